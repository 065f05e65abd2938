"""The prompt encoder: text to token ids, trusted or untrusted.

A *trusted* prompt (Python API) is tokenised as the tokenizer itself would: special tokens are parsed, no template is
applied. An *untrusted* one (a job) is data: it is placed into the checkpoint's chat template as a user turn, and no
added token of the tokenizer, marked special or not, can come out of it. ``<|image|>`` in a prompt marks an image
under both; inside a text part of ``messages`` it is text. The result holds ``image_token_id`` once an image; the
engine expands it to as many tokens as the image takes.

The chat template never sees an untrusted text. It is rendered with stand-ins, its own text is searched for special
tokens, and only then are the stand-ins replaced by the texts: so a text can neither produce a control token nor change
what the template does.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nanovllm.errors import InvalidInput, PlaceholderMismatch, PromptTooLong, UnsupportedModel
from nanovllm.image_placeholder import IMAGE_PLACEHOLDER

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

CHARS_PER_TOKEN = 128
"""The most characters that a prompt may have for each token of the context, unless the vocabulary has a longer token.

Where every character becomes part of a token, no longer text can fit. Tokenizers that drop white space, or that make
one token of any unknown word, could take one: it is refused too.
"""

_ALWAYS_ENCODED_CHARS = 1 << 16  # a shorter text is never refused unencoded; a longer one is counted in such slices
_USUAL_CHARS_PER_TOKEN = 8  # slices are counted of texts with more than these for each token of the context

Piece = str | None  # untrusted text, or None for an image


@dataclass(frozen=True)
class _Turn:
    """One message; ``is_parts`` tells whether its content came as a list of parts."""

    role: str
    pieces: tuple[Piece, ...]
    is_parts: bool


class _Parts(list[dict[str, str]]):
    """A content list that refuses to be printed: a template that knows no parts must fail, not show their repr."""

    def __str__(self) -> str:
        raise TypeError("this chat template takes strings only")

    __repr__ = __str__


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
    ) -> None:
        """Raises UnsupportedModel for a tokenizer without a ``tokenizers`` backend."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UnsupportedModel("the checkpoint's tokenizer has no tokenizer.json form")
        self._tokenizer = tokenizer
        self._backend: Tokenizer = backend
        self.image_token_id = image_token_id
        self._around_image = around_image
        self._max_model_len = max_model_len
        longest = max(map(len, backend.get_vocab(with_added_tokens=True)), default=0)
        self._max_chars = max(max_model_len * max(longest, CHARS_PER_TOKEN), _ALWAYS_ENCODED_CHARS)

    @property
    def has_chat_template(self) -> bool:
        """Whether untrusted prompts become user turns."""
        return bool(self._tokenizer.chat_template)

    def trusted(self, prompt: str) -> list[int]:
        """The tokens of a prompt whose author may write special tokens. No chat template is applied."""
        pieces = _split_images(prompt)
        self._check_length(pieces, self._backend)
        ids = list(self._leading_ids)
        for piece in pieces:
            ids += self._image_ids() if piece is None else _encode(piece, self._backend)
        return ids

    def untrusted(self, prompt: str, *, raw_prompt: bool = False) -> list[int]:
        """The tokens of ``prompt`` as one user turn; ``raw_prompt``, or no chat template, leaves the turn out."""
        pieces = _split_images(prompt)
        self._check_length(pieces, self._plain_backend)
        if raw_prompt or not self.has_chat_template:
            return self._leading_ids + self._encode_pieces(pieces)
        return self._render([_Turn("user", pieces, is_parts=False)])

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a conversation in the OpenAI form, followed by the opening of the assistant's turn.

        A content is a string, or a list of parts ``{"type": "text", "text": …}`` and ``{"type": "image"}`` or
        ``{"type": "image_url"}``; an image part is the place of the next image. Without a chat template only a single
        user message can be taken.
        """
        if len(messages) > self._max_model_len:
            raise PromptTooLong(f"{len(messages)} messages for a context of {self._max_model_len} tokens")
        turns = [_read_turn(number, message) for number, message in enumerate(messages)]
        if not turns:
            raise InvalidInput("messages is empty")
        self._check_length([piece for turn in turns for piece in turn.pieces], self._plain_backend)
        if self.has_chat_template:
            return self._render(turns)
        if len(turns) > 1 or turns[0].role != "user":
            raise InvalidInput("the checkpoint has no chat template: it takes a prompt, or a single user message")
        return self._leading_ids + self._encode_pieces(turns[0].pieces)

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

    def _render(self, turns: Sequence[_Turn]) -> list[int]:
        """Render ``turns`` in the first form of content that the template takes without losing anything."""
        import jinja2

        num_images = sum(turn.pieces.count(None) for turn in turns)
        if num_images:
            self._image_ids()
        refusal = "it leaves out or rewrites the text of a message"
        for as_parts in (None, False, True):
            stand_ins = _StandIns()
            conversation = [_to_template(turn, stand_ins, as_parts) for turn in turns]
            try:
                rendered = self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
            except (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
                refusal = str(error)
                continue
            pieces = stand_ins.restore(str(rendered), self._split_literal)
            if pieces is None:
                continue
            if not num_images or pieces.count(None) + pieces.count(self.image_token_id) == num_images:
                return self._encode_pieces(pieces)
        raise InvalidInput(f"the checkpoint's chat template refuses the messages: {refusal}")

    def _split_literal(self, literal: str) -> Iterator[str | int]:
        """What the template itself wrote: its added tokens as ids, the text between them as strings."""
        encoding = self._backend.encode(literal, add_special_tokens=False)
        end = 0
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._added_ids:
                yield literal[end:start]
                yield token
                end = stop
        yield literal[end:]

    def _encode_pieces(self, pieces: Sequence[str | int | None]) -> list[int]:
        """Encode texts plainly, neighbours together, with ids as they are and an image's for None."""
        ids: list[int] = []
        run: list[str] = []
        for piece in pieces:
            if isinstance(piece, str):
                run.append(piece)
                continue
            ids += self._encode_plain("".join(run))
            run.clear()
            ids += self._image_ids() if piece is None else [piece]
        return ids + self._encode_plain("".join(run))

    def _encode_plain(self, text: str) -> list[int]:
        """The tokens of ``text`` with no added token among them.

        A model whose own vocabulary holds the text of an added token (unigram models do) can still produce it without
        the list of added tokens; the text is then cut inside the token and encoded again.
        """
        ids: list[int] = []
        stack = [text]
        while stack:
            part = stack.pop()
            part_ids = _encode(part, self._plain_backend)
            if self._forbidden_ids.isdisjoint(part_ids):
                ids += part_ids
                continue
            encoding = self._plain_backend.encode(part, add_special_tokens=False)
            spans = zip(encoding.ids, encoding.offsets, strict=True)
            offenders = [span for token, span in spans if token in self._forbidden_ids]
            if any(stop - start < 2 for start, stop in offenders):
                raise InvalidInput("the text holds a character that the tokenizer writes as a control token only")
            cuts = [0, *(start + 1 for start, _ in offenders), len(part)]
            stack += [part[a:b] for a, b in zip(cuts[-2::-1], cuts[:0:-1], strict=True)]
        return ids

    def _image_ids(self) -> list[int]:
        """What an image's placeholder becomes; PlaceholderMismatch for a model that takes no images."""
        if self.image_token_id is None:
            raise PlaceholderMismatch(
                f"the prompt has a {IMAGE_PLACEHOLDER} placeholder, and this engine takes no images: MultiModalLLM "
                "wants enable_multimodal=True, and a text model a vision_model beside it"
            )
        if self._around_image is None:
            return [self.image_token_id]
        before, behind = self._around_image
        return [before, self.image_token_id, behind]

    @cached_property
    def _leading_ids(self) -> list[int]:
        """What the tokenizer puts before any text: a beginning-of-sequence token, or nothing."""
        return list(self._backend.encode("", add_special_tokens=True).ids)

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    @cached_property
    def _forbidden_ids(self) -> frozenset[int]:
        """What plain text must not become: every added token but the one for unknown characters."""
        forbidden = set(self._added_ids)
        if self._tokenizer.unk_token_id != self._tokenizer.eos_token_id:
            forbidden.discard(self._tokenizer.unk_token_id)
        if self.image_token_id is not None:
            forbidden.add(self.image_token_id)
        return frozenset(forbidden)

    @cached_property
    def _plain_backend(self) -> Tokenizer:
        """The same tokenizer without its added tokens: its model and pre-tokeniser alone."""
        state = json.loads(self._backend.to_str())
        state.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        return type(self._backend).from_str(json.dumps(state))


