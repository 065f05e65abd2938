"""Image preprocessing of a checkpoint, pinned to Pillow: RGB image to the uint8 pixels of its tower.

Equal bit for bit to the Pillow variants of transformers' CLIP, SigLIP, LLaVA and Qwen-VL image processors, up to and
including the normalised floats. The uint8 half runs where the image is decoded; the rest is a table of 256 values a
channel.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from math import ceil, floor, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from PIL import Image

from nanovllm.checkpoints.resolve import read_json_object
from nanovllm.errors import ConfigurationError, InvalidImage, ModelNotFound, TooManyPixels, UnsupportedModel
from nanovllm.vision.images.decode import DEFAULT_LIMITS, ImageLimits, ImageSource, load_rgb, read_source
from nanovllm.vision.images.digest import pixel_digest
from nanovllm.vision.images.image_file import ImageFile, encode_image, is_plain
from nanovllm.vision.images.preprocessor_fields import check_preprocessor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

# Incremented when equal fields give other pixels.
TRANSFORM_VERSION = 1

# "Shortest edge to 224" makes gigabytes of a strip one pixel wide and 50 million long.
MAX_RESIZED_PIXELS = 16 * 2**20

if TYPE_CHECKING:
    from torch import Tensor

Channels = tuple[float, float, float]
ResizeRule = Literal["shortest_edge", "shortest_and_longest_edge", "exact", "fit_within", "pixel_budget"]

MOST_ELONGATED = 200  # times longer than wide, under a pixel budget: beyond it no rounding keeps the proportions


@dataclass(frozen=True)
class ImageTransform:
    """Resizing, crop, rescaling and normalisation of a checkpoint's preprocessor configuration.

    ``resize`` is the meaning of ``size``: ``(edge,)``, ``(shortest, longest)``, ``(height, width)``,
    ``(max_height, max_width)``, or ``(min_pixels, max_pixels, multiple)`` for sides that are multiples of a number and
    keep the image's own resolution between two areas; None leaves the size. ``resample`` is Pillow's number of the
    filter. ``crop`` is ``(height, width)``, padded with black where the image is smaller. ``pad_to_square`` pads to a
    square first, with the mean as colour. ``file_format`` prepares files in place of pixels: the one that the image
    came in where every reader sees the same pixels in it, else one of this format.
    """

    resize: ResizeRule | None = "shortest_edge"
    size: tuple[int, ...] = (224,)
    resample: int = Image.Resampling.BICUBIC.value
    crop: tuple[int, int] | None = (224, 224)
    pad_to_square: bool = False
    rescale_factor: float | None = 1 / 255
    mean: Channels | None = CLIP_MEAN
    std: Channels | None = CLIP_STD
    file_format: Literal["png", "jpeg"] | None = None

    @classmethod
    def from_preprocessor_config(cls, config: dict[str, Any] | str | Path) -> Self:
        """Read a ``preprocessor_config.json`` or ``processor_config.json``, or the directory that holds one.

        Raises:
            ModelNotFound: there is no such file, or it is no JSON object.
            UnsupportedModel: another processor than CLIP's, SigLIP's, LLaVA's or Qwen-VL's, an unknown option, or a
                value that no image can be prepared with.
        """
        file = "preprocessor_config.json"
        if isinstance(config, dict):
            fields = config
        else:
            path = _file_in(Path(config))
            file, fields = path.name, read_json_object(path, missing=f"{path} does not exist")
        fields = fields.get("image_processor", fields)
        if not isinstance(fields, dict):
            raise UnsupportedModel(f"{file}: image_processor is {repr(fields)[:80]}, not an object")
        fields = {key: value for key, value in fields.items() if value is not None}
        kind = _kind(fields)
        check_preprocessor(fields, file)
        is_siglip, is_qwen = kind == "Siglip", kind == "Qwen2VL"
        resize: ResizeRule | None
        size: tuple[int, ...]
        if is_qwen:
            resize, size = "pixel_budget", _pixel_budget(fields)
        else:
            resize, size = _resize_rule(fields.get("size", {"height": 224, "width": 224} if is_siglip else 224))
        if not fields.get("do_resize", True):
            if is_qwen:
                raise UnsupportedModel("do_resize false is not supported for Qwen2VLImageProcessor: patches must fit")
            resize, size = None, ()
        if fields.get("do_pad") and kind in ("CLIP", "Siglip"):
            raise UnsupportedModel("do_pad is supported for LlavaImageProcessor only")
        is_cropped = not is_qwen and fields.get("do_center_crop", not is_siglip)
        return cls(
            resize=resize,
            size=size,
            resample=int(fields.get("resample", Image.Resampling.BICUBIC)),
            crop=_pair(fields.get("crop_size", 224)) if is_cropped else None,
            pad_to_square=kind == "Llava" and bool(fields.get("do_pad", False)),
            rescale_factor=float(fields.get("rescale_factor", 1 / 255)) if fields.get("do_rescale", True) else None,
            mean=_channels(fields.get("image_mean", HALF if is_siglip else CLIP_MEAN), fields),
            std=_channels(fields.get("image_std", HALF if is_siglip else CLIP_STD), fields),
        )

    @classmethod
    def for_siglip(cls, size: int) -> Self:
        """SigLIP's default preprocessing at ``size`` pixels a side."""
        return cls(resize="exact", size=(size, size), crop=None, mean=HALF, std=HALF)

    @classmethod
    def for_clip(cls, size: int) -> Self:
        """CLIP's default preprocessing at ``size`` pixels a side."""
        return cls(size=(size,), crop=(size, size))

    @classmethod
    def for_files(cls, file_format: Literal["png", "jpeg"]) -> Self:
        """No change of the image, prepared as a file."""
        return cls(resize=None, size=(), crop=None, rescale_factor=None, mean=None, std=None, file_format=file_format)

    def resized(self, side: int) -> Self:
        """This preprocessing with square images of ``side`` pixels."""
        if side < 1:
            raise ConfigurationError(f"an image size of {side} pixels is not positive")
        if self.resize == "shortest_edge" and self.crop is not None:
            return replace(self, size=(side,), crop=(side, side))
        crop = (side, side) if self.crop is not None else None
        return replace(self, resize="exact", size=(side, side), crop=crop)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`."""
        fields = json.loads(text)
        for name in ("size", "crop", "mean", "std"):
            fields[name] = None if fields[name] is None else tuple(fields[name])
        return cls(**fields)

    def to_json(self) -> str:
        """Canonical JSON: equal transforms give equal texts."""
        fields = asdict(self)
        if self.file_format is None:
            del fields["file_format"]  # the fingerprints of checkpoints are older than this field
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that determines the pixels; part of the encoder's revision."""
        return hashlib.sha256(f"{TRANSFORM_VERSION}:{self.to_json()}".encode()).hexdigest()

    @property
    def output_size(self) -> tuple[int, int] | None:
        """``(height, width)`` of every output, or None where it depends on the image."""
        if self.crop is not None:
            return self.crop
        if self.resize == "exact":
            return self.size[0], self.size[1]
        return None

    def apply(self, rgb: Image.Image) -> np.ndarray:
        """Resize and crop: uint8 ``[H, W, 3]``, before rescaling and normalisation.

        Raises:
            TooManyPixels, InvalidImage: as `check`.
        """
        if self.pad_to_square:
            rgb = self._padded_to_square(rgb)
        if self.resize is not None:
            height, width = self.check(rgb.width, rgb.height)
            # A side shorter than half a pixel rounds to zero there, which no filter can produce.
            rgb = rgb.resize((max(width, 1), max(height, 1)), resample=Image.Resampling(self.resample))
        if self.crop is not None:
            height, width = self.crop
            left, top = (rgb.width - width) // 2, (rgb.height - height) // 2
            # Pillow fills what lies outside the image with zeros.
            rgb = rgb.crop((left, top, left + width, top + height))
        return np.array(rgb)

    def check(self, width: int, height: int) -> tuple[int, int]:
        """The height and width after resizing. Sides may be swapped, as EXIF orientation does: both are refused then.

        Raises:
            TooManyPixels: the image is so narrow that resizing its shortest edge would exceed ``MAX_RESIZED_PIXELS``.
            InvalidImage: it is narrower than a pixel budget allows.
        """
        if self.resize is None:
            return height, width
        if self.pad_to_square:
            height = width = max(height, width)
        rows, columns = self._target(height, width)
        if rows * columns > MAX_RESIZED_PIXELS and rows * columns > height * width:
            raise TooManyPixels(f"the image of {width}x{height} pixels is too narrow: it would become {columns}x{rows}")
        return rows, columns

    def lookup_table(self) -> np.ndarray:
        """Normalised float32 value of each byte in each channel, ``[3, 256]``."""
        values = np.arange(256, dtype=np.uint8)
        levels = values.astype(np.float32)
        if self.rescale_factor is not None:
            # In float64 first, as in transformers: the last bit depends on it.
            levels = (values.astype(np.float64) * self.rescale_factor).astype(np.float32)
        table = np.repeat(levels[None], 3, axis=0)
        if self.mean is not None and self.std is not None:
            table = (table - np.array(self.mean, np.float32)[:, None]) / np.array(self.std, np.float32)[:, None]
        return table

    def _padded_to_square(self, rgb: Image.Image) -> Image.Image:
        if rgb.width == rgb.height:
            return rgb
        side = max(rgb.size)
        colour = tuple(int(value * 255) for value in self.mean) if self.mean else (0, 0, 0)
        square = Image.new("RGB", (side, side), colour)
        square.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
        return square

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.resize == "exact":
            return self.size[0], self.size[1]
        if self.resize == "shortest_edge":
            long_side = int(self.size[0] * max(height, width) / min(height, width))
            return (long_side, self.size[0]) if width <= height else (self.size[0], long_side)
        if self.resize == "pixel_budget":
            return _within_budget(height, width, *self.size)
        if self.resize == "fit_within":
            scale = min(self.size[0] / height, self.size[1] / width)
            return int(height * scale), int(width * scale)
        return _with_longest_edge(height, width, self.size[0], self.size[1])


AS_DECODED = ImageTransform(resize=None, crop=None, rescale_factor=None, mean=None, std=None)
"""Of images that go to a processor of transformers or vLLM: nothing is done to them."""


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """Preprocessed image, or its embedding. Compared by identity; equal pictures have equal digests.

    Attributes:
        pixels: uint8 ``[H, W, 3]`` after the transform; None where the embedding is known, or a file was prepared.
        digest: SHA-256 (32 bytes) of the original RGB pixels and size, before the transform.
        width, height: of the original, in pixels, its EXIF orientation applied.
        size: (height, width) after the transform.
        file_digest: SHA-256 (32 bytes) of the file that the image came in, where it came in one.
        embedding: the encoder's output, found by ``file_digest``. Held as long as this object is.
        file: in place of pixels, for a transform with ``file_format``.
        stored_at: S3 URI and version of the object that ``file`` is, byte for byte, where it is one.
    """

    pixels: np.ndarray | None
    digest: bytes
    width: int
    height: int
    size: tuple[int, int]
    file_digest: bytes | None = None
    embedding: Tensor | None = None
    file: ImageFile | None = None
    stored_at: tuple[str, str] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels, of the embedding or of the file."""
        return sum(part.nbytes for part in (self.pixels, self.embedding, self.file) if part is not None)


def prepare_image(
    source: ImageSource, transform: ImageTransform, limits: ImageLimits = DEFAULT_LIMITS
) -> PreparedImage:
    """Decode, digest and transform one image; see `load_rgb` for what ``source`` may be and what is raised."""
    original = None
    if transform.file_format is not None and isinstance(source := read_source(source, limits), bytes):
        original = source
    return prepare_rgb(load_rgb(source, limits, transform.check), transform, original)


def prepare_rgb(rgb: Image.Image, transform: ImageTransform, original: bytes | None = None) -> PreparedImage:
    """Digest and transform an RGB image of 8 bits a channel; ``original`` is the file that it came in."""
    if transform.file_format is not None:
        media_type = is_plain(original) if original is not None else None
        if original is not None and media_type is not None:
            file = ImageFile(original, media_type, is_original=True)
        else:
            file = encode_image(rgb, transform.file_format)
        return PreparedImage(None, pixel_digest(rgb), rgb.width, rgb.height, (rgb.height, rgb.width), file=file)
    pixels = transform.apply(rgb)
    return PreparedImage(pixels, pixel_digest(rgb), rgb.width, rgb.height, (pixels.shape[0], pixels.shape[1]))


def _file_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    names = ("processor_config.json", "preprocessor_config.json")
    found = next((path / name for name in names if _has_image_processor(path / name)), None)
    if found is None:
        raise ModelNotFound(f"{path} holds neither of {', '.join(names)} with an image processor")
    return found


def _has_image_processor(path: Path) -> bool:
    """Whether the file has the image processor's settings: processor_config.json of older checkpoints lacks them."""
    if not path.is_file():
        return False
    return path.name == "preprocessor_config.json" or "image_processor" in read_json_object(path, missing=path.name)


def _kind(fields: dict[str, Any]) -> str:
    name = str(fields.get("image_processor_type") or fields.get("feature_extractor_type") or "CLIPImageProcessor")
    known = re.fullmatch(
        r"(CLIP|Siglip|Llava|Qwen2VL)(ImageProcessor|ImageProcessorFast|ImageProcessorPil|FeatureExtractor)", name
    )
    if known is None:
        raise UnsupportedModel(
            f"the image processor {name} is not supported; CLIP's, SigLIP's, LLaVA's and Qwen2VL's are"
        )
    return known[1]


def _pixel_budget(fields: dict[str, Any]) -> tuple[int, int, int]:
    size = fields.get("size", {})
    smallest = fields.get("min_pixels", size.get("shortest_edge", 56 * 56))
    largest = fields.get("max_pixels", size.get("longest_edge", 28 * 28 * 1280))
    return int(smallest), int(largest), int(fields.get("patch_size", 14) * fields.get("merge_size", 2))


def _resize_rule(size: int | dict[str, int]) -> tuple[ResizeRule, tuple[int, ...]]:
    if isinstance(size, int):
        return "shortest_edge", (size,)
    size = {key: value for key, value in size.items() if value}
    if "shortest_edge" in size and "longest_edge" in size:
        return "shortest_and_longest_edge", (size["shortest_edge"], size["longest_edge"])
    if "shortest_edge" in size:
        return "shortest_edge", (size["shortest_edge"],)
    if "max_height" in size and "max_width" in size:
        return "fit_within", (size["max_height"], size["max_width"])
    if "height" in size and "width" in size:
        return "exact", (size["height"], size["width"])
    raise UnsupportedModel(f"the image size {size} of the preprocessor configuration is not understood")


def _pair(size: int | dict[str, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _channels(values: Any, fields: dict[str, Any]) -> Channels | None:
    if not fields.get("do_normalize", True):
        return None
    red, green, blue = values if isinstance(values, (list, tuple)) else (values,) * 3
    return float(red), float(green), float(blue)


def _within_budget(height: int, width: int, smallest: int, largest: int, multiple: int) -> tuple[int, int]:
    """Nearest multiples of the sides, scaled in proportion where their area is beyond a bound.

    Rounding never exceeds the upper bound; in transformers it does for narrow images under a low one.
    """
    if max(height, width) > MOST_ELONGATED * min(height, width):
        raise InvalidImage(f"the image of {width}x{height} pixels is too narrow: {MOST_ELONGATED}:1 is the limit")
    rows, columns = round(height / multiple), round(width / multiple)
    if rows * columns * multiple**2 > largest:
        shrink = sqrt(height * width / largest)
        rows, columns = (max(1, floor(side / shrink / multiple)) for side in (height, width))
    elif rows * columns * multiple**2 < smallest:
        grow = sqrt(smallest / (height * width))
        rows, columns = (ceil(side * grow / multiple) for side in (height, width))
    rows = min(rows, largest // multiple**2)
    return rows * multiple, min(columns, largest // multiple**2 // rows) * multiple


def _with_longest_edge(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    exact: float | None = None
    if max(height, width) / min(height, width) * shortest > longest:
        exact = longest * min(height, width) / max(height, width)
        shortest = round(exact)
    if min(height, width) == shortest:
        return height, width
    scaled = shortest if exact is None else exact
    if width < height:
        return int(scaled * height / width), shortest
    return shortest, int(scaled * width / height)
