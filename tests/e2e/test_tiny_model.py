"""The shipped checkpoint: the same texts by the engine as by transformers, and what its model card promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from nanovllm import LLM, SamplingParams
from nanovllm.checkpoints.resolve import resolve_checkpoint
from nanovllm.training import synthetic
from nanovllm.training.evaluate import answers, groups, wilson_lower

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "tiny-model.json"
BOUNDS = {"single fields": 0.97, "receipts: json": 0.88, "shapes": 0.98}
SEED = 20261125


@pytest.fixture(scope="module")
def directory() -> Path:
    directory = resolve_checkpoint("tiny-receipts")
    assert (directory / "model.safetensors").exists(), "the shipped checkpoint is missing"
    return directory


def drawn(count: int) -> list[synthetic.Sample]:
    return [synthetic.sample(index, seed=SEED, split="heldout") for index in range(count)]


def texts_of_the_engine(samples: list[synthetic.Sample]) -> list[str]:
    with LLM("tiny-receipts", max_num_seqs=64) as engine:
        outputs = engine.generate(
            [one.prompt for one in samples],
            SamplingParams(temperature=0.0, max_tokens=160),
            images=[one.images for one in samples],
            use_tqdm=False,
        )
        engine.audit()
    return [output.text for output in outputs]


def texts_of_transformers(directory: Path, samples: list[synthetic.Sample]) -> list[str]:
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    return answers(model, AutoProcessor.from_pretrained(directory), samples)


def test_the_engine_and_transformers_read_the_same_texts(directory: Path) -> None:
    samples = drawn(64)
    assert len({one.kind for one in samples}) == len(synthetic.PROMPTS)
    assert texts_of_the_engine(samples) == texts_of_transformers(directory, samples)


def test_the_checkpoint_is_small_half_precision_and_safe(directory: Path) -> None:
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 8_000_000
    assert json.loads((directory / "config.json").read_text())["dtype"] == "float16"
    assert not [path for path in directory.iterdir() if path.suffix in {".bin", ".pt", ".pkl", ".py"}]


@pytest.mark.proof
def test_two_thousand_heldout_samples_are_read_within_the_promised_bounds(directory: Path) -> None:
    samples = drawn(2000)
    texts = texts_of_the_engine(samples)
    assert texts == texts_of_transformers(directory, samples)
    marks: dict[str, list[bool]] = {}
    for one, text in zip(samples, texts, strict=True):
        for group in groups(one):
            marks.setdefault(group, []).append(text == one.answer)
    lower = {group: wilson_lower(sum(marks[group]), len(marks[group])) for group in BOUNDS}
    assert all(lower[group] >= BOUNDS[group] for group in BOUNDS), lower
    published = json.loads(RESULTS.read_text())["groups"]
    assert {group: published[group]["exact"] for group in BOUNDS} == {group: sum(marks[group]) for group in BOUNDS}
