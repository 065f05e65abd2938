"""A real instruct model: SmolLM2-135M-Instruct, out of its GGUF file by `nanovllm convert`, on real English."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from engine_parts import MARGIN, Case, Reference, drain, greedy, recording_engine

from benchmarks.smollm import smollm
from nanovllm import LLM, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TOKENS = 40
QUESTIONS = (
    "What is the capital of Portugal?",
    "Explain to a child why the sky is blue.",
    "Write two sentences about a lighthouse keeper who cannot swim.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron, and why?",
    "Give me three tips for learning to play the violin as an adult.",
    "My invoice says 'net 30'. What does that mean for the day on which I have to pay?",
    "Translate into French: Where is the nearest train station?",
    "Summarise the following in one sentence: The meeting was moved from Tuesday to Thursday because the room was "
    "flooded, the projector had not been repaired, and half of the team was still on the train from Hamburg.",
    "List the planets of the solar system from the innermost to the outermost.",
    "A receipt shows two coffees at 2.80 each and one croissant at 1.90. What is the total?",
    "Rewrite this more politely: Send me the documents today.",
    "What is the difference between a virus and a bacterium?",
    "Name a famous painting by Vincent van Gogh and say where it hangs.",
    "Is the sentence 'The ship sank quick' correct English? If not, correct it.",
    "Write a short poem about rain on a tin roof.",
    "How do I boil an egg so that the yolk stays soft?",
    "Who wrote 'Pride and Prejudice', and in which century was it published?",
    "Extract the date from this line: Delivered on 17 May 2024 to the rear entrance.",
    "What does HTTP status code 404 tell me?",
    "Continue the story: The old clock in the hall had not struck for eleven years, but that night",
    "Give an example of a sentence with a subordinate clause, and underline nothing.",
    "Why do we have leap years?",
    "Suggest a title for a report about falling coffee prices in Brazil.",
    "Write a Python function that returns the larger of two numbers.",
)


@pytest.fixture(scope="module")
def directory() -> Path:
    try:
        return smollm()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")


@pytest.fixture(scope="module")
def cases(directory: Path) -> list[Case]:
    """transformers' greedy answers, one prompt at a time, with the logits behind every token."""
    reference = Reference(directory, sees=False)
    return [reference.answer(as_chat(reference.processor, question), max_tokens=TOKENS) for question in QUESTIONS]


def as_chat(tokenizer: Any, question: str) -> str:
    turn = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def first_difference(case: Case, token_ids: tuple[int, ...]) -> int | None:
    pairs = zip(case.token_ids, token_ids, strict=True)
    return next((place for place, (theirs, ours) in enumerate(pairs) if theirs != ours), None)


SMALL_CHUNKS = {"max_num_batched_tokens": 16, "max_num_seqs": 8}
SMALL_CACHE = {"kv_cache_bytes": 20 * 16 * 2 * 3 * 64 * 30 * 4}  # 20 blocks: a prompt takes about 4, all take 100


@pytest.mark.parametrize("options", [{}, SMALL_CHUNKS, SMALL_CACHE], ids=["plain", "chunks of 16", "small KV cache"])
def test_greedy_answers_are_those_of_transformers(directory: Path, cases: list[Case], options: dict[str, int]) -> None:
    engine = recording_engine(directory, **{"kv_cache_bytes": 1 << 28, **options})
    for number, case in enumerate(cases):
        engine.add_request(case.prompt, greedy(TOKENS), request_id=str(number))
    outputs = drain(engine)

    assert (engine.stats().num_preemptions > 0) == (options is SMALL_CACHE)
    assert len(outputs) == len(QUESTIONS) >= 20
    for number, case in enumerate(cases):
        place = first_difference(case, outputs[str(number)].token_ids)
        if place is not None:
            best, second = case.logits[place].topk(2).values.tolist()
            assert best - second < MARGIN, f"{QUESTIONS[number]!r} differs at token {place}"


def test_it_answers_messages_in_its_own_chat_template(directory: Path) -> None:
    with LLM(str(directory), kv_cache_bytes=1 << 28) as llm:
        turn = [{"role": "user", "content": "What is the capital of France? Answer with one sentence."}]
        output = llm.generate([turn], SamplingParams(temperature=0.0, max_tokens=40), use_tqdm=False)[0]
    assert "Paris" in output.text
    assert output.finish_reason == "stop"
