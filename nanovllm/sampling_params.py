"""Sampling parameters of a request. No torch: producers of jobs build these too."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticKnownError


def at_most(limit: int) -> BeforeValidator:
    """Refuse a dict of more than ``limit`` items before they are validated: pydantic does behind them alone."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            length = {"field_type": "Dictionary", "max_length": limit, "actual_length": len(value)}
            raise PydanticKnownError("too_long", length)
        return value

    return BeforeValidator(check)


def _listed(value: Any) -> Any:
    """One string as a list of one, None as an empty list."""
    if value is None:
        return ()
    # A tuple: behind a validator in Python, strict JSON takes no list for one.
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _by_number(value: Any) -> Any:
    """None as no bias, and token ids as numbers: JSON has text for keys, which strict validation would refuse."""
    if not isinstance(value, dict):
        return {} if value is None else value
    return {int(key) if isinstance(key, str) and _TOKEN_ID.fullmatch(key) else key: bias for key, bias in value.items()}


def _seed(value: int) -> int | None:
    return None if value == -1 else value


_TOKEN_ID = re.compile(r"-?(0|[1-9][0-9]{0,17})")
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
MAX_BIASES = 1024
# A sender may list thousands of wrong items, and an error costs more than a valid one.
_StopStrings = Annotated[tuple[StopString, ...], Field(max_length=16, fail_fast=True)]
_BadWords = Annotated[tuple[StopString, ...], Field(max_length=64, fail_fast=True)]
_TokenIds = Annotated[tuple[int, ...], Field(max_length=64, fail_fast=True)]
_Choices = Annotated[tuple[StopString, ...], Field(min_length=1, max_length=1024, fail_fast=True)]
_Biases = Annotated[dict[int, Bias], Field(max_length=MAX_BIASES)]

MAX_CONSTRAINT_CHARS = 65_536
MAX_SCHEMA_CHARS = 262_144  # most of a large schema is prose


CONSTRAINTS = ("json_schema", "regex", "choice", "grammar")
"""The sampling parameters that confine an output; one at most is set."""


