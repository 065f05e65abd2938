"""Pages of PDFs by PDFium, which is not thread-safe: one thread of a process uses it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from nanovllm.errors import (
    DocumentEncrypted,
    InvalidDocument,
    InvalidPage,
    NanoVLLMError,
    PageTooLarge,
    UnsupportedDocumentFormat,
    counted,
)
from nanovllm.vision.documents.pages import (
    PDF,
    Document,
    DocumentInfo,
    DocumentLimits,
    PageInfo,
    check_pages,
    check_rendering,
    checked_page,
    scale_within,
)
from nanovllm.vision.documents.text_layer import Glyph, TextLayer, text_layer

try:
    import pypdfium2
    import pypdfium2.raw as pdfium
except ImportError:
    raise UnsupportedDocumentFormat(
        "PDFs cannot be read here: they need pypdfium2, the extra documents: pip install '.[documents]' in a clone"
    ) from None

MEASURED_PIXELS = 2_000_000  # of the page on which ink is measured, at 72 dpi or less
MAX_IMAGES = 1_000
_DRAWN_BY_NOTHING = {pdfium.FPDF_ANNOT_LINK, pdfium.FPDF_ANNOT_POPUP}
_HYPHENS = (0x02, 0xFFFE)  # PDFium's codes of a hyphen at the end of a line
_INVISIBLE = pdfium.FPDF_TEXTRENDERMODE_INVISIBLE
Box = tuple[float, float, float, float]


class PdfDocument(Document):
    """PDF; the page that was used last stays loaded."""

    def __init__(self, data: bytes, limits: DocumentLimits) -> None:
        self._limits = limits
        self._loaded: tuple[int, pypdfium2.PdfPage] | None = None
        try:
            self._pdf = pypdfium2.PdfDocument(data)
        except pypdfium2.PdfiumError as error:
            if error.err_code in (pdfium.FPDF_ERR_PASSWORD, pdfium.FPDF_ERR_SECURITY):
                raise DocumentEncrypted("the PDF is encrypted, and opens with no empty password") from None
            raise InvalidDocument("the PDF is truncated or corrupt") from None
        n_pages = len(self._pdf)
        if not n_pages:
            self.close()
            raise InvalidDocument("the PDF has no page that can be found")
        try:
            check_pages(n_pages, limits)
            # Forms are drawn from their fields; without it, from nothing.
            if self._pdf.get_formtype() != pdfium.FORMTYPE_NONE:
                self._pdf.init_forms()
        except Exception:
            self.close()
            raise
        sizes = (self._size(number) for number in range(1, n_pages + 1))
        self.info = DocumentInfo(PDF, tuple(PageInfo(number, *size) for number, size in enumerate(sizes, 1)))

    def render(self, page: int, *, dpi: float, rotation: int, max_pixels: int) -> Image.Image:
        """Render page ``page``; see `Document.render`. At fewer ``dpi`` where ``max_pixels`` demands it.

        Raises:
            PageTooLarge, InvalidPage, InvalidPageRange: as said.
        """
        check_rendering(dpi, rotation, max_pixels)
        info = checked_page(page, self.info)
        scale = scale_within(info.width_pt, info.height_pt, dpi, max_pixels, self._limits)
        with _as_invalid_page(page):
            return self._rendered(self._page(page), scale, rotation)

    def text(self, page: int) -> TextLayer:
        """Text layer of page ``page``.

        Raises:
            PageTooLarge: it has more characters than allowed.
            InvalidPage, InvalidPageRange: as said.
        """
        info = checked_page(page, self.info)
        with _as_invalid_page(page):
            return self._text(info)

    def close(self) -> None:
        """Release the memory of the document."""
        self._loaded = None
        self._pdf.close()

    def _text(self, page: PageInfo) -> TextLayer:
        loaded = self._page(page.number)
        scale = min(1.0, math.sqrt(MEASURED_PIXELS / (page.width_pt * page.height_pt)))
        grey = np.asarray(self._rendered(loaded, scale, 0).convert("L"))
        shown = _Coordinates(loaded)
        has_annotations = False
        if _has_drawn_annotations(loaded):
            without = self._rendered(loaded, scale, 0, draw_annots=False, may_draw_forms=False)
            has_annotations = not np.array_equal(grey, np.asarray(without.convert("L")))
        glyphs = self._glyphs(page.number, loaded, shown)
        return text_layer(glyphs, grey, scale, _images(loaded, shown), has_annotations=has_annotations)

    def _size(self, page: int) -> tuple[float, float]:
        try:
            width, height = self._pdf.get_page_size(page - 1)
        except pypdfium2.PdfiumError:
            return 612.0, 792.0  # PDFium's own size of a page without one; the page fails when it is asked for
        return (width, height) if width > 0 and height > 0 else (612.0, 792.0)

    def _page(self, page: int) -> pypdfium2.PdfPage:
        if self._loaded is not None and self._loaded[0] == page:
            return self._loaded[1]
        if self._loaded is not None:
            self._loaded[1].close()
            self._loaded = None
        loaded = self._pdf[page - 1]
        self._loaded = page, loaded
        return loaded

    def _rendered(self, page: pypdfium2.PdfPage, scale: float, rotation: int, **options: bool) -> Image.Image:
        # The memory of a native bitmap is of ctypes, which raises MemoryError; PDFium's own would be a null pointer.
        maker = pypdfium2.PdfBitmap.new_native
        bitmap = page.render(scale=scale, rotation=rotation, rev_byteorder=True, bitmap_maker=maker, **options)
        try:
            image = bitmap.to_pil()
            # Pillow copies RGB; what it shares with the bitmap is read-only.
            return image if image.mode == "RGB" and not image.readonly else image.convert("RGB")
        finally:
            bitmap.close()

    def _glyphs(self, number: int, page: pypdfium2.PdfPage, shown: _Coordinates) -> Iterator[Glyph]:
        text = page.get_textpage()
        try:
            count = text.count_chars()
            if count > self._limits.max_page_characters:
                raise PageTooLarge(
                    f"page {number} has {counted(count, 'character')} of text; "
                    f"{self._limits.max_page_characters} are allowed"
                )
            yield from _read_glyphs(text, count, shown)
        finally:
            text.close()


@contextmanager
def _as_invalid_page(page: int) -> Iterator[None]:
    """Replace PDFium's exceptions by one error that names the page."""
    try:
        yield
    except (MemoryError, NanoVLLMError):
        raise
    except Exception:
        raise InvalidPage(f"page {page} of the PDF cannot be read") from None


