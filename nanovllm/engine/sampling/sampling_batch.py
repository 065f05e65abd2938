"""The sampling batch: the parameters of a step's rows, collected on the host and sent to the device in a few copies."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.layers.device_copy import move, together
from nanovllm.engine.scheduling.sequence import Sequence


@dataclass(frozen=True)
class TokenValues:
    """Single logits of the batch, as (row, token) pairs, and a float32 number for each; all tensors are [n]."""

    rows: Tensor
    tokens: Tensor
    values: Tensor


@dataclass(frozen=True)
class ForbiddenTokens:
    """Single logits of the batch, as (row, token) pairs, and the rows that have any; all int64.

    Attributes:
        rows, tokens: [n].
        asking: the distinct rows, [m].
        places: of each pair's row in ``asking``, [n].
    """

    rows: Tensor
    tokens: Tensor
    asking: Tensor
    places: Tensor


@dataclass(frozen=True)
class RandomRows:
    """The rows that are not greedy, and how a token is drawn from each.

    Attributes:
        rows: their places in the batch, int64 [rows].
        limits: the inverse of the temperature, ``min_p`` and ``top_p``, float32 [rows, 3]; 0 and 2 where there is none.
        keys: a seed, the position in its sequence of draws, and ``top_k``, int64 [rows, 3]; the vocabulary's size where
            there is no ``top_k``.
        has_min_p: whether any row may have one.
        has_top: whether any row may have ``top_k`` or ``top_p``.
    """

    rows: Tensor
    limits: Tensor
    keys: Tensor
    has_min_p: bool = True
    has_top: bool = True


@dataclass(frozen=True)
class SamplingBatch:
    """What changes the logits of a step before their argmax, then the rows that are sampled randomly."""

    forbidden: ForbiddenTokens | None  # bad words, and end tokens before min_tokens
    biases: TokenValues | None
    repetition_penalties: TokenValues | None
    output_penalties: TokenValues | None  # presence and frequency
    random: RandomRows | None

    @classmethod
    def prepare(
        cls, sequences: abc.Sequence[Sequence], vocab_size: int, device: torch.device, generator: torch.Generator
    ) -> Self:
        """Collect the parameters of ``sequences``, one for each row of logits; keys without a seed are drawn."""
        random = [row for row, sequence in enumerate(sequences) if not sequence.is_greedy]
        drawn = _random_rows(sequences, random, vocab_size, device, generator) if random else None
        adjusted = [(row, sequence) for row, sequence in enumerate(sequences) if sequence.adjusts_logits]
        if not adjusted:
            return cls(None, None, None, None, drawn)
        forbidden, biases, repetition, output = (_Collector() for _ in range(4))
        for row, sequence in adjusted:
            params = sequence.sampling
            if sequence.bad_words or params.min_tokens:
                tokens = np.array([*_forbidden_tokens(sequence)], np.int64)
                forbidden.add(row, tokens, tokens)
            if params.logit_bias:
                biases.add(row, np.array([*params.logit_bias]), np.array([*params.logit_bias.values()]))
            if params.repetition_penalty == 1.0 and not (params.presence_penalty or params.frequency_penalty):
                continue
            tokens, counts = sequence.count_tokens().arrays()
            if params.repetition_penalty != 1.0:  # over prompt and output (Keskar et al. 2019)
                known = tokens[tokens < vocab_size]  # an image token may lie beyond the vocabulary
                repetition.add(row, known, np.full(len(known), params.repetition_penalty))
            if params.presence_penalty or params.frequency_penalty:
                is_written = counts > 0
                penalties = params.presence_penalty + params.frequency_penalty * counts[is_written]
                output.add(row, tokens[is_written], penalties)
        return cls(
            forbidden.as_forbidden(device),
            biases.to_device(device),
            repetition.to_device(device),
            output.to_device(device),
            drawn,
        )


class _Collector:
    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def add(self, row: int, tokens: np.ndarray, values: np.ndarray) -> None:
        if len(tokens):
            self._rows.append(np.full(len(tokens), row))
            self._tokens.append(tokens)
            self._values.append(values)

    def to_device(self, device: torch.device) -> TokenValues | None:
        if not self._rows:
            return None
        places = torch.from_numpy(np.stack([np.concatenate(self._rows), np.concatenate(self._tokens)]))
        rows, tokens = move(places, device)
        values = torch.from_numpy(np.concatenate(self._values).astype(np.float32))
        return TokenValues(rows, tokens, move(values, device))

    def as_forbidden(self, device: torch.device) -> ForbiddenTokens | None:
        if not self._rows:
            return None
        pairs = [np.concatenate(self._rows).tolist(), np.concatenate(self._tokens).tolist()]
        places = [place for place, rows in enumerate(self._rows) for _ in rows]
        return ForbiddenTokens(*together([*pairs, [int(rows[0]) for rows in self._rows], places], device))


def _random_rows(
    sequences: abc.Sequence[Sequence],
    random: list[int],
    vocab_size: int,
    device: torch.device,
    generator: torch.Generator,
) -> RandomRows:
    chosen = [sequences[row] for row in random]
    limits = np.array([sequence.draw_limits for sequence in chosen], np.float32)
    top_k = np.array([sequence.sampling.top_k for sequence in chosen])
    keys = np.empty((len(chosen), 3), np.int64)
    keys[:, 0] = torch.randint(2**63 - 1, (len(chosen),), generator=generator).numpy()  # for those without a seed
    keys[:, 1] = 0
    seeds = [(row, sequence.seed) for row, sequence in enumerate(chosen) if sequence.seed is not None]
    if seeds:
        places = [row for row, _ in seeds]
        keys[places, 0] = [seed for _, seed in seeds]
        keys[places, 1] = [chosen[row].num_output_tokens for row in places]
    keys[:, 2] = np.where(top_k > 0, np.minimum(top_k, vocab_size), vocab_size)
    rows, flat = together([random, keys.ravel()], device)
    return RandomRows(
        rows,
        move(torch.from_numpy(limits), device),
        flat.view(-1, 3),
        has_min_p=bool(limits[:, 1].any()),
        has_top=bool((limits[:, 2] < 1.0).any() or (keys[:, 2] < vocab_size).any()),
    )


def _forbidden_tokens(sequence: Sequence) -> set[int]:
    """The last tokens of bad words that are written but for these, and the end tokens before ``min_tokens``."""
    tokens = {word[-1] for word in sequence.bad_words if _would_complete(word, sequence)}
    return tokens | sequence.stop_token_ids if sequence.num_output_tokens < sequence.sampling.min_tokens else tokens


def _would_complete(word: tuple[int, ...], sequence: Sequence) -> bool:
    """Whether the output ends with all of a bad word but its last token."""
    begun = len(word) - 1
    return begun == 0 or (begun <= sequence.num_output_tokens and tuple(sequence.token_ids[-begun:]) == word[:-1])
