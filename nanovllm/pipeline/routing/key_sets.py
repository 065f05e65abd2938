"""Sets of object keys: globs as finite automata, whose intersection is decided exactly.

A glob is Python's, as in ``nanovllm submit``: ``*``, ``?`` and ``[…]`` stay within one level of the key, ``**`` is any
number of levels. Two sets are searched side by side, from the empty key on, over one character of every class that they
tell apart: what is found is a shortest common key, and where nothing is found there is none.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from nanovllm.errors import ConfigurationError

MAX_STATES = 20_000
"""Most pairs of states that a search visits: globs that need more are refused, not passed."""
_SURROGATES = (0xD800, 0xDFFF)  # not in UTF-8, which keys are
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

    moves: tuple[tuple[tuple[CharSet, int], ...], ...]
    skips: tuple[tuple[int, ...], ...]

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
        return cls(tuple(map(tuple, moves)), tuple(map(tuple, skips)))

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
    """A set of keys as an automaton; a state without elements accepts nothing any more."""

    def start(self) -> State:
        """Where every key begins."""

    def step(self, state: State, character: str) -> State:
        """Where ``character`` leads."""

    def accepts(self, state: State) -> bool:
        """Whether a key may end here."""

    def char_sets(self) -> Iterator[CharSet]:
        """Every set of characters that a step tells apart."""


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
        return {}

    def matches(self, key: str) -> bool:
        """Whether ``key`` is one of them."""
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
            glob = self._globs[number]
            targets = [target for characters, target in glob.moves[at] if character in characters]
            after.update((number, reached) for reached in glob.closure(targets))
        if character == "/":
            after.add(None)
        return frozenset(after)

    def accepts(self, state: State) -> bool:
        """Whether an included glob ends here, no excluded one does, and the last character is no slash."""
        if None in state:
            return False
        ended = {number for number, at in state if at == len(self._globs[number].moves) - 1}
        return any(number < len(self.include) for number in ended) and max(ended) < len(self.include)

    def char_sets(self) -> Iterator[CharSet]:
        """Every set of characters that a glob names."""
        return (characters for glob in self._globs for move in glob.moves for characters, _ in move)


@dataclass(frozen=True)
class WrittenKeys:
    """The keys ``prefix + key + suffix`` for every key of ``keys``.

    A state holds positions in the prefix, states of ``keys``, and positions in the suffix, side by side.
    """

    prefix: str
    keys: KeySet
    suffix: str

    def start(self) -> State:
        """Before the prefix."""
        return self._entered({("prefix", 0)})

    def step(self, state: State, character: str) -> State:
        """Where ``character`` leads."""
        after: set[Any] = set()
        for part, at in state:
            if part == "key":
                if stepped := self.keys.step(at, character):
                    after.add(("key", stepped))
                continue
            text = self.prefix if part == "prefix" else self.suffix
            if text[at : at + 1] == character:
                after.add((part, at + 1))
        return self._entered(after)

    def _entered(self, state: set[Any]) -> State:
        """``state``, with the key behind a whole prefix and the suffix behind a whole key."""
        if ("prefix", len(self.prefix)) in state:
            state.add(("key", self.keys.start()))
        if any(part == "key" and self.keys.accepts(at) for part, at in state):
            state.add(("suffix", 0))
        return frozenset(state)

    def accepts(self, state: State) -> bool:
        """Whether the suffix ends here."""
        return ("suffix", len(self.suffix)) in state

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
    alphabet = _alphabet([characters for one in languages for characters in one.char_sets()])
    first = tuple(one.start() for one in languages)
    reached: dict[tuple[State, ...], tuple[tuple[State, ...], str] | None] = {first: None}
    waiting = deque([first])
    while waiting:
        states = waiting.popleft()
        if all(one.accepts(state) for one, state in zip(languages, states, strict=True)):
            return _path(reached, states)
        for character in alphabet:
            after = tuple(one.step(state, character) for one, state in zip(languages, states, strict=True))
            if all(after) and after not in reached:
                reached[after] = (states, character)
                waiting.append(after)
        if len(reached) > MAX_STATES:
            raise ConfigurationError("the globs are too many or too intricate to be compared")
    return None


def _path(reached: dict[tuple[State, ...], tuple[tuple[State, ...], str] | None], end: tuple[State, ...]) -> str:
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
