"""Options of sampling through the whole engine, against `transformers` and against sums done by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_llava
from engine_parts import drain, greedy, noise_image
from pydantic import ValidationError
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.text.repetition import is_loop
from nanovllm.errors import InvalidInput
from nanovllm.sampling_params import SamplingParams

PROMPT = "The quick brown fox jumps over the lazy dog and the"


@pytest.fixture(scope="module")
def reference(text: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32).eval()


def ask(engine: LLMEngine, **options: Any) -> Any:
    options = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **options}
    return engine.generate(PROMPT, SamplingParams(**options), use_tqdm=False)[0]


@torch.inference_mode()
def expected_tokens(engine: LLMEngine, reference: Any, *processors: Any, count: int = 24) -> list[int]:
    """Greedy tokens of the reference with its own logits processors; end-of-sequence is a token like any other."""
    ids = torch.tensor([engine.tokenizer.encode(PROMPT)])
    prompt_length = ids.shape[1]
    for _ in range(count):
        logits = reference(ids).logits[:, -1].float()
        ids = torch.cat([ids, LogitsProcessorList(processors)(ids, logits).argmax(-1, keepdim=True)], dim=1)
    return ids[0, prompt_length:].tolist()


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_repetition_penalty_is_that_of_transformers(engine: LLMEngine, reference: Any, penalty: float) -> None:
    output = ask(engine, repetition_penalty=penalty)

    assert list(output.token_ids) == expected_tokens(engine, reference, RepetitionPenaltyLogitsProcessor(penalty))
    assert output.token_ids != ask(engine).token_ids


def test_presence_and_frequency_penalties_count_the_output_alone(engine: LLMEngine, reference: Any) -> None:
    prompt_length = len(engine.tokenizer.encode(PROMPT))

    def penalise(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        for token in ids[0, prompt_length:].tolist():
            logits[0, token] -= 1.5
        for token in set(ids[0, prompt_length:].tolist()):
            logits[0, token] -= 0.5
        return logits

    output = ask(engine, presence_penalty=0.5, frequency_penalty=1.5)

    assert list(output.token_ids) == expected_tokens(engine, reference, penalise)


def test_bad_words_never_come(engine: LLMEngine, reference: Any) -> None:
    plain = list(ask(engine).token_ids)
    first, second = (engine.tokenizer.decode(plain[place : place + 2]) for place in (2, 9))
    words = tuple(word for word in (first, second) if word.isprintable() and "\ufffd" not in word) or ("the",)
    output = ask(engine, bad_words=words)

    forms = [engine.tokenizer.encode(form) for word in words for form in (word.lstrip(), " " + word.lstrip())]
    processor = NoBadWordsLogitsProcessor([list(form) for form in {tuple(form) for form in forms}])
    assert list(output.token_ids) == expected_tokens(engine, reference, processor)
    assert output.token_ids != tuple(plain)


def test_a_bias_decides_and_a_neighbour_does_not_feel_it(engine: LLMEngine) -> None:
    plain = ask(engine)
    both = engine.generate([PROMPT, PROMPT], [greedy(24, logit_bias={7: 100.0}), greedy(24)])

    assert both[0].token_ids == (7,) * 24
    assert both[1].token_ids == plain.token_ids


def test_more_best_tokens_than_there_are_keep_all(engine: LLMEngine) -> None:
    options = {"temperature": 1.0, "seed": 1}
    assert ask(engine, top_k=10**400, **options).token_ids == ask(engine, top_p=0.999999, **options).token_ids


@pytest.mark.parametrize("options", [{"logit_bias": {10**6: 1.0}}, {"stop_token_ids": [-1]}])
def test_tokens_outside_the_vocabulary_are_refused(engine: LLMEngine, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="outside the vocabulary"):
        ask(engine, **options)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"stop": "\n"}, {"stop": ("\n",)}),
        ({"stop": None}, {}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop_token_ids": None, "bad_words": None, "logit_bias": None}, {}),
        ({"bad_words": "the"}, {"bad_words": ("the",)}),
        ({"logit_bias": {"7": 1}}, {"logit_bias": {7: 1.0}}),
        ({"seed": -1}, {}),
        ({"seed": None}, {}),
    ],
)
def test_sampling_parameters_may_be_written_as_for_vllm(written: dict[str, Any], meant: dict[str, Any]) -> None:
    assert SamplingParams(**written) == SamplingParams(**meant)


def test_no_limit_of_tokens_is_that_of_the_context(text: Path) -> None:
    with LLMEngine(str(text), kv_cache_bytes=4 << 20, max_model_len=48) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=None, min_tokens=20, ignore_eos=True)
        output = engine.generate([[5] * 8], params, use_tqdm=False)[0]
    assert (output.finish_reason, output.usage.output_tokens) == ("length", 40)


@pytest.mark.parametrize(
    "options",
    [
        {"stop": ""},
        {"stop": [""]},
        {"stop": 7},
        {"seed": -2},
        {"max_tokens": 0},
        {"temperature": None},
        {"logit_bias": {"x": 1.0}},
        {"logit_bias": [7]},
        {"n": 2, "temperature": 0.0},
        {"min_tokens": 9, "max_tokens": 8},
        {"regex": "a", "choice": ["a"]},
        {"json_schema": {"enum": ["a" * 270_000]}},
        {"regex": "a" * 70_000},
        {"top_q": 1},
        {"json_schema": {"enum": [{1, 2}]}},
    ],
)
def test_options_that_contradict_one_another_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SamplingParams(**options)


def test_a_schema_nested_beyond_what_json_can_write_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(ValidationError, match="nested too deeply"):
        SamplingParams(json_schema=schema)


def test_several_outputs_differ_and_each_is_the_one_of_its_seed(engine: LLMEngine) -> None:
    options = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True}
    output = ask(engine, n=4, seed=5, **options)

    assert [one.index for one in output.outputs] == [0, 1, 2, 3]
    assert len({one.token_ids for one in output.outputs}) == 4
    assert (output.text, output.token_ids) == (output.outputs[0].text, output.outputs[0].token_ids)
    assert [one.token_ids for one in output.outputs] == [ask(engine, seed=5 + n, **options).token_ids for n in range(4)]
    assert output.usage.output_tokens == 48
    assert output.usage.input_tokens == len(engine.tokenizer.encode(PROMPT))


def test_several_outputs_of_one_request_end_one_by_one_and_abort_together(engine: LLMEngine) -> None:
    name = engine.add_request(PROMPT, SamplingParams(n=3, temperature=1.0, max_tokens=500, ignore_eos=True))
    for _ in range(4):
        assert not any(output.finished for output in engine.step())
    engine.abort(name)
    outputs = [output for output in engine.step() if output.request_id == name]

    assert [output.chunk.index for output in outputs] == [0, 1, 2]
    assert [output.finished is not None for output in outputs] == [False, False, True]
    finished = outputs[-1].finished
    assert finished is not None
    assert [one.finish_reason for one in finished.outputs] == ["abort"] * 3
    engine.audit()


def test_an_image_of_several_outputs_is_encoded_once(tmp_path: Path) -> None:
    with LLMEngine(str(make_llava(tmp_path)), kv_cache_bytes=8 << 20) as engine:
        params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=6, ignore_eos=True)
        name = engine.add_request("What is <|image|>?", params, images=[noise_image(1)])
        output = drain(engine)[name]

        assert engine.stats().encoder_images == 1
        assert len({one.token_ids for one in output.outputs}) == 3


def test_logprobs_are_the_models_own_whatever_was_done_to_the_logits(engine: LLMEngine, reference: Any) -> None:
    output = ask(engine, logprobs=3, temperature=1.3, top_k=20, seed=4, repetition_penalty=1.2, max_tokens=10)
    ids = torch.tensor([engine.tokenizer.encode(PROMPT) + list(output.token_ids)])
    with torch.inference_mode():
        expected = reference(ids).logits[0].float().log_softmax(-1)[-len(output.token_ids) - 1 : -1]

    assert len(output.logprobs) == len(output.token_ids) == 10
    for token, scores, row in zip(output.token_ids, output.logprobs, expected, strict=True):
        best = row.topk(3)
        assert next(iter(scores)) == token
        assert set(scores) == {token, *best.indices.tolist()}
        for index, score in scores.items():
            assert math.isclose(score.logprob, float(row[index]), abs_tol=1e-3)
            assert score.rank == int((row > row[index]).sum()) + 1
            assert score.text == engine.tokenizer.decode([index])


def test_prompt_logprobs_are_the_same_in_chunks_after_preemption_and_on_a_warm_cache(
    text: Path, reference: Any
) -> None:
    prompts = [PROMPT * 3, PROMPT * 2 + " fox"]
    with LLMEngine(str(text), kv_cache_bytes=4 << 20, max_num_batched_tokens=16) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=2, ignore_eos=True)
        runs = [engine.generate(prompts, params, use_tqdm=False) for _ in range(2)]
        for prompt, *outputs in zip(prompts, *runs, strict=True):
            ids = engine.tokenizer.encode(prompt)
            with torch.inference_mode():
                expected = reference(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            for output in outputs:
                assert len(output.prompt_logprobs) == len(ids)
                assert output.prompt_logprobs[0] == {}
                for place, scores in enumerate(output.prompt_logprobs[1:], 1):
                    score = scores[ids[place]].logprob
                    assert math.isclose(score, float(expected[place - 1, ids[place]]), abs_tol=1e-3)
                    assert set(expected[place - 1].topk(2).indices.tolist()) <= set(scores)
                assert output.usage.cached_tokens == 0


def test_a_stop_string_stays_in_the_text_where_it_is_asked_for(engine: LLMEngine) -> None:
    plain = ask(engine).text
    stop = plain[6:9]
    without, within = (ask(engine, stop=[stop], include_stop_str_in_output=kept).text for kept in (False, True))

    assert without == plain[: plain.index(stop)]
    assert within == plain[: plain.index(stop) + 3]


@pytest.mark.parametrize(
    ("tokens", "looks"),
    [
        ([1] * 16, True),
        ([1, 2, 3, 4] * 4, True),
        ([3, 4, *[1, 2, 3, 4] * 4][:16], True),
        ([1, 2, 3, 4] * 3 + [1, 2, 3, 5], False),
        (list(range(16)), False),
        ([1, 2, 3, 4, 5] * 3 + [1], False),
    ],
)
def test_a_loop_is_one_passage_four_times_over(tokens: list[int], looks: bool) -> None:
    assert is_loop(tokens) is looks


def test_a_loop_ends_the_output_with_a_reason_of_its_own(engine: LLMEngine) -> None:
    looping = ask(engine, logit_bias={7: 100.0}, max_tokens=400, loop_tokens=40)
    endless = ask(engine, logit_bias={7: 100.0}, max_tokens=100)

    assert (looping.finish_reason, len(looping.token_ids)) == ("loop", 40)
    assert (endless.finish_reason, len(endless.token_ids)) == ("length", 100)


def test_a_biased_request_survives_json() -> None:
    params = SamplingParams(logit_bias={7: 1.5}, stop=("a",))
    text = json.dumps(params.model_dump(mode="json", exclude_unset=True))

    assert SamplingParams.model_validate_json(text, strict=True) == params
