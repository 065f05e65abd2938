"""The trial at load of a model of transformers: the engine's logits against the model's own, from the same weights.

Two references, because neither is the truth for every model: generation with transformers' cache, in which some models
have windows that a full forward pass does not show, and a full forward pass. They are computed before the model's
attention and layouts are the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from nanovllm.engine.attention.base import AttentionBackend, AttentionBatch
from nanovllm.engine.models.generic import PROVEN_TOKENS, GenericDecoder, image_token_ids
from nanovllm.engine.models.generic_loading import known_window, max_positions
from nanovllm.engine.models.generic_states import SequenceStates
from nanovllm.errors import UnsupportedModel

TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""The largest difference of a logit, relative to the largest logit."""

_PROMPT_TOKENS = 640  # at least, where the context allows: windows that no field names are mostly of 512 or less
_BEYOND = 32  # tokens behind the largest window that is named
_NEW_TOKENS = 16
_NEIGHBOUR_TOKENS = 5  # of a sequence that is computed beside the trial's


@dataclass(frozen=True)
class Reference:
    """What transformers computes: a prompt and its continuation, and the logits [new tokens, vocab] of that."""

    token_ids: tuple[int, ...]
    generated: Tensor  # by generation with transformers' cache
    full: Tensor  # by one forward pass over all tokens


@dataclass(frozen=True)
class TrialResult:
    """The largest differences of a logit from both references, relative to the largest logit."""

    num_tokens: int
    error_generated: float
    error_full: float


