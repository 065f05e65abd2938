from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from checkpoints import make_clip, make_llava, make_qwen3

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.multimodal_llm_engine import MultiModalLLM
from nanovllm.errors import ConfigurationError, InvalidInput, PlaceholderMismatch
from nanovllm.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SMALL = {"kv_cache_bytes": 4 << 20}
PICTURE = np.arange(64 * 48 * 3, dtype=np.uint8).reshape(64, 48, 3)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_qwen3(tmp_path_factory.mktemp("qwen3")))


@pytest.fixture(scope="module")
def llava_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_llava(tmp_path_factory.mktemp("llava"), size=64))


def test_without_multimodal_it_is_the_plain_engine(text_model: str) -> None:
    prompts = ["hello world", "What is the total?", [5, 6, 7]]
    with LLMEngine(text_model, **SMALL) as plain, MultiModalLLM(text_model, **SMALL) as multimodal:
        expected = [output.token_ids for output in plain.generate(prompts, GREEDY, use_tqdm=False)]
        assert [output.token_ids for output in multimodal.generate(prompts, GREEDY, use_tqdm=False)] == expected
        assert multimodal.get_multimodal_stats() == {"multimodal_enabled": False}


@pytest.mark.parametrize("model", ["text_model", "llava_model"])
def test_images_are_opt_in(model: str, request: pytest.FixtureRequest) -> None:
    with MultiModalLLM(request.getfixturevalue(model), vision_model="nowhere/at-all", **SMALL) as engine:
        with pytest.raises(PlaceholderMismatch):
            engine.generate("Describe <|image|>", GREEDY, use_tqdm=False)
        with pytest.raises(InvalidInput):
            engine.add_request("Describe", GREEDY, [PICTURE])
        assert not engine.has_unfinished()


def test_images_stand_third_in_add_request_and_show_in_the_stats(llava_model: str) -> None:
    with MultiModalLLM(llava_model, enable_multimodal=True, **SMALL) as engine:
        name = engine.add_request("Compare <|image|> and <|image|>", GREEDY, [PICTURE, PICTURE])
        outputs = [output.finished for _ in range(40) if engine.has_unfinished() for output in engine.step()]
        (output,) = [output for output in outputs if output is not None]
        assert (output.request_id, output.usage.image_tokens) == (name, 8)
        stats = engine.get_multimodal_stats()
        assert (stats["max_image_size"], stats["num_vision_tokens"], stats["images_encoded"]) == (64, 4, 1)
        assert engine.model_runner.get_vision_stats()["vision_cache_size"] == 1


def test_a_tower_is_composed_at_the_size_and_tokens_asked_for(text_model: str, tmp_path: Path) -> None:
    tower = str(make_clip(tmp_path, patch=16, size=64))
    with MultiModalLLM(
        text_model, enable_multimodal=True, vision_model=tower, max_image_size=96, num_vision_tokens=9, **SMALL
    ) as engine:
        output = engine.generate("Look: <|image|>", GREEDY, images=[[PICTURE]], use_tqdm=False)[0]
        assert output.usage.image_tokens == 9
        stats = engine.get_multimodal_stats()
        assert (stats["vision_model"], stats["max_image_size"], stats["num_vision_tokens"]) == (tower, 96, 9)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_the_guides_cure_for_high_memory_runs_on_a_checkpoint_with_its_own_tower(
    tmp_path: Path, tower: Literal["clip", "siglip"]
) -> None:
    model = str(make_llava(tmp_path, tower=tower, patch=16, size=64))
    with pytest.warns(UserWarning, match="trained on images of 64 pixels and 16 tokens") as caught:
        engine = MultiModalLLM(model, enable_multimodal=True, max_image_size=128, num_vision_tokens=16, **SMALL)
    assert len([one for one in caught if "trained on" in str(one.message)]) == 1
    with engine:
        output = engine.generate("Look: <|image|>", GREEDY, images=PICTURE, use_tqdm=False)[0]
        assert output.usage.image_tokens == 16
        stats = engine.get_multimodal_stats()
        assert (stats["max_image_size"], stats["num_vision_tokens"]) == (128, 16)
        other = engine.generate("Look: <|image|>", GREEDY, images=255 - PICTURE, use_tqdm=False)[0]
        assert other.token_ids != output.token_ids


def test_the_guides_cure_for_high_memory_runs_on_the_shipped_checkpoint() -> None:
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(picture).ellipse((40, 40, 184, 184), fill=(220, 30, 30))
    with pytest.warns(UserWarning, match="'tiny-receipts' was trained on images of 224 pixels and 49 tokens"):
        engine = MultiModalLLM("tiny-receipts", enable_multimodal=True, max_image_size=128, num_vision_tokens=16)
    with engine:
        output = engine.generate("Extract text from this document: <|image|>", GREEDY, images=picture, use_tqdm=False)
        assert output[0].usage.image_tokens == 16


def test_what_no_pooling_makes_is_refused_with_what_does(llava_model: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"num_vision_tokens=3 .* 2x2 patches of an image of 64 pixels; .* 1, 4"
    ):
        MultiModalLLM(llava_model, enable_multimodal=True, num_vision_tokens=3, **SMALL)
