"""What is asked: the requests of a turn, the same for every engine, as a JSON file that any runner process reads.

Each turn has its own prompts and pictures of the same lengths, so that no cache answers what an earlier turn asked.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import IMAGE_TOKEN, draw_picture

TOPICS = """the history of paper,how bridges carry weight,why the sky is blue,the life of bees,how bread rises
the first printed books,what a census counts,how tides work,the rules of chess,why leaves fall,how glass is made
the invention of the telephone,what maps leave out,how canals lift boats,why cats purr,the spice trade
how vaccines work,the names of the months,what a library lends,how clocks keep time""".replace("\n", ",").split(",")
MANNERS = ("for a child", "in plain words", "for a newspaper", "as a letter to a friend", "with two examples")

QWEN_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}

RECEIPT_SCHEMA = {
    "type": "object",
    "properties": {
        **{
            name: {"type": "string", "maxLength": 24}
            for name in ("vendor_name", "invoice_number", "invoice_date", "customer_name", "payment_method")
        },
        "total_amount": {"type": "string", "maxLength": 12},
    },
    "required": [
        "vendor_name",
        "invoice_number",
        "invoice_date",
        "customer_name",
        "payment_method",
        "total_amount",
    ],
    "additionalProperties": False,
}
INSTRUCTION = """You read receipts and invoices and answer with one JSON object and nothing else. The object has
exactly six fields, all of them strings. vendor_name is the name of the shop or firm that asks for
the money, as it is printed at the top, without its address. invoice_number is the number of the
document, with its letters and dashes. invoice_date is the day on which it was written, in the form
YYYY-MM-DD; a date of delivery or of payment is not meant. customer_name is whoever has to pay; if
nobody is named, write UNKNOWN. payment_method is CASH, CARD, TRANSFER or UNKNOWN. total_amount is
the sum to be paid with all taxes, with two decimals and the currency's code after it. Never guess a
field: what is not printed is UNKNOWN. Never explain, never repeat the document, never add a field.
Here is the document:\n"""
_DOCUMENT_TOKENS = 128  # at most, where a token is a character


@dataclass(frozen=True)
class Request:
    """A prompt as text or token ids, the pictures of its placeholders, and the bound on its answer."""

    prompt: str | list[int]
    max_tokens: int
    images: tuple[str, ...] = ()  # paths of PNG files, one for each IMAGE_TOKEN of the prompt
    json_schema: dict[str, Any] | None = None


@dataclass(frozen=True)
class Workload:
    """Requests that all arrive at once; with ``ignore_eos`` every answer is exactly ``max_tokens`` long."""

    name: str
    requests: tuple[Request, ...]
    ignore_eos: bool = True
    sampling: dict[str, float] | None = None  # temperature, top_p and top_k of every request; None: greedy

    @property
    def kind(self) -> str:
        """What an engine must be able to do: decode, text, prompts, sampling, images or schema."""
        return self.name.split("-")[0]

    def write(self, path: Path) -> Path:
        """Store as JSON, for the runners."""
        path.write_text(json.dumps(asdict(self)))
        return path


Maker = Callable[[int, Any, Path], Workload]  # the turn's seed, the tokenizer, a directory for pictures


def make_text(seed: int, tokenizer: Any, _: Path, count: int = 32) -> Workload:
    """(a) Prompts of 32 to 128 tokens, answers of 16 to 96: the same lengths in every turn."""
    lengths = random.Random("lengths")
    draw = random.Random(seed)
    requests = []
    for _index in range(count):
        size, answer = lengths.randint(32, 128), lengths.randint(16, 96)
        requests.append(Request(draw_prompt(draw, tokenizer, size), answer))
    return Workload("text", tuple(requests))


def make_sampling(seed: int, tokenizer: Any, scratch: Path, count: int = 32) -> Workload:
    """The requests of ``text``, drawn as Qwen recommends."""
    return replace(make_text(seed, tokenizer, scratch, count), name="sampling", sampling=QWEN_SAMPLING)


def make_prompts(seed: int, tokenizer: Any, _: Path, count: int = 16, size: int = 600, answer: int = 8) -> Workload:
    """Long prompts and short answers, as of documents."""
    draw = random.Random(seed)
    return Workload("prompts", tuple(Request(draw_prompt(draw, tokenizer, size), answer) for _ in range(count)))


def make_decode(batch: int, prompt: int, answer: int) -> Maker:
    """``batch`` prompts of equal length; a twin with answers of one token tells what the prompts cost."""

    def make(seed: int, tokenizer: Any, _: Path) -> Workload:
        draw = random.Random(seed)
        return Workload(
            f"decode-{batch}",
            tuple(Request(draw_prompt(draw, tokenizer, prompt), answer) for _ in range(batch)),
        )

    return make


def make_images(repeating: bool, count: int = 24, answer: int = 16) -> Maker:
    """(b) All pictures distinct, or (c) 5 of 6 requests repeat a picture; distinct text stands before each."""

    def make(seed: int, _: Any, directory: Path) -> Workload:
        name = "images-repeating" if repeating else "images-distinct"
        draw = random.Random(seed)
        pictures = count // 6 if repeating else count
        paths = []
        for index in range(pictures):
            paths.append(directory / f"{name}-{seed}-{index}.png")
            draw_picture(seed * 1000 + index + (500 if repeating else 0)).save(paths[-1])
        requests = [
            Request(
                f"Case {draw.randrange(10**9)} {write_sentence(draw)}: {IMAGE_TOKEN}\nDescribe the picture.",
                answer,
                (str(paths[index % pictures]),),
            )
            for index in range(count)
        ]
        return Workload(name, tuple(requests))

    return make


def make_schema(seed: int, tokenizer: Any, _: Path, count: int = 16, answer: int = 160) -> Workload:
    """(d) Fields of a receipt under a JSON schema, after one long prompt that all requests share.

    A model of few positions gets as many of its lines as it has room for.
    """
    draw = random.Random(seed)
    # A turn's own first words keep the prefix caches from answering across turns.
    head = f"Batch {draw.randrange(10**9)}. "
    room = tokenizer.model_max_length - answer - _DOCUMENT_TOKENS
    for line in INSTRUCTION.splitlines(keepends=True):
        if len(tokenizer.encode(head + line)) <= room:
            head += line
    requests = []
    for _index in range(count):
        document = (
            f"{draw.choice(('NORTH WIND', 'OLIVE PRESS', 'IRON GYM', 'RIVER BOATS'))} LTD\n"
            f"INVOICE {draw.choice('ABCDEF')}-{draw.randrange(10_000):04}\nDATE {draw.randint(1, 28):02}.03.2025\n"
            f"BILL TO {draw.choice(('A. Moss', 'J. Reed', 'T. Lake', 'M. Ford'))}\n"
            f"TOTAL {draw.randrange(1, 500)}.{draw.randrange(100):02} EUR\nPAID BY CARD\n"
        )
        requests.append(Request(head + document, answer, json_schema=RECEIPT_SCHEMA))
    return Workload("schema", tuple(requests), ignore_eos=False)


def write_sentence(draw: random.Random) -> str:
    """A plain English request."""
    return f"Write about {draw.choice(TOPICS)} {draw.choice(MANNERS)}, and mention {draw.choice(TOPICS)}."


def draw_prompt(draw: random.Random, tokenizer: Any, length: int) -> list[int]:
    """``length`` token ids: English where the tokenizer knows it, random words where it is a list of made-up ones."""
    if len(set(tokenizer("A plain sentence.")["input_ids"])) < 2:  # all unknown
        return [draw.randrange(2, len(tokenizer)) for _ in range(length)]
    tokens: list[int] = []
    while len(tokens) < length:
        tokens += tokenizer(write_sentence(draw) + "\n", add_special_tokens=False)["input_ids"]
    return tokens[-length:]
