"""A token of an output against the output's length: text, stop strings, tokens that are no text, repetition."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from benchmarks.growth.tree import Row, best, find, once, rows_of

TEXT = "The total of the receipt is 42.00 EUR and was paid by card on Monday. "


def measure(is_tiny: bool) -> list[Row]:
    """Of the shipped checkpoint's tokenizer."""
    resolve = find("checkpoints.resolve:resolve_checkpoint", "vision.checkpoints:resolve_checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny-receipts"))
    lengths = (32, 128) if is_tiny else (256, 4_096, 32_768)
    hidden = (16, 64) if is_tiny else (64, 512, 4_096)
    windows = (16, 64) if is_tiny else (64, 256, 1_024)
    return [
        *rows_of(lambda length: _text(tokenizer, length), "tokens of output", lengths),
        *rows_of(lambda length: _hidden(tokenizer, length), "skipped tokens in a row", hidden),
        *rows_of(_repetition, "tokens of the window", windows),
    ]


def _text(tokenizer: Any, length: int) -> dict[tuple[str, str], float]:
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    tokens = (ids * (length // len(ids) + 1))[:length]
    stops = tuple(f"stop{number}" * 20 for number in range(16))
    return {
        ("a token as text", "µs"): 1e6 * best(lambda: _detokenise(tokenizer, tokens), 3) / length,
        ("the same with 16 long stop strings", "µs"): 1e6
        * best(lambda: _detokenise(tokenizer, tokens, stops), 3)
        / length,
    }


def _hidden(tokenizer: Any, length: int) -> dict[tuple[str, str], float]:
    tokens = [tokenizer.eos_token_id] * length
    return {("a token that is never shown", "µs"): 1e6 * once(lambda: _detokenise(tokenizer, tokens)) / length}


def _repetition(window: int) -> dict[tuple[str, str], float]:
    is_loop = find("engine.text.repetition:is_loop", "engine.loops:is_loop")
    return {("repetition looked for", "µs"): 1e6 * best(lambda: is_loop(list(range(window))))}


def _detokenise(tokenizer: Any, tokens: list[int], stops: tuple[str, ...] = ()) -> None:
    try:
        Detokenizer, options = find("engine.text.detokenizer:Detokenizer"), None
    except LookupError:
        Detokenizer, options = find("engine.detokenizer:Detokenizer"), {"stop": stops}
    if options is None:
        from nanovllm import SamplingParams

        detokenizer = Detokenizer(tokenizer, SamplingParams(stop=stops or None))
    else:
        detokenizer = Detokenizer(tokenizer, **options)
    for token in tokens:
        detokenizer.append(token)
    detokenizer.finish()
