"""Training loop of `align`: questions about images, one optimiser, progress measured in time or images."""

from __future__ import annotations

import copy
import math
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from nanovllm.errors import InvalidInput, counted
from nanovllm.image_placeholder import IMAGE_PLACEHOLDER

IGNORED = -100
WEIGHT_DECAY = 0.05
AVERAGING = 0.999
LOG_EVERY_S = 5.0
SAVE_EVERY_S = 300.0
SNAPSHOT_EVERY_S = 540.0
STATE_FILE = "training-state.pt"
STDERR = 2


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt with one id per image position, and of its answer with the end-of-sequence id.

    ``images`` are indices into the batch's images in the order of the prompt's placeholders.
    """

    prompt: list[int]
    answer: list[int]
    images: list[int]


@dataclass(frozen=True)
class Rows:
    """Questions padded to one length: ``ids`` and ``labels`` [n, t]; ``images`` [k] are image indices as they occur."""

    ids: Tensor
    labels: Tensor
    images: Tensor


@dataclass(frozen=True)
class Batch:
    """Images and the questions about them.

    ``pixels`` are [m, 3, h, w], normalised, or uint8 [m, h, w, 3] for images that need mapping to -1..1 only. ``rows``
    are empty where only the tower and the auxiliary head learn. ``glyphs`` [m, patches, slots] are token ids of what
    each patch shows (0 for nothing), for the auxiliary head; None without one.
    """

    pixels: Tensor
    rows: Sequence[Rows]
    glyphs: Tensor | None = None


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a run, by ``minutes`` spent in steps or by ``images``.

    ``tower_share`` is the share of the run in which only the tower and the auxiliary head train.

    Raises InvalidInput unless exactly one of ``minutes`` and ``images`` is given, and more than 0.
    """

    rate: float = 1e-3
    minutes: float | None = None
    images: int | None = None
    warmup_steps: int = 300
    tower_share: float = 0.0

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.images is None):
            raise InvalidInput("say how long to train: either minutes or images")
        if (self.minutes or self.images or 0) <= 0:
            raise InvalidInput("minutes or images must be more than 0")

    def done(self, progress: Progress) -> float:
        """Finished share of the run, 0 to 1 and beyond."""
        if self.images is not None:
            return progress.images / self.images
        assert self.minutes is not None
        return progress.seconds / (60 * self.minutes)

    def rate_at(self, progress: Progress) -> float:
        """Learning rate: linear warm-up by steps, then a cosine down to half a per cent of the peak."""
        warm = min(1.0, (progress.step + 1) / self.warmup_steps)
        return self.rate * warm * (0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.done(progress)))))


