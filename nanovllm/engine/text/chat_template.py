"""The chat template of a checkpoint: its variables, and conversations rendered by it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nanovllm.engine.text.chat_messages import OwnTexts, StandIns, Turn, to_template
from nanovllm.errors import ConfigurationError, InvalidInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_RESERVED_VARIABLES = frozenset(
    {"add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length",
     "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens",
     "tokenize", "tokenizer_kwargs", "tools", "truncation"}
)  # fmt: skip
"""Parameters of ``apply_chat_template``, which are no variables of a template."""


class ChatTemplate:
    """The chat template of ``tokenizer``; ``variables`` count where a request gives none of its own.

    Raises:
        ConfigurationError: ``variables`` that the template does not take.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, variables: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._variables = dict(variables or {})
        try:
            self.check_variables(self._variables)
        except InvalidInput as error:
            raise ConfigurationError(str(error)) from None

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self._tokenizer.chat_template)

    def check_variables(self, given: Mapping[str, Any] | None) -> None:
        """InvalidInput for a name that the template does not read, or that is not the template's."""
        templates = self._tokenizer.chat_template or ""
        text = "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)
        for name in given or ():
            if name in _RESERVED_VARIABLES or not re.search(rf"\b{re.escape(str(name))}\b", text):
                raise InvalidInput(
                    f"chat_template_kwargs: the checkpoint's chat template has no variable {str(name)[:64]!r}"
                )

    def render(
        self,
        turns: Sequence[Turn],
        texts: StandIns | OwnTexts,
        *,
        as_parts: bool | None,
        variables: Mapping[str, Any] | None,
    ) -> str:
        """The rendered ``turns``, with ``texts`` in their places, and the opening of the assistant's turn.

        Raises:
            InvalidInput: the template refuses them, or fails; the message is its own.
        """
        conversation = [to_template(turn, texts, as_parts) for turn in turns]
        options = {**self._variables, **(variables or {})}
        try:
            return str(
                self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, **options)
            )
        # A template is a program: jinja2's own errors, and whatever an expression in it raises.
        except Exception as error:
            raise InvalidInput(str(error) or type(error).__name__) from error
