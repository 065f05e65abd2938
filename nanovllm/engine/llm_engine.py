"""The engine: requests in, text out, one step at a time.

A step is ``plan → inputs → forward → sample → commit``. Every mistake of a caller is an exception of ``add_request``;
``step`` raises only when the engine itself is broken.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from functools import cached_property
from itertools import count
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import AutoTokenizer

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.config import EngineConfig
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.loader import Checkpoint
from nanovllm.engine.model_runner import ModelRunner, StepInputs
from nanovllm.engine.outputs import (
    EngineStats,
    FinishReason,
    ImageUse,
    ModelInfo,
    RequestOutput,
    RequestTimings,
    StepOutput,
    TokenChunk,
    Usage,
)
from nanovllm.engine.prompts import PromptEncoder
from nanovllm.engine.sampler import Sampler
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import ImageSpan, Sequence
from nanovllm.errors import ConfigurationError, EngineFault, InvalidInput, PromptTooLong
from nanovllm.sampling_params import SamplingParams
from nanovllm.vision.cache import embedding_key
from nanovllm.vision.checkpoints import resolve_checkpoint
from nanovllm.vision.images import ImageSource
from nanovllm.vision.processor import VisionProcessor
from nanovllm.vision.transform import PreparedImage

Prompt = str | Rows[int] | Rows[Mapping[str, Any]]


class LLMEngine:
    """A model, its scheduler and its requests. Not thread-safe: one thread owns an engine."""

    def __init__(self, model: str, **options: Any) -> None:
        """Load ``model`` (a directory, alias or cached hub name) with the options of EngineConfig.

        Raises:
            ModelNotFound, UnsupportedModel, ConfigurationError: what cannot be loaded or contradicts itself.
        """
        self.config = EngineConfig.from_options(model, options)
        self.checkpoint = Checkpoint(resolve_checkpoint(model))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(
            self.checkpoint.directory, local_files_only=True, trust_remote_code=False
        )
        self.model_runner = ModelRunner(self.config, self.checkpoint, self.tokenizer)
        self.processor: VisionProcessor | None = self.model_runner.processor
        self.scheduler = Scheduler(
            BlockManager(
                self.model_runner.num_blocks,
                self.model_runner.attention.block_size,
                enable_prefix_caching=self.config.enable_prefix_caching,
            ),
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
        )
        self.sampler = Sampler(self.model_runner.device, self.config.seed)
        self.max_model_len = self._context_limit()
        self.prompts = PromptEncoder(
            self.tokenizer, image_token_id=self.model_runner.image_token_id if self.processor else None
        )
        self._eos_token_ids = self.checkpoint.eos_token_ids()
        self._sequences: dict[str, Sequence] = {}
        self._detokenizers: dict[str, Detokenizer] = {}
        self._aborted: list[StepOutput] = []
        self._names = count()
        self._steps = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0

    def _context_limit(self) -> int:
        trained = int(self.model_runner.model.config.max_position_embeddings)
        asked = self.config.max_model_len
        if asked is not None and asked > trained:
            raise ConfigurationError(f"max_model_len={asked}, but the model's positions end at {trained}")
        blocks = self.scheduler.blocks
        return min(asked or trained, blocks.num_blocks * blocks.block_size)

    @cached_property
    def model_info(self) -> ModelInfo:
        """Which model this is; reads the weight files once more for their digest.

        A directory is named by its last part: the id travels in results, and a worker's paths are its own affair.
        """
        name = Path(self.config.model)
        return ModelInfo(
            name.resolve().name if name.is_dir() else self.config.model,
            self.checkpoint.revision,
            self.checkpoint.parameter_digest,
        )

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        images: Rows[ImageSource | PreparedImage] | None = (),
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: bytes = b"",
    ) -> str:
        """Queue a request and return its id.

        A string is trusted: special tokens in it are parsed, and no chat template is applied. Messages go through the
        checkpoint's chat template. In a list of token ids every image token stands for one image. The output is cut
        (``finish_reason`` "length") where context or KV cache end.

        Raises:
            PlaceholderMismatch: more or fewer placeholders than images.
            PromptTooLong: a prompt that leaves no room for a single token.
            InvalidInput: an empty prompt, a token outside the vocabulary, a request id in use, images without a tower.
            InvalidImage: an image that cannot be read.
        """
        arrived = time.perf_counter()
        sampling = sampling_params or SamplingParams()
        request_id = request_id if request_id is not None else f"request-{next(self._names)}"
        if request_id in self._sequences:
            raise InvalidInput(f"request id {request_id!r} is in use")
        token_ids, spans = self._expand(self._encode(prompt), list(images or ()), cache_salt)
        room = self.max_model_len - len(token_ids)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(token_ids)} tokens; with one token of output at most {self.max_model_len} fit"
            )
        sequence = Sequence(
            request_id=request_id,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            sampling=sampling,
            max_tokens=min(sampling.max_tokens, room),
            images=spans,
            priority=priority,
            cache_salt=cache_salt,
            stop_token_ids=self._stop_token_ids(sampling),
        )
        sequence.times.arrived = arrived
        self._sequences[request_id] = sequence
        self._detokenizers[request_id] = Detokenizer(
            self.tokenizer,
            stop=sampling.stop,
            min_tokens=sampling.min_tokens,
            skip_special_tokens=sampling.skip_special_tokens,
        )
        self.scheduler.add(sequence)
        return request_id

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.prompts.trusted(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            return self.prompts.messages(prompt)  # type: ignore[arg-type]
        try:
            token_ids = [index(part) for part in prompt]  # type: ignore[arg-type]
        except TypeError:
            raise InvalidInput("a prompt is a string, a list of token ids, or a list of messages") from None
        image_token_id = self.model_runner.image_token_id if self.processor else None
        vocab_size = self.model_runner.model.config.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size and token_id != image_token_id:
                raise InvalidInput(f"token {token_id} is outside the vocabulary of {vocab_size}")
        return token_ids

    def _expand(
        self, token_ids: list[int], images: list[ImageSource | PreparedImage], salt: bytes
    ) -> tuple[list[int], tuple[ImageSpan, ...]]:
        """Give every image its positions: each image token becomes as many as the processor says, image by image."""
        if not token_ids:
            raise InvalidInput("the prompt is empty")
        if self.processor is None:
            if images:
                raise InvalidInput(f"{len(images)} images, but this engine has no vision model; see enable_multimodal")
            return token_ids, ()
        image_token_id = self.model_runner.image_token_id
        self.processor.check_placeholders(token_ids.count(image_token_id), len(images))
        if len(images) > self.config.max_images_per_request:
            raise InvalidInput(f"{len(images)} images, at most {self.config.max_images_per_request} are allowed")
        expanded: list[int] = []
        spans: list[ImageSpan] = []
        waiting = iter(images)
        for token_id in token_ids:
            if token_id != image_token_id:
                expanded.append(token_id)
                continue
            image = self.processor.prepare(next(waiting))
            key = embedding_key(image, self.processor.encoder.revision, salt)
            spans.append(ImageSpan(image, key, len(expanded), self.processor.num_image_tokens(image)))
            expanded += [image_token_id] * spans[-1].length
        return expanded, tuple(spans)

    def _stop_token_ids(self, sampling: SamplingParams) -> frozenset[int]:
        own = frozenset(sampling.stop_token_ids)
        vocab_size = self.model_runner.model.config.vocab_size
        if any(not 0 <= token_id < vocab_size for token_id in own):
            raise InvalidInput(f"a stop token is outside the vocabulary of {vocab_size}")
        return own if sampling.ignore_eos else own | self._eos_token_ids

    def abort(self, request_id: str) -> None:
        """End a request in whatever state it is; the next step reports it with ``finish_reason`` "abort".

        An id that is unknown or finished already is no error: an abort may always come too late.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        text = self._detokenizers[request_id].finish()
        self._aborted.append(StepOutput(request_id, TokenChunk(text, (), "abort"), self._finish(sequence, "abort")))

    def has_unfinished(self) -> bool:
        """Whether a further step has something to do or to report."""
        return bool(self._sequences or self._aborted)

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Compute one step and return what it did for each request that got a token or ended."""
        outputs, self._aborted = self._aborted, []
        if not self.scheduler.has_unfinished():
            return outputs
        plan = self.scheduler.plan()
        if not plan.rows:
            raise EngineFault(f"nothing could be scheduled while {len(self._sequences)} requests wait")
        now = time.perf_counter()
        for row in plan.rows:
            if not row.sequence.times.first_scheduled:
                row.sequence.times.first_scheduled = now
        self.model_runner.embed_images(plan.rows)
        inputs = self.model_runner.prepare(plan)
        logits = self.model_runner.forward(inputs)
        tokens = self.sampler.sample(logits, [row.sequence for row in inputs.sampling_rows])
        return outputs + self.commit(inputs, tokens)

    def commit(self, inputs: StepInputs, tokens: Rows[int]) -> list[StepOutput]:
        """Book a computed step: computed tokens, new tokens, and the requests that end with them."""
        now = time.perf_counter()
        for row in inputs.rows:
            if row.start < row.sequence.num_prompt_tokens:
                self._prompt_tokens += min(row.end, row.sequence.num_prompt_tokens) - row.start
            self.scheduler.commit(row)
            if row.sequence.images:
                row.sequence.drop_embeddings(row.sequence.num_computed_tokens)
        self._steps += 1
        self._generation_tokens += len(tokens)
        outputs = []
        for row, token in zip(inputs.sampling_rows, tokens, strict=True):
            outputs.append(self._append(row.sequence, token, now))
        return outputs

    def _append(self, sequence: Sequence, token: int, now: float) -> StepOutput:
        sequence.token_ids.append(token)
        sequence.times.first_token = sequence.times.first_token or now
        sequence.times.last_token = now
        detokenizer = self._detokenizers[sequence.request_id]
        text = detokenizer.append(token)
        reason: FinishReason | None = None
        if detokenizer.is_stopped or (
            token in sequence.stop_token_ids and sequence.num_output_tokens > sequence.sampling.min_tokens
        ):
            reason = "stop"
        elif sequence.num_output_tokens >= sequence.max_tokens:
            reason = "length"
        if reason is None:
            return StepOutput(sequence.request_id, TokenChunk(text, (token,)))
        text += detokenizer.finish()
        return StepOutput(sequence.request_id, TokenChunk(text, (token,), reason), self._finish(sequence, reason))

    def _finish(self, sequence: Sequence, reason: FinishReason) -> RequestOutput:
        self.scheduler.finish(sequence)
        sequence.finish_reason = reason
        del self._sequences[sequence.request_id]
        detokenizer = self._detokenizers.pop(sequence.request_id)
        return RequestOutput(
            request_id=sequence.request_id,
            text=detokenizer.text,
            token_ids=tuple(sequence.output_token_ids),
            finish_reason=reason,
            usage=Usage(
                input_tokens=sequence.num_prompt_tokens,
                output_tokens=sequence.num_output_tokens,
                image_tokens=sum(span.length for span in sequence.images),
                cached_tokens=sequence.num_cached_tokens or 0,
            ),
            timings=_timings(sequence, time.perf_counter()),
            images=tuple(
                ImageUse(
                    digest=span.image.digest.hex(),
                    outcome=span.outcome or "prefix",
                    tokens=span.length,
                    width=span.image.width,
                    height=span.image.height,
                )
                for span in sequence.images
            ),
        )

    def generate(
        self,
        prompts: Prompt | Rows[Prompt],
        sampling_params: SamplingParams | Rows[SamplingParams] | None = None,
        images: Rows[Rows[ImageSource | PreparedImage]] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer all prompts and return their outputs in the same order; one prompt may stand without a list.

        ``sampling_params`` and ``images`` are one for all prompts, or one for each. Raises what ``add_request`` raises,
        and then none of the prompts runs on.
        """
        batch: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)  # type: ignore[arg-type]
        if images is None:
            images = [()] * len(batch)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(batch)
        for name, given in (("sampling_params", sampling_params), ("images", images)):
            if len(given) != len(batch):
                raise InvalidInput(f"{len(given)} {name} for {len(batch)} prompts")
        places: dict[str, int] = {}
        outputs: list[RequestOutput | None] = [None] * len(batch)
        try:
            for place, (prompt, params, pictures) in enumerate(zip(batch, sampling_params, images, strict=True)):
                places[self.add_request(prompt, params, images=pictures)] = place
            with _progress(len(batch), use_tqdm) as bar:
                while any(output is None for output in outputs):
                    for output in self.step():
                        if output.finished is not None and output.request_id in places:
                            outputs[places[output.request_id]] = output.finished
                            bar.update(1)
        except BaseException:
            for request_id in places:
                self.abort(request_id)
            self._aborted = [output for output in self._aborted if output.request_id not in places]
            raise
        return [output for output in outputs if output is not None]

    def stats(self) -> EngineStats:
        """A snapshot of queues, caches and counters."""
        scheduler = self.scheduler
        encoder = self.processor.encoder if self.processor else None
        return EngineStats(
            num_requests_running=len(scheduler.running),
            num_requests_waiting=len(scheduler.waiting),
            kv_cache_usage=scheduler.blocks.usage,
            num_preemptions=scheduler.num_preemptions,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            encoder_images=encoder.images_encoded if encoder else 0,
            encoder_seconds=encoder.encode_seconds if encoder else 0.0,
            embedding_cache=self.processor.cache.stats() if self.processor else None,
        )

    def audit(self) -> None:
        """Check the engine's invariants between two steps; raises AssertionError."""
        self.scheduler.audit()
        queued = {sequence.request_id for sequence in (*self.scheduler.running, *self.scheduler.waiting)}
        assert queued == set(self._sequences) == set(self._detokenizers), "requests and queues differ"
        if self.processor is not None:
            self.processor.cache.audit()

    def close(self) -> None:
        """End all requests and let go of the KV memory. Closing twice does nothing."""
        for request_id in list(self._sequences):
            self.abort(request_id)
        self._aborted.clear()
        self.model_runner.kv_caches = []

    def __enter__(self) -> Self:
        """The engine itself; it is closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def _timings(sequence: Sequence, now: float) -> RequestTimings:
    times = sequence.times
    generation_ms = (times.last_token - times.first_token) * 1e3
    return RequestTimings(
        queue_ms=((times.first_scheduled or now) - times.arrived) * 1e3,
        encode_ms=times.encode_s * 1e3,
        time_to_first_token_ms=(times.first_token - times.arrived) * 1e3 if times.first_token else 0.0,
        generation_ms=generation_ms,
        mean_itl_ms=generation_ms / (sequence.num_output_tokens - 1) if sequence.num_output_tokens > 1 else 0.0,
        e2e_ms=(now - times.arrived) * 1e3,
    )


def _progress(total: int, visible: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, disable=not visible, desc="Generating", unit="request")
