"""Sets of object keys: globs as finite automata, whose intersection is decided exactly.

A glob is Python's, as in ``nanovllm submit``: ``*``, ``?`` and ``[…]`` stay within one level of the key, ``**`` is any
number of levels. Two sets are searched side by side, from the empty key on, over one character of every class that they
tell apart: what is found is a shortest common key, and where nothing is found there is none.
"""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import combinations, product
from typing import Any, Protocol

from nanovllm.errors import ConfigurationError

MAX_STATES = 20_000
"""Most pairs of states that a search visits: globs that need more are refused, not passed."""
_SURROGATES = (0xD800, 0xDFFF)  # not in UTF-8, which keys are
_WILD, _WILD_OR_END = re.compile(r"[*?\[]"), re.compile(r"[*?\[\]]")
_READABLE = "abcdefghijklmnopqrstuvwxyz0123456789"

State = frozenset[Any]


@dataclass(frozen=True)
class CharSet:
    """The characters within ``ranges``, both ends included, or outside them; a slash only where it is named."""

    ranges: tuple[tuple[str, str], ...]
    is_negated: bool = False

    def __contains__(self, character: str) -> bool:
        is_within = any(low <= character <= high for low, high in self.ranges)
        return is_within if not self.is_negated else not is_within and character != "/"


_ANY_IN_LEVEL = CharSet((), is_negated=True)
_ANY = CharSet((("\0", chr(sys.maxunicode)),))
_SLASH = CharSet((("/", "/"),))


@dataclass(frozen=True)
class Glob:
    """A glob as an automaton over a slash and the key: the slash makes all levels alike.

    ``moves[state]`` are what a character leads to, ``skips[state]`` what none leads to; the last state accepts.
    """

    pattern: str
    moves: tuple[tuple[tuple[CharSet, int], ...], ...] = field(compare=False)
    skips: tuple[tuple[int, ...], ...] = field(compare=False)

    @cached_property
    def literal_ends(self) -> tuple[str, str]:
        """What all of its keys begin with, and what they end with."""
        levels = self.pattern.split("/")
        first = next((at for at, level in enumerate(levels) if _WILD.search(level)), None)
        if first is None:
            return self.pattern, self.pattern
        last = max(at for at, level in enumerate(levels) if _WILD.search(level))
        # A slash beside ** is missing where that is no level at all.
        head = [] if levels[first] == "**" else [_WILD.split(levels[first])[0]]
        tail = [] if levels[last] == "**" else [_WILD_OR_END.split(levels[last])[-1]]
        return "/".join([*levels[:first], *head]), "/".join([*tail, *levels[last + 1 :]])

    @classmethod
    def of(cls, pattern: str) -> Glob:
        """The automaton of ``pattern``."""
        moves: list[list[tuple[CharSet, int]]] = [[]]
        skips: list[list[int]] = [[]]

        def add_state() -> int:
            moves.append([])
            skips.append([])
            return len(moves) - 1

        for level in pattern.split("/"):
            start = len(moves) - 1
            if level == "**":  # no level, or a slash and whatever follows
                inside, end = add_state(), add_state()
                moves[start].append((_SLASH, inside))
                moves[inside].append((_ANY, inside))
                skips[start].append(end)
                skips[inside].append(end)
                continue
            moves[start].append((_SLASH, add_state()))
            for characters in _level_tokens(level):
                at = len(moves) - 1
                if characters is None:  # a star
                    moves[at].append((_ANY_IN_LEVEL, at))
                    skips[at].append(add_state())
                else:
                    moves[at].append((characters, add_state()))
        return cls(pattern, tuple(map(tuple, moves)), tuple(map(tuple, skips)))

    def after(self, state: int, character: str) -> Iterator[int]:
        """The states that ``character`` leads to."""
        return self.closure([target for characters, target in self.moves[state] if character in characters])

    def closure(self, states: Iterable[int]) -> Iterator[int]:
        """``states``, and those that no character separates from them."""
        left = list(states)
        seen = set(left)
        while left:
            state = left.pop()
            yield state
            left += [other for other in self.skips[state] if other not in seen]
            seen.update(self.skips[state])


