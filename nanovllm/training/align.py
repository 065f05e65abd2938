"""Training of LLaVA checkpoints: a projector between a CLIP or SigLIP tower and a text model, or the tiny model.

    python -m nanovllm.training.align --text-model DIR --vision-model DIR --data pairs.jsonl --images 50000 --output DIR
    python -m nanovllm.training.align --recipe tiny --seed 1 --minutes 100 --processes 2 --output DIR
    python -m nanovllm.training.align --evaluate DIR --samples 2000 --json result.json

The output loads in `transformers` (AutoProcessor, LlavaForConditionalGeneration) and in the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionModel,
)

from nanovllm.checkpoints.resolve import resolve_checkpoint
from nanovllm.errors import ConfigurationError, InvalidInput, NanoVLLMError, counted
from nanovllm.image_placeholder import IMAGE_PLACEHOLDER
from nanovllm.terminal import plain
from nanovllm.training import evaluate as evaluate_tiny
from nanovllm.training import synthetic, tiny_model
from nanovllm.training.trainer import STATE_FILE, Batch, Schedule, Source, Trainer, encode_question, export, pad
from nanovllm.vision.images.decode import load_rgb

SYNTHETIC = "synthetic"
TEXT_MODELS = ("qwen3", "qwen2", "llama")
TOWERS = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
PRETRAINED_RATE = 0.1
"""Factor on the learning rate of the pretrained tower and text model; the projector's is 1."""
_say = partial(print, flush=True)


@dataclass(frozen=True)
class Example:
    """A prompt with one ``<|image|>`` per image, the paths of its images, and the answer to be learnt."""

    prompt: str
    images: tuple[Path, ...]
    answer: str


