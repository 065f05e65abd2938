"""Requests that another engine refuses: its words as errors of this project. No torch."""

from __future__ import annotations

from nanovllm.errors import InvalidInput, PromptTooLong

MAX_MESSAGE_CHARS = 300
_TOO_LONG = (
    "context_length_exceeded",
    "maximum context length",
    "exceed_context_size",
    "exceeds the available context size",
    "context size has been exceeded",
    "longer than the maximum model",
    "longer than the model's context length",
    "contextwindowexceeded",
    "prompt is too long",
    "input tokens exceed the",
    "exceeds the maximum number of tokens",
    "`inputs` tokens + `max_new_tokens` must be",
    "`inputs` must have less than",
)
"""In lower case: vLLM, SGLang, llama.cpp, TGI, LiteLLM, OpenAI and Google."""


def is_too_long(said: str) -> bool:
    """Whether ``said`` are an engine's words for a prompt beyond its context."""
    return any(sign in said.lower() for sign in _TOO_LONG)


def refusal(said: str, who: str) -> InvalidInput:
    """The error of a request that ``who`` refuses in the words ``said``."""
    return (PromptTooLong if is_too_long(said) else InvalidInput)(f"{who} refuses the request: {said}")


def shown(text: str, secrets: tuple[str, ...] = ()) -> str:
    """Text of another program for a message of ours: without ``secrets``, in one line, escaped and cut."""
    for secret in secrets:
        text = text.replace(secret, "***")
    text = " ".join(text[: 16 * MAX_MESSAGE_CHARS].split())
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[: 2 * MAX_MESSAGE_CHARS])
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "…"
