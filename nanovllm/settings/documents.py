"""Settings of documents: the routes by which events become records, and the limits of a document."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from nanovllm.settings.base import Bytes, SettingsModel


class DocumentSettings(SettingsModel):
    """What a worker makes of event notifications (`topics.events`), and the limits of a document."""

    routes: Path | None = Field(
        None, description="YAML file of routes; with it the worker reads `topics.events`. Unset: it does not."
    )
    max_bytes: Bytes = Field(128 * 2**20, description="Largest document.")
    max_pages: int = Field(10_000, ge=1, description="Most pages of a document; a route may allow fewer.")
    max_pixels: int = Field(
        50_000_000, ge=1, description="Most pixels of a rendered page; a larger one has a lower resolution."
    )
    min_dpi: float = Field(36.0, gt=0, description="Lowest resolution of a page for that; below it is refused.")
    max_page_characters: int = Field(200_000, ge=1, description="Most characters of a page's text layer.")
    pages_at_once: int = Field(4, ge=1, description="Most requests for pages of one document at once.")
