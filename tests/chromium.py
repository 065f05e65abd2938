"""Headless Chromium by Playwright: a page at a width, with what it asked for and what went wrong in it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.async_api import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or not HAS_PLAYWRIGHT, reason="no Chromium on this machine (apt install chromium)"
)
DESKTOP, PHONE = (1280, 900), (390, 844)


@dataclass
class Window:
    """A page of the browser; ``faults``: errors of scripts, refused and failed requests, messages of the console."""

    page: Page
    faults: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    async def resize(self, size: tuple[int, int]) -> None:
        await self.page.set_viewport_size({"width": size[0], "height": size[1]})

    async def overflow(self) -> list[str]:
        """What reaches beyond the right edge of the window and cannot be scrolled to by itself."""
        found: list[str] = await self.page.evaluate(_OVERFLOW)
        return found

    async def broken_images(self) -> list[str]:
        found: list[str] = await self.page.evaluate(
            "[...document.images].filter(one => !one.complete || !one.naturalWidth).map(one => one.src)"
        )
        return found


_OVERFLOW = """() => {
  if (document.documentElement.scrollWidth <= window.innerWidth) return [];
  const scrolls = (one) => {
    for (let above = one.parentElement; above; above = above.parentElement)
      if (above !== document.body && getComputedStyle(above).overflowX !== "visible") return true;
    return false;
  };
  const beyond = [...document.body.querySelectorAll("*")].filter(
    (one) => one.getBoundingClientRect().right > window.innerWidth + 1 && !scrolls(one));
  const told = beyond.slice(0, 5).map((one) => `${one.tagName.toLowerCase()}: ${one.textContent.trim().slice(0, 60)}`);
  return [`${document.documentElement.scrollWidth} > ${window.innerWidth} px`, ...told];
}"""


@asynccontextmanager
async def window(size: tuple[int, int] = DESKTOP) -> AsyncIterator[Window]:
    """An empty page of a browser of its own; ``SCREENSHOTS`` names a folder for a picture of it at the end."""
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu", "--disable-quic"])
        try:
            page = await browser.new_page(viewport={"width": size[0], "height": size[1]})
            opened = Window(page)
            page.on("console", lambda message: opened.faults.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: opened.faults.append(str(error)))
            page.on("requestfailed", lambda request: opened.faults.append(f"{request.url}: {request.failure}"))
            page.on("request", lambda request: opened.requests.append(request.url))
            yield opened
            if folder := os.environ.get("SCREENSHOTS"):
                await page.screenshot(path=f"{folder}/{time.time_ns()}.png", full_page=True)
        finally:
            await browser.close()
