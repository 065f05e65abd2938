"""Answers of document models that are not quite of the form: every word stays, and no printed text becomes markup."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.checkpoints.profiles import Parser
from nanovllm.pipeline.documents.answers.reading import ReadAnswer, read_answer

WORD = re.compile(r"word\d+x")
FRONT = "---\nprimary_language: en\n---\n"
MARKUP: Mapping[Parser, tuple[str, ...]] = {
    "otsl": ("<fcel>", "<ecel>", "<lcel>", "<ucel>", "<xcel>", "<ched>", "<nl>", "<", "&amp;", "<name>"),
    "doctags": (
        *("<text>", "</text>", "<otsl>", "</otsl>", "<fcel>", "<lcel>", "<ucel>", "<nl>", "<caption>", "</caption>"),
        *("<ordered_list>", "<unordered_list>", "</unordered_list>", "<list_item>", "</list_item>", "<title>", "<"),
        *("<code>", "</code>", "<picture>", "</picture>", "<chart>", "</chart>", "<loc_1>", "<_Go_>", "<name>"),
        *("<formula>", "</formula>", "<doctag>", "</doctag>", "<page_break>", "<key_1>", "</key_1>"),
    ),
    "html_blocks": (
        *('<div data-label="A">', "<div>", "</div>", "<p>", "</p>", "<table>", "</table>", "<tr>", "</tr>", "<td>"),
        *("</td>", "<ul>", '<ol start="7">', "</ul>", "<li>", "</li>", "<b>", "</b>", "<math>", "</math>", "<pre>"),
        *("</pre>", "<br/>", "<h2>", "</h2>", "<img alt='", '<input value="', '"/>', "'>", "<custom x>", "<a b", "<"),
        *("&lt;", "&amp", "<!-- ", " -->", "<dt>", "<option selected>", "<p x=", "<td and", ">", "<label>", "```\n"),
    ),
    "front_matter": ("---\n", "\n", "is_table: True\n", "\r\n", "primary_language:", "is_table: "),
}
FIRST: Mapping[Parser, str] = {
    "otsl": "<fcel>",
    "doctags": "<text>a</text>",
    "html_blocks": '<div data-label="A">',
    "front_matter": "---\n",
}


@pytest.mark.parametrize("parser", MARKUP)
@given(data=st.data())
def test_every_word_is_in_the_text_or_the_page_is_unparsed(parser: Parser, data: st.DataObject) -> None:
    pieces = data.draw(st.lists(st.sampled_from([*MARKUP[parser], "word"]), max_size=24))
    written = FIRST[parser] + "".join(
        f" {piece}{number}x " if piece == "word" else piece for number, piece in enumerate(pieces)
    )
    answer = read_answer(parser, written)
    if not answer.is_unparsed:
        assert sorted(WORD.findall(answer.text)) == sorted(WORD.findall(written))


@pytest.mark.parametrize(
    ("written", "rows"),
    [
        ("<fcel>a<lcel>b<nl><ucel>c<xcel>d<nl>", "<tr><td>a</td><td>b</td></tr><tr><td>c</td><td>d</td></tr>"),
        ("<fcel>a<lcel><nl><ucel><xcel><nl>", '<tr><td colspan="2" rowspan="2">a</td></tr><tr></tr>'),
        ("<fcel>a<lcel><nl><ucel><fcel>x<nl>", '<tr><td colspan="2">a</td></tr><tr><td></td><td>x</td></tr>'),
        ("<fcel>a &amp; b<fcel>R&D &lt;1&gt;<nl>", "<tr><td>a &amp; b</td><td>R&amp;D &lt;1&gt;</td></tr>"),
        ("<fcel>a<fcel>b<nl>c<fcel>d<nl>", "<tr><td>a</td><td>b</td></tr><tr><td>c</td><td>d</td></tr>"),
    ],
)
def test_every_cell_with_a_text_has_a_place_of_its_own(written: str, rows: str) -> None:
    assert read_answer("otsl", written) == ReadAnswer(f"<table>{rows}</table>")


@pytest.mark.parametrize(("rest", "shown"), [("<", "&lt;"), ("note", "note"), ("<|im_end|>", "<|im_end|>")])
def test_what_stands_around_a_table_is_text_before_and_behind_it(rest: str, shown: str) -> None:
    table = "<table><tr><td>a</td></tr></table>"
    assert read_answer("otsl", f"Table 1\n<fcel>a<nl>{rest}").text == f"Table 1\n\n{table}\n\n{shown}"


@pytest.mark.parametrize(
    "written",
    ["---\nTotal EUR 500, do not copy\n---\nrest", "---\nwhole page\n---", "---\nis_table: True\nTotal\n---\nrest",
     "---\nprimary_language: en, and more\n---\nrest", "---\n---\nrest"],
)  # fmt: skip
def test_rules_around_text_are_no_front_matter(written: str) -> None:
    assert read_answer("front_matter", written) == ReadAnswer(written, is_unparsed=True)


@pytest.mark.parametrize(
    "front", [FRONT, FRONT.replace("\n", "\r\n"), f"\ufeff{FRONT}", "---\nis_table: 'no'\n\n---\n"]
)
def test_front_matter_of_the_published_keys_is_left_out(front: str) -> None:
    assert read_answer("front_matter", f"{front}rest\n---\nmore") == ReadAnswer("rest\n---\nmore")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("<text>Dear <name>, 1<2, see </head></text>", "Dear &lt;name>, 1<2, see &lt;/head>"),
        ("<formula>x<y</formula>", "$$x< y$$"),
        ("<code><_C++_><a>```</a></code>", "````\n<a>```</a>\n````"),
        ("<text>one<otsl><fcel>1<nl></otsl>two", "one\n\n<table><tr><td>1</td></tr></table>\n\ntwo"),
        ("<text>one</text><fcel>1<nl>", "one\n\n<table><tr><td>1</td></tr></table>"),
        ("<chart><loc_1><bar_chart><fcel>1<nl></chart>", "<table><tr><td>1</td></tr></table>"),
        ("<otsl><fcel>1<nl><caption>c</caption></otsl>", "c\n\n<table><tr><td>1</td></tr></table>"),
        ("<picture><logo><caption>c</caption></picture>", "c"),
        ("<unordered_list><list_item>a<ordered_list><list_item>b</list_item></ordered_list>c</list_item><list_item>d"
         "</list_item></unordered_list>", "- a\n\n  1. b\n\n  c\n\n- d"),
        ("<ordered_list><list_item>a</list_item><unordered_list><list_item>b</list_item></unordered_list><list_item>c"
         "</list_item></ordered_list>e", "1. a\n\n   - b\n\n2. c\n\ne"),
    ],
)  # fmt: skip
def test_doctags_that_nest_end_early_or_are_of_other_names_keep_their_texts(written: str, read: str) -> None:
    assert read_answer("doctags", written) == ReadAnswer(read)


def test_doctags_with_a_table_that_cannot_be_read_are_unparsed() -> None:
    written = "<text>a</text><otsl>" + "<fcel>1<nl>" * 9 + "<fcel>" * 90 + "<nl></otsl>"
    assert read_answer("doctags", written) == ReadAnswer(written, is_unparsed=True)


def block(content: str) -> str:
    return f'<div data-label="Text" data-bbox="1 2 3 4">{content}</div>'


ROW = "<tr><td>1</td><td>2</td></tr>"


@pytest.mark.parametrize(
    ("content", "read"),
    [
        ('Name: <input type="text" value="John &lt;b>"/>, <input placeholder=age>', "Name: John &lt;b>, age"),
        ("<input type=radio checked>yes <input type='checkbox'>no", "[x] yes [ ] no"),
        (r"<math>x<y \text{ and } y>z</math>, <math>a<b and b>c</math>", r"$x< y \text{ and } y>z$, $a< b and b>c$"),
        ("a<b and b>c, Dear <name>", "a&lt;b and b>c, Dear &lt;name>"),
        ('<img alt="sales > 5 m"/>, <img alt=a />', "![sales > 5 m](), ![a]()"),
        ("<dl><dt>1<dd>2</dl><select><option>3<option selected>4</select>", "1\n\n2\n\n[ ] 3\n\n[x] 4"),
        ("<label>1</label><label>2</label><button>3</button>", "1 2 3"),
        ("<ul><li>a<ul><li>b</li></ul></li><li>c</ul>d", "- a\n\n  - b\n\n- c\n\nd"),
        ('<ol start="5"><li>a</li><li>b<p>c<br>d</p></li></ol>', "5. a\n\n6. b\n\n   c  \n   d"),
        ("<ul><li></li></ul><p>-</p><p>12.</p>e", "-\n\n-\n\n12.\n\ne"),
        ("<pre><code>a\n  ```&lt;b&gt;</code></pre>c", "````\na\n  ```<b>\n````\n\nc"),
        ("<li><pre>&lt;b&gt;</pre>", "- ```\n  <b>\n  ```"),
        (f"{ROW}{ROW}", f"<table>{ROW}{ROW}</table>"),
        (f"<tbody>{ROW}</tbody><p>a</p>", f"<table><tbody>{ROW}</tbody></table>\n\na"),
        (f"{ROW}</table>a", f"<table>{ROW}</table>\n\na"),
        (f"<table>{ROW}<p>a</p>", f"<table>{ROW}</table>\n\na"),
        ("<table><tr><td>1<table><tr><td>2", "<table><tr><td>1<table><tr><td>2</table></table>"),
        ("a<br/>b<hr/>c", "a  \nb\n\nc"),
    ],
)  # fmt: skip
def test_html_that_is_not_quite_of_the_form_keeps_its_texts(content: str, read: str) -> None:
    assert read_answer("html_blocks", block(content)) == ReadAnswer(read)


def test_a_table_that_is_not_closed_ends_with_its_block() -> None:
    written = block(f"<table>{ROW}") + block(f"<p>a</p><table>{ROW}</table>")
    table = f"<table>{ROW}</table>"
    assert read_answer("html_blocks", written) == ReadAnswer(f"{table}\n\na\n\n{table}")
    assert read_answer("html_blocks", written, tables_alone=True) == ReadAnswer(f"{table}\n\n{table}")


@pytest.mark.parametrize("label", ["data-label=Text", "DATA-LABEL='Text'", 'class="a" data-label = "Text"'])
def test_a_label_may_be_written_as_html_allows(label: str) -> None:
    assert read_answer("html_blocks", f"<DIV {label}>a</DIV>") == ReadAnswer("a")


@pytest.mark.parametrize(
    "printed",
    ["&lt;script&gt;a&lt;/script&gt;", "&lt;<span>img src=x onerror=a&gt;</span>", "&amp;lt;b&amp;gt;",
     "<script>a</script>", "<math>a&lt;img src=x onerror=a&gt;</math>", "<img alt='&lt;script&gt;'/>", "&lt;table&gt;",
     "<table a", '<input value="&lt;script&gt;"/>', "<!-- a -->", "&#60;svg/onload=a&#62;", "<math>&lt;</math>b"],
)  # fmt: skip
def test_printed_markup_opens_no_tag_and_is_no_table(printed: str) -> None:
    shown = read_answer("html_blocks", block(printed)).text
    assert not re.search(r"<[A-Za-z/!?]|&lt;b&gt;", shown)
    assert read_answer("html_blocks", block(printed), tables_alone=True).is_unparsed


@pytest.mark.parametrize(
    ("parser", "written", "read"),
    [
        ("html_blocks", block("a"), "a"),
        ("otsl", "<fcel>a<nl>", "<table><tr><td>a</td></tr></table>"),
        ("doctags", "<text>a</text>", "a"),
        ("front_matter", f"{FRONT}a", "a"),
    ],
)
def test_a_fence_around_an_answer_is_no_part_of_it(parser: Parser, written: str, read: str) -> None:
    for fenced in (f"```html\n{written}\n```", f"```\n{written}\n```\n", f"```html\n{written}"):
        assert read_answer(parser, fenced) == ReadAnswer(read)


def test_a_fence_around_a_part_of_an_answer_stays() -> None:
    written = f"```yaml\n{FRONT}```\na"
    assert read_answer("front_matter", written) == ReadAnswer(written, is_unparsed=True)
