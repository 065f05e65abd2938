"""Sampling parameters and constraints under vLLM's names. Imports no vLLM."""

from __future__ import annotations

import json
from typing import Any

from nanovllm.engine.backends.capabilities import SAMPLING_NAMES, Capabilities
from nanovllm.engine.sampling.grammars import grammar_of
from nanovllm.sampling_params import Constraint, SamplingParams

CAPABILITIES = Capabilities(
    deterministic=False,
    sampling=SAMPLING_NAMES - {"loop_tokens"},
    settings=frozenset({"enable_prefix_caching"}),
)

_SAME_NAMES = (
    *("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "min_tokens", "include_stop_str_in_output", "ignore_eos", "logprobs", "prompt_logprobs"),
    "skip_special_tokens",
)
_LISTS = ("stop", "stop_token_ids", "bad_words")


def sampling_fields(sampling: SamplingParams, room: int) -> dict[str, Any]:
    """The fields of vLLM's ``SamplingParams`` but the constraint; ``room`` are the tokens that the context leaves.

    Raises:
        InvalidInput: what vLLM cannot do.
    """
    CAPABILITIES.check(sampling, "the backend vllm")
    fields: dict[str, Any] = {name: getattr(sampling, name) for name in _SAME_NAMES}
    fields |= {name: list(getattr(sampling, name)) for name in _LISTS}
    fields["max_tokens"] = min(sampling.max_tokens or room, room)
    fields["min_tokens"] = min(sampling.min_tokens, fields["max_tokens"])
    fields["logit_bias"] = dict(sampling.logit_bias) or None
    fields["spaces_between_special_tokens"] = False
    return fields


def constraint_fields(constraint: Constraint) -> dict[str, Any]:
    """The fields of vLLM's ``StructuredOutputsParams``, whose backend is ``guidance``.

    A schema is the one that the native engine compiles, with its style of JSON: one line.

    Raises:
        UnsupportedConstraint: as `grammar_of`.
    """
    match constraint.kind:
        case "json_schema":
            return {"json": json.loads(grammar_of(constraint))["grammars"][0]["json_schema"]}
        case "choice":
            return {"choice": json.loads(constraint.text)}
        case _:
            return {constraint.kind: constraint.text}
