"""The tokens of a request's prompt. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.engine.backends.base import Request

if TYPE_CHECKING:
    from nanovllm.engine.text.prompt_encoder import PromptEncoder


def prompt_tokens(prompts: PromptEncoder, request: Request) -> list[int]:
    """The tokens of ``request``, whose text is untrusted, with one token for each image. Raises as `PromptEncoder`."""
    if request.prompt is not None:
        return prompts.untrusted(
            request.prompt, raw_prompt=request.raw_prompt, chat_template_kwargs=request.chat_template_kwargs
        )
    return prompts.messages(request.messages or (), chat_template_kwargs=request.chat_template_kwargs)