def align(
    text_model: str | Path,
    vision_model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    freeze_vision_weights: bool = True,
    train_text: bool = False,
    minutes: float | None = None,
    images: int | None = None,
    batch_size: int = 16,
    rate: float = 1e-3,
    seed: int = 0,
    raw_prompt: bool = False,
    device: str | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Trains a projector from a vision tower's output to a text model's embeddings; returns the directory written.

    Args:
        text_model, vision_model: directories or cached names, of one of ``TEXT_MODELS`` and one of ``TOWERS``.
        data: JSON lines of ``{"prompt", "images": [paths], "answer"}``, paths relative to the file, or ``"synthetic"``.
        output: the LLaVA directory to write; one with files is not overwritten. An interrupted run resumes from its
            state beside it.
        freeze_vision_weights: whether the tower stays bit for bit the same; otherwise it trains too.
        minutes, images: length of the training; exactly one is given.
        rate: peak learning rate of the projector; pretrained parts that train take a tenth of it.
        seed: of the projector's initial values and the order of the data.
        raw_prompt: leave out the text model's chat template.
        device: unset, CUDA where there is one.

    Raises:
        InvalidInput: contradictory options, models that cannot be combined, data that is not as described, or an
            output that is there.
        ModelNotFound: a name that leads nowhere.
        KeyboardInterrupt: SIGINT or SIGTERM came, and the state is saved.
    """
    output = Path(output)
    state = _state_directory(output)
    schedule = Schedule(minutes=minutes, images=images, rate=rate, warmup_steps=30)
    if batch_size < 1:
        raise InvalidInput(f"the batch size must be at least 1, not {batch_size}")
    examples = _examples(data, seed)
    torch.manual_seed(seed)
    report(f"loading {text_model} and {vision_model}")
    model, processor, dtype = compose(resolve_checkpoint(text_model), resolve_checkpoint(vision_model))
    model.model.vision_tower.requires_grad_(not freeze_vision_weights)
    model.model.language_model.requires_grad_(train_text)
    model.lm_head.requires_grad_(train_text)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device, or one without room
        raise InvalidInput(f"device {device} does not take the model: {str(error).partition(chr(10))[0]}") from error
    scales = dict.fromkeys(("model.vision_tower", "model.language_model", "lm_head"), PRETRAINED_RATE)
    options = {
        "text model": text_model,
        "vision model": vision_model,
        "data": data,
        "training of the tower": not freeze_vision_weights,
        "training of the text model": train_text,
        "batch size": batch_size,
        "rate": rate,
        "seed": seed,
        "raw prompt": raw_prompt,
    }
    trainer = Trainer(model, schedule, state, scales=scales, options=_as_text(options), report=report)
    batches = _batches(examples, processor, batch_size, raw_prompt)
    progress = trainer.run(batches, lambda averaged: export(averaged, processor, output, dtype))
    report(f"aligned on {counted(progress.images, 'image')} in {progress.seconds / 60:.1f} minutes: {output}")
    shutil.rmtree(state)
    return output


def _state_directory(output: Path) -> Path:
    """Directory of the state beside ``output``. Raises InvalidInput for an output with files, but without a state."""
    state = output.with_name(output.name + ".training")
    if output.exists() and not (state / STATE_FILE).exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InvalidInput(f"{output} is there already: name another output, or remove it")
    return state


def _as_text(options: Mapping[str, object]) -> dict[str, str]:
    words = {True: "on", False: "off"}
    return {name: words[value] if isinstance(value, bool) else str(value) for name, value in options.items()}


def compose(text_model: Path, vision_model: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, torch.dtype]:
    """Joins a text model and a tower by a randomly initialised projector.

    Returns the model in fp32, its processor, and the dtype to store it in: the wider of the two checkpoints', in which
    frozen weights are stored exactly.

    Raises InvalidInput for models of other kinds than ``TEXT_MODELS`` and ``TOWERS``.
    """
    text_config, tower_config = (AutoConfig.from_pretrained(path) for path in (text_model, vision_model))
    if text_config.model_type not in TEXT_MODELS:
        raise InvalidInput(f"a text model must be one of {', '.join(TEXT_MODELS)}, not {text_config.model_type!r}")
    family = tower_config.model_type.removesuffix("_vision_model")
    if family not in TOWERS:
        raise InvalidInput(f"a vision model must be one of {', '.join(TOWERS)}, not {tower_config.model_type!r}")
    # Before the models: loading in fp32 overwrites config.dtype.
    dtype = torch.promote_types(*(config.dtype or torch.float32 for config in (text_config, tower_config)))
    tower = TOWERS[family].from_pretrained(vision_model, dtype=torch.float32)
    text = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    if IMAGE_PLACEHOLDER not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_PLACEHOLDER]})
    if len(tokenizer) > text.config.vocab_size:
        text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # CLIP puts a class token before its patches, which the projector leaves out; SigLIP has none.
    has_class_token = family == "clip"
    selection = "default" if has_class_token else "full"
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER),
        vision_feature_layer=-2,
        vision_feature_select_strategy=selection,
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.generation_config = text.generation_config
    processor = LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(vision_model, backend="pil"),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=selection,
        image_token=IMAGE_PLACEHOLDER,
        num_additional_image_tokens=int(has_class_token),
        chat_template=tokenizer.chat_template,
    )
    return model, processor, dtype


def read_examples(path: Path) -> list[Example]:
    """Reads JSON lines of ``{"prompt", "images", "answer"}``; image paths are relative to the file.

    Raises InvalidInput with the number of the line for another object, a missing image, or a prompt with more or fewer
    placeholders than images.
    """
    if not path.is_file():
        raise InvalidInput(f"there is no data file {path}")
    with path.open(encoding="utf-8") as lines:
        examples = [_example(line, number, path) for number, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise InvalidInput(f"{path.name} holds no examples")
    return examples


def _example(line: str, number: int, path: Path) -> Example:
    where = f"line {number} of {path.name}"
    try:
        fields = json.loads(line)
        prompt, answer, names = fields["prompt"], fields["answer"], fields["images"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f'{where} is not {{"prompt": ..., "images": [...], "answer": ...}}') from error
    is_text = isinstance(prompt, str) and isinstance(answer, str)
    if not is_text or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidInput(f"{where}: prompt and answer must be strings, images a list of paths")
    if prompt.count(IMAGE_PLACEHOLDER) != len(names):
        raise InvalidInput(
            f"{where} has {prompt.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} for {counted(len(names), 'image')}"
        )
    images = tuple(path.parent / name for name in names)
    missing = [image.name for image in images if not image.is_file()]
    if missing:
        raise InvalidInput(f"{where}: there is no image {missing[0]}")
    return Example(prompt, images, answer)


def _examples(data: str | Path, seed: int) -> Callable[[int], Example | synthetic.Sample]:
    """Example number i of an endless series; each pass through a file has its own order."""
    if str(data) == SYNTHETIC:
        return partial(synthetic.sample, seed=seed, split="train")
    examples = read_examples(Path(data))

    @lru_cache(2)  # a batch may begin in one pass and end in the next
    def order_of(epoch: int) -> list[int]:
        order = list(range(len(examples)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        return order

    def shuffled(index: int) -> Example:
        epoch, number = divmod(index, len(examples))
        return examples[order_of(epoch)[number]]

    return shuffled


def _batches(
    examples: Callable[[int], Example | synthetic.Sample], processor: LlavaProcessor, size: int, raw_prompt: bool
) -> Source:
    """Batches of ``size`` examples: pixels [m, 3, h, w] of all images, and one group of rows."""
    tokenizer, patch = processor.tokenizer, processor.patch_size
    has_template = bool(tokenizer.chat_template) and not raw_prompt

    def batch(step: int, tower_only: bool) -> Batch:
        chosen = [examples(index) for index in range(step * size, (step + 1) * size)]
        images = [_picture(image) for example in chosen for image in example.images]
        if not images:
            raise InvalidInput("a batch has no image: leave lines without images out, or raise the batch size")
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        image_tokens = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
        indices = iter(range(len(images)))
        questions = []
        for example in chosen:
            own, prompt = list(islice(indices, len(example.images))), example.prompt
            if has_template:
                turn = [{"role": "user", "content": prompt}]
                prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            # A chat template writes its own beginning of the sequence.
            special = not has_template
            questions.append(
                encode_question(tokenizer, prompt, example.answer, own, image_tokens, add_special_tokens=special)
            )
        return Batch(pixels, [pad(questions, tokenizer.pad_token_id or 0)])

    return batch


def _picture(source: Path | Image.Image) -> Image.Image:
    try:
        return load_rgb(source)
    except InvalidInput as error:
        raise InvalidInput(f"{source if isinstance(source, Path) else 'an image'}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. A user's mistake is one line on stderr."""
    try:
        arguments = _parser().parse_args(argv)
        if arguments.evaluate:
            _evaluate(arguments)
        elif arguments.recipe:
            _train_tiny(arguments)
        else:
            _align(arguments)
    except NanoVLLMError as error:
        _complain(error.in_one_line)
        return 2 if isinstance(error, InvalidInput | ConfigurationError) else 1
    except OSError as error:
        _complain(f"{error.filename or arguments.output}: {error.strerror or error}")
        return 1
    except KeyboardInterrupt as interrupted:
        _complain(str(interrupted) or "interrupted")
        return 1
    return 0


def _complain(message: str) -> None:
    print(f"nanovllm: {plain(message).plain}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidInput(f"{message} (see `{self.prog} --help`)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="nanovllm align", description="Train or evaluate a LLaVA checkpoint.")
    what = parser.add_argument_group("what to align")
    what.add_argument("--text-model", help="Qwen3, Qwen2 or Llama checkpoint")
    what.add_argument("--vision-model", help="CLIP or SigLIP checkpoint")
    what.add_argument("--data", help=f'JSON lines of {{"prompt", "images", "answer"}}, or "{SYNTHETIC}"')
    what.add_argument(
        "--train-vision", dest="freeze_vision_weights", action="store_false", help="let the tower train too"
    )
    what.add_argument("--train-text", action="store_true", help="let the text model train too")
    what.add_argument("--raw-prompt", action="store_true", help="leave the text model's chat template out")
    what.add_argument("--batch-size", type=int, default=16)
    what.add_argument("--rate", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    what.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    recipe = parser.add_argument_group("the tiny model")
    recipe.add_argument("--recipe", choices=["tiny"], help="train the shipped tiny model from nothing")
    recipe.add_argument("--processes", type=int, default=1, help="processes that share each step (default: 1)")
    recipe.add_argument("--tower-share", type=float, default=0.1, help="share of the run for the tower alone")
    recipe.add_argument("--start", type=Path, help="begin with the weights of this directory, not with random ones")
    length = parser.add_argument_group("how long, and where to")
    length.add_argument("--minutes", type=float)
    length.add_argument("--images", type=int)
    length.add_argument("--seed", type=int)
    length.add_argument("--output", help="the directory to write")
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--evaluate", metavar="DIR", help="measure a checkpoint on held-out synthetic samples")
    evaluation.add_argument("--samples", type=int, default=2000)
    evaluation.add_argument("--json", type=Path, help="write the figures here as well")
    return parser


def _evaluate(arguments: argparse.Namespace) -> None:
    seed = evaluate_tiny.EVALUATION_SEED if arguments.seed is None else arguments.seed
    directory = resolve_checkpoint(arguments.evaluate)
    result = evaluate_tiny.evaluate(directory, samples=arguments.samples, seed=seed, report=_say)
    _say(evaluate_tiny.table(result))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _align(arguments: argparse.Namespace) -> None:
    required = {name: getattr(arguments, name) for name in ("text_model", "vision_model", "data", "output")}
    missing = [name for name, value in required.items() if value is None]
    if missing:
        raise InvalidInput(f"--{missing[0].replace('_', '-')} is missing (see `nanovllm align --help`)")
    names = ("freeze_vision_weights", "train_text", "minutes", "images", "batch_size", "rate", "raw_prompt", "device")
    options = {name: getattr(arguments, name) for name in names}
    align(**required, **options, seed=arguments.seed or 0, report=_say)


def _train_tiny(arguments: argparse.Namespace) -> None:
    if arguments.output is None or arguments.seed is None:
        raise InvalidInput("--recipe needs --output and --seed")
    if arguments.processes <= 1:
        _train_recipe(arguments)
        return
    # Refused here, once, and not by every process.
    Schedule(minutes=arguments.minutes, images=arguments.images)
    _state_directory(Path(arguments.output))
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_run_rank, (arguments, directory), nprocs=arguments.processes)


def _run_rank(rank: int, arguments: argparse.Namespace, directory: str) -> None:
    # Compilers that share a cache can leave an empty library in it, on which every later start fails.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{directory}/{rank}"
    # More threads a process, which wait for one another, lose far more on a busy machine.
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=arguments.processes
    )
    _train_recipe(arguments)


