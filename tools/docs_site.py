"""The documentation site: ``python tools/docs_site.py build/site`` makes it with Sphinx; a warning is a failure.

Pages, and what they link to, are staged under their paths of the repository. A link that GitHub follows is then a link
that Sphinx checks: to a page beside ``docs/``, to an example, to the JSON of a figure. A link to a folder leads to a
page that lists its files.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent

NAVIGATION = {
    "Start": ("docs/guide.md", "examples/README.md", "docs/settings.md", "docs/models.md", "CHANGELOG.md"),
    "Jobs": (
        *("docs/delivery.md", "docs/exactly-once.md", "docs/offsets.md", "docs/retries.md", "docs/dead-letters.md"),
        *("docs/admission.md", "docs/sameness.md", "docs/http-images.md", "docs/run.md"),
    ),
    "Documents": (
        *("docs/documents.md", "docs/events.md", "docs/routes.md", "docs/profiles.md", "docs/text-layer.md"),
        *("docs/sidecars.md", "docs/evaluate.md"),
    ),
    "Engine": ("docs/engine.md", "docs/backends.md", "docs/align.md", "benchmarks/README.md"),
    "Operations": (
        *("docs/deploy.md", "docs/stores.md", "docs/operations.md", "helm/nanovllm/README.md", "docs/metrics.md"),
        "docs/reliability.md",
        "docs/security.md",
    ),
    "Development": (
        *("ARCHITECTURE.md", "docs/extending.md", "CONTRIBUTING.md"),
        *("docs/licences.md", "nanovllm/checkpoints/assets/tiny-receipts/README.md"),
    ),
}
"""The pages by part, in their order; a page of ``docs/`` that is missing here fails the build."""

START = "README.md"

_CONFIGURATION = """
project = "nanovllm"
extensions = ["myst_parser", "sphinx_copybutton"]
html_theme = "furo"
html_title = "nanovllm"
html_show_sourcelink = False
html_show_copyright = False
html_copy_source = False
exclude_patterns = []
myst_heading_anchors = 4
copybutton_prompt_text = "$ "
# `json` blocks may be shortened with an ellipsis, and shell blocks hold what no lexer knows.
suppress_warnings = ["misc.highlighting_failure", "myst.header"]
"""

_LINK = re.compile(r"(?<=\]\()(?!#)([^)\s]+)(?=\))")


def build(site: Path) -> None:
    """Build the site into the folder ``site``. Raises CalledProcessError where Sphinx has a warning or an error."""
    with tempfile.TemporaryDirectory(prefix="nanovllm-docs-") as name:
        staged = Path(name)
        (staged / "conf.py").write_text(_CONFIGURATION, encoding="utf-8")
        for page in _pages():
            _stage(page, staged)
        command = [sys.executable, "-m", "sphinx", "--builder", "html", "--fail-on-warning", "--keep-going", "--quiet"]
        subprocess.run([*command, str(staged), str(site)], check=True)


def _pages() -> list[Path]:
    named = {ROOT / path for part in NAVIGATION.values() for path in part}
    return sorted({ROOT / START} | named | set((ROOT / "docs").glob("*.md")))


def _stage(page: Path, staged: Path) -> None:
    for target in _targets(page):
        if target.is_dir():
            _list_folder(target, staged)
        elif target.suffix != ".md":
            _copy(target, staged)
    text = _LINK.sub(lambda link: _page_of_folder(page, link[0]), page.read_text(encoding="utf-8"))
    if page == ROOT / START:
        text += "\n".join(_contents(part, pages) for part, pages in NAVIGATION.items())
    copy = staged / ("index.md" if page == ROOT / START else page.relative_to(ROOT))
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(text, encoding="utf-8")


def _contents(part: str, pages: tuple[str, ...]) -> str:
    return "\n".join(["", "```{toctree}", ":hidden:", f":caption: {part}", "", *pages, "```", ""])


def _targets(page: Path) -> Iterator[Path]:
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        parts = urlsplit(link)
        if not parts.scheme and (target := _target(page, parts.path)).exists():
            yield target


def _target(page: Path, link: str) -> Path:
    # Not resolved: the links at the root to the rooms are paths of their own.
    return Path(os.path.normpath(page.parent / link))


def _page_of_folder(page: Path, link: str) -> str:
    parts = urlsplit(link)
    is_folder = not parts.scheme and _target(page, parts.path).is_dir()
    return f"{link.rstrip('/')}/index.md" if is_folder else link


def _copy(file: Path, staged: Path) -> None:
    copy = staged / file.relative_to(ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, copy)


def _list_folder(folder: Path, staged: Path) -> None:
    path = folder.relative_to(ROOT)
    listing = staged / path / "index.md"
    listing.parent.mkdir(parents=True, exist_ok=True)
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    lines = [f"- `{name}`" for name in names if name != "__pycache__/"]
    listing.write_text("\n".join(["---", "orphan: true", "---", f"# `{path}/`", "", *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