OTHER_NAMES = {
    "max_completion_tokens": "max_tokens",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""Names of requests of OpenAI's protocol, vLLM's own additions among them, for what has another name here."""


class Constraint(NamedTuple):
    """What an output must conform to: a JSON schema (as JSON), a regular expression, a JSON list of choices, or a
    grammar in llguidance's variant of Lark.
    """

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text: str


class SamplingParams(BaseModel):
    """Sampling parameters of one request, under vLLM's names and with vLLM's defaults.

    None means none, as in vLLM: no stop, no bias, no seed, no limit of tokens but the context's. An unknown name is an
    error, here and in a job's ``sampling``: an ignored constraint would be a lie.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    n: int = Field(default=1, ge=1, le=64, description="Outputs to draw for the prompt.")
    temperature: float = Field(default=1.0, ge=0.0, le=100.0, description="0 means greedy: the most probable token.")
    top_p: float = Field(
        default=1.0, gt=0.0, le=1.0, description="Keep the smallest set of tokens with this total probability."
    )
    top_k: int = Field(default=0, ge=-1, description="Keep the k most probable tokens; 0 or -1 keeps all.")
    min_p: float = Field(
        default=0.0, ge=0.0, le=1.0, description="Drop tokens below this share of the best one's probability."
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0.0, le=10.0, description="Above 1 makes tokens of prompt and output less likely."
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2.0, le=2.0, description="Taken from the logit of every token that the output has."
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2.0, le=2.0, description="Taken from a token's logit once for each time the output has it."
    )
    logit_bias: Annotated[
        _Biases, BeforeValidator(_by_number, json_schema_input_type=_Biases | None), at_most(MAX_BIASES)
    ] = Field(default_factory=dict, description="Added to the logits of these token ids.")
    bad_words: Annotated[_BadWords, BeforeValidator(_listed, json_schema_input_type=StopString | _BadWords | None)] = (
        Field(default=(), description="Words that the output must not have, by their tokens.")
    )
    seed: Annotated[int, Field(ge=-1, lt=2**63), AfterValidator(_seed)] | None = Field(
        default=None, description="Makes the request reproducible in any batch; -1 is as unset."
    )
    max_tokens: int | None = Field(
        default=16,
        ge=1,
        le=1_000_000,
        description="Most tokens to generate; null: as many as context and worker allow.",
    )
    min_tokens: int = Field(default=0, ge=0, description="Fewest tokens before an end or stop is honoured.")
    stop: Annotated[_StopStrings, BeforeValidator(_listed, json_schema_input_type=StopString | _StopStrings | None)] = (
        Field(default=(), description="Strings that end the text; one may stand alone.")
    )
    include_stop_str_in_output: bool = Field(default=False, description="Leave the stop string in the text.")
    stop_token_ids: Annotated[_TokenIds, BeforeValidator(_listed, json_schema_input_type=_TokenIds | None)] = Field(
        default=(), description="Tokens that end the text."
    )
    ignore_eos: bool = Field(default=False, description="Go on after the end-of-sequence token, up to max_tokens.")
    loop_tokens: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="End with `loop` once this many tokens are one passage at least four times over; 0 never does.",
    )
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Log probabilities of each token taken and of this many best ones."
    )
    prompt_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="The same for the prompt; it is then computed without the prefix cache."
    )
    skip_special_tokens: bool = Field(default=True, description="Leave special tokens out of the text.")
    json_schema: dict[str, Any] | None = Field(
        default=None, description="JSON schema of the text, which is written on one line."
    )
    regex: str | None = Field(default=None, min_length=1, max_length=8192, description="Expression of the whole text.")
    choice: _Choices | None = Field(default=None, description="Texts of which the output is one.")
    grammar: str | None = Field(
        default=None, min_length=1, max_length=MAX_CONSTRAINT_CHARS, description="Lark grammar of the text."
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        constraints = [
            name for name in ("json_schema", "regex", "choice", "grammar") if getattr(self, name) is not None
        ]
        if len(constraints) > 1:
            raise ValueError(f"{' and '.join(constraints)} exclude each other")
        limit = MAX_SCHEMA_CHARS if self.json_schema is not None else MAX_CONSTRAINT_CHARS
        try:
            constraint = self.constraint
        except RecursionError:
            raise ValueError("json_schema is nested too deeply") from None
        except TypeError as error:
            raise ValueError(f"json_schema is no JSON: {error}") from None
        if constraint is not None and len(constraint.text) > limit:
            raise ValueError(f"{constraints[0]} is longer than {limit} characters")
        if self.n > 1 and self.is_greedy:
            raise ValueError(f"n is {self.n}, but temperature 0 makes all outputs equal")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens and "max_tokens" in self.model_fields_set:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        return self

    def with_seed(self, seed: int | None) -> Self:
        """These parameters with another valid ``seed``: ``model_copy``, at a quarter of its time."""
        copied = type(self).__new__(type(self))
        object.__setattr__(copied, "__dict__", {**self.__dict__, "seed": seed})
        object.__setattr__(copied, "__pydantic_fields_set__", self.__pydantic_fields_set__ | {"seed"})
        object.__setattr__(copied, "__pydantic_extra__", None)
        object.__setattr__(copied, "__pydantic_private__", None)
        return copied

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0.0

    @property
    def constraint(self) -> Constraint | None:
        """What the output must conform to."""
        if self.json_schema is not None:
            return Constraint("json_schema", json.dumps(self.json_schema, sort_keys=False))
        if self.choice is not None:
            return Constraint("choice", json.dumps(self.choice))
        if self.regex is not None:
            return Constraint("regex", self.regex)
        return Constraint("grammar", self.grammar) if self.grammar is not None else None
