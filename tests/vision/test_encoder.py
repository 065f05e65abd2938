from __future__ import annotations

import json
import shutil
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import make_clip, make_llava, make_qwen3, make_siglip
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionModel, LlavaForConditionalGeneration, SiglipVisionModel

from nanovllm.errors import ConfigurationError, ModelNotFound, UnsupportedModel
from nanovllm.vision.encoders import clip as encoder_module
from nanovllm.vision.encoders.clip import Projector, VisionEncoder
from nanovllm.vision.images.preprocess import ImageTransform

pytestmark = pytest.mark.filterwarnings("ignore:The projector between")

SMALL_CLIP = {"tower": "clip", "patch": 16, "size": 64}
SMALL_SIGLIP = {"tower": "siglip", "patch": 16, "size": 64}


def images(count: int = 3) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (90, 70 + 40 * i, 3), dtype=np.uint8)) for i in range(count)]


def pixels(transform: ImageTransform, count: int = 3) -> np.ndarray:
    return np.stack([transform.apply(image) for image in images(count)])


def assert_features_equal_transformers(directory: Path) -> VisionEncoder:
    encoder = VisionEncoder.from_llava(directory)
    reference = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    batch = pixels(encoder.transform)
    with torch.no_grad():
        expected = torch.stack(list(reference.get_image_features(encoder.normalise(torch.tensor(batch))).pooler_output))
    found = encoder.encode(batch)
    assert found.shape == expected.shape == (3, encoder.num_vision_tokens, encoder.hidden_size)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    # Different images must look different, or equality with the reference says little.
    assert (found[0] - found[1]).abs().max() > 0.01
    return encoder


