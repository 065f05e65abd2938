"""PDFs and TIFFs for the tests: native, scanned, garbled, encrypted, broken and hostile ones."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pikepdf
from fpdf import FPDF
from PIL import Image, ImageDraw, ImageFont

PROSE = (
    "The quick brown fox jumps over the lazy dog while seventeen invoices wait for approval.",
    "Payment of 1,234.56 USD is due within 30 days of receipt (see section 4.2 below).",
    "Questions go to accounts@example.com; the reference number is INV-2026-00417.",
)


def text_pdf(*pages: Sequence[str], size: tuple[float, float] = (612, 792)) -> bytes:
    """Native PDF with a page for each sequence of lines."""
    pdf = FPDF(unit="pt", format=size)
    pdf.set_auto_page_break(False)
    pdf.set_font("Helvetica", size=12)
    for lines in pages:
        pdf.add_page()
        for index, line in enumerate(lines):
            pdf.text(50, 80 + 24 * index, line)
    return bytes(pdf.output())


def scan(lines: Sequence[str] = PROSE, size: tuple[int, int] = (850, 1100)) -> Image.Image:
    """A page of ``lines`` as a picture."""
    page = Image.new("L", size, 255)
    draw = ImageDraw.Draw(page)
    for index, line in enumerate(lines):
        draw.text((60, 80 + 40 * index), line, fill=0, font=ImageFont.load_default(20))
    return page


def image_pdf(image: Image.Image, hidden: Sequence[str] = ()) -> bytes:
    """PDF of a picture as large as its page, with ``hidden`` as invisible text over it."""
    pdf = FPDF(unit="pt", format=(612, 792))
    pdf.set_font("Helvetica", size=14)
    pdf.add_page()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pdf.image(buffer, 0, 0, 612, 792)
    if hidden:
        pdf.text_mode = 3
        for index, line in enumerate(hidden):
            pdf.text(43, 72 + 28.8 * index, line)
    return bytes(pdf.output())


def raw_pdf(content: bytes, resources: str = "", page: str = "/MediaBox [0 0 612 792]") -> bytes:
    """PDF of one page with this content stream, and Helvetica as ``/F1``."""
    return objects_pdf(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            f"<< /Type /Page /Parent 2 0 R /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> {resources} >> "
            f"{page} >>".encode(),
            stream(content),
            b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        ]
    )


def objects_pdf(objects: Iterable[bytes]) -> bytes:
    """PDF of these objects, numbered from 1; the first is the catalogue."""
    out, offsets = bytearray(b"%PDF-1.7\n"), []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(offsets) + 1) + table
    return bytes(out) + b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(offsets) + 1, start)


def stream(content: bytes, entries: bytes = b"") -> bytes:
    """Stream object."""
    return b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(content), entries, content)


def many_pages_pdf(n_pages: int) -> bytes:
    """PDF of pages with their number each, in one object for each page and one for its content."""
    kids = b" ".join(b"%d 0 R" % (4 + 2 * index) for index in range(n_pages))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d /MediaBox [0 0 200 100] "
        b"/Resources << /Font << /F1 3 0 R >> >> >>" % (kids, n_pages),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for index in range(n_pages):
        objects.append(b"<< /Type /Page /Parent 2 0 R /Contents %d 0 R >>" % (5 + 2 * index))
        objects.append(stream(b"BT /F1 12 Tf 20 40 Td (Page number %d) Tj ET" % (index + 1)))
    return objects_pdf(objects)


def image_bomb_pdf(side: int) -> bytes:
    """Small PDF with a picture of ``side`` × ``side`` RGB pixels."""
    entries = b"/Type /XObject /Subtype /Image /Width %d /Height %d /ColorSpace /DeviceRGB /BitsPerComponent 8 "
    picture = stream(_zeros(3 * side * side), entries % (side, side) + b"/Filter /FlateDecode")
    page = b"/Resources << /XObject << /I 5 0 R >> >> /MediaBox [0 0 612 792]"
    return objects_pdf([*_one_page(page), stream(b"612 0 0 792 0 0 cm /I Do"), picture])


def content_bomb_pdf(size: int) -> bytes:
    """Small PDF of one page with ``size`` bytes of content."""
    return objects_pdf([*_one_page(b"/MediaBox [0 0 612 792]"), stream(_zeros(size), b"/Filter /FlateDecode")])


def _one_page(entries: bytes) -> list[bytes]:
    tree = b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>"
    page = b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R %s >>" % entries
    return [b"<< /Type /Catalog /Pages 2 0 R >>", tree, page]


def _zeros(size: int) -> bytes:
    compressor, block = zlib.compressobj(1), bytes(1 << 20)
    parts = [compressor.compress(block[: min(len(block), size - done)]) for done in range(0, size, len(block))]
    return b"".join(parts) + compressor.flush()


def edited(data: bytes, edit: Callable[[pikepdf.Pdf], object]) -> bytes:
    """The PDF after ``edit``."""
    with pikepdf.open(io.BytesIO(data)) as pdf:
        edit(pdf)
        buffer = io.BytesIO()
        pdf.save(buffer)
    return buffer.getvalue()


def encrypted(data: bytes, user: str) -> bytes:
    """The PDF, encrypted; it opens without a password where ``user`` is empty."""
    buffer = io.BytesIO()
    with pikepdf.open(io.BytesIO(data)) as pdf:
        pdf.save(buffer, encryption=pikepdf.Encryption(user=user, owner="owner", R=6))
    return buffer.getvalue()


def misread_pdf(lines: Sequence[str] = PROSE, shift: int = 3) -> bytes:
    """Native PDF whose ToUnicode map is wrong: every letter is another one, as with a broken subset."""
    entries = b"".join(b"<%02x> <%04x>\n" % (code, code + shift) for code in range(33, 120))
    cmap = (
        b"/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /X def /CMapType 2 def "
        b"1 begincodespacerange <00> <ff> endcodespacerange\n87 beginbfchar\n" + entries + b"endbfchar endcmap end end"
    )

    def edit(pdf: pikepdf.Pdf) -> None:
        for page in pdf.pages:
            for font in page.Resources.Font.values():
                font.ToUnicode = pdf.make_stream(cmap)

    return edited(text_pdf(lines), edit)


def filled_form_pdf(value: str, lines: Sequence[str] = PROSE) -> bytes:
    """Native PDF with one field of a form over it, whose value is drawn by the field's appearance."""

    def edit(pdf: pikepdf.Pdf) -> None:
        page = pdf.pages[0]
        font = pikepdf.Dictionary(Type=pikepdf.Name.Font, Subtype=pikepdf.Name.Type1, BaseFont=pikepdf.Name.Helvetica)
        appearance = pdf.make_stream(
            f"BT /F1 12 Tf 2 6 Td ({value}) Tj ET".encode(),
            Type=pikepdf.Name.XObject,
            Subtype=pikepdf.Name.Form,
            BBox=[0, 0, 300, 20],
            Resources=pikepdf.Dictionary(Font=pikepdf.Dictionary(F1=font)),
        )
        field = pdf.make_indirect(
            pikepdf.Dictionary(
                Type=pikepdf.Name.Annot,
                Subtype=pikepdf.Name.Widget,
                FT=pikepdf.Name.Tx,
                T="field",
                V=value,
                Rect=[50, 300, 350, 320],
                F=4,
                DA="/F1 12 Tf 0 g",
                AP=pikepdf.Dictionary(N=appearance),
            )
        )
        page.Annots = pdf.make_indirect(pikepdf.Array([field]))
        pdf.Root.AcroForm = pikepdf.Dictionary(
            Fields=pikepdf.Array([field]), DR=pikepdf.Dictionary(Font=pikepdf.Dictionary(F1=font)), DA="/F1 12 Tf 0 g"
        )

    return edited(text_pdf(lines), edit)


def tiff(*pages: Image.Image, **options: object) -> bytes:
    """TIFF of these pages."""
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:], **options)
    return buffer.getvalue()


def noise(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    """A picture that no other seed has."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