def _level_tokens(level: str) -> Iterator[CharSet | None]:
    """One level of a glob, as `fnmatch` reads it: sets of characters, and None for each star."""
    at = 0
    while at < len(level):
        character = level[at]
        at += 1
        if character == "*":
            yield None
        elif character == "?":
            yield _ANY_IN_LEVEL
        elif character == "[" and (end := level.find("]", at + 1 + (level[at : at + 1] == "!"))) != -1:
            yield _class(level[at:end])
            at = end + 1
        else:
            yield CharSet(((character, character),))


def _class(text: str) -> CharSet:
    is_negated = text.startswith("!")
    text = text[is_negated:]
    ranges = []
    at = 0
    while at < len(text):
        is_range = text[at + 1 : at + 2] == "-" and at + 2 < len(text)
        low, high = text[at], text[at + 2] if is_range else text[at]
        if low <= high:
            ranges.append((low, high))
        at += 3 if is_range else 1
    return CharSet(tuple(ranges), is_negated)


class KeyLanguage(Protocol):
    """A set of keys as an automaton that may go several ways with one character."""

    def starts(self) -> Iterable[Hashable]:
        """The states in which every key begins."""

    def branches(self, state: Any, character: str) -> Iterable[Hashable]:
        """The states that ``character`` leads to."""

    def is_end(self, state: Any) -> bool:
        """Whether a key may end here."""

    def char_sets(self) -> Iterator[CharSet]:
        """Every set of characters that a branch tells apart."""

    def matches(self, key: str) -> bool:
        """Whether ``key`` is in the set."""

    def parts(self) -> Iterable[KeyLanguage]:
        """Sets of one glob each, which are this one together."""

    def without_exclusions(self) -> KeyLanguage:
        """A larger set with fewer states."""

    @property
    def literal_ends(self) -> tuple[str, str]:
        """What all keys begin with, and what they end with."""


@dataclass(frozen=True)
class KeySet:
    """The keys of objects that one of ``include`` matches and none of ``exclude``.

    A key has a character, and ends with no slash: those are markers of folders. A state holds, for each glob and state
    of it, a pair; and whether the last character was a slash (as at the start, before the first).
    """

    include: tuple[Glob, ...]
    exclude: tuple[Glob, ...] = ()

    @classmethod
    def of(cls, include: Iterable[str], exclude: Iterable[str] = ()) -> KeySet:
        """The set of these patterns."""
        return cls(tuple(map(Glob.of, include)), tuple(map(Glob.of, exclude)))

    @cached_property
    def _globs(self) -> tuple[Glob, ...]:
        return self.include + self.exclude

    @cached_property
    def _steps(self) -> dict[tuple[State, str], State]:
        # Of `step` and `branches` both: their states differ, one has an included glob's and the other has none.
        return {}

    def matches(self, key: str) -> bool:
        """Whether ``key`` is one of them."""
        ends = (glob.literal_ends for glob in self.include)
        if not any(key.startswith(first) and key.endswith(last) for first, last in ends):
            return False  # at an event most routes end here
        state = self.start()
        for character in key:
            state = self.step(state, character)
            if not state:
                return False
        return self.accepts(state)

    def start(self) -> State:
        """Behind the slash that every automaton begins with."""
        begin = frozenset((number, state) for number, one in enumerate(self._globs) for state in one.closure([0]))
        return self._step(begin, "/")

    def step(self, state: State, character: str) -> State:
        """Where ``character`` leads; nothing where no glob of ``include`` can match any more."""
        known = self._steps.get((state, character))
        if known is None:
            after = self._step(state, character)
            is_alive = any(item[0] < len(self.include) for item in after if item is not None)
            known = after if is_alive else frozenset()
            if len(self._steps) >= MAX_STATES:
                self._steps.clear()
            self._steps[state, character] = known
        return known

    def _step(self, state: State, character: str) -> State:
        after: set[Any] = set()
        for number, at in (item for item in state if item is not None):
            after.update((number, reached) for reached in self._globs[number].after(at, character))
        if character == "/":
            after.add(None)
        return frozenset(after)

    def accepts(self, state: State) -> bool:
        """Whether an included glob ends here, no excluded one does, and the last character is no slash."""
        if None in state:
            return False
        ended = {number for number, at in state if at == len(self._globs[number].moves) - 1}
        return any(number < len(self.include) for number in ended) and max(ended) < len(self.include)

    def starts(self) -> Iterator[Hashable]:
        """One state of one included glob in each, beside all states of the excluded ones: these must all be known."""
        state = self.start()
        excluded = frozenset(item for item in state if item is None or item[0] >= len(self.include))
        return ((item, excluded) for item in sorted(state - excluded))

    def branches(self, state: tuple[tuple[int, int], State], character: str) -> Iterator[Any]:
        """The states that ``character`` leads to."""
        (number, at), excluded = state
        targets = list(self._globs[number].after(at, character))
        if targets:
            known = self._steps.get((excluded, character))
            if known is None:
                known = self._steps[excluded, character] = self._step(excluded, character)
            yield from (((number, target), known) for target in targets)

    def is_end(self, state: tuple[tuple[int, int], State]) -> bool:
        """As ``accepts``."""
        return self.accepts(state[1] | {state[0]})

    def parts(self) -> Iterator[KeySet]:
        """Sets of one glob each."""
        return (KeySet((glob,), self.exclude) for glob in self.include)

    def without_exclusions(self) -> KeySet:
        """The keys that a glob matches, excluded ones too."""
        return KeySet(self.include)

    @property
    def literal_ends(self) -> tuple[str, str]:
        """Those of its glob, where it has one."""
        return self.include[0].literal_ends if len(self.include) == 1 else ("", "")

    def char_sets(self) -> Iterator[CharSet]:
        """Every set of characters that a glob names."""
        return (characters for glob in self._globs for move in glob.moves for characters, _ in move)