@pytest.mark.parametrize("layer", [-1, -2, 1, 3, [-1], [-2, -1], [1, 3, -2]], ids=str)
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_llavas_features_over_clip_equal_transformers(tmp_path: Path, layer: Any, strategy: Any) -> None:
    make_llava(tmp_path, **SMALL_CLIP, vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    encoder = assert_features_equal_transformers(tmp_path)
    assert encoder.num_vision_tokens == (16 if strategy == "default" else 17)


@pytest.mark.parametrize("layer", [-1, -2, [-2, -1]], ids=str)
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_llavas_features_over_siglip_equal_transformers(tmp_path: Path, layer: Any, strategy: Any) -> None:
    make_llava(tmp_path, **SMALL_SIGLIP, vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    encoder = assert_features_equal_transformers(tmp_path)
    assert encoder.num_vision_tokens == (15 if strategy == "default" else 16)


@pytest.mark.parametrize("layer", [-1, -2, [0, 2, -1]], ids=str)
@pytest.mark.parametrize("tower", [SMALL_CLIP, SMALL_SIGLIP], ids=["clip", "siglip"])
def test_the_states_of_layers_are_those_of_transformers_bit_for_bit_and_no_other_is_kept(
    tmp_path: Path, tower: Any, layer: Any
) -> None:
    make_llava(tmp_path, **tower, vision_feature_layer=layer, vision_feature_select_strategy="full")
    encoder = VisionEncoder.from_llava(tmp_path)
    values = encoder.normalise(torch.tensor(pixels(encoder.transform)))
    states = encoder.tower(values, output_hidden_states=True).hidden_states
    outputs: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def see(_: Any, args: Any, output: Any) -> None:
        alive.append(sum(one() is not None for one in outputs))
        outputs.append(weakref.ref(output if isinstance(output, torch.Tensor) else output[0]))

    layers = getattr(encoder.tower, "vision_model", encoder.tower).encoder.layers
    for one in layers:
        one.register_forward_hook(see)
    with torch.no_grad():
        found = encoder.features(values)
    assert torch.equal(found, torch.cat([states[index] for index in encoder._layers], dim=-1))
    # What a layer reads lives until it is done, and the states that are wanted.
    assert max(alive) <= 1 + len(set(encoder._layers) - {0, len(layers)})
    assert len(alive) == len(layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pixels_are_normalised_to_the_values_of_the_table_in_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    encoder = VisionEncoder.from_llava(make_llava(tmp_path, **SMALL_CLIP), dtype=dtype)
    batch = pixels(encoder.transform)
    table = torch.from_numpy(encoder.transform.lookup_table())
    expected = torch.stack([table[channel][torch.tensor(batch[..., channel]).long()] for channel in range(3)], dim=1)
    found = encoder.normalise(torch.tensor(batch))
    assert torch.equal(found, expected.to(dtype))
    assert found.is_contiguous()  # a convolution of another layout would round otherwise


def test_a_sharded_checkpoint_in_half_precision_at_the_guides_size_loads(tmp_path: Path) -> None:
    make_llava(tmp_path, patch=32, size=224, max_shard_size="60KB", dtype=torch.float16)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert assert_features_equal_transformers(tmp_path).num_vision_tokens == 49


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("middle", ["", "vision_model."])
def test_every_layout_of_names_that_llava_checkpoints_have_had_loads(tmp_path: Path, prefix: str, middle: str) -> None:
    make_llava(tmp_path, **SMALL_CLIP)
    batch = pixels(VisionEncoder.from_llava(tmp_path).transform)
    expected = VisionEncoder.from_llava(tmp_path).encode(batch)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {
        prefix + name.replace("vision_tower.", f"vision_tower.{middle}"): value for name, value in tensors.items()
    }
    save_file(renamed, tmp_path / "model.safetensors")
    assert torch.equal(VisionEncoder.from_llava(tmp_path).encode(batch), expected)


def test_a_checkpoint_without_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    make_llava(tmp_path, **SMALL_CLIP)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["vision_tower.pre_layrnorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelNotFound, match=r"lacks 1 tensor, such as vision_tower.pre_layrnorm.weight"):
        VisionEncoder.from_llava(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"lacks model\.safetensors"):
        VisionEncoder.from_llava(tmp_path)


def add_tensors(directory: Path, prefix: str, *names: str) -> Path:
    stored = load_file(directory / "model.safetensors")
    save_file({**stored, **{prefix + name: torch.ones(2) for name in names}}, directory / "model.safetensors")
    return directory


UNKNOWN = ["encoder.layers.3.mlp.fc1.weight", "encoder.layers.0.self_attn.q_norm.weight", "adapter.weight"]


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_tensor_below_the_towers_prefix_that_has_no_place_in_it_is_refused_by_its_name(
    tmp_path: Path, tower: Any, name: str
) -> None:
    llava = make_llava(tmp_path / "llava", tower=tower, patch=16, size=64)
    with pytest.raises(UnsupportedModel, match=f"tensor 'vision_tower.{name}' has no place"):
        VisionEncoder.from_llava(add_tensors(llava, "vision_tower.", name))
    make = make_clip if tower == "clip" else make_siglip
    for prefix in ("", "vision_model."):
        alone = make(tmp_path / f"alone{prefix}")
        stored = {prefix + key: value for key, value in load_file(alone / "model.safetensors").items()}
        save_file(stored, alone / "model.safetensors")
        with pytest.raises(UnsupportedModel, match=f"tensor '{prefix}{name}' has no place"):
            VisionEncoder(24, add_tensors(alone, prefix, name))


def test_a_tensor_below_the_projectors_prefix_that_has_no_place_in_it_is_refused_by_its_name(tmp_path: Path) -> None:
    llava = make_llava(tmp_path / "llava", **SMALL_CLIP)
    with pytest.raises(UnsupportedModel, match=r"tensor 'multi_modal_projector\.linear_3\.weight' has no place"):
        VisionEncoder.from_llava(add_tensors(llava, "multi_modal_projector.", "linear_3.weight"))
    save_file({**Projector(32, 24).state_dict(), "linear_3.weight": torch.ones(2)}, tmp_path / "projector.safetensors")
    with pytest.raises(UnsupportedModel, match=r"tensor 'linear_3\.weight' has no place in this Projector"):
        VisionEncoder(24, make_clip(tmp_path / "clip"), projector=tmp_path / "projector.safetensors")


@pytest.mark.parametrize("with_text_tower", [False, True])
def test_what_no_feature_depends_on_may_be_stored_beside_a_tower(tmp_path: Path, with_text_tower: bool) -> None:
    clip = make_clip(tmp_path / "clip", with_text_tower=with_text_tower)
    expected = VisionEncoder(24, clip).state_dict()
    prefix = "vision_model." if with_text_tower else ""
    add_tensors(clip, prefix, "embeddings.position_ids", "post_layernorm.weight")
    found = VisionEncoder(24, clip).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    siglip = make_siglip(tmp_path / "siglip")
    VisionEncoder(24, add_tensors(siglip, "", "embeddings.position_ids", "head.probe", "head.mlp.fc1.weight"))


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    text = make_qwen3(tmp_path / "text")
    with pytest.raises(UnsupportedModel, match="'qwen3' checkpoint, not a LLaVA one"):
        VisionEncoder.from_llava(text)
    with pytest.raises(UnsupportedModel, match="vision tower of type 'qwen3'"):
        VisionEncoder(64, text)
    with pytest.raises(ModelNotFound, match="no checkpoint called 'nobody/has-this'"):
        VisionEncoder(64, "nobody/has-this")
    make_llava(tmp_path / "llava", **SMALL_CLIP)
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    config["vision_config"] = {"model_type": "pixtral"}
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="vision tower of type 'pixtral'"):
        VisionEncoder.from_llava(tmp_path / "llava")


def test_a_preprocessor_of_another_size_than_the_tower_is_refused_naming_both(tmp_path: Path) -> None:
    make_llava(tmp_path, **SMALL_CLIP)
    path = tmp_path / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["crop_size"] = {"height": 48, "width": 48}
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=r"\(48, 48\), the tower takes 64x64"):
        VisionEncoder.from_llava(tmp_path)


@pytest.mark.parametrize("tower", [SMALL_CLIP, SMALL_SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"max_image_size": 32, "num_vision_tokens": 4}, 4),
        ({"max_image_size": 48}, None),
        ({"num_vision_tokens": 4}, 4),
        ({"num_vision_tokens": 16}, 16),
        ({"num_vision_tokens": 1}, 1),
        ({"max_image_size": 128}, None),
        ({"max_image_size": 128, "num_vision_tokens": 64}, 64),
        ({"max_image_size": 100, "num_vision_tokens": 36}, 36),
    ],
    ids=str,
)
def test_a_checkpoints_own_tower_takes_other_sizes_and_tokens_with_one_warning(
    tmp_path: Path, tower: dict[str, Any], strategy: Any, options: dict[str, int], tokens: int | None
) -> None:
    make_llava(tmp_path, **tower, vision_feature_layer=-1, vision_feature_select_strategy=strategy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoder = VisionEncoder.from_llava(tmp_path, **options)
        own = VisionEncoder.from_llava(tmp_path)
    side = options.get("max_image_size", 64)
    assert encoder.transform.output_size == (side, side)
    changed = side != 64 or encoder.num_vision_tokens != own.num_vision_tokens
    messages = [str(one.message) for one in caught]
    assert len(messages) == changed
    assert all(f"64 pixels and {own.num_vision_tokens} tokens" in message for message in messages)
    assert all(f"{side} pixels and {encoder.num_vision_tokens} tokens" in message for message in messages)
    assert (encoder.revision == own.revision) is not changed

    reference = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval().model
    values = encoder.normalise(torch.tensor(pixels(encoder.transform)))
    first = int(tower is SMALL_CLIP)
    with torch.no_grad():
        states = reference.vision_tower(values, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[
            -1
        ]
        grid = states[:, first:].unflatten(1, (side // 16, side // 16)).permute(0, 3, 1, 2)
        if tokens is None and side > 64:  # as many patches as the checkpoint's own size has
            tokens = 16 + (first if strategy == "full" else 0)
        if tokens is None or (encoder.num_vision_tokens == own.num_vision_tokens and side == 64):
            expected = states[:, 1:] if strategy == "default" else states
        else:
            pooled = F.adaptive_avg_pool2d(grid, int(tokens**0.5)).flatten(2).transpose(1, 2)
            expected = torch.cat([states[:, : tokens - pooled.shape[1]], pooled], 1)
        expected = reference.multi_modal_projector(expected)
    found = encoder.encode(pixels(encoder.transform))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_class_token_is_kept_or_left_out_by_the_number_of_tokens(tmp_path: Path) -> None:
    make_llava(tmp_path, **SMALL_CLIP, vision_feature_select_strategy="full")
    with pytest.warns(UserWarning, match="17 tokens; .* 64 pixels and 4 tokens"):
        without = VisionEncoder.from_llava(tmp_path, num_vision_tokens=4)
    with pytest.warns(UserWarning, match="5 tokens"):
        kept = VisionEncoder.from_llava(tmp_path, num_vision_tokens=5)
    batch = pixels(kept.transform)
    assert torch.allclose(kept.encode(batch)[:, 1:], without.encode(batch), atol=1e-5)
    assert kept.revision != without.revision
    with pytest.raises(ConfigurationError, match=r"num_vision_tokens=7 cannot be pooled .* can: 5, 9"):
        VisionEncoder.from_llava(tmp_path, num_vision_tokens=7)
    with pytest.raises(ConfigurationError, match=r"num_vision_tokens=99 cannot be pooled .* can: 16, 17"):
        VisionEncoder.from_llava(tmp_path, num_vision_tokens=99)
    with pytest.raises(ConfigurationError, match="max_image_size is 16 or more"):
        VisionEncoder.from_llava(tmp_path, max_image_size=15)


def test_a_checkpoints_own_size_and_tokens_by_name_change_nothing(tmp_path: Path) -> None:
    make_llava(tmp_path, **SMALL_CLIP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = VisionEncoder.from_llava(tmp_path, max_image_size=64, num_vision_tokens=16)
    assert named.revision == VisionEncoder.from_llava(tmp_path).revision


def test_layers_behind_the_selected_one_are_left_out(tmp_path: Path) -> None:
    deep = VisionEncoder.from_llava(make_llava(tmp_path / "last", **SMALL_CLIP, vision_feature_layer=-1))
    shallow = VisionEncoder.from_llava(make_llava(tmp_path / "first", **SMALL_CLIP, vision_feature_layer=1))
    assert len(list(shallow.parameters())) < len(list(deep.parameters()))
    assert shallow.tower.config.num_hidden_layers == 1


@pytest.mark.parametrize(
    ("patch", "options", "tokens"),
    [
        (32, {}, 49),
        (16, {}, 49),
        (32, {"max_image_size": 128, "num_vision_tokens": 16}, 16),
        (16, {"max_image_size": 128, "num_vision_tokens": 16}, 16),
        (32, {"max_image_size": 128}, 16),
        (16, {"max_image_size": 128}, 49),
        (16, {"num_vision_tokens": 196}, 196),
        (32, {"max_image_size": 336, "num_vision_tokens": 100}, 100),
        (32, {"num_vision_tokens": 1}, 1),
    ],
)
def test_composing_takes_other_sizes_and_token_counts(
    tmp_path: Path, patch: int, options: dict[str, int], tokens: int
) -> None:
    encoder = VisionEncoder(24, make_clip(tmp_path, patch=patch), **options)
    size = options.get("max_image_size", 224)
    assert encoder.transform.output_size == (size, size)
    embeddings = encoder.encode(pixels(encoder.transform))
    assert embeddings.shape == (3, tokens, 24) == (3, encoder.num_vision_tokens, encoder.hidden_size)
    assert embeddings.isfinite().all()
    assert (embeddings[0] - embeddings[1]).abs().max() > 0.01


@pytest.mark.parametrize("with_text_tower", [False, True])
def test_a_composed_clip_tower_equals_transformers(tmp_path: Path, with_text_tower: bool) -> None:
    make_clip(tmp_path, patch=32, with_text_tower=with_text_tower)
    encoder = VisionEncoder(24, tmp_path, vision_feature_layer=-1)
    loaded = (CLIPModel if with_text_tower else CLIPVisionModel).from_pretrained(tmp_path, dtype=torch.float32).eval()
    reference: Any = loaded.vision_model if with_text_tower else loaded
    values = encoder.normalise(torch.tensor(pixels(encoder.transform)))
    with torch.no_grad():
        expected = reference(values).last_hidden_state[:, 1:]
        assert torch.allclose(encoder.features(values), expected, atol=1e-5)


def test_other_sizes_interpolate_positions_and_fewer_tokens_average_neighbouring_patches(tmp_path: Path) -> None:
    make_clip(tmp_path / "clip", patch=16)
    make_siglip(tmp_path / "siglip", patch=16, size=64)
    for name, kind, first in (("clip", CLIPVisionModel, 1), ("siglip", SiglipVisionModel, 0)):
        encoder = VisionEncoder(24, tmp_path / name, max_image_size=128, num_vision_tokens=16)
        reference = kind.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        values = encoder.normalise(torch.tensor(pixels(encoder.transform)))
        assert values.shape[-2:] == (128, 128)
        with torch.no_grad():
            states = reference(values, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
            grid = states[-2][:, first:].unflatten(1, (8, 8))
            expected = grid.unflatten(2, (4, 2)).unflatten(1, (4, 2)).mean(dim=(2, 4)).flatten(1, 2)
            assert torch.allclose(encoder.features(values), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"num_vision_tokens": 20},
            r"num_vision_tokens=20 cannot be pooled from the 7x7 patches .* nearest that can: 16, 25",
        ),
        ({"num_vision_tokens": 0}, "num_vision_tokens=0 cannot be pooled .* can: 1, 4"),
        ({"num_vision_tokens": -4}, "num_vision_tokens=-4 cannot be pooled .* can: 1, 4"),
        ({"num_vision_tokens": 64}, "num_vision_tokens=64 cannot be pooled .* can: 36, 49"),
        (
            {"max_image_size": 128, "num_vision_tokens": 49},
            "num_vision_tokens=49 cannot be pooled from the 4x4 .* can: 9, 16",
        ),
        ({"max_image_size": 31}, "smaller than the tower's patch of 32: max_image_size is 32 or more"),
        ({"max_image_size": -5}, "-5 pixels is not positive"),
        ({"vision_feature_layer": 7}, "vision_feature_layer 7 is not within a tower of 3 layers"),
        ({"vision_feature_layer": []}, "not within a tower"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    make_clip(tmp_path)
    with pytest.raises(ConfigurationError, match=says):
        VisionEncoder(24, tmp_path, **options)


def test_without_a_preprocessor_file_the_towers_usual_preprocessing_is_taken(tmp_path: Path) -> None:
    for make, name, expected in (
        (make_clip, "clip", ImageTransform.for_clip(224)),
        (make_siglip, "siglip", ImageTransform.for_siglip(224)),
    ):
        make(tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").unlink()
        assert VisionEncoder(24, tmp_path / name).transform == expected


def test_an_untrained_projector_is_reproducible_and_warns_once(tmp_path: Path) -> None:
    make_clip(tmp_path)
    encoder_module._warn_untrained.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(1)
        first = VisionEncoder(24, tmp_path)
        torch.manual_seed(2)
        second = VisionEncoder(24, tmp_path)
    (warning,) = [one for one in caught if "untrained" in str(one.message)]
    assert "cannot see" in str(warning.message)
    assert warning.filename == __file__
    batch = pixels(first.transform)
    assert torch.equal(first.encode(batch), second.encode(batch))
    assert first.revision == second.revision


@pytest.mark.parametrize("prefix", ["", "multi_modal_projector.", "model.multi_modal_projector."])
def test_a_trained_projector_is_used_from_a_file(tmp_path: Path, prefix: str) -> None:
    make_clip(tmp_path / "clip")
    trained = Projector(32, 24)
    path = tmp_path / "projector.safetensors"
    save_file({prefix + name: value for name, value in trained.state_dict().items()}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = VisionEncoder(24, tmp_path / "clip", projector=path)
    for name, value in trained.state_dict().items():
        assert torch.equal(encoder.projector.state_dict()[name], value)


def test_a_projector_brings_its_own_feature_layers_and_activation(tmp_path: Path) -> None:
    llava = make_llava(tmp_path / "llava", patch=32, size=224, vision_feature_layer=[-3, -1])
    config = json.loads((llava / "config.json").read_text())
    config["projector_hidden_act"] = "relu"
    (llava / "config.json").write_text(json.dumps(config))
    trained = VisionEncoder.from_llava(llava)
    tower = tmp_path / "tower"
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps(config["vision_config"]))
    tensors = load_file(llava / "model.safetensors")
    save_file(
        {k.removeprefix("vision_tower."): v for k, v in tensors.items() if k.startswith("vision_tower.")},
        tower / "model.safetensors",
    )
    composed = VisionEncoder(64, tower, projector=llava)
    batch = pixels(trained.transform)
    assert torch.equal(composed.encode(batch), trained.encode(batch))


def test_a_projector_for_another_width_is_refused(tmp_path: Path) -> None:
    make_clip(tmp_path / "clip")
    path = tmp_path / "projector.safetensors"
    save_file(Projector(32, 48).state_dict(), path)
    with pytest.raises(ConfigurationError, match=r"has shape \[48.*the model needs \[24"):
        VisionEncoder(24, tmp_path / "clip", projector=path)
    llava = make_llava(tmp_path / "llava", patch=32, size=224, vision_feature_select_strategy="full")
    with pytest.raises(ConfigurationError, match="trained with the class token"):
        VisionEncoder(64, tmp_path / "clip", projector=llava)
    with pytest.raises(ModelNotFound):
        VisionEncoder(24, tmp_path / "clip", projector=tmp_path / "missing")


def test_freezing_leaves_the_projector_trainable(tmp_path: Path) -> None:
    make_clip(tmp_path)
    frozen = VisionEncoder(24, tmp_path)
    assert not any(parameter.requires_grad for parameter in frozen.tower.parameters())
    assert all(parameter.requires_grad for parameter in frozen.projector.parameters())
    free = VisionEncoder(24, tmp_path, freeze_vision_weights=False)
    assert all(parameter.requires_grad for parameter in free.tower.parameters())
    values = free.normalise(torch.tensor(pixels(free.transform)))
    free(values).sum().backward()
    assert free.projector.linear_1.weight.grad is not None
    assert not free.encode(pixels(free.transform)).requires_grad


def test_a_batch_larger_than_one_run_of_the_tower_keeps_its_order(tmp_path: Path) -> None:
    encoder = VisionEncoder.from_llava(make_llava(tmp_path, **SMALL_CLIP))
    batch = np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3), dtype=np.uint8)
    embeddings = encoder.encode(batch)
    for index in (0, 31, 32, 69):
        assert torch.allclose(embeddings[index], encoder.encode(batch[index : index + 1])[0], atol=1e-4)
    assert encoder.images_encoded == 74
    assert encoder.encode_seconds > 0
    assert encoder.encode(batch[:0]).shape == (0, 16, 64)
    read_only = np.frombuffer(batch[:2].tobytes(), np.uint8).reshape(2, 64, 64, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(encoder.encode(read_only), encoder.encode(torch.from_numpy(batch[:2])))


@pytest.mark.parametrize(
    "batch", [np.zeros((1, 64, 64, 3), np.float32), np.zeros((64, 64, 3), np.uint8), np.zeros((1, 32, 64, 3), np.uint8)]
)
def test_pixels_that_the_transform_did_not_make_are_refused(tmp_path: Path, batch: np.ndarray) -> None:
    encoder = VisionEncoder.from_llava(make_llava(tmp_path, **SMALL_CLIP))
    with pytest.raises(ConfigurationError, match=r"uint8 pixels \[N, \(64, 64\), 3\], not"):
        encoder.encode(batch)


def test_the_revision_names_weights_options_and_preprocessing_but_not_the_place(tmp_path: Path) -> None:
    make_llava(tmp_path / "a", **SMALL_CLIP)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    make_llava(tmp_path / "other-weights", **SMALL_CLIP, seed=9)
    make_llava(tmp_path / "other-strategy", **SMALL_CLIP, vision_feature_select_strategy="full")
    shutil.copytree(tmp_path / "a", tmp_path / "other-filter")
    path = tmp_path / "other-filter" / "processor_config.json"
    path.write_text(path.read_text().replace('"resample": 3', '"resample": 2'))
    revisions = {
        name: VisionEncoder.from_llava(tmp_path / name).revision
        for name in ("a", "b", "other-weights", "other-strategy", "other-filter")
    }
    assert revisions["a"] == revisions["b"]
    assert len(set(revisions.values())) == 4
    assert VisionEncoder.from_llava(tmp_path / "a", dtype=torch.bfloat16).revision != revisions["a"]


def test_bfloat16_stays_close_to_float32(tmp_path: Path) -> None:
    make_llava(tmp_path, **SMALL_CLIP)
    exact = VisionEncoder.from_llava(tmp_path)
    half = VisionEncoder.from_llava(tmp_path, dtype=torch.bfloat16)
    batch = pixels(exact.transform)
    found = half.encode(batch)
    assert found.dtype == half.dtype == torch.bfloat16
    cosine = F.cosine_similarity(found.float().flatten(1), exact.encode(batch).flatten(1))
    assert cosine.min() > 0.99


@pytest.mark.parametrize(("patch", "images"), [(32, 32), (16, 10), (4, 1)])
def test_a_cpu_gives_the_tower_few_patches_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patch: int, images: int
) -> None:
    encoder = VisionEncoder(24, make_clip(tmp_path, patch=patch))
    parts: list[int] = []
    features = encoder.features
    monkeypatch.setattr(encoder, "features", lambda values: parts.append(len(values)) or features(values))
    encoder.encode(np.zeros((33, 224, 224, 3), dtype=np.uint8))
    assert max(parts) == images
    assert sum(parts) == 33
