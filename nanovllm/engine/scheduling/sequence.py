"""A sequence: the tokens of one output of a request, how many of them are computed, and the KV blocks that hold them.

There is no prefill state and no decode state. A sequence has a number of tokens and a number of computed tokens; every
step computes some of the difference, and the step that computes the last one samples the next token.
"""

from __future__ import annotations

import copy
import hashlib
from array import array
from bisect import bisect_left
from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

from nanovllm.engine.scheduling.drafted_tokens import DraftedTokens
from nanovllm.engine.scheduling.token_counts import TokenCounts

if TYPE_CHECKING:
    import torch

    from nanovllm.engine.outputs import FinishReason, ImageOutcome, TokenLogprobs
    from nanovllm.sampling_params import SamplingParams
    from nanovllm.vision.encoders.base import ImageLayout
    from nanovllm.vision.images.preprocess import PreparedImage
    from nanovllm.vision.timing import Timed

_ARRIVALS_PER_PRIORITY = 1000
"""How many later arrivals are scheduled before a sequence for each step of priority between them.

It bounds starvation: under an endless stream of urgent requests the others wait long, and not for ever.
"""

_MIN_TEMPERATURE = 1e-5  # below it only the best token is left, and float32 would overflow
_arrivals = count()


class SequenceStatus(Enum):
    """The state of a sequence: in the waiting queue, in the running batch, or finished."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass
class ImageSpan:
    """An image of a sequence and its token positions [start, end).

    ``embedding`` [embeddings, hidden] is held only while the sequence runs and has not computed past ``end``.
    """

    image: PreparedImage
    key: bytes  # the identity of the embedding: pixels, transform, tower, salt
    start: int
    length: int
    grid: tuple[int, int] | None = None  # rows and columns of its tokens, where positions are two-dimensional
    layout: ImageLayout | None = None  # of its tokens, where not all are embeddings
    embedding: torch.Tensor | None = None
    outcome: ImageOutcome | None = None  # of the first look-up; None while there was none

    @property
    def end(self) -> int:
        """The first position after the image."""
        return self.start + self.length

    @property
    def places(self) -> abc.Sequence[int]:
        """Where embeddings stand, relative to ``start``, ascending."""
        return range(self.length) if self.layout is None else self.layout.places

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The unbroken runs of embeddings in [start, end), which the image touches.

        Of each the position of the first, and its rows [from, to) of ``embedding``.
        """
        if self.layout is None:
            first, last = max(start, self.start), min(end, self.end)
            yield first, first - self.start, last - self.start
            return
        places = self.layout.places
        first, last = (bisect_left(places, edge - self.start) for edge in (start, end))
        while first < last:
            to = first + 1
            while to < last and places[to] == places[to - 1] + 1:
                to += 1
            yield self.start + places[first], first, to
            first = to

    def touches(self, start: int, end: int) -> bool:
        """Whether the image has a position in [start, end)."""
        return self.start < end and start < self.end


@dataclass
class Timestamps:
    """When a sequence reached each state, in seconds of ``time.perf_counter``; 0 before it does.

    ``encodings``: the encoder's calls that it waited for.
    """

    arrived: float = 0.0
    first_scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    encodings: tuple[Timed, ...] = ()