@dataclass(frozen=True)
class WrittenKeys:
    """The keys ``prefix + key + suffix`` for every key of ``keys``.

    A state is a position in the prefix or in the suffix, or a state of ``keys``.
    """

    prefix: str
    keys: KeySet
    suffix: str

    def starts(self) -> Iterator[Hashable]:
        """Before the prefix."""
        return self._prefix(0)

    def branches(self, state: tuple[str, Any], character: str) -> Iterator[Hashable]:
        """The states that ``character`` leads to."""
        part, at = state
        if part == "key":
            for after in self.keys.branches(at, character):
                yield "key", after
                if self.keys.is_end(after):
                    yield "suffix", 0
        elif part == "prefix" and self.prefix[at] == character:
            yield from self._prefix(at + 1)
        elif part == "suffix" and self.suffix[at : at + 1] == character:
            yield "suffix", at + 1

    def _prefix(self, at: int) -> Iterator[Hashable]:
        if at < len(self.prefix):
            yield "prefix", at
        else:  # no key is empty: the suffix cannot begin here
            yield from (("key", state) for state in self.keys.starts())

    def is_end(self, state: tuple[str, Any]) -> bool:
        """Whether the suffix ends here."""
        return state == ("suffix", len(self.suffix))

    def matches(self, key: str) -> bool:
        """Whether ``key`` has a key of ``keys`` between prefix and suffix."""
        inner = key.removeprefix(self.prefix).removesuffix(self.suffix)
        return key == f"{self.prefix}{inner}{self.suffix}" and self.keys.matches(inner)

    def parts(self) -> Iterator[WrittenKeys]:
        """Those of the keys, with what stands around them."""
        return (WrittenKeys(self.prefix, keys, self.suffix) for keys in self.keys.parts())

    def without_exclusions(self) -> WrittenKeys:
        """Those of the keys that a glob matches, excluded ones too."""
        return WrittenKeys(self.prefix, self.keys.without_exclusions(), self.suffix)

    @property
    def literal_ends(self) -> tuple[str, str]:
        """Those of the keys, with what stands around them."""
        first, last = self.keys.literal_ends
        return self.prefix + first, last + self.suffix

    def char_sets(self) -> Iterator[CharSet]:
        """Every set of characters of the keys, and each character around them."""
        yield from self.keys.char_sets()
        for character in self.prefix + self.suffix:
            yield CharSet(((character, character),))


