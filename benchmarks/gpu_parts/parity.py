"""Whether the engine is right: it answers greedily, and transformers in float32 scores the answers.

In float32 every token must be the best one there, up to a tie, and its log probability the same. In half precision log
probabilities may be off by about as much as those of transformers in that precision are.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gpu_parts.bench import Bench, Finding, free_memory, guarded, path_of
from nanovllm import LLM, SamplingParams
from nanovllm.engine.outputs import RequestOutput
from nanovllm.training import synthetic
from nanovllm.training.evaluate import EVALUATION_SEED

TIE = 1e-2  # log probabilities nearer than this are equal in float32: sums in another order, over dozens of layers
ALLOWANCE = 1.5  # times the error of transformers in the same precision
READ_EXACTLY = 0.9  # of the shipped checkpoint's held-out samples; on a CPU it is 0.98
MODES: dict[str, dict[str, Any]] = {
    "graphs": {},
    "without graphs": {"enforce_eager": True},
    "chunks of 48": {"max_num_batched_tokens": 48},
    "warm prefix cache": {},
}


@dataclass(frozen=True)
class Scores:
    """Log probabilities of an answer's tokens, and of the best token at each place; both [n], float32."""

    taken: torch.Tensor
    best: torch.Tensor


def check(bench: Bench, dtype: str) -> Iterator[Finding]:
    """Every way to compute, in one precision; then images with the shipped checkpoint."""
    prompts = bench.draw(bench.scale.prompts, bench.scale.prompt_tokens, seed=1, more=3)
    params = SamplingParams(temperature=0.0, max_tokens=bench.scale.answer_tokens, ignore_eos=True, logprobs=1)
    found: dict[str, tuple[list[RequestOutput], dict[str, Any]]] = {}

    def answer(mode: str) -> Finding:
        def ask(engine: LLM) -> None:
            if mode == "warm prefix cache":
                engine.generate(prompts, params, use_tqdm=False)
            outputs = engine.generate(prompts, params, use_tqdm=False)
            found[mode] = outputs, path_of(engine, outputs)

        bench.ask(ask, dtype=dtype, **{"kv_cache_bytes": 4 << 30, **MODES[mode]})
        return {}

    for mode in MODES:
        if failure := guarded(f"{dtype}, {mode}", partial(answer, mode)):
            yield failure
    model = bench.transformers("float32")
    exact = {mode: score_all(model, prompts, outputs) for mode, (outputs, _) in found.items()}
    if dtype != "float32":
        del model
        free_memory()
        model = bench.transformers(dtype)
    for mode, (outputs, path) in found.items():
        scores = exact[mode] if dtype == "float32" else score_all(model, prompts, outputs)
        theirs = mean_error([one.taken for one in scores], exact[mode])
        yield judge(f"{dtype}, {mode}", dtype, outputs, exact[mode], theirs, path)
    del model
    free_memory()
    yield guarded(f"{dtype}, images", partial(images, bench, dtype))


def images(bench: Bench, dtype: str) -> Finding:
    """The shipped checkpoint reads receipts and shapes that it never saw."""
    samples = [synthetic.sample(index, seed=EVALUATION_SEED, split="heldout") for index in range(bench.scale.held_out)]

    def ask(engine: LLM) -> Finding:
        outputs = engine.generate(
            [one.prompt for one in samples],
            SamplingParams(temperature=0.0, max_tokens=160),
            images=[one.images for one in samples],
            use_tqdm=False,
        )
        exact = statistics.fmean(one.answer == output.text for one, output in zip(samples, outputs, strict=True))
        passed = exact >= READ_EXACTLY
        return {"name": f"{dtype}, images", "passed": passed, "read_exactly": exact, **path_of(engine, outputs)}

    return bench.ask(ask, "tiny-receipts", dtype=dtype, kv_cache_bytes=256 << 20)


@torch.inference_mode()
def score_all(model: Any, prompts: list[list[int]], outputs: list[RequestOutput]) -> list[Scores]:
    """What transformers thinks of the answers, one by one."""
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([[*prompt, *output.token_ids]], device=model.device)
        logits = model(ids[:, :-1], logits_to_keep=len(output.token_ids)).logits[0].float()
        logprobs = logits.log_softmax(-1)
        taken = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
        found.append(Scores(taken.cpu(), logprobs.amax(-1).cpu()))
    return found


def mean_error(logprobs: list[torch.Tensor], exact: list[Scores]) -> float:
    """How far off log probabilities are, on average."""
    return float(torch.cat([(one - two.taken).abs() for one, two in zip(logprobs, exact, strict=True)]).mean())


def judge(
    name: str, dtype: str, outputs: list[RequestOutput], exact: list[Scores], theirs: float, path: dict[str, Any]
) -> Finding:
    """Hold answers against float32; ``theirs`` is the mean error of transformers in the same precision."""
    ours = [
        torch.tensor([entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs or (), strict=True)])
        for one in outputs
    ]
    error = mean_error(ours, exact)
    gaps = torch.cat([one.best - one.taken for one in exact])
    worst = max(float((one - two.taken).abs().max()) for one, two in zip(ours, exact, strict=True))
    near = float(gaps.max()) <= TIE and worst <= TIE if dtype == "float32" else error <= ALLOWANCE * theirs
    took = path["cached_tokens"] > 0 or "warm" not in name
    if torch.cuda.is_available():
        took = took and (path["graph_replays"] == 0) == ("without graphs" in name)
    return {
        "name": name,
        "passed": near and took,
        "mean_logprob_error": error,
        "worst_logprob_error": worst,
        "mean_logprob_error_of_transformers": theirs,
        "best_tokens": float((gaps == 0).float().mean()),
        "worst_gap_to_the_best_token": float(gaps.max()),
        **path,
    }
