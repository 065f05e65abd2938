"""Dialects of OpenAI's protocol: what servers know beyond it, and how sampling parameters are written for them.

A server fills in defaults of its own, or of the checkpoint's ``generation_config.json``, for what a request leaves out:
what it knows is therefore always written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from nanovllm.engine.backends.capabilities import Capabilities, GuidedKind
from nanovllm.engine.backends.openai.llama_cpp_schema import left_out
from nanovllm.errors import UnsupportedConstraint
from nanovllm.sampling_params import SamplingParams

_STANDARD = frozenset({"top_p", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop"})
_MOST_TOP_LOGPROBS = 20  # vLLM's --max-logprobs, unless it is set
_MAX_UINT32_SEED = 2**32 - 1  # llama.cpp takes this one for a random seed
_OTHER_SAMPLERS_OFF = {"mirostat": 0, "xtc_probability": 0.0, "typical_p": 1.0, "dry_multiplier": 0.0}
"""llama.cpp's samplers that `SamplingParams` has not: a GGUF file and the server's command line may turn them on."""
_EVERY_CONTEXT = 2**20
"""Tokens that llama.cpp's penalties look back on: 64 by default, -1 is refused; a request takes 4 bytes for each."""


@dataclass(frozen=True)
class Dialect:
    """One dialect: ``write`` returns the fields of a request for sampling parameters that ``capabilities`` allow.

    ``image_uuid``: the server caches an image under the ``uuid`` beside it. ``left_out`` says what of a JSON schema its
    servers take and do not enforce; None: they refuse that themselves.
    ``names_listed_model``: the model that an answer names is one that the server lists.
    """

    name: str
    capabilities: Capabilities
    write: Callable[[SamplingParams], dict[str, Any]]
    template_kwargs: bool = True
    cache_salt: bool = False
    names_listed_model: bool = False
    image_uuid: bool = False
    left_out: Callable[[dict[str, Any]], Iterable[str]] | None = None

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"the dialect {self.name} of remote.dialect"

    def check_schema(self, schema: dict[str, Any]) -> None:
        """Raise UnsupportedConstraint for a JSON schema that the servers would not enforce."""
        if self.left_out is None:
            return
        try:
            found = list(self.left_out(schema))
        except RecursionError:
            raise UnsupportedConstraint("json_schema is nested too deeply") from None
        if found:
            more = f", and {len(found) - 1} more" if len(found) > 1 else ""
            raise UnsupportedConstraint(f"json_schema: {self.title} does not enforce {found[0]}{more}: leave it out")