class _StandIns:
    """Stand-ins for untrusted pieces in one rendering of a template."""

    def __init__(self) -> None:
        # Letters and digits only: nothing that a template trims, escapes or looks for.
        self._nonce = f"x{secrets.token_hex(12)}x"
        self._pieces: list[tuple[Piece, ...]] = []

    def put(self, *pieces: Piece) -> str:
        """A stand-in for ``pieces``."""
        self._pieces.append(pieces)
        return f"{self._nonce}{len(self._pieces) - 1}x"

    def restore(self, rendered: str, split_literal: Any) -> list[str | int | None] | None:
        """The rendered text with the stand-ins replaced by the pieces; None when one is missing or was rewritten."""
        restored: list[str | int | None] = []
        seen: set[int] = set()
        for number, part in enumerate(re.split(rf"{self._nonce}(\d+)x", rendered)):
            if number % 2:
                seen.add(int(part))
                restored += self._pieces[int(part)]
            elif self._nonce in part.lower():
                return None
            else:
                restored += split_literal(part)
        return restored if seen == set(range(len(self._pieces))) else None


def _split_images(prompt: str) -> tuple[Piece, ...]:
    """The texts between placeholders, with None for each placeholder."""
    return tuple(piece for text in prompt.split(IMAGE_PLACEHOLDER) for piece in (None, text))[1:]


