"""The engine: requests in, text out, one step at a time.

A step is ``schedule → prepare → forward → sample → commit``. A caller's mistake is an exception of ``add_request``;
``step`` raises only when the engine itself is broken.
"""

from __future__ import annotations

import logging
import time
from collections import abc, deque
from collections.abc import Mapping
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.checkpoints.resolve import resolve_checkpoint
from nanovllm.checkpoints.transformers_version import warn_untested_version
from nanovllm.engine.config import EngineConfig
from nanovllm.engine.engine_stats import StepCounts, collect_stats
from nanovllm.engine.execution.launched_step import LaunchedStep, SampledTokens, launch
from nanovllm.engine.execution.make_scheduler import make_scheduler
from nanovllm.engine.execution.model_runner import ModelRunner
from nanovllm.engine.layers.device_copy import is_asynchronous
from nanovllm.engine.outputs import FinishReason, ModelInfo, RequestOutput, StepOutput, TokenChunk, TokenLogprobs
from nanovllm.engine.sampling.default_sampling import default_sampling, params_of_prompts, warn_ignored
from nanovllm.engine.sampling.sampler import Sampler
from nanovllm.engine.sampling.structured_output import TokenMasks
from nanovllm.engine.scheduling.batch import ScheduledBatch, ScheduledRow
from nanovllm.engine.scheduling.sequence import Sequence, SequenceStatus
from nanovllm.engine.text.detokenizer import Detokenizer
from nanovllm.engine.text.input_processor import Images, InputProcessor, Prompt
from nanovllm.engine.text.output_processor import RequestState, add_token, extend, output_of
from nanovllm.engine.text.prompt_forms import read_conversations, read_prompts
from nanovllm.errors import EngineDead, EngineFault, InvalidInput, NanoVLLMError
from nanovllm.sampling_params import SamplingParams
from nanovllm.start_phases import START, Phase
from nanovllm.statistics import EngineStats
from nanovllm.vision.processor import PromptImages, VisionProcessor

logger = logging.getLogger(__name__)


