"""PDFs of pictures and lines of text: as scanners make them, with recognised text or without, and as programs do."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

ADVANCE_EM = 0.6
"""Width of every character of the font, Courier."""


@dataclass(frozen=True)
class TextLine:
    """A line whose first character stands at ``x`` points from the left, its baseline ``y`` points from the top."""

    text: str
    x: float
    y: float


@dataclass(frozen=True)
class PdfPage:
    """A page of ``width`` x ``height`` points: a picture as large as the page, and text over it.

    ``size`` is the font's, in points. Invisible text is what scanners add after they have recognised it.
    """

    width: int
    height: int
    picture: Image.Image | None = None
    lines: tuple[TextLine, ...] = ()
    size: float = 10.0
    is_visible: bool = True


def pdf_of(pages: Sequence[PdfPage]) -> bytes:
    """A PDF of ``pages``, without loss in their pictures. Raises UnicodeEncodeError: text outside of Latin-1."""
    # Objects 1 to 3 are the catalogue, the tree of pages and the font; each page has three of its own.
    numbers = [4 + 3 * at for at in range(len(pages))]
    kids = " ".join(f"{number} 0 R" for number in numbers)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Courier /Encoding /WinAnsiEncoding >>",
    ]
    for number, page in zip(numbers, pages, strict=True):
        resources = f"/Font << /F 3 0 R >> /XObject << /P {number + 2} 0 R >>"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {page.width} {page.height}] "
            f"/Resources << {resources} >> /Contents {number + 1} 0 R >>".encode(),
            _stream(_content(page)),
            _picture(page.picture or Image.new("RGB", (1, 1))),
        ]
    return _file(objects)


def _content(page: PdfPage) -> bytes:
    drawn = [] if page.picture is None else [f"q {page.width} 0 0 {page.height} 0 0 cm /P Do Q"]
    if page.lines:
        drawn.append(f"BT /F {page.size:g} Tf {0 if page.is_visible else 3} Tr")
        for line in page.lines:
            text = line.text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
            drawn.append(f"1 0 0 1 {line.x:g} {page.height - line.y:g} Tm ({text}) Tj")
        drawn.append("ET")
    return "\n".join(drawn).encode("latin-1")


def _picture(picture: Image.Image) -> bytes:
    width, height = picture.size
    kind = f"/Type /XObject /Subtype /Image /Width {width} /Height {height} /ColorSpace /DeviceRGB /BitsPerComponent 8"
    return _stream(picture.convert("RGB").tobytes(), kind)


def _stream(data: bytes, kind: str = "") -> bytes:
    packed = zlib.compress(data)
    return f"<< {kind} /Filter /FlateDecode /Length {len(packed)} >>\nstream\n".encode() + packed + b"\nendstream"


def _file(objects: Sequence[bytes]) -> bytes:
    """The objects, numbered from 1, and the table of their places."""
    written = bytearray(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n")
    places = []
    for number, content in enumerate(objects, 1):
        places.append(len(written))
        written += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    return (
        bytes(written)
        + (
            f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
            f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(written)}\n%%EOF\n"
        ).encode()
    )