def _common(sampling: SamplingParams) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }
    if sampling.max_tokens is not None:
        fields["max_tokens"] = sampling.max_tokens
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.seed is not None and not sampling.is_greedy:
        fields["seed"] = sampling.seed
    if sampling.n > 1:
        fields["n"] = sampling.n
    if sampling.logprobs is not None:
        # At least one: it tells whether the token taken was the most probable.
        fields |= {"logprobs": True, "top_logprobs": max(1, sampling.logprobs)}
    if sampling.json_schema is not None:
        schema = {"name": "output", "schema": sampling.json_schema, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _openai(sampling: SamplingParams) -> dict[str, Any]:
    fields = _common(sampling)
    if "max_tokens" in fields:
        fields["max_completion_tokens"] = fields.pop("max_tokens")
    # Hosted servers refuse some parameters even at their neutral values.
    for name in ("presence_penalty", "frequency_penalty"):
        if not fields[name]:
            del fields[name]
    return fields


def _vllm(sampling: SamplingParams) -> dict[str, Any]:
    fields = _common(sampling) | {
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(sampling.stop_token_ids),
        "include_stop_str_in_output": sampling.include_stop_str_in_output,
        "ignore_eos": sampling.ignore_eos,
        "min_tokens": sampling.min_tokens,
        "skip_special_tokens": sampling.skip_special_tokens,
        "return_token_ids": True,
    }
    if sampling.bad_words:
        fields["bad_words"] = list(sampling.bad_words)
    if sampling.choice is not None:
        fields["structured_outputs"] = {"choice": list(sampling.choice)}
    elif sampling.regex is not None:
        fields["structured_outputs"] = {"regex": sampling.regex}
    elif sampling.grammar is not None:
        fields["structured_outputs"] = {"grammar": sampling.grammar}
    if sampling.logprobs is not None:
        # vLLM lists the token taken before the best ones, as one of these.
        fields["top_logprobs"] = min(max(2, sampling.logprobs + 1), _MOST_TOP_LOGPROBS)
    return fields


def _sglang(sampling: SamplingParams) -> dict[str, Any]:
    fields = _common(sampling) | {
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "no_stop_trim": sampling.include_stop_str_in_output,
        "ignore_eos": sampling.ignore_eos,
        "min_tokens": sampling.min_tokens,
        "skip_special_tokens": sampling.skip_special_tokens,
    }
    if sampling.stop_token_ids:
        fields["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.regex is not None:
        fields["regex"] = sampling.regex
    elif sampling.choice is not None:
        fields["regex"] = "|".join(f"({_literal(one)})" for one in sampling.choice)
    return fields


def _llamacpp(sampling: SamplingParams) -> dict[str, Any]:
    fields = _common(sampling) | {
        "top_k": max(0, sampling.top_k),
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "ignore_eos": sampling.ignore_eos,
        **_OTHER_SAMPLERS_OFF,
    }
    if sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty:
        fields["repeat_last_n"] = _EVERY_CONTEXT
    if "seed" in fields:
        fields["seed"] %= _MAX_UINT32_SEED
    if sampling.json_schema is not None:
        del fields["response_format"]  # which its completions of raw prompts ignore
        fields["json_schema"] = sampling.json_schema
    if sampling.choice is not None:
        fields["grammar"] = "root ::= " + " | ".join(map(_gbnf, sampling.choice))
    return fields


def _literal(text: str) -> str:
    """``text`` as a regular expression; only what has a meaning is escaped, because engines refuse other escapes."""
    return re.sub(r"([\\.^$*+?{}\[\]()|])", r"\\\1", text)


def _gbnf(text: str) -> str:
    """``text`` as a string of llama.cpp's grammar language."""
    escaped = "".join(
        f"\\{char}" if char in '"\\' else f"\\x{ord(char):02X}" if ord(char) < 0x20 else char for char in text
    )
    return f'"{escaped}"'


def _capabilities(guided: set[GuidedKind], *sampling: str, **others: Any) -> Capabilities:
    return Capabilities(
        guided=frozenset(guided),
        prompt_logprobs=False,
        deterministic=False,
        settings=frozenset(),
        sampling=_STANDARD | frozenset(sampling),
        **others,
    )


DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            "openai",
            _capabilities({"json_schema"}, token_ids=False, max_stops=4),
            _openai,
            template_kwargs=False,
        ),
        Dialect(
            "vllm",
            _capabilities(
                {"json_schema", "regex", "choice", "grammar"},
                *("top_k", "min_p", "repetition_penalty", "bad_words", "min_tokens", "include_stop_str_in_output"),
                *("stop_token_ids", "ignore_eos", "skip_special_tokens"),
            ),
            _vllm,
            cache_salt=True,
            names_listed_model=True,
            image_uuid=True,
        ),
        Dialect(
            "sglang",
            _capabilities(
                {"json_schema", "regex", "choice"},
                *("top_k", "min_p", "repetition_penalty", "min_tokens", "include_stop_str_in_output"),
                *("stop_token_ids", "ignore_eos", "skip_special_tokens"),
                token_ids=False,
            ),
            _sglang,
            cache_salt=True,
            names_listed_model=True,
        ),
        Dialect(
            "llamacpp",
            _capabilities(
                {"json_schema", "choice"},
                *("top_k", "min_p", "repetition_penalty", "ignore_eos"),
                n=False,
                token_ids=False,
            ),
            _llamacpp,
            left_out=left_out,
        ),
    )
}
