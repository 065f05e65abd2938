"""Fields of config.json: values that transformers takes and no model can have, and its own refusals in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from nanovllm.checkpoints.transformers_imports import ACTIVATIONS
from nanovllm.errors import NanoVLLMError, UnsupportedModel

_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "depth", "num_heads", "image_size", "patch_size", "spatial_merge_size",
    "temporal_patch_size", "out_hidden_size", "num_channels", "in_channels", "num_position_embeddings",
)  # fmt: skip
_EPSILONS = ("rms_norm_eps", "layer_norm_eps")
_ROPE = ("rope_parameters", "rope_scaling")
_ROPE_NUMBERS = (
    "factor", "rope_theta", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast",
    "beta_slow", "attention_factor",
)  # fmt: skip
_MAX_SHOWN_CHARS = 300


@contextmanager
def reading_config(fields: Mapping[str, Any], name: str) -> Iterator[None]:
    """What makes a configuration or a module of ``fields``, the config.json of checkpoint ``name``.

    Raises:
        UnsupportedModel: a value that no model can have, or that transformers refuses; names field and value.
    """
    for place, wrong, wanted in _wrong_values(fields):
        raise UnsupportedModel(f"config.json of {name!r}: {place} is {repr(wrong)[:80]}, not {wanted}")
    try:
        yield
    except NanoVLLMError:
        raise
    except Exception as error:  # a validator of a family raises whatever it likes
        why = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_SHOWN_CHARS]
        kind = fields.get("model_type")
        raise UnsupportedModel(
            f"config.json of {name!r} (model_type {kind!r}) is not understood by transformers: {why}"
        ) from error


def _wrong_values(fields: Mapping[str, Any]) -> Iterator[tuple[str, object, str]]:
    """Place, value and what belongs there."""
    architectures = fields.get("architectures")
    if architectures is not None and not _is_list_of(str, architectures):
        yield "architectures", architectures, "a list of names"
    for prefix in ("", "text_config", "vision_config"):
        part = fields.get(prefix) if prefix else fields
        if part is None:
            continue
        if not isinstance(part, dict):
            yield prefix, part, "an object"
            continue
        for name, value, wanted in _wrong_in(part):
            yield f"{prefix}.{name}" if prefix else name, value, wanted


def _wrong_in(part: Mapping[str, Any]) -> Iterator[tuple[str, object, str]]:
    # Null is a default in some families; lists are, for each layer, those of families that are refused by name.
    for name in _COUNTS:
        value = part.get(name)
        if isinstance(value, (str, float, bool)) or (isinstance(value, int) and value < 1):
            yield name, value, "a positive integer"
    for name in _EPSILONS:
        value = part.get(name)
        if value is not None and not (_is_number(value) and 0 <= value < 1):
            yield name, value, "a number from 0 to 1"
    heads, shared = part.get("num_attention_heads"), part.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        yield "num_key_value_heads", shared, f"a divisor of num_attention_heads, which is {heads}"
    for name in ("dtype", "torch_dtype"):
        value = part.get(name)
        is_name = isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)
        if not is_name and value is not None and not isinstance(value, dict):
            yield name, value, "a type of torch, such as 'bfloat16'"
    for name in ("hidden_act", "projector_hidden_act"):
        value = part.get(name)
        if value is not None and (not isinstance(value, str) or value not in ACTIVATIONS):
            yield name, value, "an activation that transformers has"
    yield from _wrong_numbers("", part, ("rope_theta",))
    for name in _ROPE:
        rope = part.get(name)
        if isinstance(rope, dict):
            yield from _wrong_numbers(f"{name}.", rope, _ROPE_NUMBERS)
            sections = rope.get("mrope_section")
            if sections is not None and not _is_list_of(int, sections):
                yield f"{name}.mrope_section", sections, "a list of integers"
        elif rope is not None:
            yield name, rope, "an object"


def _wrong_numbers(prefix: str, part: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[tuple[str, object, str]]:
    for name in names:
        value = part.get(name)
        if value is not None and not (_is_number(value) and 0 < value < float("inf")):
            yield f"{prefix}{name}", value, "a positive number"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
