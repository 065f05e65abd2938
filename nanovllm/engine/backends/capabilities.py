"""Capabilities of an engine backend, and which sampling parameters ask for more. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from nanovllm.engine.config import HAND_WRITTEN_ALONE, WITHOUT_STATES_ALONE
from nanovllm.errors import InvalidInput, UnsupportedConstraint
from nanovllm.sampling_params import SamplingParams

GuidedKind = Literal["json_schema", "regex", "choice", "grammar"]
GUIDED_KINDS: tuple[GuidedKind, ...] = get_args(GuidedKind)

_OF_THEIR_OWN = frozenset({*GUIDED_KINDS, "n", "logprobs", "prompt_logprobs", "max_tokens", "temperature"})
SAMPLING_NAMES = frozenset(SamplingParams.model_fields) - _OF_THEIR_OWN
"""Sampling parameters that a backend may lack, beside those that `Capabilities` has fields of their own for."""

ENGINE_FEATURES = frozenset({*HAND_WRITTEN_ALONE, *WITHOUT_STATES_ALONE} - {"deterministic"})
"""Settings of ``engine`` that a backend may lack, beside ``deterministic``."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do.

    Attributes:
        images: whether it takes images.
        guided: kinds of constraints that it enforces.
        logprobs: most log probabilities of best tokens at each position; None where it gives none at all.
        prompt_logprobs: whether it gives them for prompts.
        n: whether it draws several outputs of one prompt.
        deterministic: whether a text can be made independent of what is computed beside it.
        streaming: whether chunks come while the request runs.
        context: most tokens of prompt and output together; None where the backend does not know.
        token_ids: whether outputs have token ids.
        sampling: those of ``SAMPLING_NAMES`` that it heeds.
        max_stops: most stop strings; None: as many as ``SamplingParams`` takes.
        settings: those of ``ENGINE_FEATURES`` that have an effect in this process.
    """

    images: bool = True
    guided: frozenset[GuidedKind] = frozenset(GUIDED_KINDS)
    logprobs: int | None = 20
    prompt_logprobs: bool = True
    n: bool = True
    deterministic: bool = True
    streaming: bool = True
    context: int | None = None
    token_ids: bool = True
    sampling: frozenset[str] = SAMPLING_NAMES
    max_stops: int | None = None
    settings: frozenset[str] = ENGINE_FEATURES

    def lacking(self, sampling: SamplingParams) -> Iterator[str]:
        """The names of what ``sampling`` asks for and the backend cannot do."""
        constraint = sampling.constraint
        if constraint is not None and constraint.kind not in self.guided:
            yield constraint.kind
        if sampling.logprobs is not None and (self.logprobs is None or sampling.logprobs > self.logprobs):
            yield "logprobs" if self.logprobs is None else f"logprobs above {self.logprobs}"
        if sampling.prompt_logprobs is not None and not self.prompt_logprobs:
            yield "prompt_logprobs"
        if sampling.n > 1 and not self.n:
            yield "n above 1"
        if self.max_stops is not None and len(sampling.stop) > self.max_stops:
            yield f"more than {self.max_stops} strings in stop"
        for name in sorted(SAMPLING_NAMES - self.sampling):
            if getattr(sampling, name) != SamplingParams.model_fields[name].get_default(call_default_factory=True):
                yield name

    def check(self, sampling: SamplingParams, who: str) -> None:
        """Refuse what ``sampling`` asks for and the backend cannot do; ``who`` names the backend in the message.

        Raises:
            UnsupportedConstraint: a kind of constraint, where it is the only fault.
            InvalidInput: anything else.
        """
        lacking = list(self.lacking(sampling))
        if not lacking:
            return
        error = UnsupportedConstraint if set(lacking) <= set(GUIDED_KINDS) else InvalidInput
        raise error(f"{who} has no {', no '.join(lacking)}")