class _Coordinates:
    """Coordinates on the page as it is shown, in points from its top left: crop box and rotation are applied."""

    _UNITS = 1 << 20  # FPDF_PageToDevice gives whole numbers: a page is this many units wide and high

    def __init__(self, page: pypdfium2.PdfPage) -> None:
        self._units = page.get_width() / self._UNITS, page.get_height() / self._UNITS
        self._page = page
        origin, across, up = self._device(0, 0), self._device(1000, 0), self._device(0, 1000)
        self._origin = origin
        self._across = tuple((end - start) / 1000 for start, end in zip(origin, across, strict=True))
        self._up = tuple((end - start) / 1000 for start, end in zip(origin, up, strict=True))

    def box(self, left: float, bottom: float, right: float, top: float) -> Box:
        """The box of one in the page's own coordinates, from the bottom left."""
        (x0, y0), (x1, y1) = self._shown(left, bottom), self._shown(right, top)
        return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)

    def _shown(self, x: float, y: float) -> tuple[float, float]:
        return (
            self._origin[0] + x * self._across[0] + y * self._up[0],
            self._origin[1] + x * self._across[1] + y * self._up[1],
        )

    def _device(self, x: float, y: float) -> tuple[float, float]:
        across, down = ctypes.c_int(), ctypes.c_int()
        pdfium.FPDF_PageToDevice(self._page, 0, 0, self._UNITS, self._UNITS, 0, x, y, across, down)
        return across.value * self._units[0], down.value * self._units[1]


