"""Qwen2.5-VL and Qwen3-VL in the engine: positions, prompts, budgets. Parity is in test_parity.py."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import IM_END, IM_START, QwenVL, make_qwen_vl
from engine_parts import Reference, drain, greedy, noise_image
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.models import qwen_vl
from nanovllm.engine.multimodal_llm_engine import MultiModalLLM
from nanovllm.engine.scheduling.sequence import ImageSpan
from nanovllm.errors import ConfigurationError, InvalidInput, UnsupportedModel
from nanovllm.vision.images.preprocess import ImageTransform, prepare_image

SMALL = {"kv_cache_bytes": 4 << 20}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen_vl(tmp_path_factory.mktemp(request.param), family=request.param)


@pytest.fixture(scope="module")
def rope_index(tmp_path_factory: pytest.TempPathFactory) -> Qwen2_5_VLModel:
    config = AutoConfig.from_pretrained(make_qwen_vl(tmp_path_factory.mktemp("rope")))
    return Qwen2_5_VLModel(config)


@examples(100)
@given(st.data())
def test_positions_equal_transformers_and_do_not_depend_on_the_cut(
    rope_index: Qwen2_5_VLModel, data: st.DataObject
) -> None:
    parts = data.draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)), max_size=4))
    kinds: list[int] = []
    spans: list[ImageSpan] = []
    for text, rows, columns in parts:
        kinds += [0] * text
        spans.append(ImageSpan(None, b"", len(kinds), rows * columns, (rows, columns)))  # type: ignore[arg-type]
        kinds += [1] * (rows * columns)
    kinds += [0] * data.draw(st.integers(1, 5))
    ids = torch.zeros(1, len(kinds), dtype=torch.long)
    grids = torch.tensor([[1, 2 * rows, 2 * columns] for _, rows, columns in parts]).view(-1, 3)
    expected, delta = rope_index.get_rope_index(ids, torch.tensor([kinds]), image_grid_thw=grids)
    found = qwen_vl.positions(spans, 0, len(kinds))
    assert torch.tensor(found).T.tolist() == expected[:, 0].tolist()
    start, end = sorted(data.draw(st.tuples(st.integers(0, len(kinds)), st.integers(0, len(kinds)))))
    assert qwen_vl.positions(spans, start, end) == found[start:end]
    beyond = len(kinds) + 7
    assert qwen_vl.positions(spans, beyond, beyond + 1) == [(beyond + int(delta),) * 3]


def test_a_job_s_image_stands_between_the_tokens_that_the_family_wants(checkpoint: Path) -> None:
    with LLMEngine(str(checkpoint), **SMALL) as engine:
        prompts, tokenizer = engine.input_processor.prompts, engine.tokenizer
        wanted = f"{IM_START}user\nLook: <|vision_start|><|image_pad|><|vision_end|> now{IM_END}\n{IM_START}assistant\n"
        expected = tokenizer.encode(wanted, add_special_tokens=False)
        assert prompts.untrusted("Look: <|image|> now") == expected
        parts = [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": " now"}]
        assert prompts.messages([{"role": "user", "content": parts}]) == expected
        by_hand = "Look: <|vision_start|><|image_pad|><|vision_end|> now"
        assert prompts.trusted("Look: <|image|> now") == prompts.trusted(by_hand) == tokenizer.encode(by_hand)
        image = engine.model_runner.image_token_id
        assert image not in prompts.untrusted("Look: <|image_pad|> <|vision_start|> now")


def test_a_chat_template_in_the_processors_own_file_is_used(tmp_path: Path) -> None:
    directory = make_qwen_vl(tmp_path)
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    with LLMEngine(str(directory), **SMALL) as engine:
        assert engine.input_processor.prompts.has_chat_template
        assert engine.input_processor.prompts.untrusted("hi")[0] == engine.tokenizer.convert_tokens_to_ids(IM_START)


def test_the_checkpoints_of_the_hub_with_the_text_beside_the_tower_load(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = make_qwen_vl(tmp_path)
    reference = Reference(directory, sees=True).answer("total <|image|> and", [noise_image(1)], 12)
    file = directory / "model.safetensors"
    old = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(old, file, metadata={"format": "pt"})
    with LLMEngine(str(directory), **SMALL) as engine:
        engine.add_request(reference.prompt, greedy(12), images=reference.images, request_id="r")
        assert drain(engine)["r"].token_ids == reference.token_ids


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_sharded_tied_half_precision_checkpoints_answer_as_transformers_does(tmp_path: Path, family: QwenVL) -> None:
    directory = make_qwen_vl(
        tmp_path, family=family, max_shard_size="100KB", dtype=torch.bfloat16, tie_word_embeddings=True
    )
    assert len(list(directory.glob("*.safetensors"))) > 1
    case = Reference(directory, sees=True).answer("total <|image|> and", [noise_image(2, 90, 120)], 12)
    with LLMEngine(str(directory), **SMALL) as engine:
        engine.add_request(case.prompt, greedy(12), images=case.images, request_id="r")
        assert drain(engine)["r"].token_ids == case.token_ids


def test_the_token_budget_bounds_what_an_image_takes_in_the_prompt(checkpoint: Path) -> None:
    with MultiModalLLM(str(checkpoint), enable_multimodal=True, max_image_tokens=6, **SMALL) as engine:
        output = engine.generate(["<|image|>"], greedy(2), images=[[noise_image(3, 600, 400)]], use_tqdm=False)[0]
        assert 4 <= output.usage.image_tokens <= 6
        stats = engine.get_multimodal_stats()
        assert (stats["num_vision_tokens"], stats["max_image_size"]) == (6, None)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"max_image_size": 128, "num_vision_tokens": 6}, 6),
        ({"max_image_size": 64}, 5),
        ({"num_vision_tokens": 4, "max_image_tokens": 9}, 4),
        ({"num_vision_tokens": 9, "max_image_tokens": 4}, 4),
    ],
)
def test_size_and_tokens_are_bounds_for_images_at_their_own_size(
    checkpoint: Path, options: dict[str, int], most: int
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such towers were trained on many sizes
        engine = MultiModalLLM(str(checkpoint), enable_multimodal=True, **options, **SMALL)  # type: ignore[arg-type]
    with engine:
        for size in ((600, 400), (90, 400), (20, 20)):
            output = engine.generate("<|image|>", greedy(2), images=noise_image(3, *size), use_tqdm=False)[0]
            assert 1 <= output.usage.image_tokens <= most


@pytest.mark.parametrize("option", ["projector", "vision_model"])
def test_options_of_composed_towers_are_refused(checkpoint: Path, option: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{option}='x', but .* brings a tower and a projector of its own"):
        MultiModalLLM(str(checkpoint), enable_multimodal=True, **{option: "x"}, **SMALL)  # type: ignore[arg-type]


def test_an_image_prepared_for_another_model_is_refused_before_it_runs(checkpoint: Path) -> None:
    with LLMEngine(str(checkpoint), **SMALL) as engine:
        other = prepare_image(noise_image(4), ImageTransform.for_clip(50))
        with pytest.raises(InvalidInput, match=r"prepared as \(50, 50\) pixels"):
            engine.add_request("<|image|>", greedy(2), images=[other])
        assert not engine.has_unfinished()


def test_equal_pictures_of_other_shapes_share_nothing(checkpoint: Path) -> None:
    wide, tall = noise_image(5, 120, 60), noise_image(5, 60, 120)
    with LLMEngine(str(checkpoint), **SMALL) as engine:
        for image in (wide, tall):
            engine.add_request("<|image|> and", greedy(2), images=[image])
            drain(engine)
        stats = engine.stats()
        assert stats.embedding_cache is not None
        assert (stats.embedding_cache.misses, stats.embedding_cache.hits) == (2, 0)


def test_text_alone_needs_no_tower(checkpoint: Path) -> None:
    case = Reference(checkpoint, sees=True).answer("hello world", (), 12)
    with LLMEngine(str(checkpoint), enable_multimodal=False, **SMALL) as engine:
        engine.add_request(case.prompt, greedy(12), request_id="r")
        assert drain(engine)["r"].token_ids == case.token_ids
        assert engine.processor is None


def test_frequencies_that_are_not_shared_out_are_refused(tmp_path: Path) -> None:
    directory = make_qwen_vl(tmp_path)
    file = directory / "config.json"
    fields = json.loads(file.read_text())
    fields["text_config"]["rope_parameters"]["mrope_section"] = [4, 6, 5]
    file.write_text(json.dumps(fields))
    with pytest.raises(UnsupportedModel, match=r"mrope_section \[4, 6, 5\] does not share out the 16"):
        LLMEngine(str(directory), **SMALL)