@dataclass(eq=False)
class Sequence:
    """A request's tokens (prompt, then output), its images, and its KV blocks in order."""

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    max_tokens: int  # of output; already cut to what the context and the KV cache hold
    index: int = 0  # among the outputs of its request
    images: tuple[ImageSpan, ...] = ()
    priority: int = 0  # a lower one is scheduled earlier
    cache_salt: bytes = b""
    stop_token_ids: frozenset[int] = frozenset()  # that end the output, end-of-sequence among them unless ignored
    bad_words: tuple[tuple[int, ...], ...] = ()
    matcher: Any = None  # llguidance's, where the output is constrained; it has consumed every token of the output
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    num_computed_tokens: int = 0
    seat: int = -1  # its row of the block tables while it runs
    num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache at first; None before that
    block_table: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text_ends: list[int] = field(default_factory=list)  # beside logprobs: characters of text up to each output token
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    pending: int | None = None  # place of its newest token among those of the step in flight; None: all are known
    states: Any = None  # of layers that carry one, where the model has such layers; None before the first token
    times: Timestamps = field(default_factory=Timestamps)
    arrival: int = field(default_factory=_arrivals.__next__)
    _block_hashes: list[bytes] = field(default_factory=list)
    _token_counts: TokenCounts | None = None

    def __post_init__(self) -> None:
        params = self.sampling
        self.is_greedy = params.is_greedy
        penalises = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        self.adjusts_logits = bool(self.bad_words or params.min_tokens or params.logit_bias or penalises)
        """Whether anything but a constraint changes its logits before the argmax."""
        has_long_words = any(len(word) > 1 for word in self.bad_words)
        self.needs_known_tokens = bool(self.matcher is not None or penalises or has_long_words)
        """Whether sampling looks at the output so far, on the host."""

    @cached_property
    def seed(self) -> int | None:
        """The seed of its samples: each of several outputs has another one."""
        return None if self.sampling.seed is None else (self.sampling.seed + self.index) % 2**63

    @cached_property
    def draw_limits(self) -> tuple[float, float, float]:
        """The inverse of the temperature, ``min_p`` and ``top_p``, which is 2 where there is none."""
        params = self.sampling
        # Rounding may sum to more than one.
        return 1 / max(params.temperature, _MIN_TEMPERATURE), params.min_p, params.top_p if params.top_p < 1.0 else 2.0

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether prompt tokens lack their log probabilities, which need the logits before each of them."""
        wanted = self.sampling.prompt_logprobs is not None and self.index == 0
        return wanted and len(self.prompt_logprobs) < self.num_prompt_tokens

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def _order(self) -> tuple[int, int, int]:
        return self.arrival + _ARRIVALS_PER_PRIORITY * self.priority, self.priority, self.arrival

    def __lt__(self, other: Sequence) -> bool:
        """Scheduling order: lower priority number, then earlier arrival, with aging (``_ARRIVALS_PER_PRIORITY``)."""
        return self._order < other._order

    @property
    def num_tokens(self) -> int:
        """Tokens so far, the one that is still on the device among them."""
        return len(self.token_ids) + (self.pending is not None)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, the one that is still on the device among them."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens without keys and values."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        """Whether its last token is sampled, or it was aborted."""
        return self.status is SequenceStatus.FINISHED

    def ahead(self, drafts: tuple[int, ...]) -> Sequence:
        """A copy of this sequence with ``drafts`` appended, for the sampler; read-only, its other fields are shared."""
        if not drafts:
            return self
        other = copy.copy(self)
        other.token_ids = DraftedTokens(self.token_ids, drafts)  # type: ignore[assignment]  # nothing is appended to it
        if self._token_counts is not None:
            other._token_counts = self._token_counts.copy()
        return other

    def count_tokens(self) -> TokenCounts:
        """Its distinct tokens, and how often each is in its output, by now."""
        self._token_counts = self._token_counts or TokenCounts()
        return self._token_counts.update(self.token_ids, self.num_prompt_tokens)

    def block_hashes(self, block_size: int) -> list[bytes]:
        """The chained hashes of all blocks that are full of known tokens, computed once each.

        A hash names the whole prefix up to the block's end: the salt, every token, and of every image that touches a
        block its key and its offset from the block's start (equal placeholders of different images, or of one image
        shifted by a token, have different KV).
        """
        hashes = self._block_hashes
        for block in range(len(hashes), len(self.token_ids) // block_size):
            start, end = block * block_size, (block + 1) * block_size
            # The salt is hashed, so that no choice of it can imitate a parent's hash.
            parent = hashes[-1] if hashes else hashlib.sha256(b"nanovllm prefix\0" + self.cache_salt).digest()
            digest = hashlib.sha256(parent)
            digest.update(array("q", self.token_ids[start:end]))
            for span in self.images:
                if span.touches(start, end):
                    digest.update(span.key)
                    digest.update(array("q", (span.start - start,)))
            hashes.append(digest.digest())
        return hashes

    def drop_embeddings(self, computed: int | None = None) -> None:
        """Drop the embeddings of images that end at or before ``computed`` tokens; of all when it is None."""
        for span in self.images:
            if computed is None or span.end <= computed:
                span.embedding = None
