"""The pages beside the tree: links, paths, the file map of ARCHITECTURE.md and the file lists of docs/extending.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nanovllm"
PAGES = [
    ROOT / name
    for name in (
        *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"),
        *("benchmarks/README.md", "examples/README.md", "helm/nanovllm/README.md"),
    )
] + sorted((ROOT / "docs").glob("*.md"))
# Of a path in code marks the pages leave out what the reader knows: the package, or the engine on a page about it.
BASES = (ROOT, PACKAGE, PACKAGE / "engine", PACKAGE / "vision")


def shown(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_fences(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def section(page: Path, heading: str) -> str:
    """The text below ``## heading``, up to the next heading of that level."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{shown(page)} has no section {heading!r}"
    return found[1]


def file_map() -> set[str]:
    """Paths from the root: a heading of the map names a folder, the lines below it the files in it."""
    named = set()
    for folder, lines in re.findall(
        r"^### `([^`]+/)`\n(.*?)(?=^### |\Z)", section(ROOT / "ARCHITECTURE.md", "File map"), re.MULTILINE | re.DOTALL
    ):
        named |= {folder + name for name in re.findall(r"^- `([^`]+)`: \S", lines, re.MULTILINE)}
    return named


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_relative_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_fences(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            missing.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(file):
            missing.append(f"{target}: no such heading")
    assert not missing, f"links of {shown(page)} that lead nowhere: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_paths_in_code_marks_exist(page: Path) -> None:
    marked = re.findall(r"`([^`\s]+)`", without_fences(page.read_text(encoding="utf-8")))
    paths = {one for one in marked if re.fullmatch(r"[\w.\-]+(/[\w.\-]+)+\.(py|cpp|h|md|sh|json|toml)", one)}
    missing = sorted(path for path in paths if not any((base / path).exists() for base in (page.parent, *BASES)))
    assert not missing, f"{shown(page)} names files that do not exist: {missing}"


def test_every_module_is_named_in_the_file_map() -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    missing = sorted(modules - file_map())
    assert not missing, f"modules without a line in the file map of ARCHITECTURE.md: {missing}"


def test_the_file_map_names_only_files_that_exist() -> None:
    missing = sorted(path for path in file_map() if not (ROOT / path).is_file())
    assert not missing, f"lines of the file map of ARCHITECTURE.md for files that do not exist: {missing}"


EXTENSIONS = (
    "A model family",
    "An engine backend",
    "An attention backend",
    "A sink",
    "A setting",
    "A stage",
)


@pytest.mark.parametrize("heading", EXTENSIONS)
def test_the_files_that_an_extension_touches_exist(heading: str) -> None:
    lines = re.findall(r"^- (`.+?): \S", section(ROOT / "docs" / "extending.md", heading), re.MULTILINE)
    files = [path for line in lines for path in re.findall(r"`([^`]+)`", line)]
    missing = [path for path in files if not (ROOT / path).is_file()]
    assert len(files) > 3, f"docs/extending.md, {heading!r}: no list of files"
    assert not missing, f"docs/extending.md, {heading!r}, lists files that do not exist: {missing}"
