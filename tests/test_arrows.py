"""Arrows that import-linter does not draw: no import circle among all modules, those for types alone among them."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """The modules of ours that ``path`` imports at module level, under ``TYPE_CHECKING`` too."""
    found: set[str] = set()
    pending: list[ast.stmt] = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If):
            pending += [*node.body, *node.orelse]
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (full & modules) or {node.module}
    return found & modules


def graph() -> dict[str, set[str]]:
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "nanovllm").rglob("*.py")
    }
    return {name: imports_of(path, set(paths)) - {name} for name, path in paths.items()}


def circles(edges: dict[str, set[str]]) -> list[str]:
    """What is left when modules that import nothing that is left are taken away, again and again, from both ends."""
    left = {name: set(targets) for name, targets in edges.items()}
    while True:
        imported = set().union(*left.values()) if left else set()
        ends = {name for name, targets in left.items() if not targets or name not in imported}
        if not ends:
            return sorted(f"{name} → {', '.join(sorted(targets))}" for name, targets in left.items())
        left = {name: targets - ends for name, targets in left.items() if name not in ends}


def test_no_import_goes_in_a_circle() -> None:
    assert circles(graph()) == []


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b → c", "c → b"]
