"""Pages of TIFFs, and of other image files as documents of one page."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from nanovllm.vision.documents.pages import (
    POINTS_PER_INCH,
    Document,
    DocumentInfo,
    DocumentLimits,
    PageInfo,
    check_pages,
    check_rotation,
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

INK_PIXELS = 1_000_000  # of the page on which ink is measured
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # orientations that swap the sides


class ImageDocument(Document):
    """Document of an image file: the frames of a TIFF, or one image.

    Pages have pixels of their own: they are shrunk to ``max_pixels``, and ``dpi`` changes nothing.
    """

    def __init__(self, data: bytes, limits: DocumentLimits, images: ImageLimits) -> None:
        self._data, self._images = data, images
        image = open_image(data, images)
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
        check_rotation(rotation)
        rgb = self._decoded(page)
        return quarter_turned(_shrunk(rgb, max_pixels), rotation)

    def text(self, page: int) -> TextLayer:
        """The measures of ink alone: image files have no text layer."""
        grey = _shrunk(self._decoded(page).convert("L"), INK_PIXELS)
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


def _seek(image: Image.Image, frame: int) -> bool:
    with as_invalid_image(image.format):
        try:
            image.seek(frame)
        except EOFError:
            return False
    return True


def _page_info(number: int, image: Image.Image) -> PageInfo:
    width, height = (side * POINTS_PER_INCH / dpi for side, dpi in zip(image.size, _resolution(image), strict=True))
    try:
        is_turned = image.getexif().get(_ORIENTATION) in _TURNED
    except Exception:  # a broken EXIF block counts as none
        is_turned = False
    return PageInfo(number, height, width) if is_turned else PageInfo(number, width, height)


def _resolution(image: Image.Image) -> tuple[float, float]:
    """Pixels an inch, across and down; 72 where the file does not say it, or no scanner has it."""
    try:
        across, down = (float(dpi) for dpi in image.info.get("dpi", ()))
    except (TypeError, ValueError, ZeroDivisionError):
        return POINTS_PER_INCH, POINTS_PER_INCH
    return (across, down) if 10 <= across <= 10_000 and 10 <= down <= 10_000 else (POINTS_PER_INCH, POINTS_PER_INCH)


def _shrunk(image: Image.Image, max_pixels: int) -> Image.Image:
    if image.width * image.height <= max_pixels:
        return image
    shrink = math.sqrt(max_pixels / (image.width * image.height))
    size = max(1, int(image.width * shrink)), max(1, int(image.height * shrink))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
