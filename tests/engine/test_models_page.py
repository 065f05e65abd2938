"""docs/models.md: the figures of its checkpoints by their shapes, and its architectures by the registry."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from generic_checkpoints import IMAGE_FAMILIES
from transformers import AutoConfig, Qwen3VLVisionModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from nanovllm.engine.layers.linear import Linear
from nanovllm.engine.models.decoder import Decoder
from nanovllm.engine.models.qwen_vl import DECODERS
from nanovllm.engine.models.registry import LLAVA, QWEN_VL, TEXT_FAMILIES
from nanovllm.pipeline.documents.page_sizes import A4, Points, rendered_size
from nanovllm.vision.encoders.qwen import native_tokens, native_transform
from nanovllm.vision.images.preprocess import ImageTransform

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BF16_BYTES = 2
ANY_AREA = 10**9


@dataclass(frozen=True)
class Shape:
    """What decides a checkpoint's figures, as its config.json has it."""

    family: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    is_tied: bool
    tower: tuple[int, int, int] = (24, 1024, 4096)
    deepstack: tuple[int, ...] = (5, 11, 17)


SHAPES = {
    "Qwen/Qwen3-VL-2B-Instruct": Shape("qwen3_vl", 2048, 6144, 28, 16, 8, 151_936, True),
    "Qwen/Qwen3-VL-4B-Instruct": Shape("qwen3_vl", 2560, 9728, 36, 32, 8, 151_936, True),
    "Qwen/Qwen3-VL-8B-Instruct": Shape(
        "qwen3_vl", 4096, 12_288, 36, 32, 8, 151_936, False, (27, 1152, 4304), (8, 16, 24)
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": Shape("qwen2_5_vl", 2048, 11_008, 36, 16, 2, 151_936, True, (32, 1280, 3420)),
    "Qwen/Qwen2.5-VL-7B-Instruct": Shape("qwen2_5_vl", 3584, 18_944, 28, 28, 4, 152_064, False, (32, 1280, 3420)),
}
TOWERS: dict[str, Any] = {"qwen3_vl": Qwen3VLVisionModel, "qwen2_5_vl": Qwen2_5_VisionTransformerPretrainedModel}
ARCHITECTURES = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
POSITIONS = {"qwen3_vl": 262_144, "qwen2_5_vl": 128_000}
PREPROCESSORS: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"patch_size": 16, "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}},
    "qwen2_5_vl": {"patch_size": 14, "min_pixels": 3_136, "max_pixels": 12_845_056},
}


def config_of(shape: Shape) -> Any:
    depth, width, inner = shape.tower
    text: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "max_position_embeddings": POSITIONS[shape.family],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    tower: dict[str, Any] = {
        "depth": depth,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_heads": 16,
        "out_hidden_size": shape.hidden_size,
        "patch_size": PREPROCESSORS[shape.family]["patch_size"],
    }
    if shape.family == "qwen3_vl":
        text["head_dim"], text["rope_parameters"]["mrope_interleaved"] = 128, True
        tower |= {"deepstack_visual_indexes": list(shape.deepstack), "num_position_embeddings": 2_304}
    return AutoConfig.for_model(shape.family, text_config=text, vision_config=tower)


@cache
def page_text() -> str:
    return PAGE.read_text(encoding="utf-8")


def section(heading: str) -> str:
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", page_text(), re.MULTILINE | re.DOTALL)
    assert found, f"no section {heading!r}"
    return found[1]


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each row of the table in ``text``, by the first one."""
    lines = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {first.strip("`"): cells for first, *cells in lines}


def transform_of(shape: Shape, config: Any, directory: Path) -> ImageTransform:
    fields = PREPROCESSORS[shape.family] | {"image_processor_type": "Qwen2VLImageProcessor", "merge_size": 2}
    (directory / "preprocessor_config.json").write_text(json.dumps(fields))
    bounds = dict.fromkeys(("min_pixels", "max_pixels", "max_image_size", "max_image_tokens"))
    return native_transform(directory, config.vision_config, **bounds)


def tokens_at(dpi: int, transform: ImageTransform, points: Points = A4) -> int:
    return native_tokens(transform, transform.check(*rendered_size(points, dpi, ANY_AREA)))


@pytest.mark.parametrize("name", SHAPES)
def test_the_figures_of_a_checkpoint_follow_from_its_shape(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    config = config_of(shape)
    decoder = DECODERS[ARCHITECTURES[shape.family]](config.text_config)
    with torch.device("meta"):
        text = Decoder(decoder)
        tower = TOWERS[shape.family](config.vision_config)
    linears = sum(module.weight.numel() for module in text.modules() if isinstance(module, Linear))
    others = sum(one.numel() for one in [*text.parameters(), *tower.parameters()]) - linears
    parameters = linears + others - (shape.vocabulary * shape.hidden_size if shape.is_tied else 0)
    page = tokens_at(150, transform_of(shape, config, tmp_path))
    kv_bytes = 2 * decoder.num_key_value_heads * decoder.head_dim * decoder.num_hidden_layers * BF16_BYTES
    levels = 1 + len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    embedding_bytes = page * shape.hidden_size * levels * BF16_BYTES
    assert rows(section("What it takes"))[name] == [
        f"{parameters / 1e9:.2f} G",
        f"{BF16_BYTES * parameters / 1e9:.1f} GB",
        f"{(linears + BF16_BYTES * others) / 1e9:.1f} GB",
        f"{kv_bytes // 1024} KiB",
        f"{page:,}",
        f"{page * kv_bytes / 2**20:.0f} MiB",
        f"{embedding_bytes / 2**20:.0f} MiB",
        f"{decoder.context_limit(None):,}",
    ]


@pytest.mark.parametrize(("family", "title"), [("qwen3_vl", "Qwen3-VL"), ("qwen2_5_vl", "Qwen2.5-VL")])
def test_the_tokens_of_a_page_grow_as_the_page_says(family: str, title: str, tmp_path: Path) -> None:
    shape = next(one for one in SHAPES.values() if one.family == family)
    transform = transform_of(shape, config_of(shape), tmp_path)
    *first, last = (f"{tokens_at(dpi, transform):,}" for dpi in (72, 100, 200, 300))
    assert f"{', '.join(first)} and {last}" in section("What it takes").replace(f" in {title}", "")


def architectures(text: str) -> set[str]:
    return set(re.findall(r"`(\w+For(?:ConditionalGeneration|CausalLM))`", text))


def test_what_runs_today_is_what_the_registry_has() -> None:
    assert architectures(section("Checkpoints that run today")) == {*TEXT_FAMILIES, LLAVA, *QWEN_VL}


def test_what_runs_through_transformers_layers_is_tested_and_not_in_the_registry() -> None:
    named = architectures(section("Through transformers' layers")) - {"DotsOCRForCausalLM"}
    assert len(named) > 5
    assert named.isdisjoint({*TEXT_FAMILIES, LLAVA, *QWEN_VL})
    assert named <= {MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family] for family in IMAGE_FAMILIES}
