from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from nanovllm.errors import ConfigurationError, ModelNotFound, TooManyPixels, UnsupportedModel
from nanovllm.vision.images.preprocess import ImageTransform, prepare_image

SIZES = [(224, 224), (100, 150), (150, 100), (480, 640), (37, 1000), (1000, 37), (223, 225), (16, 16), (1, 1), (3, 90)]

CLIP_CONFIGS: list[dict[str, Any]] = [
    {},
    {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
    {"size": {"shortest_edge": 33}, "crop_size": {"height": 64, "width": 48}},
    {"size": {"shortest_edge": 65}, "crop_size": {"height": 64, "width": 64}, "resample": 2},
    {"size": {"shortest_edge": 64}, "crop_size": {"height": 63, "width": 61}, "resample": 1},
    {"size": {"height": 48, "width": 64}, "do_center_crop": False},
    {"size": {"shortest_edge": 40, "longest_edge": 60}, "crop_size": {"height": 50, "width": 50}},
    {"do_resize": False, "crop_size": {"height": 64, "width": 64}},
    {"size": {"height": 40, "width": 40}, "do_center_crop": False, "do_normalize": False},
    {"size": {"height": 40, "width": 40}, "do_center_crop": False, "do_rescale": False},
    {"size": {"height": 40, "width": 40}, "do_center_crop": False, "rescale_factor": 1 / 127.5, "resample": 0},
    {"size": {"max_height": 60, "max_width": 40}, "crop_size": {"height": 50, "width": 50}},
]
SIGLIP_CONFIGS: list[dict[str, Any]] = [
    {},
    {"size": {"height": 96, "width": 96}, "resample": 2},
    {"size": {"height": 384, "width": 384}},
]
LLAVA_CONFIGS: list[dict[str, Any]] = [
    {},
    {"do_pad": True},
    {"do_pad": True, "size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}},
]


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_equal_to(processor: Any, sizes: list[tuple[int, int]] = SIZES) -> None:
    transform = ImageTransform.from_preprocessor_config(json.loads(processor.to_json_string()))
    for height, width in sizes:
        image = noise(height, width)
        pixels = transform.apply(image)
        assert pixels.dtype == np.uint8
        untouched = processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
        assert np.array_equal(pixels, np.moveaxis(untouched, 0, -1))
        normalised = np.stack([transform.lookup_table()[channel][pixels[..., channel]] for channel in range(3)])
        expected = processor(image)["pixel_values"][0]
        assert np.array_equal(normalised, expected.astype(np.float32))


@pytest.mark.parametrize("config", CLIP_CONFIGS, ids=str)
def test_clips_preprocessing_is_equal_bit_for_bit(config: dict[str, Any]) -> None:
    assert_equal_to(CLIPImageProcessorPil(**config))


@pytest.mark.parametrize("config", SIGLIP_CONFIGS, ids=str)
def test_siglips_preprocessing_is_equal_bit_for_bit(config: dict[str, Any]) -> None:
    assert_equal_to(SiglipImageProcessorPil(**config))


@pytest.mark.parametrize("config", LLAVA_CONFIGS, ids=str)
def test_llavas_preprocessing_is_equal_bit_for_bit(config: dict[str, Any]) -> None:
    assert_equal_to(LlavaImageProcessorPil(**config), [size for size in SIZES if min(size) > 1])


def test_a_configuration_as_old_as_the_hubs_first_clip_is_read() -> None:
    config = {
        "crop_size": 224,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 224,
    }
    assert ImageTransform.from_preprocessor_config(config) == ImageTransform.for_clip(224)


def test_defaults_are_those_of_the_named_processor() -> None:
    clip = ImageTransform.from_preprocessor_config({"image_processor_type": "CLIPImageProcessorFast"})
    siglip = ImageTransform.from_preprocessor_config({"image_processor_type": "SiglipImageProcessor"})
    assert clip == ImageTransform.for_clip(224)
    assert siglip == ImageTransform.for_siglip(224)


def test_settings_inside_a_processor_configuration_win_over_a_preprocessor_file(tmp_path: Path) -> None:
    fields = json.loads(CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).to_json_string())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))
    assert ImageTransform.from_preprocessor_config(tmp_path).output_size == (224, 224)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    assert ImageTransform.from_preprocessor_config(tmp_path).output_size == (224, 224)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": fields}))
    assert ImageTransform.from_preprocessor_config(tmp_path).output_size == (32, 32)


