"""The model runner: a scheduled batch in, logits out. Owner of the weights, the KV memory and the vision processor."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from operator import attrgetter
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.engine.attention.base import AttentionBatch, GraphAttention
from nanovllm.engine.attention.selection import Heads, choose_backend
from nanovllm.engine.config import LEAST_KV_BYTES, EngineConfig
from nanovllm.engine.execution import loading
from nanovllm.engine.execution.batch_invariance import prove
from nanovllm.engine.execution.cuda_graphs import DecodeGraphs, choose_recorder, why_no_graphs
from nanovllm.engine.execution.kv_cache_size import kv_cache_bytes, limits_for
from nanovllm.engine.execution.prompt_logprobs import score_prompt
from nanovllm.engine.execution.step_inputs import StepInputs, StepResult, StepTokens
from nanovllm.engine.execution.tokens_ahead import TokensAhead
from nanovllm.engine.layers.device_copy import together
from nanovllm.engine.models.decoder import Decoder
from nanovllm.engine.models.generic_states import RowStates, SequenceStates
from nanovllm.engine.models.registry import around_image, positions_of
from nanovllm.engine.sampling.kernel_selection import choose_kernels
from nanovllm.engine.scheduling.batch import ScheduledBatch, ScheduledRow
from nanovllm.engine.scheduling.block_tables import BlockTables
from nanovllm.engine.scheduling.sequence import Sequence
from nanovllm.errors import ConfigurationError
from nanovllm.statistics import CacheStats
from nanovllm.vision.processor import VisionProcessor

if TYPE_CHECKING:
    from nanovllm.engine.models.generic_trial import TrialResult


class ModelRunner:
    """Weights, KV caches and the steps between a scheduled batch and its logits, each callable on its own."""

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint, tokenizer: Any) -> None:
        """Load weights and allocate memory; raises what ``LLMEngine`` raises."""
        self.config = config
        self.text_of = lambda token: str(tokenizer.decode([token]))
        self.device = loading.numbered(loading.choose_device(config.device))
        self.dtype = loading.choose_dtype(config, checkpoint, self.device)
        self.model, self.encoder, reference = loading.load_models(config, checkpoint, self.dtype, self.device)
        self.image_token_id = loading.choose_image_token_id(checkpoint, tokenizer, self.model.config.vocab_size)
        self.around_image = around_image(checkpoint)
        self.processor: VisionProcessor | None = None
        if self.encoder is not None:
            self.processor = loading.make_processor(config, self.encoder, self.image_token_id, self.device)
        text = self.model.config
        heads = Heads(text.num_attention_heads, *text.kv_shapes[0])
        self.attention = choose_backend(self.device, self.dtype, config.block_size, heads, config.deterministic)
        self.trial: TrialResult | None = None
        if reference is not None:
            from nanovllm.engine.models.generic import GenericDecoder
            from nanovllm.engine.models.generic_trial import hold_against

            assert isinstance(self.model, GenericDecoder)
            self.trial = hold_against(self.model, self.attention, reference, self.encoder)
        elif config.deterministic:
            assert isinstance(self.model, Decoder)
            prove(self.model, self.attention)
        recorder = choose_recorder(self.device)
        self.why_no_graphs = self.model.why_no_graphs or why_no_graphs(config, self.attention, recorder)
        if self.encoder is not None and recorder is not None and not config.enforce_eager:
            try:
                self.encoder.record(recorder)
            except torch.OutOfMemoryError:
                raise ConfigurationError(
                    f"a batch of {self.encoder.batch_size} images does not fit the GPU beside the weights: set "
                    "enable_multimodal=False, or enforce_eager=True, which records none"
                ) from None
        reserved = config.embedding_cache_bytes if self.encoder is not None else 0
        self.sampling = choose_kernels(self.device, self.model.embed_tokens.dtype, text.vocab_size)
        self.limits = limits_for(config, self.device, self.model, self.attention, self.sampling, reserved=reserved)
        self.kv_caches = self._allocate_kv_caches(reserved)
        limit = self.model.config.context_limit(config.max_model_len)
        self.max_model_len = min(limit, self.num_blocks * self.attention.block_size)
        self._saved_positions: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()
        self.graphs: DecodeGraphs | None = None
        if self.why_no_graphs is None:
            assert recorder is not None
            assert isinstance(self.attention, GraphAttention)
            assert isinstance(self.model, Decoder)
            self.graphs = DecodeGraphs(
                self.model,
                self.attention,
                self.kv_caches,
                recorder,
                spare_block=self.num_blocks,
                max_tokens=self.limits.decode_tokens(config.num_speculative_tokens),
                max_context=self.max_model_len,
                num_seats=self.limits.max_num_seqs,
            )

    def _allocate_kv_caches(self, reserved: int) -> list[Tensor]:
        """One cache for each layer, all of ``num_blocks`` blocks, and of a spare one where there are graphs.

        ``reserved``: bytes of the embedding cache.
        """
        config = self.config
        budget = kv_cache_bytes(
            config,
            self.limits,
            self.device,
            self.model,
            self.attention,
            self.sampling,
            self.encoder,
            has_graphs=self.why_no_graphs is None,
            reserved=reserved,
        )
        dtype = loading.choose_kv_dtype(config, self.dtype, self.device, self.attention)
        shapes = [(*shape, dtype) for shape in self.model.config.kv_shapes]
        sizes = {shape: self._allocate(1, *shape).nbytes for shape in set(shapes)}
        block_bytes = sum(sizes[shape] for shape in shapes)
        spare = 1 if self.why_no_graphs is None else 0
        if config.kv_cache_bytes is None:
            # Twice what all seats need at once is room enough for prefixes; an endless one would fill for nothing.
            seats = self.limits.max_num_seqs * self.model.config.context_limit(config.max_model_len)
            most = 2 * -(-seats // self.attention.block_size) * block_bytes
            budget = min(budget, max(most, LEAST_KV_BYTES))
        self.num_blocks = budget // block_bytes - spare
        if self.num_blocks < 1:
            least = block_bytes * (1 + spare)
            raise ConfigurationError(f"the KV cache must have {least} bytes to hold a block; raise kv_cache_bytes")
        return [self._allocate(self.num_blocks + spare, *shape) for shape in shapes]

    def _allocate(self, num_blocks: int, *shape: Any) -> Tensor:
        """The cache of a layer; ConfigurationError where the machine does not have the memory."""
        try:
            return self.attention.allocate(num_blocks, *shape)
        # Of mmap (OverflowError: more than an address can be), and of torch on a GPU.
        except (OSError, OverflowError, MemoryError, torch.OutOfMemoryError):
            config = self.config
            if config.kv_cache_bytes is not None:
                remedy = f"lower kv_cache_bytes={config.kv_cache_bytes}"
            elif num_blocks == 1 and config.block_size is not None:
                remedy = f"lower block_size={config.block_size}"
            else:
                share = "gpu_memory_utilization" if self.device.type == "cuda" else "cpu_memory_utilization"
                remedy = f"set kv_cache_bytes, or lower {share}={getattr(config, share)}"
            raise ConfigurationError(f"the memory for the KV cache cannot be allocated: {remedy}") from None

    def use_in_this_thread(self) -> None:
        """Make the model's GPU the calling thread's current one; else libraries that ask for that would take GPU 0."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def release(self) -> None:
        """Free the KV memory, and the graphs that hold it."""
        self.graphs = None
        self.kv_caches = []

    def prepare(self, scheduled: ScheduledBatch, sampled_before: Tensor | None = None) -> StepInputs:
        """The scheduled rows as tensors, single-token rows first, or load them into a graph.

        ``sampled_before`` [n] are the tokens of the step in flight, where rows go on behind them.
        """
        if scheduled.is_decode:
            return self._prepare_decode(scheduled, sampled_before)
        rows = tuple(sorted(scheduled.rows, key=lambda row: (row.num_tokens != 1, row.end)))
        token_ids: list[int] = []
        positions: list[Any] = []
        images: list[tuple[int, Tensor]] = []
        sampled: list[Sequence] = []
        sampling_indices: list[int] = []
        scored: list[tuple[ScheduledRow, int]] = []
        states: list[RowStates] = []
        pending: list[tuple[int, int]] = []  # place of a token that is not known yet, and of it in ``sampled_before``
        for row in rows:
            sequence, start, end = row.sequence, row.start, row.end
            for span in sequence.images:
                if span.touches(start, end):
                    assert span.embedding is not None  # attach_image_embeddings ran before
                    for first, low, high in span.runs(start, end):
                        images.append((len(token_ids) + first - start, span.embedding[low:high]))
            if self.model.has_states:
                sequence.states = sequence.states or SequenceStates()
                states.append((len(token_ids), len(token_ids) + row.num_tokens, sequence.states))
            if sequence.lacks_prompt_logprobs:
                scored.append((row, len(token_ids)))
            token_ids += sequence.token_ids[start:end]
            if sequence.pending is not None:
                pending.append((len(token_ids), sequence.pending))
                token_ids.append(0)
            token_ids += row.drafts
            positions += self._positions(sequence, start, end)
            sampled += [sequence.ahead(row.drafts[:drafted]) for drafted in range(row.num_samples)]
            sampling_indices += range(len(token_ids) - row.num_samples, len(token_ids))
        ahead = TokensAhead(sampled_before, pending) if sampled_before is not None and pending else None
        seats = [row.sequence.seat for row in rows]
        lengths, contexts = [row.num_tokens for row in rows], [row.end for row in rows]
        axes = self.model.config.position_axes
        if self.graphs is not None and not images and not scored:
            # Only an image's own tokens have different positions on different axes.
            plain = positions if axes is None else [triple[0] for triple in positions]
            wanted = None if len(sampling_indices) == len(token_ids) else sampling_indices
            tables = scheduled.tables
            if replay := self.graphs.load(token_ids, plain, wanted, lengths, contexts, seats, tables, ahead):
                return StepInputs(rows, tuple(sampled), replay)
        flat = positions if axes is None else [position for triple in positions for position in triple]
        ids, located, indices = together([token_ids, flat, sampling_indices], self.device)
        if ahead is not None:
            ahead.write_to(ids)
        if images:
            ids.clamp_(max=self.model.config.vocab_size - 1)  # the image token may lie beyond a text model's own
        tokens = StepTokens(
            token_ids=ids,
            positions=located if axes is None else located.view(len(ids), -1),
            images=tuple(images),
            attention=self._attention_metadata(lengths, contexts, seats, scheduled.tables),
            sampling_indices=None if len(indices) == len(ids) else indices,
            scored=tuple(scored),
            states=tuple(states),
        )
        return StepInputs(rows, tuple(sampled), tokens)

    def _prepare_decode(self, scheduled: ScheduledBatch, sampled_before: Tensor | None) -> StepInputs:
        """As ``prepare``, where every row is the last token of a sequence behind its prompt."""
        rows = tuple(sorted(scheduled.rows, key=attrgetter("start")))
        sequences = tuple([row.sequence for row in rows])
        token_ids = [sequence.token_ids[-1] for sequence in sequences]
        ahead = None
        if sampled_before is not None:
            places = [(place, one.pending) for place, one in enumerate(sequences) if one.pending is not None]
            ahead = TokensAhead(sampled_before, places) if places else None
        starts = [row.start for row in rows]
        seats = [sequence.seat for sequence in sequences]
        config, axes = self.model.config, self.model.config.position_axes
        # Behind its prompt a token has the same position on all axes.
        positions = starts
        if axes is not None:
            positions = [start - self._saved_by_images(one) for one, start in zip(sequences, starts, strict=True)]
        lengths, contexts = [1] * len(rows), [start + 1 for start in starts]
        if self.graphs is not None:
            replay = self.graphs.load(token_ids, positions, None, lengths, contexts, seats, scheduled.tables, ahead)
            if replay is not None:
                return StepInputs(rows, sequences, replay, is_decode=True)
        ids, located = together([token_ids, positions], self.device)
        if ahead is not None:
            ahead.write_to(ids)
        states: list[RowStates] = []
        if self.model.has_states:
            states = [(index, index + 1, sequence.states) for index, sequence in enumerate(sequences)]
        tokens = StepTokens(
            token_ids=ids,
            positions=located if axes is None else located.unsqueeze(1).repeat(1, config.num_axes),
            images=(),
            attention=self._attention_metadata(lengths, contexts, seats, scheduled.tables),
            sampling_indices=None,
            scored=(),
            states=tuple(states),
        )
        return StepInputs(rows, sequences, tokens, is_decode=True)

    def _positions(self, sequence: Sequence, start: int, end: int) -> Ordered[Any]:
        config = self.model.config
        if config.position_axes is None or start < sequence.num_prompt_tokens:
            return positions_of(config, sequence.images, start, end)
        saved = self._saved_by_images(sequence)
        return [(index - saved,) * config.num_axes for index in range(start, end)]

    def _saved_by_images(self, sequence: Sequence) -> int:
        """Token index minus position behind a prompt, the same on all axes; the images are looked through once."""
        saved = self._saved_positions.get(sequence)
        if saved is None:
            end = sequence.num_prompt_tokens
            saved = end - positions_of(self.model.config, sequence.images, end, end + 1)[0][0]
            self._saved_positions[sequence] = saved
        return saved

    def _attention_metadata(
        self, query_lens: list[int], context_lens: list[int], seats: list[int], tables: BlockTables
    ) -> Any:
        return self.attention.metadata(AttentionBatch(query_lens, context_lens, tables.rows, seats))

    def forward(self, inputs: StepInputs) -> StepResult:
        """Compute the step's logits and log probabilities of prompts; writes to the KV caches and to no sequence."""
        tokens = inputs.tokens
        if not isinstance(tokens, StepTokens):
            return StepResult(tokens(), ())
        hidden = self.model.embed(tokens.token_ids)
        wanted = None if tokens.scored else tokens.sampling_indices
        states: dict[str, Any] = {"states": tokens.states} if tokens.states else {}
        hidden = self.model(
            hidden, tokens.positions, self.kv_caches, self.attention, tokens.attention, tokens.images, wanted, **states
        )
        scores = tuple(
            (row.sequence, tuple(score_prompt(self.model, row, hidden[first : first + row.num_tokens], self.text_of)))
            for row, first in tokens.scored
        )
        if not inputs.sampled_sequences:
            return StepResult(hidden.new_empty(0, self.model.config.vocab_size), scores)
        if tokens.scored and tokens.sampling_indices is not None:
            hidden = hidden.index_select(0, tokens.sampling_indices)
        return StepResult(self.model.logits(hidden), scores)

    def get_vision_stats(self) -> dict[str, Any]:
        """The embedding cache's figures under the guide's names; without vision all are 0."""
        cache = self.processor.cache.stats() if self.processor is not None else CacheStats()
        return {
            "vision_cache_size": cache.entries,
            "vision_cache_bytes": cache.bytes,
            "vision_cache_hits": cache.hits,
            "vision_cache_hits_by_file": cache.hits_by_file,
            "vision_cache_hits_by_tier": {tier.name: tier.hits for tier in cache.tiers},
            "vision_cache_misses": cache.misses,
            "vision_cache_joined": cache.joined,
            "vision_cache_evictions": cache.evictions,
            "vision_cache_seconds_saved": cache.seconds_saved,
            "images_encoded": self.encoder.images_encoded if self.encoder is not None else 0,
            "encode_seconds": self.encoder.encode_seconds if self.encoder is not None else 0.0,
        }
