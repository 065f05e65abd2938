"""What the engine's tests share: transformers as the reference, and engines whose logits can be looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import RequestOutput
from nanovllm.engine.sampling.sampler import Sampler
from nanovllm.engine.sampling.structured_output import GuidedRows
from nanovllm.engine.scheduling.sequence import Sequence as EngineSequence
from nanovllm.sampling_params import SamplingParams

MARGIN = 1e-3
WORDS = [
    "the",
    "total",
    "receipt",
    "hello",
    "world",
    "{json}",
    "42",
    "über",
    "日本",
    "quick",
    "fox",
    "<think>",
    "shape:",
    "circle",
]


def greedy(max_tokens: int = 64, **options: Any) -> SamplingParams:
    """Greedy sampling of exactly ``max_tokens`` tokens."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **options)


def noise_image(seed: int, width: int = 260, height: int = 240) -> Image.Image:
    """A picture of coloured blocks, different for every seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Case:
    """A prompt with its images, and what transformers answers: tokens [n] and the logits [n, vocab] they came from."""

    prompt: str
    images: tuple[Image.Image, ...]
    token_ids: tuple[int, ...]
    logits: Tensor

    @property
    def margin(self) -> float:
        """The smallest distance between the two best logits."""
        best = self.logits.topk(2, -1).values
        return float((best[:, 0] - best[:, 1]).min())


class _QwenProcessor:
    """What Qwen-VL's own processors do to text and images; those cannot be made without a reader of films."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._pictures = Qwen2VLImageProcessorPil.from_pretrained(directory)

    def __call__(self, text: str, images: Sequence[Image.Image] = (), **_: Any) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {}
        parts = text.split("<|image|>")
        text = parts[0]
        if images:
            inputs = {name: torch.as_tensor(value) for name, value in self._pictures(list(images)).items()}
            squares = (inputs["image_grid_thw"].prod(-1) // self._pictures.merge_size**2).tolist()
            for part, count in zip(parts[1:], squares, strict=True):
                text += "<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" + part
        ids = torch.tensor([self._tokenizer(text).input_ids])
        is_image = ids == self._tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": is_image.int()}


class Reference:
    """A checkpoint in transformers, in float32 unless told otherwise."""

    def __init__(self, directory: Path, *, sees: bool, dtype: torch.dtype = torch.float32) -> None:
        """Load it."""
        loader: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        self.model = loader.from_pretrained(directory, dtype=dtype).eval()
        is_qwen_vl = self.model.config.model_type in ("qwen2_5_vl", "qwen3_vl")
        self.processor: Any = _QwenProcessor(directory) if is_qwen_vl else AutoProcessor.from_pretrained(directory)

    def answer(self, prompt: str, images: Sequence[Image.Image] = (), max_tokens: int = 64) -> Case:
        """Greedy decoding, one prompt at a time, never stopped by an end token."""
        pictures = {"images": list(images)} if images else {}
        inputs = self.processor(text=prompt, **pictures, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return Case(prompt, tuple(images), tuple(tokens), torch.cat(output.logits))


def random_prompt(seed: int, num_words: int) -> str:
    """Words in an order of their own."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, num_words))


def draw_cases(reference: Reference, num_images: Sequence[int], max_tokens: int = 64) -> list[Case]:
    """One case for each entry, of mixed lengths, drawn until the two best logits never come closer than the margin."""
    cases: list[Case] = []
    seed = 0
    while len(cases) < len(num_images):
        seed += 1
        wanted = num_images[len(cases)]
        prompt = random_prompt(seed, 1 + 5 * (len(cases) % 7)) + " <|image|> and" * wanted
        images = [noise_image(100 * seed + n, 70 + 43 * (seed % 4), 60 + 39 * n) for n in range(wanted)]
        case = reference.answer(prompt, images, max_tokens)
        if case.margin >= MARGIN:
            cases.append(case)
    assert all(case.margin >= MARGIN for case in cases)
    return cases


class RecordingSampler(Sampler):
    """A sampler that keeps every row of logits it was given, by request and place in the output.

    A place that followed a wrong draft is sampled again; the last row stays.
    """

    def __init__(self, device: torch.device) -> None:
        """Record nothing yet."""
        super().__init__(device, seed=0)
        self.logits: dict[str, dict[int, Tensor]] = {}

    def sample(self, logits: Tensor, sequences: Sequence[EngineSequence], guided: GuidedRows | None = None) -> Tensor:
        """Record, then sample."""
        for sequence, row in zip(sequences, logits.clone(), strict=True):
            self.logits.setdefault(sequence.request_id, {})[sequence.num_output_tokens] = row
        return super().sample(logits, sequences, guided)


def recording_engine(directory: Path, **options: Any) -> LLMEngine:
    """An engine with a RecordingSampler and a small KV cache."""
    engine = LLMEngine(str(directory), **{"kv_cache_bytes": 4 << 20, **options})
    engine.sampler = RecordingSampler(engine.model_runner.device)
    return engine


def drain(engine: LLMEngine, outputs: dict[str, RequestOutput] | None = None) -> dict[str, RequestOutput]:
    """Step to the end, auditing every step; the outputs by request."""
    outputs = {} if outputs is None else outputs
    while engine.has_unfinished():
        step(engine, outputs)
    return outputs


def step(engine: LLMEngine, outputs: dict[str, RequestOutput]) -> None:
    """One audited step; finished requests go to ``outputs``."""
    for output in engine.step():
        if output.finished is not None:
            outputs[output.request_id] = output.finished
    engine.audit()


def assert_same(case: Case, output: RequestOutput, logits: Iterable[Tensor]) -> None:
    """Equal tokens, and logits within 1e-4 of the largest one."""
    assert output.token_ids == case.token_ids
    ours = torch.stack(list(logits))
    assert ours.shape == case.logits.shape
    assert float((ours - case.logits).abs().max() / case.logits.abs().max()) <= 1e-4


def assert_all_same(engine: LLMEngine, cases: Mapping[str, Case], outputs: Mapping[str, RequestOutput]) -> None:
    """Every case has its output, recorded by the engine's RecordingSampler."""
    assert isinstance(engine.sampler, RecordingSampler)
    assert set(outputs) == set(cases)
    for name, case in cases.items():
        recorded = engine.sampler.logits[name]
        assert_same(case, outputs[name], [recorded[place] for place in range(len(outputs[name].token_ids))])
