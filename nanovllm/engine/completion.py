"""How an output grows, and when it ends."""

from __future__ import annotations

from nanovllm.engine.loops import is_loop
from nanovllm.engine.outputs import FinishReason
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import UnsupportedConstraint

_LOOK_FOR_LOOPS_EVERY = 8  # tokens


def extend(sequence: Sequence, token: int, *, force: bool = True) -> tuple[str, FinishReason | None]:
    """Add a sampled token and, with ``force``, those after it that the constraint leaves no choice about.

    Returns the text that may be shown now, and why the output ends here if it does.

    Raises:
        UnsupportedConstraint: the constraint turned out to be too complex, or it allows no token at all.
    """
    matcher = sequence.matcher
    text, reason = _add(sequence, token)
    if matcher is None or reason is not None:
        return text, reason
    matcher.consume_token(token)
    # A forced token has no logits, so that its log probability could not be told.
    if force and sequence.sampling.logprobs is None:
        for forced in matcher.compute_ff_tokens():
            more, reason = _add(sequence, forced)
            text += more
            if reason is not None:
                return text, reason
            matcher.consume_token(forced)
    if matcher.is_error():
        raise UnsupportedConstraint("the constraint is too complex, or allows no token after the text so far")
    return text, "stop" if matcher.is_stopped() else None


def _add(sequence: Sequence, token: int) -> tuple[str, FinishReason | None]:
    sequence.token_ids.append(token)
    text = sequence.detokenizer.append(token)
    count, sampling = sequence.num_output_tokens, sequence.sampling
    if sequence.detokenizer.is_stopped or (token in sequence.stop_token_ids and count > sampling.min_tokens):
        return text, "stop"
    if count >= sequence.max_tokens:
        return text, "length"
    window = sampling.loop_tokens
    if window and count >= window and count % _LOOK_FOR_LOOPS_EVERY == 0 and is_loop(sequence.token_ids[-window:]):
        return text, "loop"
    return text, None
