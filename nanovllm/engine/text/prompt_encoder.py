"""The prompt encoder: text to token ids, trusted or untrusted.

A *trusted* prompt (Python API) is tokenised as the checkpoint's processor tokenises that string: special tokens are
parsed, no template is applied. An *untrusted* one (a job) is data: it is placed into the checkpoint's chat template as
a user turn, and no added token of the tokenizer, marked special or not, can come out of it. ``<|image|>`` in a prompt
marks an image under both; inside a text part of ``messages`` it is text. The result holds ``image_token_id`` once an
image; the engine expands it to as many tokens as the image takes.

The chat template is rendered with stand-ins, and only then are these replaced by the texts: so a text cannot change
what the template does. A template that looks at the texts is rendered with them, where its control tokens stay those
that it has with stand-ins. The whole string is tokenised at once, because sentencepiece
tokenizers treat the beginning of a string otherwise than the text behind a special token. Its control tokens must be
those that it has with stand-ins, and each text alone must have none. Where that does not hold, the template's control
tokens are hidden behind an anchor, and the rest is tokenised without added tokens.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from nanovllm.engine.text.chat_messages import (
    OwnTexts,
    Part,
    Piece,
    StandIns,
    Turn,
    Untrusted,
    read_turn,
    split_images,
)
from nanovllm.engine.text.chat_template import ChatTemplate
from nanovllm.errors import InvalidInput, PlaceholderMismatch, PromptTooLong, UnsupportedModel
from nanovllm.image_placeholder import IMAGE_PLACEHOLDER

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

CHARS_PER_TOKEN = 128
"""The most characters that a prompt may have for each token of the context, unless the vocabulary has a longer token.

