"""Routes: read from a file, held against one another, and asked which one takes an object."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nanovllm.errors import ConfigurationError, InvalidRoutes
from nanovllm.messages.s3_uri import split_prefix_uri
from nanovllm.messages.validation import describe_error, first_errors
from nanovllm.pipeline.routing.key_sets import KeyLanguage, KeySet, WrittenKeys, common_key
from nanovllm.settings.located_yaml import LocatedYaml, Place, read_yaml, refusal_in
from nanovllm.settings.routes import Route, RoutesFile

DEFAULTS = "defaults"
_FILES = {"prompt_file": "prompt", "response_schema_file": "response_schema"}
# One replaces the other of a pair, and a schema the whole of another.
_PAIRS = {**_FILES, **{field: name for name, field in _FILES.items()}}
_REPLACED = {"response_schema"}


@dataclass(frozen=True, eq=False)
class RouteEntry:
    """A route with the line that it begins on, and its keys as a set."""

    route: Route
    place: Place
    line: int

    @cached_property
    def keys(self) -> KeySet:
        """The keys that it takes."""
        return KeySet.of(self.route.match.key, self.route.match.exclude)

    @cached_property
    def _included(self) -> KeySet:
        return KeySet.of(self.route.match.key)

    @cached_property
    def types(self) -> KeySet | None:
        """The content types that it takes, a set of the same kind; None for all."""
        return KeySet.of(self.route.match.content_type) if self.route.match.content_type else None

    def may_take(self, bucket: str, key: str) -> bool:
        """Whether it takes objects of this bucket and key, given the content type and the size that it asks for."""
        return bucket in self.route.match.bucket and self.keys.matches(key)

    def why_not(self, bucket: str, key: str, content_type: str | None, size: int | None) -> str | None:
        """Why it does not take this object; None where it does. What is not known meets no condition on it."""
        match = self.route.match
        if bucket not in match.bucket:
            return f"its bucket is {' or '.join(match.bucket)}"
        if not self.keys.matches(key):
            is_excluded = match.exclude and self._included.matches(key)
            return "exclude names its key" if is_excluded else f"its key is not {' or '.join(match.key)}"
        if self.types is not None:
            bare = (content_type or "").partition(";")[0].strip().lower()
            if not bare or not self.types.matches(bare):
                return f"its content type is {bare or 'not known'}, not {' or '.join(match.content_type)}"
        if size is None and (match.min_bytes or match.max_bytes is not None):
            return "its size is not known"
        if size is not None and not match.min_bytes <= size <= (size if match.max_bytes is None else match.max_bytes):
            largest = "" if match.max_bytes is None else f" to {match.max_bytes}"
            return f"its size is {size}, not {match.min_bytes}{largest}"
        return None


@dataclass(frozen=True)
class WrittenObjects:
    """Objects that a worker writes: those of one bucket with these keys, as far as known of one content type."""

    what: str
    bucket: str
    keys: KeyLanguage
    content_type: str | None = None


@dataclass(frozen=True)
class Routes:
    """The routes of a file. No two take the same object, and none takes what one of them writes.

    ``refusals``: what of the file does not hold (`read_routes`); routes that are malformed are none of ``entries``.
    """

    entries: tuple[RouteEntry, ...]
    page_store: str | None
    source: LocatedYaml
    refusals: tuple[str, ...] = ()

    def route_of(self, bucket: str, key: str, content_type: str | None = None, size: int | None = None) -> Route | None:
        """The route that takes this object. None is not known, and meets no condition on it (``needs_head``)."""
        found = (one for one in self.entries if one.why_not(bucket, key, content_type, size) is None)
        entry = next(found, None)
        return None if entry is None else entry.route

    def needs_head(self, bucket: str, key: str) -> bool:
        """Whether content type or size decide on this object: a HEAD request tells both, an event only the size."""
        matches = (route.match for route in self.candidates(bucket, key))
        return any(match.content_type or match.min_bytes or match.max_bytes for match in matches)

    def candidates(self, bucket: str, key: str) -> list[Route]:
        """The routes that take this object, as far as its name decides."""
        return [one.route for one in self.entries if one.may_take(bucket, key)]

    @property
    def topics(self) -> list[str]:
        """The topics that routes name for their records, each once."""
        named = (topic for one in self.entries for topic in (one.route.result_topic, one.route.review_topic))
        return list(dict.fromkeys(topic for topic in named if topic is not None))

    @property
    def buckets(self) -> list[str]:
        """The buckets whose objects some route takes."""
        return sorted({bucket for entry in self.entries for bucket in entry.route.match.bucket})

    def refusal(self, entry: RouteEntry, why: str, *place: str | int) -> str:
        """One line that names file, line and route; ``place``: names that lead from the route to what is wrong."""
        return self.source.refusal((*entry.place, *place), f"route {entry.route.name}: {why}")


def load_routes(path: Path) -> Routes:
    """The routes of a file, as `read_routes`. Raises InvalidRoutes: whatever is wrong, each with file and line."""
    routes = read_routes(path)
    if routes.refusals:
        raise InvalidRoutes(routes.refusals)
    return routes


def read_routes(path: Path) -> Routes:
    """The routes of a YAML file, with those of its ``defaults`` that a route leaves unset, and all that is wrong.

    Files that it names (``prompt_file``, ``response_schema_file``) are relative to it. Nothing else decides what the
    routes are: no variable of the environment. Malformed routes are left out, and the others held against one another.

    Raises:
        InvalidRoutes: the file cannot be read, or no route of it is well formed.
    """
    located = read_yaml(path)
    if not isinstance(located.value, dict):
        raise InvalidRoutes([located.refusal((), "holds no mapping with routes")])
    _put_defaults(located)
    unread = _read_files(located, path.parent)
    page_store, well_formed, malformed = _validated(located, unread)
    refusals = [*dict.fromkeys(refusal for found in unread.values() for refusal in found), *malformed]
    if not well_formed:
        raise InvalidRoutes(refusals)
    entries = tuple(
        RouteEntry(route, ("routes", number), located.line_of(("routes", number)))
        for number, route in well_formed.items()
    )
    routes = Routes(entries, page_store, located)
    refusals += [*_double_names(routes), *overlaps(routes), *loops(routes), *double_writes(routes)]
    return replace(routes, refusals=tuple(refusals))


def _validated(located: LocatedYaml, unread: Collection[int]) -> tuple[str | None, dict[int, Route], list[str]]:
    """The page store, the well-formed routes by number, and what is wrong with the others but ``unread``."""
    try:
        file = RoutesFile.model_validate(located.value)
    except ValidationError as error:
        places = [item["loc"] for item in error.errors(include_url=False, include_input=False, include_context=False)]
        refusals = list(_errors(located, error, unread))
        if any(place[:1] == ("routes",) and len(place) == 1 for place in places):
            return None, {}, refusals
        bad = {place[1] for place in places if len(place) > 1} | set(unread)
        good = {number: route for number, route in enumerate(located.value["routes"]) if number not in bad}
        page_store = None if ("page_store",) in places else located.value.get("page_store")
        return page_store, {number: Route.model_validate(route) for number, route in good.items()}, refusals
    return file.page_store, {n: route for n, route in enumerate(file.routes) if n not in unread}, []


def overlaps(routes: Routes) -> Iterator[str]:
    """Objects that two routes take, with one of them as an example."""
    for one, other in combinations(routes.entries, 2):
        with_both = set(one.route.match.bucket) & set(other.route.match.bucket)
        if not with_both or not _share_conditions(one, other):
            continue
        if (example := example_object(min(with_both), one.keys, other.keys)) is not None:
            taken = f"takes {example}, which route {one.route.name} (line {one.line}) takes too"
            yield routes.refusal(other, f"{taken}; make their keys, types or sizes differ", "match")


def loops(routes: Routes, result_prefix: str | None = None) -> Iterator[str]:
    """Objects that a worker writes and a route takes; ``result_prefix``: where large results go."""
    for place, written in _written(routes, result_prefix):
        for reader in routes.entries:
            if written.bucket not in reader.route.match.bucket or not _takes_type(reader, written.content_type):
                continue
            if (example := example_object(written.bucket, written.keys, reader.keys)) is not None:
                place = place or (*reader.place, "match")  # what the settings name has no line here
                loop = f"{written.what} is written to {example}, which route {reader.route.name}"
                remedy = "write elsewhere, or narrow its keys"
                yield routes.source.refusal(place, f"{loop} (line {reader.line}) takes: a loop; {remedy}")


def double_writes(routes: Routes) -> Iterator[str]:
    """Sidecars of two objects at one place."""
    written = [(place, one) for place, one in _written(routes, None) if place != ("page_store",)]
    for (_, one), (place, other) in combinations(written, 2):
        if one.bucket != other.bucket:
            continue
        if (example := example_object(one.bucket, one.keys, other.keys)) is not None:
            both = f"{one.what} and {other.what} are both written to {example}"
            yield routes.source.refusal(place, f"{both}; put {{bucket}} or another prefix into place")


def _written(routes: Routes, result_prefix: str | None) -> Iterator[tuple[Place, WrittenObjects]]:
    for entry in routes.entries:
        if (sidecar := entry.route.sidecar) is not None:
            for source in entry.route.match.bucket:
                bucket, prefix, suffix = sidecar.around_key(source)
                keys = WrittenKeys(prefix, entry.keys, suffix)
                what = f"the sidecar of route {entry.route.name}"
                what += f" for bucket {source}" if len(entry.route.match.bucket) > 1 else ""
                yield (*entry.place, "sidecar", "place"), WrittenObjects(what, bucket, keys, sidecar.content_type)
    for place, what, uri in (
        (("page_store",), "a finished page (page_store)", routes.page_store),
        ((), "a large result (s3.large_results)", result_prefix),
    ):
        if uri is not None and (parts := split_prefix_uri(uri)) is not None:
            yield place, WrittenObjects(what, parts[0], below(parts[1]))


def example_object(bucket: str, *keys: KeyLanguage) -> str | None:
    """The URI of an object whose key is in all of ``keys``; None where there is none.

    Where that takes too long to decide, words that say so stand in its place: it counts as one.
    """
    try:
        key = common_key(*keys)
    except ConfigurationError as error:
        return f"objects of s3://{bucket} that cannot be told apart ({error})"
    return None if key is None else f"s3://{bucket}/{key}"


def below(prefix: str, *, and_itself: bool = False) -> KeySet:
    """The keys below ``prefix``, as `split_prefix_uri` gives it; ``and_itself``: and that key."""
    escaped = "".join(f"[{one}]" if one in "*?[" else one for one in prefix)
    return KeySet.of(["/".join([*([escaped] if prefix else []), "**" if and_itself else "**/*"])])


def _share_conditions(one: RouteEntry, other: RouteEntry) -> bool:
    """Whether some content type and some size meet the conditions of both."""
    if one.types is not None and other.types is not None and common_key(one.types, other.types) is None:
        return False
    matches = (one.route.match, other.route.match)
    least = max(match.min_bytes for match in matches)
    return all(match.max_bytes is None or match.max_bytes >= least for match in matches)


def _takes_type(entry: RouteEntry, content_type: str | None) -> bool:
    return entry.types is None or content_type is None or entry.types.matches(content_type)


def _double_names(routes: Routes) -> Iterator[str]:
    first: dict[str, int] = {}
    for entry in routes.entries:
        line = first.setdefault(entry.route.name, entry.line)
        if line != entry.line:
            yield routes.refusal(entry, f"the name is that of the route in line {line}", "name")


def _errors(located: LocatedYaml, error: ValidationError, unread: Collection[int]) -> Iterable[str]:
    """What pydantic found, a line each; a mistake in the defaults once, and none in routes that are ``unread``."""
    found: dict[str, None] = {}
    for item in first_errors(error)[0]:
        place = item["loc"]
        if place[:1] == ("routes",) and len(place) > 1 and place[1] in unread:
            continue
        name = _route_name(located, place)
        inner = place[2:] if name else place
        line = located.line_of(place)
        what = describe_error({**item, "loc": inner}, "the route" if name else "the file")
        is_default = name and line == located.line_of((DEFAULTS, *inner)) and (DEFAULTS, *inner[:1]) in located.lines
        who = "" if not name else "defaults: " if is_default else f"route {name}: "
        found.setdefault(refusal_in(located.path, line, f"{who}{what}"), None)
    return list(found)


def _route_name(located: LocatedYaml, place: Place) -> str:
    if len(place) < 2 or place[0] != "routes":
        return ""
    route = located.value["routes"][place[1]]
    return str(route.get("name", place[1])) if isinstance(route, dict) else str(place[1])


def _put_defaults(located: LocatedYaml) -> None:
    """Give every route what it leaves unset, with the lines of the defaults."""
    defaults, routes = located.value.pop(DEFAULTS, None), located.value.get("routes")
    if defaults is None or not isinstance(routes, list):
        return
    if not isinstance(defaults, dict) or "name" in defaults:
        raise InvalidRoutes([located.refusal((DEFAULTS, "name"), "defaults are fields of a route other than its name")])
    for number, route in enumerate(routes):
        if isinstance(route, dict):
            _merge(located, defaults, route, (DEFAULTS,), ("routes", number))


def _merge(located: LocatedYaml, below: dict[str, Any], above: dict[str, Any], source: Place, target: Place) -> None:
    is_route = source == (DEFAULTS,)
    own = set(above)
    for name, value in below.items():
        if name in own:
            if isinstance(value, dict) and isinstance(above[name], dict) and not (is_route and name in _REPLACED):
                _merge(located, value, above[name], (*source, name), (*target, name))
        elif not (is_route and _PAIRS.get(name) in own):
            above[name] = _copied(value)
            for place, line in list(located.lines.items()):
                if place[: len(source) + 1] == (*source, name):
                    located.lines[*target, name, *place[len(source) + 1 :]] = line


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _read_files(located: LocatedYaml, directory: Path) -> dict[int, list[str]]:
    """Put the files that routes name in the place of their names; returns refusals, by number of the route."""
    routes = located.value.get("routes")
    found: defaultdict[int, list[str]] = defaultdict(list)
    for number, route in enumerate(routes if isinstance(routes, list) else ()):
        for name, field in _FILES.items():
            if not isinstance(route, dict) or name not in route:
                continue
            place = ("routes", number, name)
            path = route.pop(name)
            located.lines["routes", number, field] = located.line_of(place)
            refusals = found[number]
            if field in route:
                refusals.append(located.refusal(place, f"{name} and {field} exclude each other"))
            elif not isinstance(path, str):
                refusals.append(located.refusal(place, f"{name} is no path"))
            else:
                try:
                    text = (directory / path).read_text(encoding="utf-8")
                    # A file ends with a line end; the prompt does not.
                    route[field] = text.removesuffix("\n") if field == "prompt" else json.loads(text)
                except json.JSONDecodeError as error:
                    why = f"{path} is no valid JSON in line {error.lineno}: {error.msg}"
                    refusals.append(located.refusal(place, why))
                except (OSError, UnicodeDecodeError, RecursionError) as error:
                    why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
                    refusals.append(located.refusal(place, f"{path} cannot be read: {why}"))
    return {number: refusals for number, refusals in found.items() if refusals}
