"""Documents as pages, in this process: what is opened, what is refused with which code, and what a page looks like."""

from __future__ import annotations

import io

import numpy as np
import pikepdf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pdf_files import (
    PROSE,
    edited,
    encrypted,
    image_pdf,
    many_pages_pdf,
    noise,
    objects_pdf,
    raw_pdf,
    scan,
    text_pdf,
    tiff,
)
from PIL import Image

from nanovllm.errors import (
    ConfigurationError,
    DocumentEncrypted,
    DocumentTooLarge,
    InvalidDocument,
    InvalidImage,
    InvalidPage,
    InvalidPageRange,
    NanoVLLMError,
    PageTooLarge,
    TooManyPages,
    TooManyPixels,
    UnsupportedDocumentFormat,
    UnsupportedImageFormat,
)
from nanovllm.vision.documents.pages import (
    PDF,
    Document,
    DocumentLimits,
    PageInfo,
    media_type_of,
    open_document,
    parse_page_range,
    scale_within,
)
from nanovllm.vision.images.decode import ImageLimits
from nanovllm.vision.images.digest import pixel_digest

MOST = 50_000_000


def rendered(document: Document, page: int = 1, dpi: float = 72, rotation: int = 0, most: int = MOST) -> Image.Image:
    return document.render(page, dpi=dpi, rotation=rotation, max_pixels=most)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("text", "pages"),
    [
        ("1-3,7,-1", [1, 2, 3, 7, 10]),
        ("all", [*range(1, 11)]),
        ("8-", [8, 9, 10]),
        ("-2-", [9, 10]),
        ("-3--2", [8, 9]),
        ("1--1", [*range(1, 11)]),
        (" 2 , 2 , 1 ", [2, 1]),
        ("9-400", [9, 10]),
        ("-400-2", [1, 2]),
        ("3,99", [3]),
    ],
)
def test_a_page_range_gives_pages_in_its_order_and_each_once(text: str, pages: list[int]) -> None:
    assert parse_page_range(text, 10) == pages


@pytest.mark.parametrize(
    "text", ["", "0", "1-0", "0-3", "a", "3-1", "-1--3", "1,,2", "1-2-3", "11", "٣", "1" * 12, "1," * 2000]
)
def test_what_is_no_page_range_or_holds_no_page_is_refused(text: str) -> None:
    with pytest.raises(InvalidPageRange):
        parse_page_range(text, 10)


@given(st.text("0123456789-, all", max_size=12), st.integers(1, 30))
def test_a_page_range_gives_pages_of_the_document_or_an_error(text: str, n_pages: int) -> None:
    try:
        pages = parse_page_range(text, n_pages)
    except InvalidPageRange:
        return
    assert len(set(pages)) == len(pages) > 0
    assert set(pages) <= set(range(1, n_pages + 1))


@given(st.floats(0.1, 20_000), st.floats(0.1, 20_000), st.floats(20, 600), st.integers(10_000, MOST))
def test_a_page_is_rendered_within_its_pixels_at_its_resolution_or_the_most_that_fits(
    width: float, height: float, dpi: float, most: int
) -> None:
    try:
        scale = scale_within(width, height, dpi, most, DocumentLimits())
    except PageTooLarge:
        return
    assert scale <= dpi / 72
    assert np.ceil(width * scale) * np.ceil(height * scale) <= most
    assert scale * 72 >= min(36, dpi)


def test_the_media_type_follows_from_the_bytes() -> None:
    assert media_type_of(text_pdf(PROSE)) == PDF
    assert media_type_of(b"\xef\xbb\xbf junk before\n" + text_pdf(PROSE)) == PDF
    assert media_type_of(tiff(noise(1))) == "image/tiff"
    assert media_type_of(png(noise(1))) == "image/png"
    assert media_type_of(b"PK\x03\x04") is None
    assert media_type_of(b"") is None


