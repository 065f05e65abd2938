"""Synthetic receipts and shapes with exact answers, for training and evaluation of the shipped tiny model.

Every sample is a pure function of (index, seed, split). The two splits cannot share an image: a receipt belongs to a
split by a hash of its number, date and total, a shape by a hash of its geometry. One vendor in ten, by a hash of its
name, is never drawn for training: its receipts measure reading without memory of the name.

Pictures are 224 x 224 RGB. Text stands on a grid of 17 columns, 13 pixels apart, and one line in each 32-pixel row of a
tower's patches, wholly inside it, so that a patch meets at most three characters, all of one line. The whole grid moves
by up to 3 pixels across and 16 down: with text at any pixel, a tower this small makes twice the errors. The font is
Pillow's own.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Split = Literal["train", "heldout"]
Colour = tuple[int, int, int]

DEMO_SEED = 20261123
"""Seed of the demo's images, fixed before the first training run. The demo draws from split ``heldout``."""

SIZE_PX = 224
ADVANCE_PX = 13
PITCH_PX = 32
MAX_LINE_CHARS = SIZE_PX // ADVANCE_PX

PROMPTS: Mapping[str, str] = {
    "json": "Extract the fields as JSON: <|image|>",
    "text": "Extract text from this document: <|image|>",
    "total": "What is the total? <|image|>",
    "date": "What is the date? <|image|>",
    "number": "What is the number? <|image|>",
    "vendor": "Who is the vendor? <|image|>",
    "describe": "Describe this image: <|image|>",
    "compare": "Compare these two images: <|image|> and <|image|>",
}
FIELDS = ("vendor", "number", "date", "total")
KIND_WEIGHTS = (25, 10, 9, 9, 9, 9, 19, 10)
"""Relative frequencies of the kinds, in the order of ``PROMPTS``."""
DESCRIBED_RECEIPTS = 0.2
"""Share of ``describe`` samples that show a receipt instead of a shape."""

VENDORS: tuple[str, ...] = tuple(
    """ACORN BAKERY,ALPINE SPORTS,AMBER OPTICS,ANCHOR MARINE,APEX HARDWARE,ARROW COURIER,ASPEN BOOKS,ATLAS TRAVEL
    AURORA CAFE,BAMBOO KITCHEN,BAY STREET DELI,BEACON PRESS,BIRCH & SON,BLUE FINCH,BOLT ELECTRIC,BRICK LANE TOYS
    BRIGHT DENTAL,CEDAR FURNITURE,CITRUS BAR,CLOVER DAIRY,COBALT PAINTS,COPPER KETTLE,CORAL TAILOR,CRANE LOGISTICS
    CROWN CINEMA,DELTA PLUMBING,DESERT ROSE,DOVE LAUNDRY,EAGLE TYRES,EAST PIER FISH,ECHO RECORDS,ELM TREE INN
    EMBER GRILL,FALCON AIR,FERN GARDENS,FLINT & CO,FOX AND HOUND,GALAXY GAMES,GINGER BISTRO,GLACIER WATER
    GOLDEN WOK,GRANITE WORKS,GREEN GROCER,HARBOR VIEW,HAWK SECURITY,HAZEL PHARMACY,HERON HOTEL,HILL TOP FARM
    IRIS FLOWERS,IRON GYM,IVORY PIANOS,JADE PALACE,JASMINE SPA,JUNIPER SOAP,KESTREL MOTORS,KIWI FRUITS
    LANTERN PUB,LARK STATIONERY,LEMON TREE,LINDEN CLINIC,LOTUS YOGA,LUNA LIGHTING,MAPLE SYRUPS,MARBLE ARCH
    MEADOW MILK,METRO PARKING,MINT MOBILE,MOSAIC TILES,NORTH WIND,NOVA PRINT,OAK & IRON,OCEAN DIVERS
    OLIVE PRESS,ONYX JEWELS,ORCHID HOUSE,OTTER POOLS,PEARL DRIVE,PEPPER MILL,PINE LODGE,PLUM PUDDING
    QUARTZ CLOCKS,QUEEN STREET,RAVEN INK,RIVER BOATS,ROBIN NURSERY,RUBY SHOES,SAFFRON SPICE,SILVER SPOON
    SPARROW POST,STONE OVEN,TEAL TEXTILES,THISTLE WHISKY,TULIP BIKES,VELVET SOFA,WILLOW WINES,ZEBRA PHOTO""".replace(
        "\n    ", ","
    ).split(",")
)