Where every character becomes part of a token, no longer text can fit. Tokenizers that drop white space, or that make
one token of any unknown word, could take one: it is refused too.
"""

_ALWAYS_ENCODED_CHARS = 1 << 16  # a shorter text is never refused unencoded; a longer one is counted in such slices
_USUAL_CHARS_PER_TOKEN = 8  # slices are counted of texts with more than these for each token of the context


class PromptEncoder:
    """Tokenises prompts and messages for one checkpoint. Holds no state between calls.

    ``image_token_id`` None means that the model takes no images. ``around_image`` are the tokens before and behind it,
    which some families want and their chat templates write.

    Raises, from every method:
        InvalidInput: text that is no valid Unicode; roles, fields, parts or text that the template cannot take.
        PlaceholderMismatch: an image placeholder or part for a model that takes no images.
        PromptTooLong: more characters, images, parts or messages than can fit ``max_model_len`` tokens; a result may
            still be longer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_model_len: int,
        image_token_id: int | None = None,
        around_image: tuple[int, int] | None = None,
        is_processor_template: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """``is_processor_template``: the chat template is that of a processor of transformers.

        Raises:
            UnsupportedModel: a tokenizer without a ``tokenizers`` backend.
            ConfigurationError: ``chat_template_kwargs`` that the chat template does not take.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UnsupportedModel("the checkpoint's tokenizer has no tokenizer.json form")
        self._tokenizer = tokenizer
        self.image_token_id = image_token_id
        before, behind = (around_image[:1], around_image[1:]) if around_image is not None else ((), ())
        self._image_ids = () if image_token_id is None else (*before, image_token_id, *behind)
        # As the call of a tokenizer of transformers does.
        backend.no_truncation()
        backend.no_padding()
        self._backend: Tokenizer = backend
        self._ids_of_own: dict[int, int] = {}  # tokens that only `_backend` has -> what they stand for
        self._image_text = self._add_image_tokens()
        self._is_processor_template = is_processor_template
        self._template = ChatTemplate(tokenizer, chat_template_kwargs)
        self._max_model_len = max_model_len
        longest = max(map(len, backend.get_vocab(with_added_tokens=True)), default=0)
        self._max_chars = max(max_model_len * max(longest, CHARS_PER_TOKEN), _ALWAYS_ENCODED_CHARS)

    @property
    def has_chat_template(self) -> bool:
        """Whether untrusted prompts become user turns."""
        return bool(self._template)

    def trusted(self, prompt: str) -> list[int]:
        """The tokens of a prompt whose author may write special tokens. No chat template is applied."""
        if IMAGE_PLACEHOLDER in self._image_text:  # the image token's own text, and its neighbours may be written too
            prompt = prompt.replace(self._image_text, IMAGE_PLACEHOLDER)
        pieces = split_images(prompt)
        self._check_length(pieces, self._backend)
        text = "".join(self._image_text_or_raise() if piece is None else piece for piece in pieces)
        ids = self._encode_whole(text)
        return ids if self._starts_with_bos(text) else self._with_special_tokens(ids)

    def untrusted(
        self, prompt: str, *, raw_prompt: bool = False, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The tokens of ``prompt`` as one user turn; ``raw_prompt``, or no chat template, leaves the turn out."""
        pieces = split_images(prompt)
        self._check_length(pieces, self._plain_backend)
        if raw_prompt:
            return self._without_template(pieces)
        return self._render([Turn("user", pieces, is_parts=False)], chat_template_kwargs)

    def messages(
        self, messages: Sequence[Mapping[str, Any]], *, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The tokens of a conversation in the OpenAI form, followed by the opening of the assistant's turn.

        Those of the processor's ``apply_chat_template``, or the tokenizer's, where no text has a control token.
        ``chat_template_kwargs`` are further variables of the template; their values are trusted.

        A content is a string, or a list of parts ``{"type": "text", "text": …}`` and ``{"type": "image"}`` or
        ``{"type": "image_url"}``; an image part is the place of the next image. Without a chat template only a single
        user message can be taken.
        """
        if len(messages) > self._max_model_len:
            raise PromptTooLong(f"{len(messages)} messages for a context of {self._max_model_len} tokens")
        turns = [read_turn(number, message) for number, message in enumerate(messages)]
        if not turns:
            raise InvalidInput("messages is empty")
        self._check_length([piece for turn in turns for piece in turn.pieces], self._plain_backend)
        return self._render(turns, chat_template_kwargs)

    def beginning(self, text: str, max_tokens: int) -> str:
        """The beginning of ``text`` that has at most so many tokens, as plain text; whole characters."""
        text = text[: CHARS_PER_TOKEN * max_tokens]
        _check_unicode(text)
        offsets = self._plain_backend.encode_batch([text], add_special_tokens=False)[0].offsets
        return text if len(offsets) <= max_tokens else text[: offsets[max_tokens][0]]

    def _check_length(self, pieces: Sequence[Piece], backend: Tokenizer) -> None:
        """Refuse what is too long for certain, before anything is encoded; PromptTooLong.

        Of a text that is longer than texts of so many tokens usually are, slices are encoded one by one, until they
        have twice the tokens of the context: a cut may split a token, so that slices have a few more than the whole.
        """
        room = self._max_model_len
        texts = [piece for piece in pieces if piece is not None]
        for count, name in ((len(pieces) - len(texts), "images"), (len(texts), "parts of text")):
            if count > room:
                raise PromptTooLong(f"the prompt has {count} {name}; a context of {room} tokens is all there is")
        chars = sum(map(len, texts))
        if chars > self._max_chars:
            raise PromptTooLong(
                f"the prompt has {chars} characters; at most {self._max_chars} can fit a context of {room} tokens"
            )
        if chars <= max(_ALWAYS_ENCODED_CHARS, _USUAL_CHARS_PER_TOKEN * room):
            return
        text, known = "".join(texts), 0
        for start in range(0, chars, _ALWAYS_ENCODED_CHARS):
            known += len(_encode(text[start : start + _ALWAYS_ENCODED_CHARS], backend))
            if known > 2 * room:
                raise PromptTooLong(
                    f"the prompt has {chars} characters, and the first {start + _ALWAYS_ENCODED_CHARS} have {known} "
                    f"tokens; a context of {room} tokens is all there is"
                )

    def _render(self, turns: Sequence[Turn], chat_template_kwargs: Mapping[str, Any] | None) -> list[int]:
        """Render ``turns`` in the first form of content that the template takes without losing anything."""
        self._template.check_variables(chat_template_kwargs)
        if not self._template:
            if len(turns) > 1 or turns[0].role != "user":
                raise InvalidInput("the checkpoint has no chat template: it takes a prompt, or a single user message")
            return self._without_template(turns[0].pieces)
        num_images = sum(turn.pieces.count(None) for turn in turns)
        if num_images:
            self._image_text_or_raise()
        refusal = "it leaves out or rewrites the text of a message"
        for as_parts in (None, False, True):
            stand_ins = StandIns()
            render = partial(self._template.render, turns, as_parts=as_parts, variables=chat_template_kwargs)
            try:
                rendered = render(stand_ins)
            except InvalidInput as error:
                refusal = str(error)
                continue
            parts = stand_ins.restore(rendered)
            if parts is None:
                continue
            ids = self._as_read(parts, render) or self._encode_parts(parts)
            if self.image_token_id is not None and num_images and ids.count(self.image_token_id) != num_images:
                continue
            # ProcessorMixin.apply_chat_template adds the tokenizer's special tokens, unless BOS is there.
            adds = self._is_processor_template and not self._starts_with_bos(rendered)
            return self._with_special_tokens(ids) if adds else ids
        raise InvalidInput(f"the checkpoint's chat template refuses the messages: {refusal}")

    def _as_read(self, parts: Sequence[Part], render: Callable[[OwnTexts], str]) -> list[int] | None:
        """The tokens of what a template makes of the texts themselves, where it looks at them; else None.

        Templates of thinking models drop the thoughts of earlier turns, others escape or measure a text. None where
        that would change the control tokens, or leave one that an untrusted text holds.
        """
        image = self._image_text
        try:
            rendered = render(OwnTexts(image))
            if rendered == "".join(image if part is None else part for part in parts):
                return None
            nonce, controls = self._anchors[1], self._control_texts
            if re.search(f"{nonce}(?:{controls.pattern}){nonce}", render(OwnTexts(image, controls, nonce))):
                return None
        except InvalidInput:
            return None
        texts = [self._control_texts.sub("", part) for part in parts if isinstance(part, Untrusted)]
        ids = self._encode_whole(rendered)
        is_safe = self._are_plain(texts) and self._controls(ids) == self._controls(
            self._encode_whole(self._skeleton(parts))
        )
        return ids if is_safe else None

    def _without_template(self, pieces: Sequence[Piece]) -> list[int]:
        if None in pieces:
            self._image_text_or_raise()
        return self._with_special_tokens(
            self._encode_parts([None if piece is None else Untrusted(piece) for piece in pieces])
        )

    def _encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """The tokens of a rendered prompt, without the special tokens that the tokenizer adds.

        As its processor tokenises the whole string, unless an untrusted text would make a control token.
        """
        texts = [part for part in parts if isinstance(part, Untrusted)]
        ids = self._encode_whole("".join(self._image_text if part is None else part for part in parts))
        skeleton = self._skeleton(parts)
        if self._are_plain(texts) and self._controls(ids) == self._controls(self._encode_whole(skeleton)):
            return ids
        return self._encode_apart(skeleton, texts)

    def _skeleton(self, parts: Sequence[Part]) -> str:
        """The rendered prompt with an anchor in the place of each untrusted text."""
        image, stand_in = self._image_text, self._anchors[0]
        return "".join(image if part is None else stand_in if isinstance(part, Untrusted) else part for part in parts)

    def _are_plain(self, texts: Sequence[str]) -> bool:
        return all(self._forbidden_ids.isdisjoint(self._encode_whole(text)) for text in texts)

    def _encode_apart(self, skeleton: str, texts: Sequence[str]) -> list[int]:
        """The tokens of ``skeleton``, whose stand-ins are ``texts``, with no control token but the skeleton's own.

        A model whose own vocabulary holds the text of an added token (unigram models do) can still produce it without
        the list of added tokens; the text is then cut inside the token and tokenised again.
        """
        stand_in, control, cut = self._anchors
        encoding = self._backend.encode(skeleton, add_special_tokens=False)
        found = [
            (token, span)
            for token, span in zip(encoding.ids, encoding.offsets, strict=True)
            if self._ids_of_own.get(token, token) in self._forbidden_ids
        ]
        for _, (start, end) in reversed(found):
            skeleton = skeleton[:start] + control + skeleton[end:]
        between = skeleton.split(stand_in)
        text = between[0] + "".join(part for pair in zip(texts, between[1:], strict=True) for part in pair)
        backend = self._plain_backend
        of_control, of_cut = backend.token_to_id(control), backend.token_to_id(cut)
        forbidden = self._forbidden_ids - {of_control, of_cut}
        ids = _encode(text, backend)
        while not forbidden.isdisjoint(ids):
            encoding = backend.encode(text, add_special_tokens=False)
            spans = zip(encoding.ids, encoding.offsets, strict=True)
            offenders = [span for token, span in spans if token in forbidden]
            if any(stop - start < 2 for start, stop in offenders):
                raise InvalidInput("the text holds a character that the tokenizer writes as a control token only")
            for start, _ in reversed(offenders):
                text = text[: start + 1] + cut + text[start + 1 :]
            ids = _encode(text, backend)
        controls = iter([self._ids_of_own.get(token, token) for token, _ in found])
        return [next(controls) if token == of_control else token for token in ids if token != of_cut]

    def _encode_whole(self, text: str) -> list[int]:
        """The tokens of ``text`` with its control tokens, without those that the tokenizer adds."""
        ids = _encode(text, self._backend)
        return [self._ids_of_own.get(token, token) for token in ids] if self._ids_of_own else ids

    def _controls(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self._forbidden_ids]

    def _with_special_tokens(self, ids: list[int]) -> list[int]:
        before, behind = self._special_tokens_around
        return [*before, *ids, *behind]

    def _starts_with_bos(self, text: str) -> bool:
        bos = self._tokenizer.bos_token
        return bool(bos) and text.startswith(bos)

    def _image_text_or_raise(self) -> str:
        """What an image's placeholder becomes; PlaceholderMismatch for a model that takes no images."""
        if self.image_token_id is None:
            raise PlaceholderMismatch(
                f"the prompt has a {IMAGE_PLACEHOLDER} placeholder, and this engine takes no images: MultiModalLLM "
                "wants enable_multimodal=True, and a text model a vision_model beside it"
            )
        return self._image_text

    def _add_image_tokens(self) -> str:
        """The string of an image: the texts of its tokens. One that has none gets it in a copy of the backend."""
        known = {index: token.content for index, token in self._backend.get_added_tokens_decoder().items()}
        unknown = [token for token in self._image_ids if token not in known]
        if unknown:
            from tokenizers import AddedToken

            self._backend = type(self._backend).from_str(self._backend.to_str())
            for token in unknown:
                known[token] = IMAGE_PLACEHOLDER if token == self.image_token_id else f"<|image|{token}|>"
                self._backend.add_special_tokens([AddedToken(known[token], normalized=False)])
                if (own := self._backend.token_to_id(known[token])) is not None:
                    self._ids_of_own[own] = token
        return "".join(known[token] for token in self._image_ids)

    @cached_property
    def _special_tokens_around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind any text: a beginning-of-sequence token, or nothing."""
        ids = self._backend.encode("a", add_special_tokens=True).ids
        text = self._backend.encode("a", add_special_tokens=False).ids
        for start in range(len(ids) - len(text) + 1):
            if ids[start : start + len(text)] == text:
                return ids[:start], ids[start + len(text) :]
        return [], []

    @cached_property
    def _anchors(self) -> tuple[str, str, str]:
        """Strings that no text can hold: in the place of a text, of a control token, and of a cut."""
        nonce = secrets.token_hex(12)
        return f"x{nonce}tx", f"x{nonce}cx", f"x{nonce}sx"

    @cached_property
    def _forbidden_ids(self) -> frozenset[int]:
        """What plain text must not become: every added token but white space and the one for unknown characters."""
        added = self._backend.get_added_tokens_decoder().items()
        forbidden = {self._ids_of_own.get(index, index) for index, token in added if not token.content.isspace()}
        if self._tokenizer.unk_token_id != self._tokenizer.eos_token_id:
            forbidden.discard(self._tokenizer.unk_token_id)
        return frozenset(forbidden.union(self._image_ids))

    @cached_property
    def _control_texts(self) -> re.Pattern[str]:
        """What finds the text of any control token."""
        added = self._backend.get_added_tokens_decoder().items()
        texts = [token.content for index, token in added if self._ids_of_own.get(index, index) in self._forbidden_ids]
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")

    @cached_property
    def _plain_backend(self) -> Tokenizer:
        """The same tokenizer with the anchors as its only added tokens: its model and pre-tokeniser alone."""
        from tokenizers import AddedToken

        state = json.loads(self._backend.to_str())
        state.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        backend = type(self._backend).from_str(json.dumps(state))
        backend.add_special_tokens([AddedToken(anchor, normalized=False) for anchor in self._anchors[1:]])
        return backend


def _encode(text: str, backend: Tokenizer) -> list[int]:
    """The tokens of ``text``. Raises InvalidInput as `_check_unicode`."""
    _check_unicode(text)
    # `Tokenizer.encode` holds the GIL throughout, and computes offsets.
    return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids


def _check_unicode(text: str) -> None:
    """Raise InvalidInput where ``text`` holds half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidInput("the text holds half of a surrogate pair: it is no valid Unicode") from None