@dataclass
class Progress:
    """Progress of a run; ``seconds`` are spent in steps."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0


Source = Callable[[int, bool], Batch]
"""The batch of a step; the flag asks for a batch without rows, for the tower and the auxiliary head alone."""


class GlyphHead(nn.Module):
    """Auxiliary classifier of the characters in each patch, on the tower's output.

    Without it a tower trained from random weights hardly learns to read: guessing from the language alone lowers the
    loss for very long.
    """

    def __init__(self, width: int, slots: int, vocabulary: int) -> None:
        super().__init__()
        self.slots = slots
        self.linear = nn.Linear(width, slots * vocabulary)

    def forward(self, features: Tensor, glyphs: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy over features [n, patches, width], where empty slots weigh a quarter; share of hits."""
        logits = self.linear(features).unflatten(-1, (self.slots, -1)).float()
        inked = glyphs != 0
        weights = torch.where(inked, 1.0, 0.25)
        losses = F.cross_entropy(logits.flatten(0, -2), glyphs.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        return loss, (logits.argmax(-1) == glyphs)[inked].float().mean()


class Trainer:
    """Training of the parameters of ``model`` and ``head`` that require gradients, with their running average.

    ``scales`` maps a prefix of parameter names to a factor on the rate. State is kept in ``directory`` and resumed from
    there, with the same ``options`` only (InvalidInput). With `torch.distributed`, every process trains on its own
    batches and gradients are averaged; the first process keeps the clock, the log and the state.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        schedule: Schedule,
        directory: Path,
        *,
        head: GlyphHead | None = None,
        scales: dict[str, float] | None = None,
        bf16: bool = False,
        options: Mapping[str, str] | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        self.model, self.schedule, self.head, self.bf16, self.report = model, schedule, head, bf16, report
        self.options = dict(options or {})
        self.device = model.device
        self.progress = Progress()
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.trained.items()}
        heads = dict(head.named_parameters(prefix="head")) if head is not None else {}
        self.optimizer = torch.optim.AdamW(
            _groups({**self.trained, **heads}, scales or {}), betas=(0.9, 0.98), fused=True
        )
        self.parameters = [*self.trained.values(), *heads.values()]
        self.tower_trains = any("vision_tower" in name for name in self.trained)
        self.is_first = not dist.is_initialized() or dist.get_rank() == 0
        self.seconds = 0.0
        self.path = directory / STATE_FILE
        directory.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._resume()

    def run(self, source: Source, snapshot: Callable[[LlavaForConditionalGeneration], str | None]) -> Progress:
        """Trains to the end of the schedule.

        ``snapshot`` gets a copy of the model with the averaged weights every ``SNAPSHOT_EVERY_S`` and at the end; the
        text that it returns is logged.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM came; the step at work was finished, and the state is saved.
        """
        with _interruption() as interrupted:
            self._run(source, snapshot, interrupted)
        return self.progress

    def _run(
        self,
        source: Source,
        snapshot: Callable[[LlavaForConditionalGeneration], str | None],
        interrupted: threading.Event,
    ) -> None:
        figures: dict[str, list[float]] = defaultdict(list)
        saved = shown = time.monotonic()
        logged = -math.inf
        while (done := self.schedule.done(self.progress)) < 1:
            began = time.monotonic()
            tower_only = done < self.schedule.tower_share
            of_this_step = self._step(source(self.progress.step, tower_only))
            now = time.monotonic()
            self.seconds += now - began
            if not self.is_first:
                continue
            for name, figure in of_this_step.items():
                figures[name].append(figure)
            # The first step and the last one too: a short run shows as well whether the loss falls.
            if now - logged > LOG_EVERY_S or self.schedule.done(self.progress) >= 1:
                means = ", ".join(f"{name} {fmean(values):.4f}" for name, values in figures.items())
                share = min(100.0, 100 * self.schedule.done(self.progress))
                self.report(f"{share:5.1f}% {self.progress.images:,} images, {means}")
                figures.clear()
                logged = now
            if interrupted.is_set():
                self.save()
                trained = counted(self.progress.images, "image")
                raise KeyboardInterrupt(f"stopped after {trained}; the same command goes on from there ({self.path})")
            if now - saved > SAVE_EVERY_S:
                self.save()
                saved = time.monotonic()
            if now - shown > SNAPSHOT_EVERY_S and not tower_only:
                self._show(snapshot)
                shown = time.monotonic()
        if self.is_first:
            self.save()
            self._show(snapshot)

    def save(self) -> None:
        """Writes weights, averages, optimiser and progress atomically."""
        state = {
            "model": self.model.state_dict(),
            "averages": self.averages,
            "head": self.head.state_dict() if self.head is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "options": self.options,
        }
        unfinished = self.path.with_suffix(".new")
        torch.save(state, unfinished)
        unfinished.replace(self.path)

    def _resume(self) -> None:
        state = torch.load(self.path, weights_only=True, map_location=self.device)
        before = state["options"]
        if other := [name for name, value in self.options.items() if before.get(name) != value]:
            name = other[0]
            raise InvalidInput(
                f"{self.path.parent} was begun with {name} {before.get(name)}, not {self.options[name]}: go on with "
                "the options of before, name another output, or remove that directory"
            )
        self.model.load_state_dict(state["model"])
        self.averages = state["averages"]
        if self.head is not None:
            self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self.seconds = self.progress.seconds
        self.report(f"resumed after {counted(self.progress.images, 'image')}")

    def _step(self, batch: Batch) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate_at(self.progress) * group["scale"]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss, figures = self._loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        images, seconds = self._share_gradients(len(batch.pixels))
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.progress = Progress(self.progress.step + 1, self.progress.images + images, seconds)
        # A constant factor would keep the random initial values in the average for thousands of steps.
        keep = min(AVERAGING, (1 + self.progress.step) / (10 + self.progress.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averages.values()), list(self.trained.values()), 1 - keep)
        return figures

    def _share_gradients(self, images: int) -> tuple[int, float]:
        """Averages gradients over processes; returns the images of the step in all of them, and the first one's clock.

        Decisions depend on this one clock: processes that took different ones would deadlock in the next all-reduce.
        """
        if not dist.is_initialized():
            return images, self.seconds
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        own = torch.tensor([float(images), self.seconds if self.is_first else 0.0], device=self.device)
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), own])
        dist.all_reduce(flat)
        shares = flat[:-2].div_(dist.get_world_size()).split([gradient.numel() for gradient in gradients])
        for gradient, share in zip(gradients, shares, strict=True):
            gradient.copy_(share.view_as(gradient))
        return round(flat[-2].item()), flat[-1].item()

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        with torch.set_grad_enabled(self.tower_trains):
            hidden = tower_features(self.model, _normalised(batch.pixels.to(self.device)))
        loss = torch.zeros((), device=self.device)
        figures: dict[str, float] = {}
        if self.head is not None and batch.glyphs is not None:
            glyphs = batch.glyphs.to(self.device)
            named, share = self.head(hidden, glyphs)
            loss = loss + named
            figures |= {"glyph loss": named.item(), "glyphs right": share.item()}
        if batch.rows:
            features = self.model.model.multi_modal_projector(hidden).float()
            scored = [answer_logits(self.model, features, rows) for rows in batch.rows]
            count = sum(len(labels) for _, labels in scored)
            told = torch.stack([F.cross_entropy(logits, labels, reduction="sum") for logits, labels in scored]).sum()
            right = sum(int((logits.argmax(-1) == labels).sum()) for logits, labels in scored)
            loss = loss + told / count
            figures |= {"loss": told.item() / count, "tokens right": right / count}
        return loss, figures

    def _show(self, snapshot: Callable[[LlavaForConditionalGeneration], str | None]) -> None:
        averaged = copy.deepcopy(self.model).eval()
        averaged.load_state_dict(self.averages, strict=False)
        line = snapshot(averaged)
        if line:
            self.report(line)


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; what a second one does is as it was before.

    Not in a process group: processes that stopped at different steps would wait for one another without end.
    """
    interrupted = threading.Event()
    if dist.is_initialized() or threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def interrupt(*_: object) -> None:
        restore()
        interrupted.set()
        # No lock, unlike print, which the main thread may be in.
        os.write(STDERR, b"stopping after this step; a second signal ends it at once\n")

    for number in before:
        signal.signal(number, interrupt)
    try:
        yield interrupted
    finally:
        restore()


def tower_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Features [n, tokens, width] of normalised pixels [n, 3, h, w] for the projector, as the config selects them."""
    layers = model.config.vision_feature_layer
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    chosen = torch.cat([states[layer] for layer in ([layers] if isinstance(layers, int) else layers)], dim=-1)
    return chosen[:, 1:] if model.config.vision_feature_select_strategy == "default" else chosen


def answer_logits(model: LlavaForConditionalGeneration, features: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Logits [answers, vocabulary] and labels [answers] of the answers' tokens, for features [m, tokens, width].

    Rows are padded on the right, so that causal attention alone masks the padding.
    """
    ids, labels = rows.ids.to(features.device), rows.labels.to(features.device)
    embeddings = model.get_input_embeddings()(ids)
    places = (ids == model.config.image_token_id).unsqueeze(-1)
    embeddings = embeddings.masked_scatter(places, features[rows.images.to(features.device)].to(embeddings.dtype))
    hidden = model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    wanted = labels != IGNORED
    return model.lm_head(hidden[wanted]).float(), labels[wanted]


def encode_question(
    tokenizer: Any, prompt: str, answer: str, images: list[int], image_tokens: int, *, add_special_tokens: bool = True
) -> Question:
    """Tokenizes a question about the batch's ``images``, which take ``image_tokens`` positions each."""
    expanded = prompt.replace(IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER * image_tokens)
    answer_ids = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    return Question(tokenizer.encode(expanded, add_special_tokens=add_special_tokens), answer_ids, images)


def pad(questions: Sequence[Question], pad_id: int) -> Rows:
    """Rows of one length, a multiple of 8; labels stand where the next token is an answer's."""
    length = max(len(question.prompt) + len(question.answer) for question in questions)
    length = math.ceil(length / 8) * 8
    ids = torch.full((len(questions), length), pad_id)
    labels = torch.full((len(questions), length), IGNORED)
    for row, question in enumerate(questions):
        end = len(question.prompt) + len(question.answer)
        ids[row, :end] = torch.tensor(question.prompt + question.answer)
        labels[row, len(question.prompt) - 1 : end - 1] = torch.tensor(question.answer)
    return Rows(ids, labels, torch.tensor(list(chain.from_iterable(question.images for question in questions))))


def pad_by_length(questions: Sequence[Question], pad_id: int) -> list[Rows]:
    """Splits questions into three groups of similar length, which saves computing on padding."""
    ordered = sorted(questions, key=lambda question: len(question.prompt) + len(question.answer))
    size = math.ceil(len(ordered) / 3)
    return [pad(ordered[start : start + size], pad_id) for start in range(0, len(ordered), size or 1)]


def export(model: LlavaForConditionalGeneration, processor: Any, output: Path, dtype: torch.dtype) -> None:
    """Writes a LLaVA directory (safetensors); leaves ``model`` in ``dtype``."""
    output.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(output)
    processor.save_pretrained(output)
    for path in output.iterdir():
        path.chmod(0o644)


def _groups(parameters: dict[str, nn.Parameter], scales: dict[str, float]) -> list[dict[str, Any]]:
    """Optimiser groups: matrices decay, vectors and embedding tables do not."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters.items():
        scale = next((factor for prefix, factor in scales.items() if name.startswith(prefix)), 1.0)
        is_table = parameter.ndim < 2 or "embed_tokens" in name or "position_embedding" in name
        groups[0.0 if is_table else WEIGHT_DECAY, scale].append(parameter)
    return [{"params": members, "weight_decay": decay, "scale": scale} for (decay, scale), members in groups.items()]


def _normalised(pixels: Tensor) -> Tensor:
    if pixels.dtype != torch.uint8:
        return pixels
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
