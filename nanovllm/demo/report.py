"""The HTML report of a demo run: one file, every text in it escaped, without script or reference to others."""

from __future__ import annotations

import base64
import io
import os
import platform

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from nanovllm.demo.outcome import Outcome, stage_times

THUMBNAIL_PX = 128


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
        machine=f"Python {platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores",
    )


def _thumbnail(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
