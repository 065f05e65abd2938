"""The sampling batch: the parameters of a step's rows, collected on the host and sent to the device in a few copies."""

from __future__ import annotations

from collections import Counter, abc
from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from nanovllm.engine.layers.device_copy import to_device, together
from nanovllm.engine.scheduling.sequence import Sequence

_MIN_TEMPERATURE = 1e-5  # below it only the best token is left, and float32 would overflow


@dataclass(frozen=True)
class TokenValues:
    """Single logits of the batch, as (row, token) pairs, and a float32 number for each; all tensors are [n]."""

    rows: Tensor
    tokens: Tensor
    values: Tensor


@dataclass(frozen=True)
class RandomRows:
    """The rows that are not greedy, and their parameters [rows, 1]; None where no row has such a parameter."""

    rows: Tensor | None  # None: all rows of the batch
    temperatures: Tensor
    min_p: Tensor | None
    top_k_p: tuple[Tensor, Tensor] | None  # [rows, 1] each; without one, the vocabulary's size and 2
    seeds: tuple[tuple[int, int] | None, ...]  # the seed, and the position in the output


@dataclass(frozen=True)
class SamplingBatch:
    """What changes the logits of a step before their argmax, then the rows that are sampled randomly."""

    forbidden: TokenValues | None  # bad words, and end tokens before min_tokens
    biases: TokenValues | None
    repetition_penalties: TokenValues | None
    output_penalties: TokenValues | None  # presence and frequency
    random: RandomRows | None

    @classmethod
    def prepare(cls, sequences: abc.Sequence[Sequence], vocab_size: int, device: torch.device) -> Self:
        """Collect the parameters of ``sequences``, one for each row of logits."""
        forbidden, biases, repetition, output = (_Collector() for _ in range(4))
        for row, sequence in enumerate(sequences):
            params = sequence.sampling
            if sequence.bad_words or params.min_tokens:
                tokens = _forbidden_tokens(sequence)
                forbidden.add(row, tokens, [0.0] * len(tokens))
            if params.logit_bias:
                biases.add(row, params.logit_bias.keys(), params.logit_bias.values())
            if params.repetition_penalty != 1.0:  # over prompt and output (Keskar et al. 2019)
                # An image token may lie beyond the vocabulary.
                known = [token for token in set(sequence.token_ids) if token < vocab_size]
                repetition.add(row, known, [params.repetition_penalty] * len(known))
            if params.presence_penalty or params.frequency_penalty:
                counts = Counter(sequence.output_token_ids)
                penalties = [params.presence_penalty + params.frequency_penalty * count for count in counts.values()]
                output.add(row, counts.keys(), penalties)
        random = [row for row, sequence in enumerate(sequences) if not sequence.sampling.is_greedy]
        return cls(
            forbidden.to_device(device),
            biases.to_device(device),
            repetition.to_device(device),
            output.to_device(device),
            _random_rows(sequences, random, vocab_size, device) if random else None,
        )


class _Collector:
    def __init__(self) -> None:
        self._rows: list[int] = []
        self._tokens: list[int] = []
        self._values: list[float] = []

    def add(self, row: int, tokens: Collection[int], values: Collection[float]) -> None:
        self._rows += [row] * len(tokens)
        self._tokens += tokens
        self._values += values

    def to_device(self, device: torch.device) -> TokenValues | None:
        if not self._rows:
            return None
        rows, tokens = together([self._rows, self._tokens], device)
        return TokenValues(rows, tokens, to_device(self._values, device, torch.float32))


def _random_rows(
    sequences: abc.Sequence[Sequence], random: list[int], vocab_size: int, device: torch.device
) -> RandomRows:
    chosen = [sequences[row] for row in random]
    params = [sequence.sampling for sequence in chosen]
    columns: list[list[float]] = [
        [max(param.temperature, _MIN_TEMPERATURE) for param in params],
        [param.min_p for param in params],
        [min(param.top_k, vocab_size) if param.top_k > 0 else vocab_size for param in params],
        [param.top_p if param.top_p < 1.0 else 2.0 for param in params],  # rounding may sum to more than one
    ]
    flat = to_device([value for column in columns for value in column], device, torch.float32)
    temperatures, min_p, top_k, top_p = flat.view(len(columns), -1, 1).unbind()
    return RandomRows(
        rows=to_device(random, device, torch.int64) if len(random) < len(sequences) else None,
        temperatures=temperatures,
        min_p=min_p if any(param.min_p > 0.0 for param in params) else None,
        top_k_p=(top_k, top_p) if any(param.top_k > 0 or param.top_p < 1.0 for param in params) else None,
        seeds=tuple(None if one.seed is None else (one.seed, one.num_output_tokens) for one in chosen),
    )


def _forbidden_tokens(sequence: Sequence) -> set[int]:
    """The last tokens of bad words that are written but for these, and the end tokens before ``min_tokens``."""
    tokens = {word[-1] for word in sequence.bad_words if _would_complete(word, sequence)}
    return tokens | sequence.stop_token_ids if sequence.num_output_tokens < sequence.sampling.min_tokens else tokens


def _would_complete(word: tuple[int, ...], sequence: Sequence) -> bool:
    """Whether the output ends with all of a bad word but its last token."""
    begun = len(word) - 1
    return begun == 0 or (begun <= sequence.num_output_tokens and tuple(sequence.token_ids[-begun:]) == word[:-1])