def _read_glyphs(text: pypdfium2.PdfTextPage, count: int, shown: _Coordinates) -> Iterator[Glyph]:
    sides = [ctypes.c_double() for _ in range(4)]
    modes: dict[int, bool] = {}

    def glyph(index: int, character: str) -> Glyph:
        if character.isspace():
            return Glyph(character, (0.0, 0.0, 0.0, 0.0))
        left, right, bottom, top = sides
        pdfium.FPDFText_GetCharBox(text, index, left, right, bottom, top)
        box = shown.box(left.value, bottom.value, right.value, top.value)
        is_mapped = pdfium.FPDFText_HasUnicodeMapError(text, index) != 1
        return Glyph(character, box, is_mapped, _is_visible(text, index, modes))

    codes = [pdfium.FPDFText_GetUnicode(text, index) for index in range(count)]
    for index, code in enumerate(codes):
        following = codes[index + 1] if index + 1 < count else 0
        if 0xDC00 <= code < 0xE000 and index and 0xD800 <= codes[index - 1] < 0xDC00:
            # The second half of a character outside of the basic plane.
            high = chr(codes[index - 1])
            yield glyph(index, (high + chr(code)).encode("utf-16", "surrogatepass").decode("utf-16"))
        elif not (0xD800 <= code < 0xDC00 and 0xDC00 <= following < 0xE000):
            is_none = not 0 < code < 0x110000 or 0xD800 <= code < 0xE000
            yield glyph(index, "\ufffd" if is_none else "-" if code in _HYPHENS else chr(code))


def _is_visible(text: pypdfium2.PdfTextPage, index: int, modes: dict[int, bool]) -> bool:
    drawn = pdfium.FPDFText_GetTextObject(text, index)
    address = ctypes.cast(drawn, ctypes.c_void_p).value
    if address is None:
        return True
    if address not in modes:
        modes[address] = pdfium.FPDFTextObj_GetTextRenderMode(drawn) != _INVISIBLE
    return modes[address]


def _images(page: pypdfium2.PdfPage, shown: _Coordinates) -> list[Box]:
    """Boxes of the page's first images, and of forms (groups of objects) that hold one."""
    boxes: list[Box] = []
    sides = [ctypes.c_float() for _ in range(4)]
    for index in range(pdfium.FPDFPage_CountObjects(page)):
        drawn = pdfium.FPDFPage_GetObject(page, index)
        if _holds_image(drawn) and pdfium.FPDFPageObj_GetBounds(drawn, *sides):
            boxes.append(shown.box(*(side.value for side in sides)))
        if len(boxes) == MAX_IMAGES:
            break
    return boxes


def _holds_image(drawn: Any, depth: int = 3) -> bool:
    kind = pdfium.FPDFPageObj_GetType(drawn)
    if kind != pdfium.FPDF_PAGEOBJ_FORM or depth == 0:
        return kind == pdfium.FPDF_PAGEOBJ_IMAGE
    inner = range(pdfium.FPDFFormObj_CountObjects(drawn))
    return any(_holds_image(pdfium.FPDFFormObj_GetObject(drawn, index), depth - 1) for index in inner)


def _has_drawn_annotations(page: pypdfium2.PdfPage) -> bool:
    for index in range(pdfium.FPDFPage_GetAnnotCount(page)):
        annotation = pdfium.FPDFPage_GetAnnot(page, index)
        if not annotation:
            continue
        kind = pdfium.FPDFAnnot_GetSubtype(annotation)
        pdfium.FPDFPage_CloseAnnot(annotation)
        if kind not in _DRAWN_BY_NOTHING:
            return True
    return False