def _train_recipe(arguments: argparse.Namespace) -> None:
    """Trains the tiny model (see `tiny_model`) and writes it in fp16.

    In a process group every process calls this, and the first one writes.
    """
    schedule = Schedule(
        rate=arguments.rate, minutes=arguments.minutes, images=arguments.images, tower_share=arguments.tower_share
    )
    output = Path(arguments.output)
    state = _state_directory(output)
    torch.manual_seed(arguments.seed)
    processor = tiny_model.processor()
    model = tiny_model.model(processor.tokenizer)
    if arguments.start is not None:
        earlier = LlavaForConditionalGeneration.from_pretrained(arguments.start, dtype=torch.float32)
        model.load_state_dict(earlier.state_dict())
    head = tiny_model.glyph_head(model)
    tiny_model.speed_up(model)
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = tiny_model.Batches(processor.tokenizer, arguments.seed, rank=rank, processes=processes)

    def snapshot(averaged: LlavaForConditionalGeneration) -> str:
        export(averaged, processor, output, torch.float16)
        result = evaluate_tiny.evaluate(output, samples=100, seed=arguments.seed, report=lambda _: None)
        return ", ".join(
            f"{name} {kind['exact']}/{kind['n']}" for name, kind in result["groups"].items() if "kind" in name
        )

    trainer = Trainer(model, schedule, state, head=head, bf16=True, report=_say)
    progress = trainer.run(batches.batch, snapshot)
    if rank == 0:
        _say(f"trained on {counted(progress.images, 'image')} in {progress.seconds / 60:.1f} minutes: {output}")


if __name__ == "__main__":
    raise SystemExit(main())
