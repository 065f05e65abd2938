"""The input processor: from a caller's request to sequences. All mistakes of a request are found here."""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Iterable, Mapping
from dataclasses import replace
from operator import index
from typing import Any

from nanovllm.engine.sampling.grammar_compiler import GrammarCompiler
from nanovllm.engine.scheduling.sequence import ImageSpan, Sequence
from nanovllm.engine.text.prompt_encoder import PromptEncoder
from nanovllm.engine.text.prompt_forms import ReadPrompt, read_prompt, refusal
from nanovllm.errors import InvalidInput, PromptTooLong, counted
from nanovllm.sampling_params import SamplingParams
from nanovllm.vision.processor import (
    OneImage,
    PromptImages,
    VisionProcessor,
    as_list,
    image_list,
    is_image,
    shape_of,
    written,
)

Prompt = str | abc.Sequence[int] | abc.Sequence[Mapping[str, Any]] | Mapping[str, Any] | ReadPrompt
Images = PromptImages | Iterable[PromptImages]
"""Of many prompts: one entry for each. Of one prompt: its images, or a list with them."""

_MAX_PROMPTS_IN_MESSAGE = 4


class InputProcessor:
    """Encodes prompts, assigns images their positions, and validates both against the model."""

    def __init__(
        self,
        tokenizer: Any,
        processor: VisionProcessor | None,
        *,
        vocab_size: int,
        max_model_len: int,
        max_images: int,
        image_token_id: int,
        around_image: tuple[int, int] | None,
        eos_token_ids: frozenset[int],
        is_processor_template: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """``vocab_size`` is the model's; ``around_image`` are the tokens before and behind an image, if any.

        The last two are PromptEncoder's.
        """
        self.processor = processor
        self.prompts = PromptEncoder(
            tokenizer,
            max_model_len=max_model_len,
            image_token_id=image_token_id if processor else None,
            around_image=around_image,
            is_processor_template=is_processor_template,
            chat_template_kwargs=chat_template_kwargs,
        )
        self.max_model_len = max_model_len
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._image_token_id = image_token_id
        self._max_images = max_images
        self._eos_token_ids = eos_token_ids
        self.grammars = GrammarCompiler(tokenizer, vocab_size, sorted(eos_token_ids))

    def sequences(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: SamplingParams,
        images: PromptImages,
        *,
        priority: int,
        salt: bytes,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Sequence]:
        """The ``n`` sequences of a request, all of one prompt; raises what ``LLMEngine.add_request`` says."""
        arrived = time.perf_counter()
        read = read_prompt(prompt)
        token_ids = self._encode(read, chat_template_kwargs)
        pictures = read.images_with(image_list(images, token_ids.count(self._image_token_id)))
        token_ids, spans = self._expand(token_ids, pictures, salt)
        self._check_length(len(token_ids))
        stop_token_ids = self._stop_token_ids(sampling)
        bad_words = self._bad_words(sampling)
        self._check_tokens("logit_bias", sampling.logit_bias)
        constraint = sampling.constraint
        sequences = []
        room = self.max_model_len - len(token_ids)
        for number in range(sampling.n):
            sequence = Sequence(
                request_id=request_id,
                token_ids=list(token_ids),
                num_prompt_tokens=len(token_ids),
                sampling=sampling,
                max_tokens=min(sampling.max_tokens or room, room),
                index=number,
                images=tuple(replace(span) for span in spans),
                priority=priority,
                cache_salt=salt,
                stop_token_ids=stop_token_ids,
                bad_words=bad_words,
                matcher=self.grammars.matcher(constraint) if constraint is not None else None,
            )
            sequence.times.arrived = arrived
            sequences.append(sequence)
        return sequences

    def fits(self, prompt: Prompt, sampling: SamplingParams, images: PromptImages) -> bool:
        """Whether the prompt and its images are taken, with room for ``max_tokens``; for one token without it."""
        try:
            read = read_prompt(prompt)
            token_ids = self._encode(read)
            pictures = read.images_with(image_list(images, token_ids.count(self._image_token_id)))
            token_ids, _ = self._expand(token_ids, pictures, b"")
        except InvalidInput:
            return False
        return len(token_ids) + (sampling.max_tokens or 1) <= self.max_model_len

    def images_of(self, prompts: abc.Sequence[ReadPrompt], images: Images) -> list[list[OneImage]]:
        """The images beside each prompt.

        InvalidInput, where these are not one list for each prompt, nor a flat list or an image for a single prompt,
        writes the shape that the prompts' placeholders call for.
        """
        if images is None:
            return [[] for _ in prompts]
        listed = [images] if is_image(images) else as_list(images)
        if listed is not None and len(prompts) == 1 and all(map(is_image, listed)):
            return [listed]
        if listed is None or len(listed) != len(prompts) or any(map(is_image, listed)):
            raise self._wrong_shape(prompts, listed or images)
        try:
            return [image_list(entry) for entry in listed]
        except InvalidInput:
            raise self._wrong_shape(prompts, listed) from None

    def _wrong_shape(self, prompts: abc.Sequence[ReadPrompt], given: object) -> InvalidInput:
        wanted = []
        for prompt in prompts[:_MAX_PROMPTS_IN_MESSAGE]:
            within = sum(image is not None for image in prompt.own_images)
            wanted.append(written(self._encode(prompt).count(self._image_token_id) - within))
        wanted += ["…"] * (len(prompts) > _MAX_PROMPTS_IN_MESSAGE)
        return InvalidInput(
            f"each prompt has its own list of images: images=[{', '.join(wanted)}], not {shape_of(given)}"
        )

    def _encode(self, prompt: ReadPrompt, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
        content = prompt.content
        if isinstance(content, str):
            token_ids = self.prompts.trusted(content)
        elif content and isinstance(content[0], Mapping):
            messages: Any = content
            token_ids = self.prompts.messages(messages, chat_template_kwargs=chat_template_kwargs)
        else:
            self._check_length(len(content))
            try:
                token_ids = [index(part) for part in content]  # type: ignore[arg-type]
            except TypeError:
                raise refusal(content) from None
        # Not of lists alone: a tokenizer may have more tokens than the model.
        image_token_id = self._image_token_id if self.processor else None
        self._check_tokens("prompt", {token_id for token_id in token_ids if token_id != image_token_id})
        return token_ids

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens >= self.max_model_len:
            raise PromptTooLong(
                f"the prompt has {num_tokens} tokens; with one token of output at most {self.max_model_len} fit"
            )

    def _expand(
        self, token_ids: list[int], images: list[OneImage], salt: bytes
    ) -> tuple[list[int], tuple[ImageSpan, ...]]:
        """Give every image its positions: each image token becomes as many as the processor says, image by image."""
        if not token_ids:
            raise InvalidInput("the prompt is empty")
        if self.processor is None:
            if images:
                raise InvalidInput(
                    f"{counted(len(images), 'image')}, but this engine has no vision model; see enable_multimodal"
                )
            return token_ids, ()
        self.processor.check_placeholders(token_ids.count(self._image_token_id), len(images))
        if len(images) > self._max_images:
            raise InvalidInput(f"{counted(len(images), 'image')}, at most {self._max_images} are allowed")
        expanded: list[int] = []
        spans: list[ImageSpan] = []
        waiting = iter(images)
        for token_id in token_ids:
            if token_id != self._image_token_id:
                expanded.append(token_id)
                continue
            image = self.processor.prepare(next(waiting), salt)
            encoder, key = self.processor.encoder, self.processor.key(image, salt)
            layout = encoder.layout(image.size)
            tokens = [token_id] * encoder.num_tokens(image.size) if layout is None else layout.token_ids
            spans.append(ImageSpan(image, key, len(expanded), len(tokens), encoder.grid(image.size), layout))
            expanded += tokens
        return expanded, tuple(spans)

    def _stop_token_ids(self, sampling: SamplingParams) -> frozenset[int]:
        own = frozenset(sampling.stop_token_ids)
        self._check_tokens("stop_token_ids", own)
        return own if sampling.ignore_eos else own | self._eos_token_ids

    def _bad_words(self, sampling: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """The tokens of each bad word, as it stands at the beginning of a text and after a space."""
        forms = {form for word in sampling.bad_words for form in (word.lstrip(), f" {word.lstrip()}")}
        ids = {tuple(self._tokenizer.encode(form, add_special_tokens=False)) for form in forms}
        for form in ids:
            self._check_tokens("bad_words", form)
        return tuple(sorted(form for form in ids if form))

    def _check_tokens(self, name: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise InvalidInput(f"{name}: token {token_id} is outside the vocabulary of {self._vocab_size}")