@pytest.mark.parametrize("name", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_an_image_is_a_document_of_one_page_whatever_its_name_says(name: str) -> None:
    buffer = io.BytesIO()
    noise(3).save(buffer, name)
    document = open_document(buffer.getvalue())
    assert document.info.media_type == f"image/{name.lower()}"
    (page,) = document.info.pages
    assert page.width_pt / page.height_pt == pytest.approx(1.5, rel=1e-3)
    assert rendered(document).size == (60, 40)


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"", InvalidDocument, "0 bytes"),
        (b"%PDF-1.7\n", InvalidDocument, "truncated or corrupt"),
        (text_pdf(PROSE)[:400], InvalidDocument, "truncated or corrupt"),
        (encrypted(text_pdf(PROSE), "secret"), DocumentEncrypted, "encrypted"),
        (b"PK\x03\x04" + bytes(99), UnsupportedDocumentFormat, "103 bytes are a ZIP archive"),
        (b"<!DOCTYPE html><p>Sign in", UnsupportedDocumentFormat, "HTML"),
        (b"<?xml version='1.0'?>", UnsupportedDocumentFormat, "XML"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", UnsupportedDocumentFormat, "older Office"),
        (b"Dear Sir", UnsupportedDocumentFormat, "no PDF and no image"),
        (b"\xff\x4f\xff\x51", UnsupportedImageFormat, "JPEG2000"),
        (b"II*\0" + bytes(20), InvalidImage, "TIFF"),
        (png(noise(1))[:40], InvalidImage, "PNG"),
    ],
)
def test_what_is_no_readable_document_is_refused_with_its_own_code(
    data: bytes, error: type[NanoVLLMError], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        rendered(open_document(data))
    assert type(caught.value) is error


def test_every_code_of_documents_is_its_own() -> None:
    kinds = [InvalidDocument, *InvalidDocument.__subclasses__(), *InvalidPage.__subclasses__()]
    assert len({kind.code for kind in kinds}) == len(kinds) == 8
    assert len({kind.remedy for kind in kinds}) > 5


def test_a_document_beyond_its_bytes_or_pages_is_refused() -> None:
    with pytest.raises(DocumentTooLarge, match="100 bytes; 99 are allowed"):
        open_document(b"x" * 100, DocumentLimits(max_bytes=99))
    with pytest.raises(TooManyPages, match="3 pages or more; 2 are allowed"):
        open_document(text_pdf((), (), ()), DocumentLimits(max_pages=2))
    with pytest.raises(TooManyPages, match="3 pages or more; 2 are allowed"):
        open_document(tiff(noise(1), noise(2), noise(3), noise(4)), DocumentLimits(max_pages=2))


def test_an_owner_password_alone_hinders_nobody_to_read() -> None:
    plain = text_pdf(PROSE)
    document = open_document(encrypted(plain, ""))
    assert pixel_digest(rendered(document)) == pixel_digest(rendered(open_document(plain)))


def test_ten_thousand_pages_are_opened_and_the_last_one_is_rendered() -> None:
    document = open_document(many_pages_pdf(10_000))
    assert len(document.info.pages) == 10_000
    assert document.info.pages[-1] == PageInfo(10_000, 200, 100)
    assert document.text(10_000).text == "Page number 10000"
    assert rendered(document, 10_000).size == (200, 100)
    with pytest.raises(TooManyPages):
        open_document(many_pages_pdf(10_001))


def test_pages_of_a_claimed_count_are_not_made_up() -> None:
    tree = b"<< /Type /Pages /Kids [3 0 R] /Count %d >>"
    page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 10 10] >>"
    claims = [objects_pdf([b"<< /Type /Catalog /Pages 2 0 R >>", tree % count, page]) for count in (900, 10**8, 10**18)]
    for claim in claims:
        document = open_document(claim)
        assert rendered(document).size == (10, 10)
        for number in range(2, min(4, len(document.info.pages)) + 1):
            with pytest.raises(InvalidPage, match=f"page {number} of the PDF cannot be read"):
                rendered(document, number)
    with pytest.raises(InvalidPage):
        rendered(open_document(objects_pdf([b"<< /Type /Catalog /Pages 2 0 R >>", tree.replace(b"3 0", b"2 0") % 3])))


