"""Answers of document models: the published forms, in texts of our own, and texts that are none."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.checkpoints.profiles import Parser
from nanovllm.pipeline.documents.answers.reading import ReadAnswer, read_answer

PARSERS: tuple[Parser, ...] = get_args(Parser)

BLOCKS = """<div data-bbox="100 40 900 60" data-label="Page-Header">Invoice 12</div>
<div data-bbox="100 80 500 110" data-label="Section-Header"><h2>What we <i>sold</i></h2></div>
<div data-bbox="100 120 900 300" data-label="Text"><p>Two &amp; three<br>lines, <math>x^2</math>.</p><p>More.</p></div>
<div data-bbox="100 310 900 360" data-label="List-Group"><ul><li><p>one</p></li><li>two</li></ul>
<ol><li>a</li><li>b</li></ol></div>
<div data-bbox="1 2 3 4" data-label="Equation-Block"><math display="block">E=mc^2</math></div>
<div data-bbox="100 400 900 600" data-label="Table">
<table border="1"><tr><td colspan="2">&lt;1&gt;</td></tr></table></div>
<div data-bbox="1 2 3 4" data-label="Form"><input type="checkbox" checked/>paid</div>
<div data-bbox="1 2 3 4" data-label="Figure"><img alt="a &quot;chart&quot;"/></div>"""
BLOCKS_READ = """Invoice 12

## What we *sold*

Two & three\x20\x20
lines, $x^2$.

More.

- one

- two

1. a

2. b

$$E=mc^2$$

<table border="1"><tr><td colspan="2">&lt;1&gt;</td></tr></table>

[x] paid

![a "chart"]()"""

GROUNDED = """![title](113,608,263,623) ## Terms
![text](112,640,482,698) The buyer pays
![text+](512,640,882,698) within a week.
![table](10,10,990,400) <table><tr><td>1</td></tr></table>
![image](309,90,691,516) a lorry
![page_number](491,935,505,950)"""
GROUNDED_READ = """## Terms

The buyer pays within a week.

<table><tr><td>1</td></tr></table>

![a lorry]()"""

OTSL = "<ched>Item<ched>Price<lcel><nl><fcel>Tea<fcel>1<fcel>2<nl><ucel><ecel><fcel>3 & 4<nl>"
OTSL_READ = (
    '<table><tr><th>Item</th><th colspan="2">Price</th></tr><tr><td rowspan="2">Tea</td><td>1</td><td>2</td></tr>'
    "<tr><td></td><td>3 &amp; 4</td></tr></table>"
)

DOCTAGS = (
    "<doctag><page_header><loc_1><loc_2><loc_3><loc_4>Lading</page_header>\n"
    "<section_header_level_1><loc_1><loc_2><loc_3><loc_4>Goods</section_header_level_1>\n"
    "<text><loc_1><loc_2><loc_3><loc_4>Twelve crates.</text>\n"
    "<ordered_list><list_item><loc_1><loc_2><loc_3><loc_4>tea</list_item><list_item>salt</list_item></ordered_list>\n"
    "<unordered_list><list_item>dry</list_item></unordered_list>\n"
    "<otsl><loc_1><loc_2><loc_3><loc_4><caption>Weights</caption><ched>kg<nl><fcel>7<nl></otsl>\n"
    "<picture><loc_1><loc_2><loc_3><loc_4><caption>A seal</caption></picture>"
    "<formula>a+b</formula><code><_Python_>x = 1</code><checkbox_selected>agreed</checkbox_selected></doctag>"
)
DOCTAGS_READ = """Lading

## Goods

Twelve crates.

1. tea

2. salt

- dry

Weights

<table><tr><th>kg</th></tr><tr><td>7</td></tr></table>

A seal

$$a+b$$

```
x = 1
```

- [x] agreed"""

FRONT_MATTER = """---
primary_language: en
is_rotation_valid: True
rotation_correction: 0
is_table: False
is_diagram: False
---
# Terms

