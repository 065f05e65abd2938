"""The HTML report of a demo run: one file, every text in it escaped, without script or reference to others."""

from __future__ import annotations

import base64
import io
import os
import platform

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from nanovllm.demo.outcome import Outcome, stage_times
from nanovllm.vision.documents.pages import DocumentLimits
from nanovllm.vision.documents.pdf import PdfDocument

THUMBNAIL_PX = 128
PAGE_PX = 420


def render_report(outcome: Outcome) -> str:
    """The report as one HTML document."""
    environment = Environment(
        loader=PackageLoader("nanovllm.demo", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    results = sorted(outcome.results.values(), key=lambda result: result.timings_ms.total)
    times = {result.job_id: stage_times(result) for result in results}
    return environment.get_template("report.html.jinja").render(
        outcome=outcome,
        times=times,
        longest_ms=max((sum(stages.values()) for stages in times.values()), default=0.0) or 1.0,
        thumbnails={key: _thumbnail(outcome.demo.objects[key]) for job in outcome.demo.jobs for key in job.keys},
        pages={}
        if outcome.documents is None
        else {one.key: _page_pictures(one.data) for one in outcome.documents.demo.documents},
        machine=f"Python {platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores",
    )


def _thumbnail(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        return _embedded(image, THUMBNAIL_PX)


def _page_pictures(data: bytes) -> list[str]:
    """The pages of a PDF of the demo, as they look."""
    limits = DocumentLimits()
    document = PdfDocument(data, limits)
    try:
        numbers = range(1, len(document.info.pages) + 1)
        return [
            _embedded(document.render(number, dpi=72, rotation=0, max_pixels=limits.max_pixels), PAGE_PX)
            for number in numbers
        ]
    finally:
        document.close()


def _embedded(image: Image.Image, side_px: int) -> str:
    """``image`` as the source of an ``img``: both sides ``side_px`` or less."""
    small = image.convert("RGB")
    small.thumbnail((side_px, side_px))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