def test_sizes_are_those_of_the_page_as_it_is_shown() -> None:
    def turn(pdf: pikepdf.Pdf) -> None:
        pdf.pages[1].Rotate = 90
        pdf.pages[2].MediaBox = [100, 200, 400, 300]
        pdf.pages[3].CropBox = [50, 60, 150, 110]

    document = open_document(edited(text_pdf((), (), (), ()), turn))
    sizes = [(612, 792), (792, 612), (300, 100), (100, 50)]
    assert [(page.width_pt, page.height_pt) for page in document.info.pages] == sizes
    assert [rendered(document, page).size for page in (1, 2, 3, 4)] == sizes
    assert rendered(document, 3, dpi=144).size == (600, 200)
    assert rendered(document, 2, rotation=270).size == (612, 792)


@pytest.mark.parametrize("data", [text_pdf(PROSE), tiff(noise(1)), png(noise(2))])
def test_a_rotation_turns_clockwise(data: bytes) -> None:
    document = open_document(data)
    upright = np.asarray(rendered(document))
    for turns in (1, 2, 3):
        turned = np.asarray(rendered(document, rotation=90 * turns)).astype(int)
        assert turned.shape == np.rot90(upright, -turns).shape
        assert np.abs(turned - np.rot90(upright, -turns)).mean() < 2
    with pytest.raises(ConfigurationError, match="not by 45"):
        rendered(document, rotation=45)


def test_equal_pages_of_different_documents_have_equal_digests() -> None:
    first = open_document(text_pdf(PROSE, ("page two",)))
    second = open_document(
        edited(text_pdf(("cover",), PROSE, ("page 2",)), lambda pdf: pdf.docinfo.update({"/Title": "x"}))
    )
    assert pixel_digest(rendered(first, 1)) == pixel_digest(rendered(second, 2))
    assert pixel_digest(rendered(first, 2)) != pixel_digest(rendered(second, 3))
    # Whatever was rendered before, and again.
    assert pixel_digest(rendered(first, 1)) == pixel_digest(rendered(open_document(text_pdf(PROSE)), 1))


def test_a_page_too_large_for_its_pixels_has_a_lower_resolution_and_below_the_least_is_refused() -> None:
    document = open_document(text_pdf(PROSE))
    small = rendered(document, dpi=300, most=600_000)
    assert 590_000 < small.width * small.height <= 600_000
    with pytest.raises(PageTooLarge, match=r"8\.5x11 inches within 100000 pixels has 3\d\.?\d* dpi; 36 are needed"):
        rendered(document, dpi=300, most=100_000)
    poster = open_document(raw_pdf(b"", page="/MediaBox [0 0 14400 14400]"))
    with pytest.raises(PageTooLarge, match="200x200 inches"):
        rendered(poster, dpi=150, most=10**12)
    assert poster.text(1).is_blank


def test_a_page_with_too_many_characters_has_no_text_and_can_be_rendered() -> None:
    document = open_document(
        raw_pdf(b"BT /F1 1 Tf " + b"(aaaaaaaaaa ) Tj " * 20 + b"ET"), DocumentLimits(max_page_characters=99)
    )
    with pytest.raises(PageTooLarge, match="characters of text; 99 are allowed"):
        document.text(1)
    assert rendered(document).size == (612, 792)


@pytest.mark.parametrize("page", [0, -1, 3, 10**9])
def test_a_page_that_is_not_there_is_named(page: int) -> None:
    for data in (text_pdf((), ()), tiff(noise(1), noise(2))):
        document = open_document(data)
        for read in (rendered, type(document).text):
            with pytest.raises(InvalidPageRange, match=f"2 pages, and no page {page}"):
                read(document, page)