def _to_template(turn: _Turn, stand_ins: _StandIns, as_parts: bool | None) -> dict[str, Any]:
    """The message as the template gets it; ``as_parts`` None keeps the form in which it came."""
    if not (turn.is_parts if as_parts is None else as_parts):
        return {"role": turn.role, "content": stand_ins.put(*turn.pieces)}
    parts = _Parts()
    for piece in turn.pieces:
        if piece is None:
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": stand_ins.put(piece)})
    return {"role": turn.role, "content": parts}


def _read_turn(number: int, message: Mapping[str, Any]) -> _Turn:
    """Check message ``number`` and read it; InvalidInput names what is wrong, never its text."""
    if not isinstance(message, Mapping):
        raise InvalidInput(f"messages[{number}] is not an object")
    unknown = sorted(str(key) for key, value in message.items() if key not in ("role", "content") and value is not None)
    if unknown:
        raise InvalidInput(f"messages[{number}] has fields that are not supported: {', '.join(unknown)[:200]}")
    role = message.get("role")
    # The template writes the role as it is: only known ones may reach it.
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidInput(f"messages[{number}].role is none of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        return _Turn(ROLES[role], (content,), is_parts=False)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InvalidInput(f"messages[{number}].content is neither a string nor a list of parts")
    pieces = tuple(_read_part(f"messages[{number}].content[{index}]", part) for index, part in enumerate(content))
    return _Turn(ROLES[role], pieces, is_parts=True)


def _read_part(name: str, part: Any) -> Piece:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("image", "image_url"):
        return None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise InvalidInput(f"{name} is neither a text part nor an image part")


def _encode(text: str, backend: Tokenizer) -> list[int]:
    """The tokens of ``text``; InvalidInput when it holds half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidInput("the text holds half of a surrogate pair: it is no valid Unicode") from None
    # `Tokenizer.encode` holds the GIL throughout, and computes offsets.
    return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
