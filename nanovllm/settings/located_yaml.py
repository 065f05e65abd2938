"""YAML with the line of every value, so that a refusal can name it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nanovllm.errors import InvalidRoutes
from nanovllm.messages.validation import printable

Place = tuple[str | int, ...]
"""Names and numbers that lead to a value."""

MAX_DEPTH = 64
MAX_VALUES = 200_000

_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|false|True|False|TRUE|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    "float": (r"[-+]?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?", list("-+0123456789")),
}


class _Loader(yaml.SafeLoader):
    """JSON's values in YAML's form: of YAML 1.1 neither dates, nor 1:30 for 90, nor `no` for false."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own form)


for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


@dataclass
class LocatedYaml:
    """The value of a YAML file, and the line on which each part of it begins."""

    path: str
    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict)

    def line_of(self, place: Place) -> int:
        """The line of ``place``, or of what is around it where there is no such place."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)

    def refusal(self, place: Place, why: str) -> str:
        """One line that names file and line."""
        return refusal_in(self.path, self.line_of(place), why)


def refusal_in(path: str, line: int, why: str) -> str:
    """``why``, behind the file and the line."""
    return f"{path}:{line}: {' '.join(why.split())}"


def read_yaml(path: Path) -> LocatedYaml:
    """The file's one document. Keys are text as they stand there, and none comes twice.

    Raises:
        InvalidRoutes: it cannot be read, or is no YAML of this kind.
    """
    located = LocatedYaml(str(path))
    loader: _Loader | None = None
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is not None:
            located.value = _Reader(loader, located).value_of(node, (), node)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidRoutes([refusal_in(str(path), 1, f"cannot be read: {why}")]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        why = getattr(error, "problem", None) or str(error)
        raise InvalidRoutes([refusal_in(str(path), mark.line + 1 if mark else 1, f"is no valid YAML: {why}")]) from None
    finally:
        if loader is not None:
            loader.dispose()
    return located


class _Reader:
    """Values of nodes; what an alias repeats counts each time."""

    def __init__(self, loader: _Loader, located: LocatedYaml) -> None:
        self._loader, self._located = loader, located

    def value_of(self, node: yaml.Node, place: Place, name: yaml.Node) -> Any:
        """The value of ``node``, whose line is that of its ``name``."""
        lines = self._located.lines
        lines[place] = name.start_mark.line + 1
        if len(place) > MAX_DEPTH or len(lines) > MAX_VALUES:
            raise self._refused(name, f"more than {MAX_DEPTH} levels or {MAX_VALUES} values")
        if isinstance(node, yaml.SequenceNode):
            return [self.value_of(item, (*place, number), item) for number, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return self._scalar(node)
        values: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._refused(key, "a name is no text")
            if key.value in values:
                raise self._refused(key, f"{printable(key.value)} is there twice")
            values[key.value] = self.value_of(item, (*place, key.value), key)
        return values

    def _scalar(self, node: yaml.Node) -> Any:
        if node.tag.rpartition(":")[2] not in {*_SCALARS, "str"}:
            raise self._refused(node, f"the tag {printable(node.tag)} is not known here")
        return self._loader.construct_object(node)

    def _refused(self, node: yaml.Node, why: str) -> InvalidRoutes:
        return InvalidRoutes([refusal_in(self._located.path, node.start_mark.line + 1, why)])