def common_key(*languages: KeyLanguage) -> str | None:
    """A shortest key that all ``languages`` have; None where there is none.

    Raises:
        ConfigurationError: the search takes more than ``MAX_STATES`` states.
    """
    found = []
    for parts in product(*(tuple(one.parts()) for one in languages)):
        key = _search(tuple(one.without_exclusions() for one in parts)) if _may_meet(parts) else None
        if key is not None and not all(one.matches(key) for one in parts):
            key = _search(parts)
        found += [] if key is None else [key]
    return min(found, key=len, default=None)


@lru_cache(MAX_STATES)
def _search(languages: tuple[KeyLanguage, ...]) -> str | None:
    alphabet = _alphabet([characters for one in languages for characters in one.char_sets()])
    leads_to = [_Branches(one, alphabet) for one in languages]
    reached: dict[tuple[Any, ...], tuple[tuple[Any, ...], str] | None] = {}
    reached.update(dict.fromkeys(product(*(one.starts() for one in languages))))
    waiting = deque(reached)
    while waiting:
        states = waiting.popleft()
        if all(one.is_end(state) for one, state in zip(languages, states, strict=True)):
            return _path(reached, states)
        branches = [known(state) for known, state in zip(leads_to, states, strict=True)]
        for character in min(branches, key=len):
            for after in product(*(one.get(character, ()) for one in branches)):
                if after not in reached:
                    reached[after] = (states, character)
                    waiting.append(after)
        if len(reached) > MAX_STATES:
            raise ConfigurationError("the globs are too many or too intricate to be compared")
    return None


class _Branches:
    """The branches of a language's states, by character, each computed once."""

    def __init__(self, language: KeyLanguage, alphabet: Sequence[str]) -> None:
        self._language, self._alphabet = language, alphabet
        self._known: dict[Any, dict[str, tuple[Any, ...]]] = {}

    def __call__(self, state: Any) -> dict[str, tuple[Any, ...]]:
        if state not in self._known:
            found = ((one, tuple(self._language.branches(state, one))) for one in self._alphabet)
            self._known[state] = {one: states for one, states in found if states}
        return self._known[state]


def _may_meet(languages: Sequence[KeyLanguage]) -> bool:
    """Whether beginnings and ends go together: most sets differ there, and need no search."""
    return all(
        (first.startswith(head) or head.startswith(first)) and (last.endswith(tail) or tail.endswith(last))
        for (first, last), (head, tail) in combinations([one.literal_ends for one in languages], 2)
    )


def _path(reached: Mapping[tuple[Any, ...], tuple[tuple[Any, ...], str] | None], end: tuple[Any, ...]) -> str:
    characters = []
    while (step := reached[end]) is not None:
        end, character = step
        characters.append(character)
    return "".join(reversed(characters))


def _alphabet(char_sets: Sequence[CharSet]) -> list[str]:
    """One character of every class that ``char_sets`` tell apart, readable where there is one; no NUL, no surrogate."""
    ranges = {pair for characters in char_sets for pair in characters.ranges} | {("/", "/")}
    starts = {1, _SURROGATES[0], _SURROGATES[1] + 1}
    starts |= {ord(low) for low, _ in ranges} | {ord(high) + 1 for _, high in ranges}
    bounds = [start for start in sorted(starts) if 1 <= start <= sys.maxunicode]
    chosen = []
    for low, high in zip(bounds, [*bounds[1:], sys.maxunicode + 1], strict=True):
        if not _SURROGATES[0] <= low <= _SURROGATES[1]:
            chosen.append(next((one for one in _READABLE if low <= ord(one) < high), chr(low)))
    readable = [character for character in _READABLE if character in chosen]
    return readable + [character for character in chosen if character not in _READABLE]