@torch.inference_mode()
def compute_reference(model: Any, max_model_len: int | None) -> Reference:
    """Let transformers' ``model`` continue a random prompt, greedily.

    ``max_model_len``: the longest context that is asked for, in tokens.

    Raises UnsupportedModel where the model cannot generate.
    """
    text = model.config.get_text_config()
    wanted = max(_PROMPT_TOKENS, min(known_window(text), PROVEN_TOKENS) + _BEYOND)
    length = max(1, min(wanted, (max_model_len or max_positions(model.config)) - _NEW_TOKENS))
    images = image_token_ids(model.config)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(text.vocab_size, (1, 2 * length + 64), generator=generator)
    prompt = drawn[~torch.isin(drawn, torch.tensor(images, dtype=drawn.dtype))][None, :length].to(model.device)
    settings = GenerationConfig(
        max_new_tokens=_NEW_TOKENS,
        min_new_tokens=_NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        suppress_tokens=list(images) or None,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    try:
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        full = model(input_ids=output.sequences, use_cache=False, logits_to_keep=_NEW_TOKENS + 1).logits
    except Exception as error:  # a model of transformers raises whatever it likes
        name = type(model).__name__
        raise UnsupportedModel(f"transformers cannot generate with {name}: {type(error).__name__}: {error}") from error
    return Reference(
        tuple(output.sequences[0].tolist()), torch.cat(output.logits).float(), full[0, -_NEW_TOKENS - 1 : -1].float()
    )


@torch.inference_mode()
def hold_against(model: GenericDecoder, attention: AttentionBackend, reference: Reference) -> TrialResult:
    """Compute the reference's tokens in chunks, beside another sequence, over paged attention.

    Raises UnsupportedModel where a logit differs by more than `TOLERANCES`, which the model's dtype chooses.
    """
    tokens = reference.token_ids
    prompt = len(tokens) - _NEW_TOKENS
    first = prompt // 3 + 1
    chunks = [size for size in (first, min(16, prompt - first), max(0, prompt - first - 16)) if size > 0]
    try:
        found = _logits(model, attention, tokens, [*chunks, *[1] * (_NEW_TOKENS - 1)])
    except Exception as error:  # layers of transformers raise whatever they like
        why = f"{type(error).__name__}: {error}"
        raise UnsupportedModel(f"{model.config.name} does not run over this engine's attention: {why}") from error
    dtype = model.embed_tokens.dtype
    errors = [_difference(found, wanted, model.never_sampled) for wanted in (reference.generated, reference.full)]
    apart = _difference(reference.generated, reference.full, model.never_sampled)
    if not max(errors) <= TOLERANCES[dtype]:  # a NaN is refused too
        raise UnsupportedModel(
            f"{model.config.name} does not pass the trial at load: over {len(tokens)} tokens its logits differ from "
            f"those of transformers' cached generation by {errors[0]:.2g} of the largest and from those of its full "
            f"forward pass by {errors[1]:.2g}, {TOLERANCES[dtype]:.0e} being allowed (these two by {apart:.2g} from "
            "each other): it does something that this engine's attention does not do, such as a window or a mask that "
            "its layers do not name"
        )
    return TrialResult(len(tokens), *errors)


@dataclass
class _Row:
    tokens: Sequence[int]
    table: list[int]
    states: SequenceStates = field(default_factory=SequenceStates)


def _logits(model: GenericDecoder, attention: AttentionBackend, tokens: Sequence[int], chunks: Sequence[int]) -> Tensor:
    """Logits of the last of the ``tokens``, one before each new token; a neighbour goes along, a token a step."""
    size = attention.block_size
    blocks = -(-len(tokens) // size)
    spare = -(-(_NEIGHBOUR_TOKENS + len(chunks)) // size)
    ours = _Row(tokens, list(range(blocks)))
    other = _Row([tokens[-1], *tokens][: _NEIGHBOUR_TOKENS + len(chunks)], list(range(blocks, blocks + spare)))
    dtype = model.embed_tokens.dtype
    caches = [attention.allocate(blocks + spare, *shape, dtype) for shape in model.config.kv_shapes]
    found = []
    other_end = 0
    for end, chunk in zip(accumulate(chunks), chunks, strict=True):
        more = min(len(other.tokens), other_end + (1 if other_end else _NEIGHBOUR_TOKENS)) - other_end
        other_end += more
        rows = [(row, count, stop) for row, count, stop in ((other, more, other_end), (ours, chunk, end)) if count]
        rows.sort(key=lambda row: (row[1] != 1, row[2]))  # single tokens first, as in every step
        hidden = _step(model, attention, caches, rows)
        last = sum(count for _, count, _ in rows[: [row is ours for row, *_ in rows].index(True) + 1]) - 1
        if end >= len(tokens) - _NEW_TOKENS:
            found.append(model.logits(hidden[last : last + 1]))
    return torch.cat(found).float()


def _step(
    model: GenericDecoder, attention: AttentionBackend, caches: Sequence[Tensor], rows: Sequence[tuple[_Row, int, int]]
) -> Tensor:
    device = model.embed_tokens.device
    counts, stops = [count for _, count, _ in rows], [stop for *_, stop in rows]
    ids = torch.tensor([token for row, count, stop in rows for token in row.tokens[stop - count : stop]], device=device)
    positions = torch.cat([torch.arange(stop - count, stop, device=device) for _, count, stop in rows])
    if model.config.num_axes > 1:
        positions = positions.unsqueeze(1).expand(-1, model.config.num_axes)
    batch = AttentionBatch(counts, stops, [row.table for row, *_ in rows])
    ends = list(accumulate(counts))
    states = [(end - count, end, row.states) for end, (row, count, _) in zip(ends, rows, strict=True)]
    hidden: Tensor = model(
        model.embed(ids),
        positions,
        caches,
        attention,
        attention.metadata(batch),
        states=states if model.has_states else (),
    )
    return hidden


def _difference(found: Tensor, wanted: Tensor, without: Sequence[int]) -> float:
    keep = torch.ones(found.shape[1], dtype=torch.bool, device=found.device)
    keep[list(without)] = False
    found, wanted = found[:, keep], wanted[:, keep]
    return float((found - wanted).abs().max() / wanted.abs().max())