def test_what_cannot_be_read_or_done_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="neither of"):
        ImageTransform.from_preprocessor_config(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelNotFound, match="not valid JSON"):
        ImageTransform.from_preprocessor_config(tmp_path)
    with pytest.raises(UnsupportedModel, match="ViTImageProcessor"):
        ImageTransform.from_preprocessor_config({"image_processor_type": "ViTImageProcessor"})
    with pytest.raises(UnsupportedModel, match="do_pad"):
        ImageTransform.from_preprocessor_config({"image_processor_type": "CLIPImageProcessor", "do_pad": True})
    with pytest.raises(UnsupportedModel, match="not understood"):
        ImageTransform.from_preprocessor_config({"size": {"depth": 3}})


@pytest.mark.parametrize("transform", [ImageTransform.for_clip(224), ImageTransform.for_siglip(384)])
def test_another_size_keeps_the_rest(transform: ImageTransform) -> None:
    smaller = transform.resized(128)
    assert smaller.output_size == (128, 128)
    assert smaller.apply(noise(100, 150)).shape == (128, 128, 3)
    assert (smaller.mean, smaller.std, smaller.resample) == (transform.mean, transform.std, transform.resample)
    assert smaller.resized(transform.size[0]) == transform
    with pytest.raises(ConfigurationError, match="0 pixels"):
        transform.resized(0)


def test_a_transform_survives_json_and_its_fingerprint_names_every_field() -> None:
    base = ImageTransform.for_clip(224)
    others = [
        ImageTransform.for_siglip(224),
        base.resized(128),
        ImageTransform(resample=2),
        ImageTransform(mean=None),
        ImageTransform(rescale_factor=None),
        ImageTransform(pad_to_square=True),
        ImageTransform(crop=None),
    ]
    for transform in [base, *others]:
        assert ImageTransform.from_json(transform.to_json()) == transform
    assert len({transform.fingerprint() for transform in [base, *others]}) == 8


def test_a_strip_that_resizing_would_blow_up_is_refused() -> None:
    with pytest.raises(TooManyPixels, match="1x500000 pixels is too narrow: it would become 224x112000000"):
        ImageTransform.for_clip(224).apply(Image.new("RGB", (1, 500_000)))


def test_a_prepared_image_carries_the_originals_size_and_digest() -> None:
    transform = ImageTransform.for_clip(32)
    prepared = prepare_image(np.asarray(noise(20, 30)), transform)
    assert (prepared.width, prepared.height, prepared.pixels.shape) == (30, 20, (32, 32, 3))
    assert prepared.digest == prepare_image(noise(20, 30), transform.resized(64)).digest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resample", 99),
        ("resample", "bicubic"),
        ("size", "224"),
        ("size", {"shortest_edge": -1}),
        ("size", {"height": 224.5, "width": 224}),
        ("crop_size", {"height": 224}),
        ("crop_size", 0),
        ("rescale_factor", "1/255"),
        ("rescale_factor", 0),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", "0.5"),
        ("image_std", [0.5, 0.5, 0.0]),
        ("do_resize", "false"),
    ],
)
@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "Llava"])
def test_a_value_that_no_image_can_be_prepared_with_is_refused_at_load(
    tmp_path: Path, kind: str, field: str, value: object
) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_processor_type": f"{kind}ImageProcessor", field: value}))
    with pytest.raises(UnsupportedModel, match=rf"preprocessor_config\.json: {field} is "):
        ImageTransform.from_preprocessor_config(tmp_path)


@pytest.mark.parametrize("field", ["min_pixels", "max_pixels", "patch_size", "merge_size"])
@pytest.mark.parametrize("value", ["28", 0, -1, 3.5])
def test_a_wrong_bound_of_a_pixel_budget_is_refused_at_load(tmp_path: Path, field: str, value: object) -> None:
    fields = {"image_processor_type": "Qwen2VLImageProcessor", field: value}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": fields}))
    with pytest.raises(UnsupportedModel, match=rf"processor_config\.json: {field} is "):
        ImageTransform.from_preprocessor_config(tmp_path)
