"""Sets of keys: globs as `nanovllm submit` reads them, and intersections that are decided, not sampled."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from nanovllm.errors import ConfigurationError
from nanovllm.objects.listing import ObjectPattern
from nanovllm.pipeline.routing import key_sets
from nanovllm.pipeline.routing.key_sets import KeySet, WrittenKeys, common_key

ALPHABET = "ab/."
SHORT_KEYS = ["".join(key) for length in range(1, 6) for key in product(ALPHABET, repeat=length)]
LEVELS = st.sampled_from(["**", "*", "a", "b*", "*.a", "?", "[ab]", "[!a]*", "[a-b]b", "a*b", "[", "[]a]", "[b-a]", ""])
PATTERNS = st.lists(LEVELS, min_size=1, max_size=4).map("/".join).filter(lambda glob: not glob.endswith("/"))


@pytest.mark.parametrize(
    ("glob", "taken", "left"),
    [
        ("in/*.pdf", ["in/a.pdf", "in/.pdf"], ["in/a/b.pdf", "in/a.PDF", "a.pdf", "in/a.pdf/"]),
        ("in/**/*.pdf", ["in/a.pdf", "in/x/y/a.pdf"], ["in.pdf", "in/a.png"]),
        ("in/**", ["in", "in/a", "in/a/b"], ["in/", "inn", "in/a/"]),
        ("**/[0-9][!a-c]?", ["1d€", "x/0-\N{GRINNING FACE}"], ["1b0", "1d/", "11"]),
        ("a+b %2F[*].pdf", ["a+b %2F*.pdf"], ["a+b %2F1.pdf"]),
    ],
)
def test_a_glob_takes_what_is_below_its_levels_and_nothing_else(glob: str, taken: list[str], left: list[str]) -> None:
    keys = KeySet.of([glob])
    assert [key for key in taken if not keys.matches(key)] == []
    assert [key for key in left if keys.matches(key)] == []


@given(PATTERNS)
@examples(100)
def test_a_glob_means_what_it_means_to_submit(glob: str) -> None:
    keys, pattern = KeySet.of([glob]), ObjectPattern("bucket", glob)
    # There an object may be called by the pattern's own characters, and a prefix names all below it.
    if not pattern.is_prefix:
        for key in SHORT_KEYS:
            assert key == glob or keys.matches(key) == pattern.matches(key), key


@given(st.lists(PATTERNS, min_size=1, max_size=2), st.lists(PATTERNS, max_size=1), PATTERNS)
@examples(100)
def test_a_common_key_is_found_exactly_where_there_is_one(include: list[str], exclude: list[str], other: str) -> None:
    one, second = KeySet.of(include, exclude), KeySet.of([other])
    key = common_key(one, second)
    shared = [short for short in SHORT_KEYS if one.matches(short) and second.matches(short)]
    if key is None:
        assert shared == []
    else:
        assert one.matches(key)
        assert second.matches(key)
        assert not shared or len(key) == len(shared[0]), "a shortest one is found"


@pytest.mark.parametrize(
    ("one", "other", "is_shared"),
    [
        ("*a*b*", "*b*a*", True),  # samples of either are not in the other
        ("[!a]x", "[!b]x", True),
        ("[a-m]*", "[n-z]*", False),
        ("**/a/**/z", "x/**/b", False),
        ("**/*.pdf", "2026/**/scan-????.*", True),
        ("*.pdf", "*.json", False),
        ("?" * 40, "*" + "?" * 41, False),
    ],
)
def test_intersections_that_no_sample_would_show(one: str, other: str, is_shared: bool) -> None:
    assert (common_key(KeySet.of([one]), KeySet.of([other])) is not None) == is_shared


def test_an_exclusion_empties_an_intersection() -> None:
    pdf = KeySet.of(["in/**/*.pdf"], ["**/drafts/**"])
    assert common_key(pdf, KeySet.of(["in/drafts/**"])) is None
    assert common_key(pdf, KeySet.of(["in/**"], ["**/*.pdf"])) is None
    assert common_key(pdf, KeySet.of(["in/draft*/**"])) == "in/draft.pdf"


@given(st.text("ab/", max_size=2), PATTERNS, st.sampled_from([".a", "a", "/b"]))
@examples(60)
def test_written_keys_are_the_keys_with_what_stands_around_them(prefix: str, glob: str, suffix: str) -> None:
    keys = KeySet.of([glob])
    written = WrittenKeys(prefix, keys, suffix)
    expected = {f"{prefix}{key}{suffix}" for key in SHORT_KEYS if keys.matches(key)}
    for key in SHORT_KEYS:
        states = set(written.starts())
        for character in key:
            states = {after for state in states for after in written.branches(state, character)}
        assert any(map(written.is_end, states)) == (key in expected), key


def test_globs_that_take_too_long_to_compare_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_sets, "MAX_STATES", 100)
    wide = ["*a" + "?" * number for number in range(9)]
    with pytest.raises(ConfigurationError, match="intricate"):
        common_key(KeySet.of(wide), KeySet.of(["*b*c*d*e" + "[!f]" * 30]))
