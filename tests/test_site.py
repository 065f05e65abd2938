"""The documentation's site: built without a warning, whole by its links, and looked at in headless Chromium."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from chromium import DESKTOP, PHONE, needs_chromium, window

from tools.docs_site import build

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def names(site: Path) -> list[str]:
    """The paths of its pages."""
    return sorted(str(file.relative_to(site)) for file in site.rglob("*.html"))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """URL of the site."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class Links(HTMLParser):
    """Anchors of a page, where its links lead, and what it loads by itself."""

    names: set[str] = field(default_factory=set)
    targets: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.names |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.targets.append(given["href"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon", "shortcut icon"):
            self.loaded.append(given["href"])
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loaded.append(given["src"])


def links_of(site: Path) -> dict[Path, Links]:
    found = {}
    for file in sorted(site.rglob("*.html")):
        links = Links()
        links.feed(file.read_text(encoding="utf-8"))
        found[file] = links
    return found


def test_the_site_has_every_page_of_the_documentation_in_its_navigation(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages == {path.stem for path in (site / "docs").glob("*.html")}
    start = (site / "index.html").read_text(encoding="utf-8")
    assert all(f'href="docs/{name}.html"' in start for name in pages)


def test_each_link_within_the_site_leads_to_a_page_and_its_heading(site: Path) -> None:
    pages, astray = links_of(site), []
    for file, links in pages.items():
        for target in links.targets + links.loaded:
            path, name = urldefrag(target)
            parts = urlsplit(path)
            if parts.scheme or parts.netloc:
                continue
            there = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if there.is_dir():
                there /= "index.html"
            is_known = there.is_file() and (not name or there not in pages or unquote(name) in pages[there].names)
            if not is_known:
                astray.append(f"{file.relative_to(site)}: {target}")
    assert astray == []


def test_the_site_loads_nothing_from_others(site: Path) -> None:
    loaded = [one for links in links_of(site).values() for one in links.loaded]
    assert loaded
    assert [one for one in loaded if urlsplit(one).netloc] == []


@needs_chromium
@pytest.mark.timeout(600)
async def test_each_page_fits_a_desktop_and_a_phone_without_an_error(names: list[str], served: str) -> None:
    faults: dict[str, list[str]] = {}
    async with window(DESKTOP) as shown:
        for name in names:
            await shown.page.goto(f"{served}/{name}", wait_until="load")
            wrong = await shown.broken_images() + await shown.overflow()
            await shown.resize(PHONE)
            wrong += await shown.overflow()
            await shown.resize(DESKTOP)
            if wrong := wrong + shown.faults:
                faults[name] = wrong
            shown.faults.clear()
        others = [one for one in shown.requests if not one.startswith((served, "data:"))]
    assert faults == {}
    assert others == []


@needs_chromium
async def test_the_search_finds_a_page(served: str) -> None:
    async with window(PHONE) as shown:
        await shown.page.goto(f"{served}/search.html?q=watermark")
        await shown.page.locator("ul.search li a").first.wait_for(timeout=30_000)
        assert not shown.faults