--- none ---
"""


@pytest.mark.parametrize(
    ("parser", "written", "read"),
    [
        ("as_written", "# As it is\n", "# As it is\n"),
        ("html_blocks", BLOCKS, BLOCKS_READ),
        ("grounded_blocks", GROUNDED, GROUNDED_READ),
        ("otsl", OTSL, OTSL_READ),
        ("doctags", DOCTAGS, DOCTAGS_READ),
        ("front_matter", FRONT_MATTER, "# Terms\n\n--- none ---"),
    ],
)
def test_an_answer_in_the_published_form_is_markdown(parser: Parser, written: str, read: str) -> None:
    assert read_answer(parser, written) == ReadAnswer(read)


@pytest.mark.parametrize("parser", [one for one in PARSERS if one != "as_written"])
@pytest.mark.parametrize("written", ["I cannot read this page.", "<div>no label</div>", "---\nnever: closed"])
def test_an_answer_of_another_form_stays_as_it_is_and_is_marked(parser: Parser, written: str) -> None:
    assert read_answer(parser, written) == ReadAnswer(written, is_unparsed=True)


def test_an_empty_answer_is_none_of_another_form() -> None:
    assert [read_answer(parser, " \n").is_unparsed for parser in PARSERS] == [False] * len(PARSERS)


def test_an_answer_that_was_cut_keeps_what_was_written() -> None:
    assert (
        read_answer("html_blocks", '<div data-label="Text"><p>one</p><table><tr><td>2').text
        == "one\n\n<table><tr><td>2</table>"
    )
    assert read_answer("doctags", "<doctag><text>one</text><otsl><fcel>2<nl><fcel>").text == (
        "one\n\n<table><tr><td>2</td></tr><tr><td></td></tr></table>"
    )
    assert read_answer("grounded_blocks", "![text](1,2,3,4) one ![tex").text == "one ![tex"


@pytest.mark.parametrize(
    ("parser", "written", "tables"),
    [
        ("html_blocks", BLOCKS, ['<table border="1"><tr><td colspan="2">&lt;1&gt;</td></tr></table>']),
        ("grounded_blocks", GROUNDED, ["<table><tr><td>1</td></tr></table>"]),
        ("as_written", "a <table>1<table>2</table></table> b <TABLE x=1>3</TABLE> </table>",
         ["<table>1<table>2</table></table>", "<TABLE x=1>3</TABLE>"]),
    ],
)  # fmt: skip
def test_of_an_answer_its_tables_alone_are_kept(parser: Parser, written: str, tables: list[str]) -> None:
    assert read_answer(parser, written, tables_alone=True) == ReadAnswer("\n\n".join(tables))


def test_an_answer_without_a_table_is_marked_where_tables_were_asked_for() -> None:
    assert read_answer("as_written", "| a | b |", tables_alone=True) == ReadAnswer("| a | b |", is_unparsed=True)


PIECES_OF_A_FORM: dict[Parser, tuple[str, ...]] = {
    "html_blocks": (
        "<",
        "<div ",
        "<table>",
        "</table>",
        "<li><p> </p>",
        "<ol>",
        '<img alt="',
        "<math>",
        "<pre>",
        "&",
        " a",
    ),
    "grounded_blocks": ("![", "![a](", "![text](1,2,3,4)", "![text+](1,2,3,4) a", " "),
    "doctags": (
        "<",
        "<text>",
        "</text>",
        "<otsl><fcel>",
        "<otsl><fcel><nl></otsl>",
        "<list_item>",
        "<caption>",
        "<loc_",
    ),
    "otsl": ("<fcel>", "<nl>", "<ucel><nl>", "<lcel><ucel><xcel>", "<fcel>a<nl>", "<"),
    "front_matter": ("---\n", "\n", "a", "- --"),
}
PIECES = st.sampled_from(
    ["<", ">", "</", "<div", "<div>", "</div>", ' data-label="Text">', " data-label='", ' alt="', "<table>", "</table>",
     "<td", "<li>", "</li>", "<ul>", "</ul>", "<p>", "<math>", "<pre>", "</pre>", "<h1>", "<fcel>", "<lcel>", "<ucel>",
     "<xcel>", "<nl>", "<ched>", "<otsl>", "</otsl>", "<caption>", "</caption>", "<doctag>", "<text>", "</text>",
     "<list_item>", "</list_item>", "<ordered_list>", "</ordered_list>", "<loc_1>", "![text](1,2,3,4)", "![", "](",
     "---", "1.", "-", "&amp;", "&#x110000;", "$", "`", "\x00", "\ud83d", "\u00e4", " ", "\n"]
)  # fmt: skip


@given(st.lists(PIECES | st.text(max_size=5), max_size=60).map("".join), st.booleans())
def test_no_answer_makes_a_reader_fail(written: str, tables_alone: bool) -> None:
    for parser in PARSERS:
        answer = read_answer(parser, written, tables_alone=tables_alone)
        assert not answer.is_unparsed or answer.text == written
        assert len(answer.text) <= 200 + 60 * len(written)


@pytest.mark.parametrize("parser", [one for one in PARSERS if one != "as_written"])
def test_thirty_thousand_pieces_of_anything_are_read(parser: Parser) -> None:
    """What took time by the square of the length would not end."""
    first = {"otsl": "<fcel>", "grounded_blocks": "![text](1,2,3,4)", "front_matter": "---\n"}.get(parser, "")
    for piece in PIECES_OF_A_FORM[parser]:
        written = f'{first}<div data-label="Text"><doctag><text>x</text>{piece * 30_000}'
        assert len(read_answer(parser, written).text) <= 100 + 60 * len(written)
