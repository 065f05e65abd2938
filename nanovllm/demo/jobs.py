"""Jobs of the demo: generated receipts and shapes with their exact truth, several questions about one picture.

Each round draws one receipt and asks three questions about it; every second round also draws a pair of shapes, compares
them and asks what the first one is. The third question about a receipt names a copy of its picture: the same pixels
under another key and in another file format, which only a digest of the pixels recognises.
"""

from __future__ import annotations

import io
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from nanovllm.errors import ConfigurationError
from nanovllm.training.synthetic import DEMO_SEED, Split, ask, compare, describe, generator, receipt, shape_pair

BUCKET = "nanovllm-demo"
MIN_JOBS = 24
DEFAULT_JOBS = 48
BROKEN_JOB_ID = "demo-broken-image"
MALFORMED_MESSAGE = b'{"version": 1, "job_id": "demo-malformed", "prompt": "What is the total? <|image|>", "images": ['

_SPLIT: Split = "heldout"
_RECEIPT_QUESTIONS = ("json", "total", "text", "vendor", "date", "number")


@dataclass(frozen=True)
class DemoJob:
    """One job and its truth; ``keys`` name its images in the demo's bucket."""

    job_id: str
    kind: str
    prompt: str
    keys: tuple[str, ...]
    truth: str

    @property
    def uris(self) -> tuple[str, ...]:
        """The images as the job names them."""
        return tuple(f"s3://{BUCKET}/{key}" for key in self.keys)


@dataclass(frozen=True)
class DemoSet:
    """Everything that the demo sends.

    ``objects`` maps keys to encoded images; ``pictures`` maps keys to the number of the picture that they hold, equal
    for copies. ``broken`` is a job whose image is cut off in the middle: it belongs in the dead letters.
    """

    jobs: tuple[DemoJob, ...]
    broken: DemoJob
    objects: Mapping[str, bytes]
    pictures: Mapping[str, int]

    @property
    def distinct_images(self) -> int:
        """Number of different pictures that the answerable jobs name."""
        return len({self.pictures[key] for job in self.jobs for key in job.keys})


def demo_set(count: int = DEFAULT_JOBS) -> DemoSet:
    """The demo's ``count`` jobs, always the same ones, in an order that mixes rounds.

    Raises:
        ConfigurationError: ``count`` is too small for every kind of question to come three times.
    """
    if count < MIN_JOBS:
        raise ConfigurationError(f"the demo needs at least {MIN_JOBS} jobs to ask every kind of question, not {count}")
    jobs: list[DemoJob] = []
    objects: dict[str, bytes] = {}
    pictures: dict[str, int] = {}

    def upload(image: Image.Image, key: str, *, copy: str | None = None) -> None:
        pictures[key] = max(pictures.values(), default=0) + 1
        objects[key] = _encoded(image, format="PNG")
        if copy is not None:
            pictures[copy] = pictures[key]
            objects[copy] = _encoded(image, format="WEBP", lossless=True, exact=True)

    def add(kind: str, prompt: str, keys: tuple[str, ...], truth: str) -> None:
        jobs.append(DemoJob(f"demo-{len(jobs) + 1:03d}-{kind}", kind, prompt, keys, truth))

    for number in range(count):
        drawn = receipt(generator(number, seed=DEMO_SEED, split=_SPLIT), _SPLIT)
        key, copy = f"receipts/{number:03d}.png", f"copies/{number:03d}.webp"
        upload(drawn.image, key, copy=copy)
        for turn in range(3):
            asked = ask(drawn, _RECEIPT_QUESTIONS[(3 * number + turn) % len(_RECEIPT_QUESTIONS)])
            add(asked.kind, asked.prompt, (copy if turn == 2 else key,), asked.answer)
        if number % 2:
            first, second = shape_pair(generator(10_000 + number, seed=DEMO_SEED, split=_SPLIT), _SPLIT)
            keys = (f"shapes/{number:03d}-a.png", f"shapes/{number:03d}-b.png")
            upload(first.image, keys[0])
            upload(second.image, keys[1])
            described, compared = describe(first), compare(first, second)
            add(described.kind, described.prompt, keys[:1], described.answer)
            add(compared.kind, compared.prompt, keys, compared.answer)
        if len(jobs) >= count:
            break

    broken = DemoJob(BROKEN_JOB_ID, "broken", "What is the total? <|image|>", ("broken.png",), "")
    whole = objects["receipts/000.png"]
    objects["broken.png"] = whole[: len(whole) // 2]
    chosen = jobs[:count]
    random.Random(DEMO_SEED).shuffle(chosen)
    return DemoSet(tuple(chosen), broken, objects, pictures)


def _encoded(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()
