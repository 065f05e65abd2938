"""Requests through the whole engine: images, aborts, limits, ends, and what a request leaves behind."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_clip, make_llava, make_qwen3
from engine_parts import drain, greedy, noise_image, random_prompt, step

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import RequestOutput
from nanovllm.errors import (
    ConfigurationError,
    EngineDead,
    EngineFault,
    InvalidInput,
    PlaceholderMismatch,
    PromptTooLong,
    UnsupportedModel,
)
from nanovllm.sampling_params import SamplingParams

KV_BYTES = 2 << 20
QUESTION = "What is the total? <|image|> Answer:"


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


def make_engine(directory: Path, **options: Any) -> LLMEngine:
    return LLMEngine(str(directory), **{"kv_cache_bytes": KV_BYTES, **options})


def ask(engine: LLMEngine, prompt: str, *images: Any, max_tokens: int = 8, **options: Any) -> RequestOutput:
    """One request alone."""
    name = engine.add_request(prompt, greedy(max_tokens), images=images, **options)
    return drain(engine)[name]


@pytest.fixture
def engine(llava: Path) -> Iterator[LLMEngine]:
    with make_engine(llava) as engine:
        yield engine


def test_a_result_is_a_mapping_with_attributes(engine: LLMEngine) -> None:
    output = ask(engine, QUESTION, noise_image(1))
    assert (
        output["text"]
        == output.text
        == engine.tokenizer.decode(output.token_ids, skip_special_tokens=True).rstrip("\ufffd")
    )
    assert output["token_ids"] == output.token_ids
    assert {**output}["finish_reason"] == "length"
    assert "nothing" not in output
    assert output.usage.image_tokens == 49
    assert output.usage.output_tokens == len(output.token_ids) == 8
    assert output.timings.e2e_ms >= output.timings.time_to_first_token_ms > 0
    assert output.timings.encode_ms > 0
    assert (output.images[0].width, output.images[0].height) == (260, 240)


def test_the_same_prompt_with_different_images_never_crosses(engine: LLMEngine, llava: Path) -> None:
    answers = [ask(engine, QUESTION, noise_image(n), max_tokens=24).token_ids for n in (1, 2, 1, 3, 2)]
    fresh = [ask(make_engine(llava), QUESTION, noise_image(n), max_tokens=24).token_ids for n in (1, 2, 3)]
    assert answers == [fresh[0], fresh[1], fresh[0], fresh[2], fresh[1]]
    assert len(set(fresh)) == 3


def test_the_same_image_at_another_offset_in_the_block_is_not_reused(engine: LLMEngine, llava: Path) -> None:
    prompts = [f"{'a ' * n}<|image|> Answer:" for n in range(5)]
    answers = [ask(engine, prompt, noise_image(1), max_tokens=16) for prompt in prompts]
    fresh = make_engine(llava, enable_prefix_caching=False)
    assert [answer.token_ids for answer in answers] == [
        ask(fresh, prompt, noise_image(1), max_tokens=16).token_ids for prompt in prompts
    ]
    assert [answer.images[0].outcome for answer in answers] == ["miss", "hit", "hit", "hit", "hit"]


def test_outcomes_tell_where_each_embedding_came_from(engine: LLMEngine) -> None:
    first = ask(engine, "<|image|> and <|image|>", noise_image(1), noise_image(1))
    assert [use.outcome for use in first.images] == ["miss", "joined"]
    assert [use.outcome for use in ask(engine, "now <|image|>", noise_image(1)).images] == ["hit"]
    again = ask(engine, "<|image|> and <|image|>", noise_image(1), noise_image(1))
    assert again.images[0].outcome == "prefix"
    assert again.token_ids == first.token_ids
    assert engine.stats().encoder_images == 1


def test_requests_of_one_step_encode_an_image_once(engine: LLMEngine) -> None:
    for number in range(4):
        engine.add_request(f"{number} <|image|>", greedy(2), images=[noise_image(1)])
    outputs = drain(engine)
    assert engine.stats().encoder_images == 1
    assert sorted(output.images[0].outcome for output in outputs.values()) == ["joined", "joined", "joined", "miss"]


def test_salts_share_neither_prefix_nor_embeddings(engine: LLMEngine) -> None:
    ask(engine, QUESTION, noise_image(1), cache_salt=b"one")
    other = ask(engine, QUESTION, noise_image(1), cache_salt=b"two")
    assert other.usage.cached_tokens == 0
    assert other.images[0].outcome == "miss"
    assert ask(engine, QUESTION, noise_image(1), cache_salt=b"two").usage.cached_tokens > 0


def test_an_evicted_embedding_is_encoded_again(llava: Path) -> None:
    engine = make_engine(llava, embedding_cache_bytes=0, enable_prefix_caching=False)
    answers = {ask(engine, QUESTION, noise_image(1)).token_ids for _ in range(2)}
    assert len(answers) == 1
    assert engine.stats().encoder_images == 2


def test_embeddings_are_held_only_until_they_are_computed(llava: Path) -> None:
    engine = make_engine(llava, max_num_batched_tokens=30, embedding_cache_bytes=0)
    engine.add_request("a <|image|> b <|image|> c", greedy(4), images=[noise_image(1), noise_image(2)], request_id="x")
    (sequence,) = engine.scheduler.waiting
    seen = []
    while engine.has_unfinished():
        step(engine, {})
        seen.append(tuple(span.embedding is not None for span in sequence.images))
        for span in sequence.images:
            assert (span.embedding is not None) == (span.start < sequence.num_computed_tokens < span.end)
    assert (True, False) in seen
    assert (False, True) in seen
    assert engine.stats().encoder_images == 2


@pytest.mark.parametrize(
    ("prompt", "images"), [("no image", 1), ("<|image|> <|image|>", 1), ("<|image|>", 0), ("<|image|>", 3)]
)
def test_more_or_fewer_images_than_placeholders_are_refused(engine: LLMEngine, prompt: str, images: int) -> None:
    with pytest.raises(PlaceholderMismatch, match=rf"{prompt.count('<|image|>')}.*{images}"):
        engine.add_request(prompt, images=[noise_image(n) for n in range(images)])
    assert not engine.has_unfinished()
    engine.audit()


def test_a_placeholder_inside_user_text_stays_text(engine: LLMEngine) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "say <|image|>"}, {"type": "image"}]}
    name = engine.add_request([message], greedy(4), images=[noise_image(1)])
    assert drain(engine)[name].usage.image_tokens == 49
    with pytest.raises(PlaceholderMismatch):
        engine.add_request([message], greedy(4), images=[noise_image(1), noise_image(2)])


def test_token_ids_hold_one_image_token_for_each_image(engine: LLMEngine) -> None:
    token_ids = engine.input_processor.prompts.trusted(QUESTION)
    assert token_ids.count(engine.model_runner.image_token_id) == 1
    name = engine.add_request(token_ids, greedy(8), images=[noise_image(1)])
    assert drain(engine)[name].token_ids == ask(engine, QUESTION, noise_image(1)).token_ids


def test_images_for_a_text_model_are_refused(text: Path) -> None:
    with pytest.raises(InvalidInput, match="no vision model"):
        make_engine(text).add_request("hello", images=[noise_image(1)])


def test_an_engine_that_was_closed_says_so(text: Path) -> None:
    engine = make_engine(text)
    engine.close()
    with pytest.raises(EngineDead, match="the engine is closed"):
        engine.generate("hello")


@pytest.mark.parametrize("device", ["nope", "cuda", "cuda:7"])
def test_a_device_that_is_not_there_is_a_configuration_error(text: Path, device: str) -> None:
    with pytest.raises(ConfigurationError, match="device="):
        make_engine(text, device=device)


@pytest.mark.parametrize("prompt", ["", [], [999_999], [-1], ["a", 1]])
def test_prompts_that_are_no_prompts_are_refused(text: Path, prompt: Any) -> None:
    engine = make_engine(text)
    with pytest.raises(InvalidInput):
        engine.add_request(prompt)
    assert not engine.has_unfinished()


def test_what_can_never_fit_is_refused_at_admission(text: Path) -> None:
    engine = make_engine(text, max_model_len=32)
    with pytest.raises(PromptTooLong, match="32 tokens; with one token of output at most 32"):
        engine.add_request([1] * 32)
    small = make_engine(text, kv_cache_bytes=16384 * 3)
    assert small.max_model_len == 48
    with pytest.raises(PromptTooLong, match="at most 48"):
        small.add_request([1] * 48)


def test_output_is_cut_where_the_context_ends(text: Path) -> None:
    engine = make_engine(text, max_model_len=32)
    name = engine.add_request([1] * 30, greedy(100))
    output = drain(engine)[name]
    assert (output.usage.output_tokens, output.finish_reason) == (2, "length")


def test_contexts_that_fill_the_whole_cache_finish(text: Path) -> None:
    engine = make_engine(text, kv_cache_bytes=16384 * 3, max_num_batched_tokens=7)
    for number in range(4):
        engine.add_request([number] * 20, greedy(100), request_id=str(number))
    outputs = drain(engine)
    assert {output.usage.output_tokens for output in outputs.values()} == {28}


def test_aborts_end_a_request_in_every_state(llava: Path) -> None:
    engine = make_engine(llava, max_num_batched_tokens=40, max_num_seqs=3)
    alone = ask(make_engine(llava), "runs on", max_tokens=20).token_ids
    outputs: dict[str, RequestOutput] = {}
    engine.add_request("runs on", greedy(20), request_id="survivor")
    engine.add_request("running", greedy(50), request_id="running")
    step(engine, outputs)
    engine.add_request("half <|image|> way", greedy(50), images=[noise_image(1)], request_id="half")
    step(engine, outputs)
    engine.add_request("waiting <|image|>", greedy(50), images=[noise_image(2)], request_id="waiting")
    states = {sequence.request_id: sequence for sequence in engine.scheduler.running + engine.scheduler.waiting}
    assert states["running"].num_output_tokens == 2
    assert 0 < states["half"].num_computed_tokens < states["half"].num_prompt_tokens
    assert states["half"].images[0].embedding is not None
    assert states["waiting"] in engine.scheduler.waiting
    for name in ("running", "half", "waiting", "running", "unknown"):
        engine.abort(name)
        engine.audit()
    assert states["half"].images[0].embedding is None
    drain(engine, outputs)
    assert {name: output.finish_reason for name, output in outputs.items()} == {
        "running": "abort",
        "half": "abort",
        "waiting": "abort",
        "survivor": "length",
    }
    assert len(outputs["running"].token_ids) == 2
    assert outputs["survivor"].token_ids == alone
    assert engine.stats().kv_cache_usage == 0.0


def test_a_request_id_may_come_again_only_after_its_end(text: Path) -> None:
    engine = make_engine(text)
    engine.add_request("hello", greedy(2), request_id="a")
    with pytest.raises(InvalidInput, match="'a' is in use"):
        engine.add_request("hello", request_id="a")
    drain(engine)
    engine.add_request("hello", greedy(2), request_id="a")
    drain(engine)


def test_priorities_are_served_in_their_order(text: Path) -> None:
    engine = make_engine(text, max_num_seqs=1)
    for name, priority in (("late", 5), ("normal", 0), ("urgent", -3)):
        engine.add_request(name, greedy(3), request_id=name, priority=priority)
    assert list(drain(engine)) == ["urgent", "normal", "late"]


def test_a_seed_reproduces_alone_and_in_a_batch(text: Path) -> None:
    mine = SamplingParams(temperature=1.0, seed=7, max_tokens=24, ignore_eos=True)
    engine = make_engine(text, seed=1)
    alone = engine.generate("hello", mine, use_tqdm=False)[0].token_ids
    others = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True)
    batch = [random_prompt(n, 9) for n in range(5)] + ["hello"]
    assert engine.generate(batch, [others] * 5 + [mine], use_tqdm=False)[5].token_ids == alone
    assert engine.generate("hello", others, use_tqdm=False)[0].token_ids[:24] != alone


def test_stop_tokens_and_strings_end_the_text(text: Path) -> None:
    engine = make_engine(text)
    whole = ask(engine, "hello", max_tokens=32)
    token = whole.token_ids[6]
    first = whole.token_ids.index(token)
    params = greedy(32, stop_token_ids=(token,))
    output = engine.generate("hello", params, use_tqdm=False)[0]
    assert output.token_ids == whole.token_ids[: first + 1]
    assert output.finish_reason == "stop"
    later = engine.generate("hello", greedy(32, stop_token_ids=(token,), min_tokens=20), use_tqdm=False)[0]
    assert token not in later.token_ids[:20]
    stop = whole.text[7:9]
    cut = engine.generate("hello", greedy(32, stop=(stop,)), use_tqdm=False)[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < 32
    with pytest.raises(InvalidInput, match="stop_token_ids"):
        engine.add_request("hello", SamplingParams(stop_token_ids=(10**6,)))


def test_chunks_join_to_the_final_text_and_tokens(text: Path) -> None:
    engine = make_engine(text)
    for number in range(4):
        engine.add_request(random_prompt(number, 4), greedy(40, stop=("ab",)), request_id=str(number))
    texts: dict[str, str] = {}
    tokens: dict[str, tuple[int, ...]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            name = output.request_id
            texts[name] = texts.get(name, "") + output.chunk.text
            tokens[name] = tokens.get(name, ()) + output.chunk.token_ids
            assert (output.finished is None) == (output.chunk.finish_reason is None)
            if output.finished is not None:
                assert (texts[name], tokens[name]) == (output.finished.text, output.finished.token_ids)
    assert len(texts) == 4


def test_generate_keeps_the_order_and_leaves_nothing_after_an_error(text: Path) -> None:
    engine = make_engine(text)
    prompts = [random_prompt(n, 1 + n % 5) for n in range(10)]
    lengths = [greedy(1 + 7 * n % 10) for n in range(10)]
    outputs = engine.generate(prompts, lengths, use_tqdm=False)
    assert [output.usage.output_tokens for output in outputs] == [1 + 7 * n % 10 for n in range(10)]
    with pytest.raises(InvalidInput):
        engine.generate(["fine", ""], use_tqdm=False)
    assert not engine.has_unfinished()
    with pytest.raises(InvalidInput, match="2 sampling_params for 1 prompt"):
        engine.generate(["fine"], lengths[:2], use_tqdm=False)
    assert engine.generate([], use_tqdm=False) == []


def test_a_step_that_can_schedule_nothing_is_a_fault(text: Path) -> None:
    engine = make_engine(text)
    engine.add_request("hello")
    engine.scheduler.max_num_seqs = 0  # a broken scheduler; no request can cause this
    with pytest.raises(EngineFault, match="1 requests wait"):
        engine.step()


def test_statistics_count_what_happened(llava: Path) -> None:
    engine = make_engine(llava, num_speculative_tokens=0)
    ask(engine, QUESTION, noise_image(1), max_tokens=4)
    ask(engine, QUESTION, noise_image(1), max_tokens=4)
    stats = engine.stats()
    length = stats.prefix_cache_queries // 2
    assert (stats.num_requests_running, stats.num_requests_waiting, stats.steps) == (0, 0, 8)
    assert stats.generation_tokens == 8
    assert stats.prefix_cache_hits == (length - 1) // 16 * 16
    assert stats.prompt_tokens == 2 * length - stats.prefix_cache_hits
    assert stats.embedding_cache is not None
    assert engine.model_runner.get_vision_stats()["vision_cache_size"] == stats.embedding_cache.entries == 1


def test_model_info_names_model_revision_and_digest(text: Path) -> None:
    info = make_engine(text).model_info
    assert info.id == text.name
    assert len(info.parameter_digest) == 64
    assert info.parameter_digest.startswith(info.revision)


def test_a_text_model_and_a_tower_compose(text: Path, tmp_path: Path) -> None:
    tower = make_clip(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = make_engine(text, vision_model=str(tower), max_image_size=128, num_vision_tokens=16)
    output = ask(engine, "Look: <|image|> and <|image|>", noise_image(1), noise_image(2))
    assert output.usage.image_tokens == 32
    assert output.token_ids != ask(engine, "Look: <|image|> and <|image|>", noise_image(1), noise_image(3)).token_ids


def test_a_text_tokenizer_without_an_image_token_composes_too(tmp_path: Path) -> None:
    text, tower = make_qwen3(tmp_path / "text"), make_clip(tmp_path / "tower")
    file = text / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<|image|>"]
    file.write_text(json.dumps(tokenizer))
    settings = json.loads((text / "tokenizer_config.json").read_text())
    settings = {name: value for name, value in settings.items() if "<|image|>" not in json.dumps(value)}
    (text / "tokenizer_config.json").write_text(json.dumps(settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = make_engine(text, vision_model=str(tower))
    assert "<|image|>" not in engine.tokenizer.get_vocab()
    assert ask(engine, "Look: <|image|>.", noise_image(1)).usage.image_tokens == 49


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_image_size": 31}, "max_image_size is 32 or more"),
        ({"num_vision_tokens": 18}, "num_vision_tokens=18.*: 16, 25"),
        ({"max_image_tokens": 16}, "max_image_tokens=16.*see max_image_size and num_vision_tokens"),
        ({"min_pixels": 100}, "min_pixels=100.*see max_image_size and num_vision_tokens"),
        ({"projector": "other"}, "projector='other'"),
        ({"max_model_len": 10**6}, "max_model_len=1000000.*4096"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2.*one GPU.*vLLM"),
        ({"quantization": "awq"}, "quantization='awq'"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"dtype": "int4"}, "dtype='int4'"),
        ({"kv_cache_bytes": 100}, "KV cache"),
        ({"gpu_memory": 1}, "unknown engine option: gpu_memory"),
    ],
)
def test_options_that_contradict_or_do_not_exist_are_refused(
    llava: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_engine(llava, **options)


def test_pixel_bounds_of_other_towers_are_refused_for_a_composed_one(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"max_pixels=100.*see max_image_size"):
        make_engine(text, vision_model=str(make_clip(tmp_path)), max_pixels=100)


def test_a_foreign_tower_for_a_llava_checkpoint_is_refused(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"vision_model=.*brings a tower of its own"):
        make_engine(llava, vision_model=str(make_clip(tmp_path)))


def test_a_llava_checkpoint_without_vision_is_its_text_model(llava: Path) -> None:
    engine = make_engine(llava, enable_multimodal=False)
    assert engine.processor is None
    assert len(ask(engine, "hello").token_ids) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel.*Qwen3ForCausalLM"),
        ({"rope_parameters": {"rope_type": "proportional", "factor": 4.0, "rope_theta": 1e4}}, "proportional.*yarn"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "0.5"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, "lacks"),
        ({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "no place"),
        ({"intermediate_size": 64}, r"expected \[64"),
    ],
)
def test_checkpoints_that_are_not_understood_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_qwen3(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(UnsupportedModel, match=message):
        make_engine(tmp_path)


def test_closing_ends_everything_and_may_be_repeated(text: Path) -> None:
    engine = make_engine(text)
    engine.add_request("hello", greedy(50))
    engine.step()
    engine.close()
    engine.close()
    assert not engine.has_unfinished()