_CONSONANTS = "BCDFGHJKLMNPQRSTVWXYZ"
_VOWELS = "AEIOUY"
_SUFFIXES = ("LTD", "CO", "INC", "GMBH", "CAFE", "SHOP", "& SONS", "BROS")
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_NUMBER_LETTERS = "ABCDEFGHJKLMNPRTUVWXYZ"
_PRACTICE_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:/-&$ "
_PRACTICE_WEIGHTS = 26 * [3] + 10 * [3] + 7 * [1] + [12]
_LABELS: Mapping[str, tuple[str, ...]] = {
    "number": ("NO", "NR", "NO.", "INVOICE", "RECEIPT", "REF"),
    "date": ("DATE", "DATE", "ISSUED", ""),
    "total": ("TOTAL", "TOTAL", "SUM", "AMOUNT", "TO PAY"),
}

SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLOURS: Mapping[str, Colour] = {
    "red": (215, 30, 35),
    "green": (30, 150, 55),
    "blue": (30, 65, 215),
    "yellow": (240, 215, 25),
    "purple": (130, 35, 160),
    "orange": (245, 130, 20),
}
BACKGROUNDS: Mapping[str, Colour] = {"white": (245, 245, 245), "gray": (140, 140, 140), "black": (18, 18, 18)}
_RADII_PX: Mapping[str, tuple[int, int]] = {"small": (34, 42), "large": (66, 88)}


@dataclass(frozen=True)
class Sample:
    """A question with its images (224 x 224 RGB) and the one correct answer.

    ``vendor_seen`` says whether the receipt's vendor may occur in training; it and ``fields`` are None for shapes.
    """

    kind: str
    prompt: str
    images: tuple[Image.Image, ...]
    answer: str
    vendor_seen: bool | None
    fields: Mapping[str, str] | None


@dataclass(frozen=True)
class Glyph:
    """A character and the pixel position of its centre."""

    character: str
    x: int
    y: int


@dataclass(frozen=True)
class Receipt:
    """A drawn receipt: its characters, its lines from top to bottom, and its fields as printed.

    A practice sheet is a receipt without fields.
    """

    image: Image.Image
    glyphs: tuple[Glyph, ...]
    lines: tuple[str, ...]
    fields: Mapping[str, str]


@dataclass(frozen=True)
class Shape:
    """A drawn shape, its description in words, and its coverage [224, 224] before colours and noise, 0 to 255."""

    image: Image.Image
    coverage: npt.NDArray[np.uint8]
    size: str
    colour: str
    form: str
    background: str


def is_heldout(identity: str) -> bool:
    """Whether the identity is the one in ten that is left out of training."""
    return hashlib.sha256(identity.encode()).digest()[0] % 10 == 0


def generator(index: int, *, seed: int, split: Split) -> random.Random:
    """Random generator of one sample; those of different splits, seeds or indices are unrelated."""
    return random.Random(hashlib.sha256(f"{split}/{seed}/{index}".encode()).digest())


