"""Drafts decide how fast a text comes, never which: whatever a request asks for, and whoever stands beside it."""

from __future__ import annotations

import json
import random
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_clip, make_qwen3
from engine_parts import drain, greedy, noise_image, step

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import RequestOutput
from nanovllm.engine.scheduling.batch import ScheduledRow
from nanovllm.engine.scheduling.prompt_lookup import MATCH_TOKENS, PromptLookup, Recurrences
from nanovllm.engine.scheduling.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

PROMPTS = ("The quick brown fox the quick brown fox jumps over", "the the the the the the the the the the")
SCHEMA = {"type": "object", "properties": {"kind": {"enum": ["a", "b"]}, "n": {"type": "integer"}}, "required": ["n"]}


@pytest.fixture(scope="module")
def plain(text: Path) -> Iterator[LLMEngine]:
    with LLMEngine(str(text), kv_cache_bytes=4 << 20, num_speculative_tokens=0) as engine:
        yield engine


def texts(output: RequestOutput) -> Any:
    """What a caller reads of an output."""
    return [(one.text, one.token_ids, one.finish_reason) for one in output.outputs]


def scores(output: RequestOutput) -> list[float]:
    """The log probabilities of all tokens, prompt and output, that have one."""
    places = [*(output.prompt_logprobs or ()), *(place for one in output.outputs for place in one.logprobs or ())]
    return [next(iter(place.values())).logprob for place in places if place]


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 1},
    "a seed": {"temperature": 0.8, "seed": 5},
    "several": {"temperature": 1.3, "seed": 6, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "n": 3},
    "penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1},
    "bad words": {"bad_words": ["the fox", "quick"]},
    "a stop string": {"stop": ["th", "a "], "min_tokens": 10},
    "a stop string kept": {"stop": ["th", "a "], "include_stop_str_in_output": True},
    "a stop string inside a draft": {"logit_bias": {67: 100.0}, "stop": ["aaaaaaaaaaaaa"]},
    "a stop token": {"logit_bias": {7: 100.0}, "stop_token_ids": [7], "min_tokens": 13},
    "a loop": {"logit_bias": {7: 100.0}, "loop_tokens": 16},
    "max_tokens inside a draft": {"logit_bias": {7: 100.0}, "max_tokens": 18},
    "a schema": {"json_schema": SCHEMA},
    "a schema and log probabilities": {"json_schema": SCHEMA, "logprobs": 0, "temperature": 1.0, "seed": 3},
    "an expression that never ends": {"regex": "(ab )*", "ignore_eos": True, "frequency_penalty": 0.1},
}


@pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))
def test_every_option_gives_the_same_with_drafts_and_without(text: Path, plain: LLMEngine, options: Any) -> None:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 70, "ignore_eos": True, **options})
    with LLMEngine(str(text), kv_cache_bytes=4 << 20) as engine:
        for prompt in PROMPTS:
            expected = plain.generate(prompt, params, use_tqdm=False)[0]
            for _ in range(2):  # the second time the first answer is known
                output = engine.generate(prompt, params, use_tqdm=False)[0]
                assert texts(output) == texts(expected)
                assert scores(output) == pytest.approx(scores(expected), abs=1e-3)
        assert engine.stats().spec_decode_accepted_tokens > 0
    assert plain.stats().spec_decode_draft_tokens == 0


def test_drafts_leave_the_distribution_as_it_is(text: Path) -> None:
    """Many short samples of one prompt with few tokens to choose from, so that drafts are right now and then."""
    bias = dict.fromkeys((60, 61, 62), 60.0)
    params = SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True, logit_bias=bias)
    counts = []
    for drafts in (0, 8):
        with LLMEngine(str(text), kv_cache_bytes=4 << 20, num_speculative_tokens=drafts, seed=drafts) as engine:
            outputs = [engine.generate([[60, 61, 62] * 4] * 2, params, use_tqdm=False) for _ in range(400)]
            stats = engine.stats()
        assert (stats.spec_decode_accepted_tokens > 300) == (drafts > 0)
        counts.append(Counter(one.token_ids[2:5] for pair in outputs for one in pair))
    total = sum(counts[0].values())
    distance = sum(abs(counts[0][key] - counts[1][key]) for key in counts[0] | counts[1]) / (2 * total)
    # Of two samples of this size the distance is 0.06 on average; drafts that were taken untested would make it 0.5.
    assert distance < 0.12


def make_sequence(prompt: list[int], **options: Any) -> Sequence:
    sampling = SamplingParams(max_tokens=99)
    return Sequence("", list(prompt), len(prompt), sampling, 99, **options)


