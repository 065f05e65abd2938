"""The output processor: appends sampled tokens, decides where an output ends, and builds the request's output."""

from __future__ import annotations

import time
from collections import abc
from dataclasses import dataclass

from nanovllm.engine.outputs import (
    Completion,
    FinishReason,
    ImageUse,
    RequestOutput,
    RequestTimings,
    TokenLogprobs,
    Usage,
)
from nanovllm.engine.sampling.structured_output import Matcher
from nanovllm.engine.scheduling.batch import ScheduledRow
from nanovllm.engine.scheduling.sequence import Sequence
from nanovllm.engine.text.detokenizer import Detokenizer
from nanovllm.engine.text.repetition import is_loop
from nanovllm.errors import UnsupportedConstraint

_LOOP_CHECK_INTERVAL_TOKENS = 8


@dataclass(frozen=True)
class RequestState:
    """A running request: its sequences and their detokenizers, one of each for an output."""

    sequences: abc.Sequence[Sequence]
    detokenizers: abc.Sequence[Detokenizer]


def extend(
    row: ScheduledRow,
    detokenizer: Detokenizer,
    tokens: abc.Sequence[int],
    logprobs: abc.Sequence[TokenLogprobs | None],
    *,
    force: bool = True,
) -> tuple[str, FinishReason | None]:
    """Append to the row's sequence the token sampled after its last one and those after each accepted draft.

    ``tokens`` and ``logprobs`` have one entry for the last known token and one for each draft. With ``force`` the only
    tokens that the constraint allows are appended too; they need no sampled token, and may be drafts.
    Returns the text that may be shown now, and the finish reason if the output ends here.

    Raises:
        UnsupportedConstraint: the constraint turned out to be too complex, or it allows no token after the text.
    """
    sequence, known = row.sequence, len(row.sequence)
    text, new = "", 0
    reason: FinishReason | None = None
    while reason is None and new < len(tokens) and row.num_accepted == new:
        if (scores := logprobs[new]) is not None:
            sequence.logprobs.append(scores)
        more, reason = _extend(sequence, detokenizer, tokens[new], force=force)
        text += more
        new = len(sequence) - known
    return text, reason


def _extend(
    sequence: Sequence, detokenizer: Detokenizer, token: int, *, force: bool
) -> tuple[str, FinishReason | None]:
    matcher = sequence.matcher
    if matcher is None:
        return add_token(sequence, detokenizer, token)
    text, reason, is_whole = _add_matched(sequence, detokenizer, matcher, token)
    # A forced token has no logits, so there would be no log probability.
    if force and reason is None and sequence.sampling.logprobs is None:
        for forced in matcher.forced_tokens():
            more, reason, is_whole = _add_matched(sequence, detokenizer, matcher, forced)
            text += more
            if reason is not None:
                break
    if (failure := matcher.failure) is not None:
        # In a dead end llguidance's mask allows the end tokens alone, so that "stop" says nothing here.
        if reason in (None, "stop"):
            raise UnsupportedConstraint(failure)
        return text, reason
    if detokenizer.is_cut or (reason == "stop" and not is_whole):
        return text, "length"  # a stop string or a stop token inside what the constraint demands
    # An output that is complete with its last token has not been cut by max_tokens.
    return text, "stop" if matcher.is_stopped else reason


def _add_matched(
    sequence: Sequence, detokenizer: Detokenizer, matcher: Matcher, token: int
) -> tuple[str, FinishReason | None, bool]:
    """As ``add_token``, and whether the text is all that the constraint demands."""
    text, reason = add_token(sequence, detokenizer, token)
    is_left_out = not sequence.sampling.include_stop_str_in_output and token in sequence.sampling.stop_token_ids
    was_whole = reason == "stop" and is_left_out and matcher.is_accepting
    matcher.consume(token)
    return text, reason, was_whole if is_left_out else matcher.is_stopped or matcher.is_accepting


def add_token(sequence: Sequence, detokenizer: Detokenizer, token: int) -> tuple[str, FinishReason | None]:
    """Append a token that no constraint confines; returns what ``extend`` does."""
    token_ids, sampling = sequence.token_ids, sequence.sampling
    token_ids.append(token)
    count = len(token_ids) - sequence.num_prompt_tokens
    is_end = token in sequence.stop_token_ids and count > sampling.min_tokens
    # As in vLLM: the token that ends an output is one of its tokens, and no part of its text.
    text = "" if is_end and not sampling.include_stop_str_in_output else detokenizer.append(token)
    if sampling.logprobs is not None:
        sequence.text_ends.append(len(detokenizer.text))
    if detokenizer.is_stopped or is_end:
        return text, "stop"
    if count >= sequence.max_tokens:
        return text, "length"
    window = sampling.loop_tokens
    is_due = window and count >= window and count % _LOOP_CHECK_INTERVAL_TOKENS == 0
    return text, "loop" if is_due and is_loop(sequence.token_ids[-window:]) else None


def output_of(request: RequestState) -> RequestOutput:
    """The output of a finished request."""
    first = request.sequences[0]
    outputs = tuple(
        Completion(
            index=sequence.index,
            text=detokenizer.text,
            token_ids=tuple(sequence.output_token_ids),
            finish_reason=sequence.finish_reason or "abort",
            logprobs=tuple(sequence.logprobs) if sequence.sampling.logprobs is not None else None,
            text_ends=tuple(sequence.text_ends) if sequence.sampling.logprobs is not None else None,
        )
        for sequence, detokenizer in zip(request.sequences, request.detokenizers, strict=True)
    )
    return RequestOutput(
        request_id=first.request_id,
        text=outputs[0].text,
        token_ids=outputs[0].token_ids,
        finish_reason=outputs[0].finish_reason,
        usage=Usage(
            input_tokens=first.num_prompt_tokens,
            output_tokens=sum(sequence.num_output_tokens for sequence in request.sequences),
            image_tokens=sum(span.length for span in first.images),
            cached_tokens=first.num_cached_tokens or 0,
        ),
        timings=_timings(request.sequences, time.perf_counter()),
        images=tuple(
            ImageUse(
                span.image.digest.hex(), span.outcome or "prefix", span.length, span.image.width, span.image.height
            )
            for span in first.images
        ),
        logprobs=outputs[0].logprobs,
        prompt_logprobs=tuple(first.prompt_logprobs) if first.sampling.prompt_logprobs is not None else None,
        outputs=outputs,
        is_constrained=all(sequence.matcher is not None for sequence in request.sequences),
    )


def _timings(sequences: abc.Sequence[Sequence], now: float) -> RequestTimings:
    """From the first token of any output to the last of all."""
    times = [sequence.times for sequence in sequences]
    arrived = times[0].arrived
    scheduled = min((one.first_scheduled for one in times if one.first_scheduled), default=now)
    first_token = min((one.first_token for one in times if one.first_token), default=0.0)
    generation_ms = (max(one.last_token for one in times) - first_token) * 1e3
    longest = max(sequence.num_output_tokens for sequence in sequences)
    return RequestTimings(
        queue_ms=(scheduled - arrived) * 1e3,
        encode_ms=max(sum(call.seconds or 0.0 for call in one.encodings) for one in times) * 1e3,
        time_to_first_token_ms=(first_token - arrived) * 1e3 if first_token else 0.0,
        generation_ms=generation_ms,
        mean_itl_ms=generation_ms / (longest - 1) if longest > 1 else 0.0,
        e2e_ms=(now - arrived) * 1e3,
    )
