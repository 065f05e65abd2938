"""Requests of every kind at once, in an engine that is short of everything: each answers what it answers alone.

In the deterministic mode, so that no rounding excuses a difference.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_llava
from engine_parts import WORDS, drain, noise_image

from nanovllm.engine import kernels, llm_engine
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(kernels.missing() is not None, reason=str(kernels.missing()))

COUNT = 24
BLOCK_BYTES = 16384
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["yes", "no"]}, "n": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


def draw_params(draw: random.Random) -> SamplingParams:
    options: dict[str, Any] = {"max_tokens": draw.randint(1, 40), "ignore_eos": draw.random() < 0.5, "temperature": 0.0}
    if draw.random() < 0.5:
        options |= {"temperature": draw.choice([0.5, 1.0, 2.0]), "seed": draw.randrange(99)}
        options |= {"top_p": draw.choice([1.0, 0.9]), "top_k": draw.choice([0, 5]), "n": draw.choice([1, 1, 3])}
    options |= draw.choice([{}, {}, {}, {"json_schema": SCHEMA}, {"regex": "(ab|c)*d"}])
    sometimes: list[dict[str, Any]] = [
        {"stop": [draw.choice("abcdefg")], "include_stop_str_in_output": draw.random() < 0.5},
        {"stop_token_ids": [draw.randrange(300)]},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.5},
        {"logprobs": 2},
        {"prompt_logprobs": 1},
        {"min_tokens": draw.randint(0, options["max_tokens"])},
        {"bad_words": ["the fox", "a"]},
        {"loop_tokens": 16},
        {"logit_bias": {7: 20.0, 67: 20.0}},
    ]
    for option in sometimes:
        if draw.random() < 0.2:
            options |= option
    return SamplingParams(**options)


def draw_request(draw: random.Random) -> dict[str, Any]:
    images = draw.choice([0, 0, 1, 2])
    words = draw.choices(WORDS, k=draw.choice([2, 4, 20]))
    text = " ".join(words) if draw.random() < 0.6 else "the quick brown fox total receipt hello world"
    return {
        "prompt": text + " <|image|> and" * images,
        "sampling_params": draw_params(draw),
        "images": [noise_image(draw.randrange(4)) for _ in range(images)],
        "cache_salt": draw.choice([b"", b"tenant"]),
    }


def seen(output: RequestOutput) -> Any:
    return [
        (one.text, one.token_ids, one.finish_reason, one.logprobs) for one in output.outputs
    ], output.prompt_logprobs


@pytest.mark.parametrize("seed", range(7))
def test_each_answers_what_it_answers_alone(llava: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    overlaps, num_requests = (True, COUNT // 2) if seed == 6 else (False, COUNT)
    monkeypatch.setattr(llm_engine, "is_asynchronous", lambda _: overlaps)
    options = {"deterministic": True, "quantization": "int8" if seed % 3 == 2 else None}
    engine = LLMEngine(
        str(llava),
        kv_cache_bytes=draw.choice([12, 16]) * BLOCK_BYTES,
        max_num_batched_tokens=draw.choice([7, 33, 2048]),
        max_num_seqs=draw.choice([3, 16]),
        embedding_cache_bytes=draw.choice([0, 1 << 20]),
        **options,
    )
    requests, outputs, aborted = {}, {}, set()
    while len(requests) < num_requests or engine.has_unfinished():
        if len(requests) < num_requests and draw.random() < 0.4:
            name = str(len(requests))
            requests[name] = draw_request(draw)
            engine.add_request(**requests[name], request_id=name, priority=draw.choice([-1, 0, 0, 1]))
            if draw.random() < 0.1:
                aborted.add(name)
        for name in aborted - set(outputs):
            if draw.random() < 0.2:
                engine.abort(name)
        if engine.scheduler.running and not engine._in_flight and draw.random() < 0.05:
            engine.scheduler._preempt_last()
        for output in engine.step():
            assert output.failure is None
            if output.finished is not None:
                outputs[output.request_id] = output.finished
        engine.audit()

    assert set(outputs) == set(requests)
    alone = LLMEngine(
        str(llava),
        kv_cache_bytes=64 * BLOCK_BYTES,
        max_model_len=engine.max_model_len,
        enable_prefix_caching=False,
        num_speculative_tokens=0,
        **options,
    )
    for name, request in requests.items():
        if name not in aborted:
            images, salt = request["images"], request["cache_salt"]
            alone.add_request(request["prompt"], request["sampling_params"], images=images, cache_salt=salt)
            (output,) = drain(alone).values()
            assert seen(outputs[name]) == seen(output)
    stats = engine.stats()
    assert min(stats.num_preemptions, stats.prefix_cache_hits, stats.spec_decode_accepted_tokens) > 0