class LLMEngine:
    """A model, its scheduler and its requests. Not thread-safe: one thread owns an engine."""

    def __init__(self, model: str, **options: Any) -> None:
        """Load ``model`` (a directory, alias or cached hub name) with the options of EngineConfig.

        Raises:
            ModelNotFound, UnsupportedModel, ConfigurationError: what cannot be loaded or contradicts itself.
        """
        warn_untested_version()
        self.config = EngineConfig.from_options(model, options)
        self.checkpoint = Checkpoint(resolve_checkpoint(model))
        with START.timed(Phase.TOKENIZER):
            self.tokenizer = self.checkpoint.tokenizer()
        self.model_runner = ModelRunner(self.config, self.checkpoint, self.tokenizer)
        self.processor: VisionProcessor | None = self.model_runner.processor
        self.scheduler = make_scheduler(self.config, self.model_runner)
        self.max_model_len = self.model_runner.max_model_len
        vocab_size = self.model_runner.model.config.vocab_size
        self.sampler = Sampler(self.model_runner.device, self.config.seed, self.model_runner.sampling)
        self.input_processor = InputProcessor(
            self.tokenizer,
            self.processor,
            vocab_size=vocab_size,
            max_model_len=self.max_model_len,
            max_images=self.config.max_images_per_request,
            image_token_id=self.model_runner.image_token_id,
            around_image=self.model_runner.around_image,
            eos_token_ids=self.checkpoint.eos_token_ids(vocab_size, self.tokenizer),
            is_processor_template=self.checkpoint.processor_template is not None,
            chat_template_kwargs=self.config.chat_template_kwargs,
        )
        self._default_sampling = default_sampling(self.generation_defaults)
        warn_ignored(self.config, self.checkpoint)
        self._masks = TokenMasks(vocab_size)
        self._requests: dict[str, RequestState] = {}
        self._ended: list[StepOutput] = []  # between two steps
        self._in_flight: deque[LaunchedStep] = deque()  # in the order of their launches: two at most, one between steps
        self._overlaps = is_asynchronous(self.model_runner.device) and not self.model_runner.model.has_states
        self._is_closed = False
        self._names = count()
        self._counts = StepCounts()

    @cached_property
    def model_info(self) -> ModelInfo:
        """Which model this is; reads the weight files once more for their digest.

        A directory is named by its last part: the id is part of results, which must not contain a worker's paths.
        """
        name = Path(self.config.model)
        return ModelInfo(
            name.resolve().name if name.is_dir() else self.config.model,
            self.checkpoint.revision,
            self.checkpoint.parameter_digest,
        )

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without sampling parameters gets: generation_config.json's over vLLM's defaults.

        As in vLLM: a request that has sampling parameters takes all of them from there. ``generation_config="vllm"``
        leaves the file out.
        """
        return self._default_sampling

    @property
    def generation_defaults(self) -> dict[str, Any]:
        """The sampling parameters that are taken from generation_config.json."""
        return self.checkpoint.generation_defaults if self.config.generation_config == "auto" else {}

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        images: PromptImages = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: bytes = b"",
        chat_template_kwargs: abc.Mapping[str, Any] | None = None,
    ) -> str:
        """Queue a request and return its id.

        A string is trusted: special tokens in it are parsed, and no chat template is applied. Messages go through the
        checkpoint's chat template, with ``chat_template_kwargs`` over the engine's own. In a list of token ids every
        image token stands for one image. ``{"prompt": …}`` and ``{"prompt_token_ids": …}`` may hold their images:
        ``"multi_modal_data": {"image": …}``. The output is cut (``finish_reason`` "length") where context or KV cache
        end.

        Raises:
            PlaceholderMismatch: more or fewer placeholders than images.
            PromptTooLong: a prompt after which not a single token fits.
            UnsupportedConstraint: a schema, expression, grammar or choice that cannot be enforced.
            InvalidInput: an empty prompt or one of another form, a token outside the vocabulary, a request id in use,
                images without a tower or in another shape than a flat sequence or one image.
            InvalidImage: an image that cannot be read.
            EngineDead: the engine is closed.
        """
        if self._is_closed:
            raise EngineDead("the engine is closed: make another one")
        (sampling,) = params_of_prompts(sampling_params, 1, self._default_sampling)
        request_id = request_id if request_id is not None else f"request-{next(self._names)}"
        if request_id in self._requests:
            raise InvalidInput(f"request id {request_id!r} is in use")
        sequences = self.input_processor.sequences(
            request_id,
            prompt,
            sampling,
            images,
            priority=priority,
            salt=cache_salt,
            chat_template_kwargs=chat_template_kwargs,
        )
        self._requests[request_id] = RequestState(sequences, [Detokenizer(self.tokenizer, sampling) for _ in sequences])
        for sequence in sequences:
            self.scheduler.add(sequence)
        return request_id

    def abort(self, request_id: str) -> None:
        """End a waiting or running request; the next step reports it with ``finish_reason`` "abort".

        An unknown or finished id is no error: an abort may arrive after the end.
        """
        request = self._requests.get(request_id)
        for sequence in request.sequences if request is not None else ():
            if not sequence.is_finished:
                self._ended.append(self._finish(sequence, "abort", self._detokenizer(sequence).finish(), ()))

    def has_unfinished(self) -> bool:
        """Whether a further step has something to do or to report."""
        return bool(self._requests or self._ended)

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Compute one step and return what it did for each request that got a token or ended."""
        outputs, self._ended = self._ended, []
        while self._in_flight and self._in_flight[0].is_over:
            self._in_flight.popleft()
        if not self._in_flight:
            if not self.scheduler.has_unfinished():
                return outputs
            self._launch(self.scheduler.schedule())
        if not self._in_flight:
            raise EngineFault(f"nothing could be scheduled while {len(self._requests)} requests wait")
        launched = self._in_flight[0]
        if self._overlaps and len(self._in_flight) == 1 and launched.can_be_followed:
            self._launch(self.scheduler.schedule_behind(launched.rows), launched.token_ids)
        sampled = launched.read(self.model_runner.text_of)
        self._in_flight.popleft()
        return outputs + self.commit(launched, sampled)

    def _launch(self, scheduled: ScheduledBatch, sampled_before: Tensor | None = None) -> None:
        """Prepare, compute and sample the scheduled rows, if any, without waiting for the device."""
        if scheduled.rows:
            upcoming = self.scheduler.images_in_order()
            step = launch(self.model_runner, self.sampler, self._masks, scheduled, upcoming, sampled_before)
            self._in_flight.append(step)

    def commit(self, launched: LaunchedStep, sampled: SampledTokens) -> list[StepOutput]:
        """Write a computed step into its sequences: computed tokens, scores, new tokens, and the ends of requests."""
        now = time.perf_counter()
        self._counts.steps += 1
        for sequence, scores in launched.prompt_logprobs:
            sequence.prompt_logprobs += scores
        outputs = []
        if launched.has_plain_tokens:
            return [
                self._append_token(row, token, now)
                for row, token in zip(launched.rows, sampled.token_ids, strict=True)
                if row.sequence.status is not SequenceStatus.FINISHED
            ]
        first = 0
        for row in launched.rows:
            mine = slice(first, first + row.num_samples)
            first = mine.stop
            if row.sequence.is_finished:  # another output of the request has failed, which ended it
                continue
            if row.start < row.sequence.num_prompt_tokens:
                self._counts.prompt_tokens += min(row.end, row.sequence.num_prompt_tokens) - row.start
            if row.is_sampled:
                outputs.append(self._append(row, sampled.token_ids[mine], sampled.logprobs[mine], now))
            else:
                self.scheduler.commit(row)
        return outputs

    def _append(
        self, row: ScheduledRow, tokens: abc.Sequence[int], logprobs: abc.Sequence[TokenLogprobs | None], now: float
    ) -> StepOutput:
        sequence = row.sequence
        sequence.times.first_token = sequence.times.first_token or now
        sequence.times.last_token = now
        known = len(sequence)
        try:
            text, reason = extend(row, self._detokenizer(sequence), tokens, logprobs, force=self.config.forced_tokens)
            if reason is not None:
                text += self._detokenizer(sequence).finish()
        except MemoryError:
            raise
        except Exception as error:  # the work of one request: the others of the step are not at fault
            return self._fail(sequence.request_id, error)
        finally:
            self._counts.generation_tokens += len(sequence) - known
        self.scheduler.commit(row)
        new = tuple(sequence.token_ids[known:])
        if reason is None:
            return StepOutput(sequence.request_id, TokenChunk(text, new, None, sequence.index))
        return self._finish(sequence, reason, text, new)

    def _append_token(self, row: ScheduledRow, token: int, now: float) -> StepOutput:
        """As ``_append``, for a row of ``LaunchedStep.has_plain_tokens``."""
        sequence = row.sequence
        sequence.times.last_token = now
        self._counts.generation_tokens += 1
        detokenizer = self._requests[sequence.request_id].detokenizers[sequence.index]
        try:
            text, reason = add_token(sequence, detokenizer, token)
            if reason is not None:
                text += detokenizer.finish()
        except MemoryError:
            raise
        except Exception as error:  # the work of one request: the others of the step are not at fault
            return self._fail(sequence.request_id, error)
        self.scheduler.commit(row)
        if reason is None:
            return StepOutput(sequence.request_id, TokenChunk(text, (token,), None, sequence.index))
        return self._finish(sequence, reason, text, (token,))

    def _detokenizer(self, sequence: Sequence) -> Detokenizer:
        return self._requests[sequence.request_id].detokenizers[sequence.index]

    def _finish(self, sequence: Sequence, reason: FinishReason, text: str, new: tuple[int, ...]) -> StepOutput:
        """End one output, whose last text is ``text``; the last one of a request ends the request."""
        self.scheduler.finish(sequence)
        sequence.finish_reason = reason
        request = self._requests[sequence.request_id]
        finished = None
        if all(one.is_finished for one in request.sequences):
            del self._requests[sequence.request_id]
            finished = output_of(request)
        return StepOutput(sequence.request_id, TokenChunk(text, new, reason, sequence.index), finished)

    def _fail(self, request_id: str, error: Exception) -> StepOutput:
        if not isinstance(error, NanoVLLMError):
            logger.error("request %r failed in a step", request_id, exc_info=error)
            error = NanoVLLMError(f"internal error of the engine: {type(error).__name__}")
        for sequence in self._requests.pop(request_id).sequences:
            if not sequence.is_finished:
                self.scheduler.finish(sequence)
        return StepOutput(request_id, TokenChunk("", ()), failure=error)

    def generate(
        self,
        prompts: Prompt | abc.Sequence[Prompt],
        sampling_params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
        images: Images = None,
        use_tqdm: bool = True,
        *,
        chat_template_kwargs: abc.Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts and return their outputs in the same order; one prompt may stand without a list.

        ``sampling_params`` are one for all prompts, or one for each; without any, ``get_default_sampling_params``.
        ``chat_template_kwargs`` are for all prompts that are messages. ``images`` are one list for each prompt; a
        single prompt's may be a flat list, and a single image may stand without one. Raises what ``add_request``
        raises, and then none of the prompts runs on.
        """
        batch = read_prompts(prompts)
        images_of_prompts = self.input_processor.images_of(batch, images)
        params_of_each = params_of_prompts(sampling_params, len(batch), self._default_sampling)
        outputs: dict[str, RequestOutput | None] = {}
        try:
            for prompt, params, pictures in zip(batch, params_of_each, images_of_prompts, strict=True):
                outputs[self.add_request(prompt, params, pictures, chat_template_kwargs=chat_template_kwargs)] = None
            with tqdm(total=len(batch), disable=not use_tqdm, desc="Generating", unit="request") as bar:
                unfinished = len(outputs)
                while unfinished:
                    for output in self.step():
                        if output.request_id not in outputs:
                            continue
                        if output.failure is not None:
                            raise output.failure
                        if output.finished is not None:
                            outputs[output.request_id] = output.finished
                            unfinished -= 1
                            bar.update(1)
        except BaseException:
            for request_id in outputs:
                self.abort(request_id)
            self._ended = [output for output in self._ended if output.request_id not in outputs]
            raise
        return [output for output in outputs.values() if output is not None]

    def chat(
        self,
        messages: abc.Sequence[Mapping[str, Any]] | abc.Sequence[abc.Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        images: Images = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or many, through the checkpoint's chat template; as ``generate`` otherwise.

        The content of a message is a string or a list of parts. An image part holds its image (``{"type": "image",
        "image": …}``, ``{"type": "image_pil", "image_pil": …}``, or ``{"type": "image_url", "image_url": {"url": …}}``
        with a data: URL), or is the place of the next one of ``images``. Text in it can write no control token.
        """
        prompts = read_conversations(messages)
        return self.generate(prompts, sampling_params, images, use_tqdm, chat_template_kwargs=chat_template_kwargs)

    def stats(self) -> EngineStats:
        """A snapshot of queues, caches and counters."""
        return collect_stats(self.scheduler, self.processor, self._counts)

    def audit(self) -> None:
        """Check the engine's invariants between two steps; raises AssertionError."""
        self.scheduler.audit()
        queued = {sequence.request_id for sequence in (*self.scheduler.running, *self.scheduler.waiting)}
        assert queued == set(self._requests), "requests and queues differ"
        if self.processor is not None:
            self.processor.cache.audit()

    def close(self) -> None:
        """End all requests and free the KV memory. Closing twice does nothing."""
        self._is_closed = True
        for request_id in list(self._requests):
            self.abort(request_id)
        self._ended.clear()
        self._in_flight.clear()
        self._masks.close()
        self.input_processor.grammars.close()
        self.model_runner.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
