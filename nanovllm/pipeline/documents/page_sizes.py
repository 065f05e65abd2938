"""Sizes of pages: in points, and in pixels once rendered."""

from __future__ import annotations

from math import sqrt

from nanovllm.vision.documents.pages import POINTS_PER_INCH

Points = tuple[float, float]
"""Width and height of a page in points."""

A4: Points = (595.0, 842.0)


def rendered_size(points: Points, dpi: float, max_pixels: int) -> tuple[int, int]:
    """Width and height in pixels of a page of this size, within the largest area."""
    width, height = (side / POINTS_PER_INCH * dpi for side in points)
    scale = min(1.0, sqrt(max_pixels / (width * height)))
    return max(1, int(width * scale)), max(1, int(height * scale))
