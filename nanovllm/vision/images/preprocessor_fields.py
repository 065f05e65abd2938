"""Fields of preprocessor_config.json: values that no image can be prepared with are refused before one comes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from nanovllm.errors import UnsupportedModel

_FLAGS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "do_convert_rgb")
_COUNTS = ("min_pixels", "max_pixels", "patch_size", "merge_size", "temporal_patch_size")
_FILTERS = {member.value for member in Image.Resampling}


def check_preprocessor(fields: Mapping[str, Any], file: str) -> None:
    """Raise UnsupportedModel for a value of ``fields`` that no image can be prepared with; names ``file`` and field."""
    for name, value, wanted in _wrong(fields):
        raise UnsupportedModel(f"{file}: {name} is {repr(value)[:80]}, not {wanted}")


def _wrong(fields: Mapping[str, Any]) -> Iterator[tuple[str, object, str]]:
    for name, value in fields.items():
        if name in _FLAGS and value not in (True, False):
            yield name, value, "true or false"
        elif name == "resample" and (not _is_count(value, least=0) or value not in _FILTERS):
            yield name, value, f"one of Pillow's filters, {', '.join(map(str, sorted(_FILTERS)))}"
        elif name in _COUNTS and not _is_count(value):
            yield name, value, "a positive integer"
        elif name == "rescale_factor" and not _is_positive(value):
            yield name, value, "a positive number"
        elif name in ("image_mean", "image_std"):
            numbers = value if isinstance(value, list | tuple) else [value] * 3
            is_good = len(numbers) == 3 and all(map(_is_number, numbers))
            if not is_good or (name == "image_std" and not all(map(_is_positive, numbers))):
                yield name, value, "three numbers" if name == "image_mean" else "three positive numbers"
        elif name in ("size", "crop_size") and not _is_size(value):
            yield name, value, "a positive integer or an object of them"
    crop = fields.get("crop_size")
    if isinstance(crop, dict) and not (crop.get("height") and crop.get("width")):
        yield "crop_size", crop, "an object with height and width"


def _is_size(value: object) -> bool:
    if isinstance(value, dict):
        # transformers writes the keys that do not count as null.
        return all(one is None or _is_count(one) for one in value.values())
    return _is_count(value)


def _is_count(value: object, *, least: int = 1) -> bool:
    return type(value) is int and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0