def test_the_pages_of_a_tiff_have_sizes_and_orientations_of_their_own() -> None:
    turned, fax = noise(2, (50, 30)), scan().convert("1")
    turned.encoderinfo = {"tiffinfo": {274: 6}}  # Orientation: to be turned clockwise
    fax.encoderinfo = {"compression": "group4", "dpi": (100, 100)}
    document = open_document(tiff(noise(1), turned, fax))
    assert [(page.width_pt, page.height_pt) for page in document.info.pages] == [(60, 40), (30, 50), (612, 792)]
    pixels = [np.asarray(image.convert("RGB")) for image in (noise(1), noise(2, (50, 30)), fax)]
    pixels[1] = np.rot90(pixels[1], -1)
    for page in (3, 1, 2, 3):
        assert np.array_equal(np.asarray(rendered(document, page)), pixels[page - 1])
    assert pixel_digest(rendered(document, 1)) == pixel_digest(rendered(open_document(png(noise(1)))))


def test_a_broken_page_of_a_tiff_leaves_the_others() -> None:
    data = tiff(noise(1), noise(2), compression="tiff_lzw")
    document = open_document(data)
    second = Image.open(io.BytesIO(data))
    second.seek(1)
    offset, size = second.tag_v2[273][0], second.tag_v2[279][0]
    broken = open_document(data[:offset] + bytes(size) + data[offset + size :])
    assert pixel_digest(rendered(broken, 1)) == pixel_digest(rendered(document, 1))
    with pytest.raises(InvalidImage, match="TIFF image is truncated or corrupt"):
        rendered(broken, 2)
    assert pixel_digest(rendered(broken, 1)) == pixel_digest(rendered(document, 1))


def test_a_page_of_a_tiff_is_bounded_before_it_is_decoded_and_shrunk_to_what_is_asked() -> None:
    document = open_document(tiff(noise(1), noise(2, (300, 200))), images=ImageLimits(max_pixels=59_999))
    assert rendered(document, 1).size == (60, 40)
    with pytest.raises(TooManyPixels, match="300x200 = 60000 pixels; 59999 are allowed"):
        rendered(document, 2)
    shrunk = rendered(open_document(tiff(noise(2, (300, 200)))), most=15_000)
    assert shrunk.size == (150, 100)


def test_the_bytes_of_a_tiff_are_bounded_as_those_of_a_document() -> None:
    data = tiff(noise(1), noise(2))
    assert len(open_document(data, images=ImageLimits(max_bytes=100)).info.pages) == 2
    assert rendered(open_document(png(noise(1)), images=ImageLimits(max_bytes=100))).size == (60, 40)


def test_a_fax_whose_pixels_are_not_square_is_shown_in_its_proportions() -> None:
    fax = scan(size=(1728, 1078)).convert("1")
    document = open_document(tiff(fax, dpi=(204, 98)))
    (page,) = document.info.pages
    assert (page.width_pt, page.height_pt) == pytest.approx((609.9, 792), abs=0.1)
    shown = rendered(document)
    assert shown.width == 1728
    assert shown.width / shown.height == pytest.approx(page.width_pt / page.height_pt, rel=1e-3)
    small = rendered(document, most=500_000)
    assert small.width * small.height <= 500_000
    assert small.width / small.height == pytest.approx(page.width_pt / page.height_pt, rel=1e-2)
    assert rendered(open_document(tiff(fax, dpi=(9000, 10)))).size == fax.size


def test_a_circle_of_tiff_directories_ends() -> None:
    data = bytearray(tiff(noise(1), noise(2)))
    image = Image.open(io.BytesIO(bytes(data)))
    first = int.from_bytes(data[4:8], "little")
    image.seek(1)
    entries = int.from_bytes(data[first : first + 2], "little")
    link = first + 2 + 12 * entries
    second = int.from_bytes(data[link : link + 4], "little")
    end = second + 2 + 12 * int.from_bytes(data[second : second + 2], "little")
    data[end : end + 4] = data[4:8]
    assert len(open_document(bytes(data)).info.pages) == 2


def test_a_scan_in_a_pdf_is_rendered_as_it_is() -> None:
    page = np.asarray(rendered(open_document(image_pdf(scan())), dpi=100).convert("L")).astype(int)
    assert page.shape == (1100, 850)
    assert np.abs(page - np.asarray(scan())).mean() < 3
