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
    "front_matter": ("---\n", "\n", "is_table: True\n", "\r\n", "primary_language:", "is_table: "),
}
FIRST: Mapping[Parser, str] = {"otsl": "<fcel>", "doctags": "<text>a</text>", "front_matter": "---\n"}


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


@pytest.mark.parametrize("rest", ["<", "note", "<|im_end|>"])
def test_what_stands_around_a_table_is_text_before_and_behind_it(rest: str) -> None:
    table = "<table><tr><td>a</td></tr></table>"
    assert read_answer("otsl", f"Table 1\n<fcel>a<nl>{rest}").text == f"Table 1\n\n{table}\n\n{rest}"


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