def sample(index: int, *, seed: int, split: Split, kind: str | None = None) -> Sample:
    """Draws sample ``index`` of a split; ``kind`` is one of ``PROMPTS``, or None for a mixture of all kinds.

    Raises ValueError for an unknown split or kind.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', not {split!r}")
    if kind is not None and kind not in PROMPTS:
        raise ValueError(f"kind must be one of {', '.join(PROMPTS)}, not {kind!r}")
    rng = generator(index, seed=seed, split=split)
    drawn = rng.choices(list(PROMPTS), KIND_WEIGHTS)[0]
    kind = kind or drawn
    if kind == "compare":
        return compare(*shape_pair(rng, split))
    if kind == "describe" and rng.random() >= DESCRIBED_RECEIPTS:
        return describe(shape(rng, split))
    return ask(receipt(rng, split), kind)


def ask(drawn: Receipt, kind: str) -> Sample:
    """Question of a ``kind`` of ``PROMPTS`` but ``compare`` about a receipt."""
    fields = drawn.fields
    answers = {
        "json": json.dumps(fields),
        "text": "\n".join(drawn.lines),
        "describe": f"a receipt from {fields['vendor']}",
        **fields,
    }
    return Sample(kind, PROMPTS[kind], (drawn.image,), answers[kind], not is_heldout(fields["vendor"]), fields)


def describe(drawn: Shape) -> Sample:
    """Question for the description of a shape."""
    answer = f"a {drawn.size} {drawn.colour} {drawn.form} on a {drawn.background} background"
    return Sample("describe", PROMPTS["describe"], (drawn.image,), answer, None, None)


def compare(first: Shape, second: Shape) -> Sample:
    """Question whether two shapes agree in colour and form.

    The answer names both shapes before its verdict: a small model compares its own text better than two images.
    """
    names = [f"{'an' if one.colour[0] in 'aeiou' else 'a'} {one.colour} {one.form}" for one in (first, second)]
    answer = f"{names[0]} and {names[1]}: {'same' if names[0] == names[1] else 'different'}"
    return Sample("compare", PROMPTS["compare"], (first.image, second.image), answer, None, None)


def shape_pair(rng: random.Random, split: Split) -> tuple[Shape, Shape]:
    """Two shapes; in two pairs of five they agree in colour and form."""
    first = shape(rng, split)
    if rng.random() < 0.4:
        return first, shape(rng, split, colour=first.colour, form=first.form)
    return first, shape(rng, split)


def shape(rng: random.Random, split: Split, *, colour: str | None = None, form: str | None = None) -> Shape:
    """Draws one filled shape wholly inside the image."""
    colour = colour or rng.choice(list(COLOURS))
    form = form or rng.choice(SHAPES)
    background = rng.choice(list(BACKGROUNDS))
    while True:
        size = rng.choice(list(_RADII_PX))
        radius = rng.randint(*_RADII_PX[size])
        x, y = (rng.randint(radius + 6, SIZE_PX - radius - 7) for _ in range(2))
        if is_heldout(f"{size}/{radius}/{x}/{y}") == (split == "heldout"):
            break
    mask = Image.new("L", (SIZE_PX, SIZE_PX))
    draw = ImageDraw.Draw(mask)
    if form == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    else:
        draw.polygon(_outline(form, x, y, radius), fill=255)
    if form == "cross":
        arm = radius * 0.32
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=255)
    ink, paper = (_jitter(rng, base, 14) for base in (COLOURS[colour], BACKGROUNDS[background]))
    coverage = np.asarray(mask)
    return Shape(_develop(rng, coverage, ink, paper), coverage, size, colour, form, background)


def _outline(form: str, x: int, y: int, radius: int) -> list[tuple[float, float]]:
    half, arm = radius * 0.85, radius * 0.32
    outlines: dict[str, list[tuple[float, float]]] = {
        "square": [(-half, -half), (half, -half), (half, half), (-half, half)],
        "triangle": [(0, -radius), (radius, half), (-radius, half)],
        "diamond": [(0, -radius), (radius, 0), (0, radius), (-radius, 0)],
        "cross": [(-radius, -arm), (radius, -arm), (radius, arm), (-radius, arm)],
    }
    return [(x + dx, y + dy) for dx, dy in outlines[form]]


def receipt(rng: random.Random, split: Split) -> Receipt:
    """Draws one receipt. Held-out receipts have a held-out vendor in one case of four, otherwise any vendor."""
    while True:
        fields = {"vendor": _vendor(rng, split), "number": _number(rng), "date": _date(rng), "total": _total(rng)}
        lines = _lines(rng, fields)
        identity = "/".join(fields[name] for name in FIELDS[1:])
        if lines is not None and is_heldout(identity) == (split == "heldout"):
            break
    return Receipt(*_print(rng, lines), tuple(lines), fields)


def practice_sheet(rng: random.Random) -> Receipt:
    """Draws a page of random characters, printed as receipts are: none of them can be guessed from the others."""
    lines = []
    for _ in range(rng.choice((4, 5, 5))):
        line = rng.choices(_PRACTICE_CHARACTERS, _PRACTICE_WEIGHTS, k=rng.randint(10, MAX_LINE_CHARS))
        lines.append("".join(line).strip() or "A")
    return Receipt(*_print(rng, lines), tuple(lines), {})


def _vendor(rng: random.Random, split: Split) -> str:
    wants_heldout = split == "heldout" and rng.random() < 0.25
    from_list = rng.random() < 0.5
    while True:
        name = rng.choice(VENDORS) if from_list else _invented_name(rng)
        # Without anagrams the text model memorises the list, and corrects what the tower reads towards it.
        if split == "train" and rng.random() < 0.35:
            name = _anagram(rng, name)
        if split == "heldout" and not wants_heldout:
            return name
        if is_heldout(name) == wants_heldout:
            return name


def _anagram(rng: random.Random, name: str) -> str:
    letters = [character for character in name if character != " "]
    rng.shuffle(letters)
    return "".join(" " if character == " " else letters.pop() for character in name)


def _invented_name(rng: random.Random) -> str:
    while True:
        words = [_invented_word(rng) for _ in range(rng.choice((1, 1, 2)))]
        if rng.random() < 0.35:
            words.append(rng.choice(_SUFFIXES))
        name = " ".join(words)
        if 4 <= len(name) <= MAX_LINE_CHARS and name not in VENDORS:
            return name


def _invented_word(rng: random.Random) -> str:
    syllables = []
    for _ in range(rng.choice((1, 2, 2, 3))):
        tail = rng.choice(_CONSONANTS) if rng.random() < 0.4 else ""
        syllables.append(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) + tail)
    return "".join(syllables)


def _number(rng: random.Random) -> str:
    digits = f"{rng.randrange(10**6):06d}"
    letters = rng.choice(_NUMBER_LETTERS) + rng.choice(_NUMBER_LETTERS)
    return rng.choice(
        (digits, digits[:5], f"{digits[:2]}-{digits[2:]}", f"{letters[0]}-{digits[:5]}", letters + digits[:4])
    )


def _date(rng: random.Random) -> str:
    year, month, day = rng.randint(2015, 2032), rng.randint(1, 12), rng.randint(1, 28)
    name = _MONTHS[month - 1]
    return rng.choice(
        (
            f"{year}-{month:02d}-{day:02d}",
            f"{day:02d}/{month:02d}/{year}",
            f"{day:02d}.{month:02d}.{year}",
            f"{day:02d} {name} {year}",
            f"{name} {day:02d} {year}",
        )
    )


def _total(rng: random.Random) -> str:
    cents = rng.randrange(100, 10 ** rng.choice((4, 5, 6)))
    return rng.choice(("", "", "$", "EUR ")) + f"{cents // 100:,}.{cents % 100:02d}"


def _extra(rng: random.Random) -> str:
    return rng.choice(
        (
            "THANK YOU",
            "WELCOME",
            "CUSTOMER COPY",
            "PAID CASH",
            f"TEL 555-{rng.randrange(10**4):04d}",
            f"TABLE {rng.randint(1, 40)}",
            f"VISA {rng.randrange(10**4):04d}",
            f"TAX {rng.randint(1, 99)}.{rng.randrange(100):02d}",
        )
    )


def _lines(rng: random.Random, fields: Mapping[str, str]) -> list[str] | None:
    """Lines of a receipt from top to bottom, or None where one is wider than the paper."""
    separator = rng.choice((" ", ": "))
    printed = []
    for name in rng.sample(FIELDS[1:], 3):
        label = rng.choice(_LABELS[name])
        printed.append(f"{label}{separator}{fields[name]}" if label else fields[name])
    printed.insert(0, fields["vendor"])
    if rng.random() < 0.4:
        printed.append(_extra(rng))
    return printed if all(len(line) <= MAX_LINE_CHARS for line in printed) else None


def _print(rng: random.Random, lines: list[str]) -> tuple[Image.Image, tuple[Glyph, ...]]:
    coverage, glyphs = _typeset(rng, lines)
    if rng.random() < 0.2:
        coverage = np.asarray(Image.fromarray(coverage).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.7))))
    dark = _jitter(rng, rng.choice(((15, 15, 15), (20, 25, 90), (95, 20, 25), (15, 70, 35), (60, 60, 65))), 15)
    light = _jitter(rng, rng.choice(((245, 245, 245), (240, 228, 200), (215, 230, 245), (245, 220, 225))), 10)
    return _develop(rng, coverage, dark, light), glyphs


_MARGIN_PX = 12


@lru_cache(maxsize=1024)
def _glyph(character: str, size: int) -> npt.NDArray[np.uint8]:
    """Coverage of one character, horizontally centred in a cell of 24 x 24 pixels, baseline at pixel 17."""
    cell = Image.new("L", (2 * _MARGIN_PX, 2 * _MARGIN_PX))
    font = ImageFont.load_default(size)
    ImageDraw.Draw(cell).text((_MARGIN_PX, 17), character, fill=255, font=font, anchor="ms")
    return np.asarray(cell)


def _typeset(rng: random.Random, lines: list[str]) -> tuple[npt.NDArray[np.uint8], tuple[Glyph, ...]]:
    """Typesets the lines: the ink's coverage (224 x 224) and the glyphs' centres."""
    size = rng.randint(14, 16)
    first = rng.randint(0, SIZE_PX // PITCH_PX - len(lines))
    rows = range(first, first + len(lines))
    offset = rng.randint(8, PITCH_PX - 8)
    alignment = rng.choice(("left", "left", "centre", "right"))
    margin = rng.randint(0, MAX_LINE_CHARS - max(map(len, lines)))
    edge = rng.randint(0, SIZE_PX - ADVANCE_PX * MAX_LINE_CHARS)
    canvas = np.zeros((SIZE_PX + 2 * _MARGIN_PX, SIZE_PX + 2 * _MARGIN_PX), np.uint8)
    glyphs = []
    for row, line in zip(rows, lines, strict=True):
        y = row * PITCH_PX + offset
        slack = MAX_LINE_CHARS - len(line)
        indent = {"left": margin, "centre": slack // 2, "right": slack - margin}[alignment]
        for column, character in enumerate(line):
            if character == " ":
                continue
            x = edge + (indent + column) * ADVANCE_PX + ADVANCE_PX // 2
            cell = canvas[y : y + 2 * _MARGIN_PX, x : x + 2 * _MARGIN_PX]
            np.maximum(cell, _glyph(character, size), out=cell)
            glyphs.append(Glyph(character, x, y))
    coverage = canvas[_MARGIN_PX:-_MARGIN_PX, _MARGIN_PX:-_MARGIN_PX]
    if rng.random() < 0.3:
        y = rng.choice(rows[:-1]) * PITCH_PX + offset + PITCH_PX // 2
        coverage[y, rng.randint(0, 30) : rng.randint(190, SIZE_PX)] = 170
    return np.ascontiguousarray(coverage), tuple(glyphs)


@lru_cache(maxsize=1)
def _noise() -> npt.NDArray[np.int16]:
    """Tile of unit noise in 1/16 steps, cropped at random: noise drawn for each image would cost more than the rest."""
    tile = np.random.default_rng(7).normal(0, 16, (2 * SIZE_PX, 2 * SIZE_PX, 3))
    return tile.astype(np.int16)


def _jitter(rng: random.Random, colour: Colour, spread: int) -> Colour:
    red, green, blue = (min(255, max(0, base + rng.randint(-spread, spread))) for base in colour)
    return red, green, blue


def _develop(rng: random.Random, coverage: npt.NDArray[np.uint8], ink: Colour, paper: Colour) -> Image.Image:
    """Renders coverage (224 x 224) in colour, with uneven light and pixel noise."""
    ramp = np.linspace(0, 1, 256)[:, None]
    palette = np.asarray(paper) + ramp * (np.asarray(ink) - np.asarray(paper))
    pixels = palette.astype(np.int16)[coverage]
    if rng.random() < 0.5:
        slope = np.linspace(rng.randint(-25, 0), rng.randint(-25, 0), SIZE_PX).astype(np.int16)
        pixels += slope[:, None, None] if rng.random() < 0.5 else slope[None, :, None]
    strength = rng.choice((0, 3, 6, 10))
    if strength:
        x, y = rng.randrange(SIZE_PX), rng.randrange(SIZE_PX)
        pixels += _noise()[y : y + SIZE_PX, x : x + SIZE_PX] * np.int16(strength) >> 4
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
