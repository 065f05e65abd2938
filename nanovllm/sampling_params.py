"""How a request's tokens are chosen and when it ends. No torch: producers of jobs build these too."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

StopString = Annotated[str, Field(min_length=1, max_length=256)]


class SamplingParams(BaseModel):
    """Sampling parameters of one request, under vLLM's names and with vLLM's defaults.

    An unknown name is an error, here and in a job's ``sampling``: an ignored constraint would be a lie.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(default=1.0, ge=0.0, le=100.0, description="0 means greedy: the most probable token.")
    top_p: float = Field(
        default=1.0, gt=0.0, le=1.0, description="Keep the smallest set of tokens with this total probability."
    )
    top_k: int = Field(default=0, ge=-1, description="Keep the k most probable tokens; 0 or -1 keeps all.")
    min_p: float = Field(
        default=0.0, ge=0.0, le=1.0, description="Drop tokens below this share of the best one's probability."
    )
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="Makes the request reproducible in any batch.")
    max_tokens: int = Field(default=16, ge=1, le=1_000_000, description="Most tokens to generate.")
    min_tokens: int = Field(default=0, ge=0, description="Fewest tokens before an end or stop is honoured.")
    stop: tuple[StopString, ...] = Field(
        default=(), max_length=16, description="Strings that end the text, not included in it."
    )
    stop_token_ids: tuple[int, ...] = Field(default=(), max_length=64, description="Tokens that end the text.")
    ignore_eos: bool = Field(default=False, description="Go on after the end-of-sequence token, up to max_tokens.")
    skip_special_tokens: bool = Field(default=True, description="Leave special tokens out of the text.")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0.0
