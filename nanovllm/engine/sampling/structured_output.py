"""Structured output: text that conforms to a schema, an expression, a list of choices or a grammar, by llguidance.

A constrained sequence has a matcher. Between two steps the matcher has consumed every token of the output; its mask
of allowed tokens is computed while the forward pass runs, and tokens that are the only possible ones are appended
without a decode step each.
"""

from __future__ import annotations

import json
from collections import abc
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from nanovllm.engine.sampling.json_schema import enforceable
from nanovllm.errors import ConfigurationError, UnsupportedConstraint
from nanovllm.sampling_params import Constraint

_MAX_GRAMMARS = 64
_MINUS_INFINITY = float("-inf")
_BITS = 32
_JSON_STYLE = {
    # Where white space is free, a model that loops fills the output with it, and no token is ever forced.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}


class GrammarCompiler:
    """Compiles constraints for one tokenizer, with an LRU cache. Thread-safe."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_token_ids: abc.Sequence[int]) -> None:
        """``vocab_size`` is the model's: it may be larger than the tokenizer's."""
        self._tokenizer, self._vocab_size, self._end_token_ids = tokenizer, vocab_size, list(end_token_ids)
        # It holds no lock while it compiles: a large schema takes a second, and the engine's thread asks meanwhile.
        self._compiled = lru_cache(_MAX_GRAMMARS)(self._compile)

    def matcher(self, constraint: Constraint) -> Any:
        """A fresh matcher for one sequence.

        Raises:
            UnsupportedConstraint: what is malformed, too large, or beyond what llguidance can enforce.
            ConfigurationError: the extra ``guided`` is not installed.
        """
        return self._compiled(constraint).deep_copy()

    def _compile(self, constraint: Constraint) -> Any:
        tokens, llguidance = self._tokens, _llguidance()
        try:
            grammar = _grammar(constraint, llguidance.LLMatcher)
        except ValueError as error:
            raise UnsupportedConstraint(f"{constraint.kind}: {error}") from None
        except RecursionError:
            raise UnsupportedConstraint(f"{constraint.kind}: nested too deeply") from None
        # Errors only: a keyword that the library would leave out must not pass as enforced.
        failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, tokens)
        if failed or messages:
            raise UnsupportedConstraint(f"{constraint.kind}: {_first_line(messages)}")
        matcher = llguidance.LLMatcher(tokens, grammar, log_level=0)
        if matcher.is_error():
            raise UnsupportedConstraint(f"{constraint.kind}: {_first_line([matcher.get_error()])}")
        return matcher

    @cached_property
    def _tokens(self) -> Any:
        """The vocabulary in llguidance's form: from tokenizer.json, or token by token where a token is its text."""
        llguidance = _llguidance()
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        if state["model"]["type"] == "WordLevel":
            words = _Words(self._tokenizer, self._vocab_size, self._end_token_ids)
            return llguidance.LLTokenizer(llguidance.TokenizerWrapper(words))
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._end_token_ids or None)
        except Exception as error:  # the library's own type is Exception
            raise UnsupportedConstraint(f"this checkpoint's tokenizer: {_first_line([str(error)])}") from None


class _Words:
    """A vocabulary whose tokens are their own text, as ``llguidance.TokenizerWrapper`` expects it."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_token_ids: abc.Sequence[int]) -> None:
        words = {index: token for token, index in tokenizer.get_vocab().items()}
        self.tokens = [words.get(index, "").encode() for index in range(vocab_size)]
        self.special_token_ids = list(tokenizer.all_special_ids)
        self.eos_token_id = next(iter(end_token_ids), None)
        self.bos_token_id = tokenizer.bos_token_id
        self._encode = tokenizer.backend_tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False).ids


class TokenMasks:
    """Masks of allowed tokens, computed in a thread of their own during the forward pass."""

    def __init__(self, vocab_size: int) -> None:
        self._words = -(-vocab_size // _BITS)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="nanovllm-masks")

    def begin(self, rows: abc.Sequence[tuple[Any | None, tuple[int, ...]]]) -> Future[Tensor] | None:
        """Start on the rows of a step: each a matcher, None where it is unconstrained, and its drafts.

        The result is int32 [sampled tokens, words], bit 1 = allowed; a row samples its next token and one after each
        draft. Until the result is there the matchers belong to the other thread.
        """
        if all(matcher is None for matcher, _ in rows):
            return None
        return self._executor.submit(self._fill, list(rows))

    def _fill(self, rows: abc.Sequence[tuple[Any | None, tuple[int, ...]]]) -> Tensor:
        masks = torch.full((sum(1 + len(drafts) for _, drafts in rows), self._words), -1, dtype=torch.int32)
        each_mask = iter(masks)
        for matcher, drafts in rows:
            if matcher is not None and drafts:
                # A draft may lead into a dead end, and LLMatcher.rollback does not clear a matcher's error.
                matcher = matcher.deep_copy()
            for num_drafts in range(1 + len(drafts)):
                mask = next(each_mask)
                if matcher is not None:
                    if num_drafts:
                        matcher.consume_token(drafts[num_drafts - 1])
                    matcher.unsafe_compute_mask_ptr(mask.data_ptr(), 4 * self._words)
        return masks

    def close(self) -> None:
        """Stop the thread."""
        self._executor.shutdown(wait=False)


def forbid_masked(logits: Tensor, masks: Tensor) -> None:
    """Set the logits [rows, vocab] whose bit in ``masks`` [rows, words] is 0 to minus infinity, in place."""
    bits = torch.arange(_BITS, dtype=torch.int32, device=logits.device)
    allowed = (masks.to(logits.device).unsqueeze(-1) >> bits) & 1
    logits.masked_fill_(allowed.flatten(1)[:, : logits.shape[1]] == 0, _MINUS_INFINITY)


def _grammar(constraint: Constraint, matcher: Any) -> str:
    match constraint.kind:
        case "json_schema":
            schema = json.dumps(enforceable(json.loads(constraint.text)))
            return str(matcher.grammar_from_json_schema(schema, overrides=_JSON_STYLE))
        case "regex":
            return str(matcher.grammar_from_regex(constraint.text))
        case "choice":
            choices = " | ".join(json.dumps(choice) for choice in json.loads(constraint.text))
            return str(matcher.grammar_from_lark(f"start: {choices}"))
        case "grammar":
            return str(matcher.grammar_from_lark(constraint.text))


def _first_line(messages: abc.Sequence[str]) -> str:
    return next((line for message in messages for line in message.splitlines() if line.strip()), "refused")[:300]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigurationError("guided output needs llguidance: pip install '.[guided]' in a clone") from None
    return llguidance
