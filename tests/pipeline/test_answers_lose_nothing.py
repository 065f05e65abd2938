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
    "front_matter": ("---\n", "\n", "is_table: True\n", "\r\n", "primary_language:", "is_table: "),
}
FIRST: Mapping[Parser, str] = {"otsl": "<fcel>", "front_matter": "---\n"}


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
