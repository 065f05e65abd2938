"""The outputs of one request as they come from vLLM; then the finished output."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.vllm.prompt import ImageRun
from nanovllm.engine.outputs import (
    Completion,
    FinishReason,
    ImageUse,
    Logprob,
    RequestOutput,
    RequestTimings,
    TokenChunk,
    TokenLogprobs,
    Usage,
)

_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "repetition": "loop"}


@dataclass
class _Choice:
    """One of the ``n`` outputs so far."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text_ends: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Answer:
    """Collects what vLLM says of one request, whose outputs are deltas.

    ``begun`` is of ``time.perf_counter``; ``runs`` are the places of its images, once they are known.
    """

    def __init__(self, request: Request, begun: float, runs: Sequence[ImageRun] = ()) -> None:
        self._request = request
        self._begun = begun
        self._choices = [_Choice() for _ in range(request.sampling.n)]
        self._first_token = self._last_token = 0.0
        self._queue_s = 0.0
        self._input_tokens = self._cached_tokens = 0
        self._prompt_logprobs: list[TokenLogprobs] | None = None
        self._runs = runs
        self.failed = False
        """Whether vLLM has given the request up, which may succeed when it is sent again."""

    def add(self, output: Any) -> Iterator[TokenChunk]:
        """Take one ``RequestOutput`` of vLLM; yields what is new of each output, without its end."""
        self._input_tokens = len(output.prompt_token_ids or ())
        self._cached_tokens = max(self._cached_tokens, output.num_cached_tokens or 0)
        if output.prompt_logprobs:
            self._prompt_logprobs = [_position(place) for place in output.prompt_logprobs]
            for run in self._runs:
                self._prompt_logprobs[run.start : run.end] = [{}] * run.length
        stats = output.metrics
        if stats is not None and stats.scheduled_ts:
            self._queue_s = max(0.0, stats.scheduled_ts - stats.queued_ts)
        for one in output.outputs:
            choice = self._choices[one.index]
            if one.token_ids:
                self._last_token = time.perf_counter()
                self._first_token = self._first_token or self._last_token
            choice.text += one.text
            choice.token_ids += one.token_ids
            choice.logprobs += map(_position, one.logprobs or ())
            choice.text_ends += [len(choice.text)] * (len(choice.token_ids) - len(choice.text_ends))
            if one.finish_reason is not None:
                self.failed |= one.finish_reason not in _REASONS
                choice.finish_reason = _REASONS.get(one.finish_reason, "abort")
            if one.text or one.token_ids:
                yield TokenChunk(one.text, tuple(one.token_ids), None, one.index)

    def output(self) -> RequestOutput:
        """What has come so far, as an output; without an end it was aborted."""
        request, ended = self._request, time.perf_counter()
        outputs = tuple(self._completion(index, choice) for index, choice in enumerate(self._choices))
        first, longest = outputs[0], max(len(one.token_ids) for one in outputs)
        generation_ms = (self._last_token - self._first_token) * 1000
        return RequestOutput(
            request_id=request.request_id,
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=first.finish_reason,
            usage=Usage(
                input_tokens=self._input_tokens,
                output_tokens=sum(len(one.token_ids) for one in outputs),
                image_tokens=sum(run.length for run in self._runs),
                cached_tokens=self._cached_tokens,
            ),
            timings=RequestTimings(
                queue_ms=self._queue_s * 1000,
                time_to_first_token_ms=((self._first_token or ended) - self._begun) * 1000,
                generation_ms=generation_ms,
                mean_itl_ms=generation_ms / (longest - 1) if longest > 1 else 0.0,
                e2e_ms=(ended - self._begun) * 1000,
            ),
            images=tuple(
                ImageUse(
                    image.digest.hex(),
                    "prefix" if run.end <= self._cached_tokens else "miss",  # vLLM does not tell its encoder cache's
                    run.length,
                    image.width,
                    image.height,
                )
                for image, run in zip(request.images, self._runs, strict=False)
            ),
            logprobs=first.logprobs,
            prompt_logprobs=None if self._prompt_logprobs is None else tuple(self._prompt_logprobs),
            outputs=outputs,
            is_constrained=request.sampling.constraint is not None,
        )

    def _completion(self, index: int, choice: _Choice) -> Completion:
        has_logprobs = self._request.sampling.logprobs is not None
        return Completion(
            index,
            choice.text,
            tuple(choice.token_ids),
            choice.finish_reason or "abort",
            tuple(choice.logprobs) if has_logprobs else None,
            tuple(choice.text_ends) if has_logprobs else None,
        )


def _position(found: Any) -> TokenLogprobs:
    """Log probabilities at one position: vLLM's first entry is the token itself, then come the most probable ones."""
    return {
        token: Logprob(float(one.logprob), one.rank or 0, one.decoded_token or "")
        for token, one in (found or {}).items()
    }
