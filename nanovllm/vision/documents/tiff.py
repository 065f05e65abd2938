"""Pages of TIFFs, and of other image files as documents of one page."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from PIL import Image

from nanovllm.vision.documents.pages import (
    POINTS_PER_INCH,
    Document,
    DocumentInfo,
    DocumentLimits,
    PageInfo,
    check_pages,
    check_rendering,
    checked_page,
    media_type_of,
    quarter_turned,
)
from nanovllm.vision.documents.text_layer import TextLayer, text_layer
from nanovllm.vision.images.decode import (
    ImageLimits,
    as_invalid_image,
    check_dimensions,
    decode_image,
    load_rgb,
    open_image,
)

SQUARE_PIXELS = 1.1  # a fax of standard resolution has 204 pixels an inch across and 98 down
INK_PIXELS = 1_000_000  # of the page on which ink is measured
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # orientations that swap the sides


class ImageDocument(Document):
    """Document of an image file: the frames of a TIFF, or one image.

    Pages have pixels of their own: they are made square where a fax's are not, and shrunk to ``max_pixels``; ``dpi``
    changes nothing.
    """

    def __init__(self, data: bytes, limits: DocumentLimits, images: ImageLimits) -> None:
        # The bytes are those of a document, of many pages maybe.
        self._data, self._images = data, replace(images, max_bytes=limits.max_bytes)
        image = open_image(data, self._images)
        self._frames = image if image.format == "TIFF" else None  # stays open: frames are found one after another
        pages = [_page_info(1, image)]
        while self._frames is not None and _seek(self._frames, len(pages)):
            check_pages(len(pages) + 1, limits)
            pages.append(_page_info(len(pages) + 1, self._frames))
        self.info = DocumentInfo(media_type_of(data) or "", tuple(pages))

    def render(self, page: int, *, dpi: float, rotation: int, max_pixels: int) -> Image.Image:
        """Decode page ``page``; see `Document.render`.

        Raises:
            TooManyPixels, InvalidImage, InvalidPageRange: as said.
        """
        check_rendering(dpi, rotation, max_pixels)
        return quarter_turned(self._resized(self._decoded(page), page, max_pixels), rotation)

    def text(self, page: int) -> TextLayer:
        """The measures of ink alone: image files have no text layer."""
        grey = self._resized(self._decoded(page).convert("L"), page, INK_PIXELS)
        return text_layer((), np.asarray(grey), 1.0)

    def close(self) -> None:
        """Release the memory of the document."""
        if self._frames is not None:
            self._frames.close()

    def _decoded(self, page: int) -> Image.Image:
        checked_page(page, self.info)
        if self._frames is None:
            return load_rgb(self._data, self._images)
        _seek(self._frames, page - 1)
        check_dimensions(self._frames.width, self._frames.height, self._images)
        return decode_image(self._frames)

    def _resized(self, image: Image.Image, page: int, max_pixels: int) -> Image.Image:
        """The image with square pixels, ``max_pixels`` at most."""
        info = self.info.pages[page - 1]
        width, height = float(image.width), float(image.height)
        across, down = width / info.width_pt, height / info.height_pt
        if max(across, down) > SQUARE_PIXELS * min(across, down):
            width, height = width * max(1.0, down / across), height * max(1.0, across / down)
        shrink = min(1.0, math.sqrt(max_pixels / (width * height)))
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        if size[0] * size[1] > max_pixels:
            size = max(1, int(width * shrink)), max(1, int(height * shrink))
        return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def _seek(image: Image.Image, frame: int) -> bool:
    with as_invalid_image(image.format):
        try:
            image.seek(frame)
        except EOFError:
            return False
    return True


def _page_info(number: int, image: Image.Image) -> PageInfo:
    (width, height), (across, down) = image.size, _resolution(image)
    try:
        is_turned = image.getexif().get(_ORIENTATION) in _TURNED
    except Exception:  # a broken EXIF block counts as none
        is_turned = False
    if is_turned:
        across, down = down, across
        if image.format != "TIFF":  # whose size Pillow gives turned already
            width, height = height, width
    return PageInfo(number, width * POINTS_PER_INCH / across, height * POINTS_PER_INCH / down)


def _resolution(image: Image.Image) -> tuple[float, float]:
    """Pixels an inch, across and down; 72 where the file does not say it, or no scanner has it."""
    unknown = float(POINTS_PER_INCH), float(POINTS_PER_INCH)
    try:
        across, down = (float(dpi) for dpi in image.info.get("dpi", ()))
    except (TypeError, ValueError, ZeroDivisionError):
        return unknown
    is_credible = 10 <= min(across, down) <= max(across, down) <= min(10_000, 4 * min(across, down))
    return (across, down) if is_credible else unknown