def test_one_sequence_learns_from_an_earlier_one_of_its_template_and_tenant_only() -> None:
    template = list(range(100, 120))
    lookup = PromptLookup(4)
    done = make_sequence([*template, 1, 2, 3], cache_salt=b"tenant")
    done.token_ids += [4, 5, 6, 7]
    lookup.finish(done)
    assert lookup.propose(make_sequence([*template, 9, 2, 3, 4], cache_salt=b"tenant"), 8) == (5, 6, 7, 5)
    assert lookup.propose(make_sequence([*template, 1, 2, 3], cache_salt=b"tenant"), 8)[:1] == (4,)
    assert lookup.propose(make_sequence([*template, 9, 2, 3, 4], cache_salt=b"other"), 8) == ()
    assert lookup.propose(make_sequence([0, *template, 9, 2, 3, 4], cache_salt=b"tenant"), 8) == ()


def test_a_draft_that_was_all_wrong_ends_them_for_a_while_and_right_ones_grow() -> None:
    lookup = PromptLookup(8)
    sequence = make_sequence([1, 2, 3] * 5)

    def commit(accepted: int) -> int:
        """Draft, take over that many and then another token; returns the length of the draft."""
        known = len(sequence)
        drafts = lookup.propose(sequence, 99)
        row = ScheduledRow(sequence, known - 1, 1 + len(drafts), True, drafts)
        sequence.token_ids += drafts[:accepted]
        if accepted < len(drafts):
            sequence.token_ids += [9]
        if drafts:
            lookup.learn(row)
        return len(drafts)

    assert [commit(99), commit(99), commit(99)] == [4, 8, 8]
    assert commit(2) == 8
    sequence.token_ids += [1, 2, 3]
    assert commit(0) == 2  # no more than was right the last time
    for _ in range(10):
        sequence.token_ids += [1, 2, 3]
        assert commit(0) == 0
    sequence.token_ids += [1, 2, 3]
    assert commit(1) > 0


def test_a_large_batch_has_no_drafts(text: Path) -> None:
    with LLMEngine(str(text), kv_cache_bytes=8 << 20) as engine:
        params = greedy(60, logit_bias={7: 100.0})  # a text that is guessed at once
        for number in range(engine.scheduler.max_draft_step_tokens):
            engine.add_request([number + 1] * 3, params)
        for _ in range(40):
            step(engine, {})
        assert engine.stats().spec_decode_draft_tokens == 0
        for sequence in engine.scheduler.running[4:]:
            engine.abort(sequence.request_id)
        drain(engine)
        assert engine.stats().spec_decode_accepted_tokens > 0


def test_a_placeholder_beyond_the_vocabulary_is_never_drafted(tmp_path: Path) -> None:
    text, tower = make_qwen3(tmp_path / "text"), make_clip(tmp_path / "tower")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = text / name
        file.write_text(json.dumps(without_image_token(json.loads(file.read_text()))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = LLMEngine(str(text), kv_cache_bytes=4 << 20, vision_model=str(tower))
    assert engine.model_runner.image_token_id >= engine.model_runner.model.config.vocab_size
    template = "one two three four five six seven eight nine ten eleven twelve"
    for _ in range(2):
        name = engine.add_request(f"{template} <|image|>", greedy(12), images=[noise_image(1)])
        answer = drain(engine)[name].token_ids
    prompt = [*engine.tokenizer.encode(template), *answer[-3:]]
    name = engine.add_request(prompt, greedy(12))
    assert len(drain(engine)[name].token_ids) == 12
    assert torch.tensor(engine.input_processor.prompts.trusted(template)).max() < engine.model_runner.image_token_id


def without_image_token(value: Any) -> Any:
    """A tokenizer's file without its mention of images."""
    if isinstance(value, dict):
        parts = {name: without_image_token(part) for name, part in value.items()}
        return {name: part for name, part in parts.items() if "<|image|>" not in json.dumps(part)}
    if isinstance(value, list):
        return [part for part in value if "<|image|>" not in json.dumps(part)]
    return value


def test_the_runs_of_a_long_context_are_found_in_a_megabyte() -> None:
    draw = random.Random(0)
    tokens = [draw.randrange(12) for _ in range(1 << 15)]
    tracemalloc.start()
    recurrences = Recurrences(tokens)
    recurrences.continuation((0, 0, 0), 1)
    distinct = [draw.randrange(1 << 17) for _ in range(1 << 15)]
    long = Recurrences(distinct)
    for _ in range(3_000):
        long.continuation((0, 0, 0), 1)
        distinct.append(draw.randrange(1 << 17))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 3 << 20  # both lists among it, which are their owners'

    for _ in range(2_000):
        run = tuple(draw.randrange(12) for _ in range(MATCH_TOKENS))
        ends = [end for end in range(len(tokens) - 1, len(tokens) - 300, -1) if tuple(tokens[end - 3 : end]) == run]
        found = recurrences.continuation(run, 1)
        assert not ends or found == [tokens[ends[0]]]
        tokens.append(draw.randrange(12))
    earlier = 100
    assert long.continuation(tuple(distinct[earlier : earlier + 3]), 4) == distinct[earlier + 3 : earlier + 7]
    assert long.continuation((1 << 18, 0, 0), 4) == long.continuation((5,), 4) == []
