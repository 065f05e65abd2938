import json
import os
import re
import shlex
import signal
from itertools import groupby
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from nanovllm.errors import InvalidInput
from nanovllm.image_placeholder import IMAGE_PLACEHOLDER
from nanovllm.training import align as align_module
from nanovllm.training import evaluate as evaluate_tiny
from nanovllm.training import synthetic, tiny_model
from nanovllm.training.align import align, main, read_examples
from nanovllm.training.trainer import IGNORED, Batch, Question, Schedule, Trainer, pad, pad_by_length, tower_features

TEXT_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
TOWER_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


def text_model(directory: Path, *, family: str = "qwen3", dtype: torch.dtype = torch.float32) -> Path:
    """A random text model whose tokenizer does not know of images."""
    words = tiny_model.tokenizer()
    state = json.loads(words.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != IMAGE_PLACEHOLDER]
    image_id = state["model"]["vocab"].pop(IMAGE_PLACEHOLDER)
    state["model"]["vocab"]["<unused>"] = image_id
    words = type(words)(
        tokenizer_object=words.backend_tokenizer.from_str(json.dumps(state)),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    torch.manual_seed(1)
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(words), tie_word_embeddings=True, **TEXT_SIZES))
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), tie_word_embeddings=False, **TEXT_SIZES))
    model.to(dtype).save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


def tower(directory: Path, *, family: str = "clip", dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(2)
    if family == "clip":
        CLIPVisionModel(CLIPVisionConfig(**TOWER_SIZES)).to(dtype).save_pretrained(directory)
        size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        CLIPImageProcessorPil(**size).save_pretrained(directory)
    else:
        SiglipVisionModel(SiglipVisionConfig(**TOWER_SIZES)).to(dtype).save_pretrained(directory)
        SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(directory)
    return directory


def pairs(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    Image.new("RGB", (40, 30), "red").save(directory / "red.png")
    Image.new("L", (30, 40), 200).save(directory / "gray.png")
    examples = [
        {"prompt": "What? <|image|>", "images": ["red.png"], "answer": "red"},
        {"prompt": "Both? <|image|> <|image|>", "images": ["red.png", "gray.png"], "answer": "red, gray"},
        {"prompt": "Hello", "images": [], "answer": "hi"},
    ]
    path = directory / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, examples)), encoding="utf-8")
    return path


def aligned(tmp_path: Path, **options: object) -> Path:
    return align(
        text_model(tmp_path / "text"),
        tower(tmp_path / "tower"),
        pairs(tmp_path / "data"),
        tmp_path / "llava",
        images=12,
        batch_size=3,
        rate=0.05,
        report=lambda _: None,
        device="cpu",
        **options,  # type: ignore[arg-type]
    )


def tower_of(llava: Path) -> dict[str, torch.Tensor]:
    return dict(LlavaForConditionalGeneration.from_pretrained(llava).model.vision_tower.state_dict())


def text_of(llava: Path) -> dict[str, torch.Tensor]:
    return dict(LlavaForConditionalGeneration.from_pretrained(llava).model.language_model.state_dict())


def original_tower(tmp_path: Path) -> dict[str, torch.Tensor]:
    return dict(CLIPVisionModel.from_pretrained(tmp_path / "tower").state_dict())


def original_text(tmp_path: Path) -> dict[str, torch.Tensor]:
    return dict(Qwen3ForCausalLM.from_pretrained(tmp_path / "text").model.state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name][: len(other[name])] if one[name].ndim else one[name], other[name]) for name in one)


def test_only_the_projector_trains_unless_more_is_asked_for(tmp_path: Path) -> None:
    llava = aligned(tmp_path)
    torch.manual_seed(0)
    untrained, _, _ = align_module.compose(tmp_path / "text", tmp_path / "tower")
    trained = LlavaForConditionalGeneration.from_pretrained(llava)

    assert same(tower_of(llava), original_tower(tmp_path))
    assert same(text_of(llava), original_text(tmp_path))
    before, after = (model.model.multi_modal_projector.linear_1.weight for model in (untrained, trained))
    assert not torch.equal(before, after)


def test_an_unfrozen_tower_trains(tmp_path: Path) -> None:
    llava = aligned(tmp_path, freeze_vision_weights=False)

    assert not same(tower_of(llava), original_tower(tmp_path))
    assert same(text_of(llava), original_text(tmp_path))


def test_the_text_model_trains_when_asked_to(tmp_path: Path) -> None:
    llava = aligned(tmp_path, train_text=True)

    assert same(tower_of(llava), original_tower(tmp_path))
    assert not same(text_of(llava), original_text(tmp_path))


@pytest.mark.parametrize(("family", "text_family"), [("clip", "qwen3"), ("siglip", "llama")])
def test_what_is_written_answers_in_transformers(tmp_path: Path, family: str, text_family: str) -> None:
    llava = align(
        text_model(tmp_path / "text", family=text_family),
        tower(tmp_path / "tower", family=family),
        pairs(tmp_path / "data"),
        tmp_path / "llava",
        images=6,
        batch_size=2,
        report=lambda _: None,
        device="cpu",
    )
    processor = AutoProcessor.from_pretrained(llava)
    model = LlavaForConditionalGeneration.from_pretrained(llava)
    inputs = processor(text="What? <|image|>", images=[Image.new("RGB", (50, 50))], return_tensors="pt")

    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    assert not (tmp_path / "llava.training").exists()
    assert not list(llava.glob("*.bin"))


def test_a_frozen_tower_is_stored_bit_for_bit_beside_a_narrower_text_model(tmp_path: Path) -> None:
    text, wide = text_model(tmp_path / "text", dtype=torch.bfloat16), tower(tmp_path / "tower", dtype=torch.float16)
    llava = align(
        text, wide, "synthetic", tmp_path / "llava", images=4, batch_size=2, report=lambda _: None, device="cpu"
    )

    assert same(tower_of(llava), {name: one.float() for name, one in original_tower(tmp_path).items()})


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, processor, _ = align_module.compose(text_model(tmp_path / "text"), tower(tmp_path / "tower"))
    batches = align_module._batches(align_module._examples(pairs(tmp_path / "data"), 0), processor, 3, False)

    class Stopped(Exception):
        pass

    def three_steps(step: int, tower_only: bool) -> Batch:
        if step == 3:
            raise Stopped
        return batches(step, tower_only)

    schedule = Schedule(images=18)
    first = Trainer(model, schedule, tmp_path / "state", report=lambda _: None)
    with pytest.raises(Stopped):
        first.run(three_steps, lambda _: None)
    first.save()
    lines: list[str] = []
    second = Trainer(model, schedule, tmp_path / "state", report=lines.append)

    assert second.progress == first.progress
    assert second.progress.step == 3
    assert second.run(batches, lambda _: None).images >= 18
    assert any("resumed" in line for line in lines)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("not json", "line 1 of data.jsonl is not"),
        ('{"prompt": "a"}', "line 1 of data.jsonl is not"),
        ('{"prompt": "a", "images": ["x.png"], "answer": 3}', "must be strings"),
        ('{"prompt": "<|image|>", "images": [], "answer": "a"}', "has 1 <|image|> for 0 images"),
        ('{"prompt": "<|image|>", "images": ["no.png"], "answer": "a"}', "no image no.png"),
        ("", "no examples"),
    ],
)
def test_broken_data_is_refused_by_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line, encoding="utf-8")

    with pytest.raises(InvalidInput) as refused:
        read_examples(path)
    assert complaint in str(refused.value)


def test_models_that_are_not_text_or_tower_are_refused(tmp_path: Path) -> None:
    text, eyes = text_model(tmp_path / "text"), tower(tmp_path / "tower")

    with pytest.raises(InvalidInput, match="a text model must be"):
        align_module.compose(eyes, eyes)
    with pytest.raises(InvalidInput, match="a vision model must be"):
        align_module.compose(text, text)


@pytest.mark.parametrize("length", [{}, {"minutes": 1.0, "images": 5}, {"images": 0}])
def test_a_run_needs_one_length(tmp_path: Path, length: dict[str, float]) -> None:
    with pytest.raises(InvalidInput):
        align("text", "tower", "synthetic", tmp_path, **length)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--vision-model", "tower"], "--text-model is missing"),
        (["--images", "many"], "argument --images: invalid int value: 'many'"),
        (["--evaluate", "no-such-model"], "no checkpoint called 'no-such-model'"),
    ],
)
def test_misuse_of_the_command_line_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("nanovllm: ")
    assert complaint in said
    assert said.count("\n") == 1


def test_a_device_that_is_not_there_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="device teapot does not take the model"):
        align(
            text_model(tmp_path / "text"), tower(tmp_path / "tower"), pairs(tmp_path / "data"), tmp_path / "llava",
            images=6, report=lambda _: None, device="teapot",
        )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state_and_the_same_command_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    output = tmp_path / "llava"
    text, eyes, data = text_model(tmp_path / "text"), tower(tmp_path / "tower"), pairs(tmp_path / "data")
    words = ["--text-model", str(text), "--vision-model", str(eyes), "--data", str(data), "--device", "cpu"]
    command = [*words, "--images", "12", "--batch-size", "2", "--output", str(output)]
    step = Trainer._step

    def signalled(trainer: Trainer, batch: Batch) -> dict[str, float]:
        if trainer.progress.step == 1:
            os.kill(os.getpid(), number)
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "_step", signalled)
    before = signal.getsignal(number)
    assert main(command) == 1
    said = capfd.readouterr()
    assert "nanovllm: stopped after" in said.err
    assert "the same command goes on" in said.err
    assert signal.getsignal(number) == before
    assert not output.exists()
    monkeypatch.setattr(Trainer, "_step", step)

    assert main([*command, "--rate", "0.1"]) == 2
    assert "was begun with rate 0.001, not 0.1" in capfd.readouterr().err
    assert main(command) == 0
    assert "resumed after" in capfd.readouterr().out
    assert main(command) == 2
    assert f"{output} is there already" in capfd.readouterr().err


def test_a_run_of_few_steps_shows_the_loss_of_its_first_and_last(tmp_path: Path) -> None:
    lines: list[str] = []
    align(
        text_model(tmp_path / "text"), tower(tmp_path / "tower"), pairs(tmp_path / "data"), tmp_path / "llava",
        images=12, batch_size=3, report=lines.append, device="cpu",
    )  # fmt: skip

    shown = [line for line in lines if ", loss " in line]
    assert len(shown) >= 2
    assert shown[-1].startswith("100.0% ")


def test_the_commands_of_the_page_run_at_small_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "align.md").read_text(encoding="utf-8")
    commands = re.findall(r"^nanovllm align (.+)$", page, re.MULTILINE)
    assert len(commands) == 3
    text_model(tmp_path / "Qwen" / "Qwen3-0.6B")
    tower(tmp_path / "openai" / "clip-vit-base-patch32")
    data = pairs(tmp_path)
    (tmp_path / "questions.jsonl").write_text(data.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        short = re.sub(r"--images \d+ --batch-size \d+", "--images 6 --batch-size 3", command)
        assert short != command
        words = shlex.split(short)
        assert main([*words, "--device", "cpu"]) == 0
        assert LlavaForConditionalGeneration.from_pretrained(tmp_path / words[-1])
    original = CLIPVisionModel.from_pretrained("openai/clip-vit-base-patch32")
    assert same(tower_of(tmp_path / "aligned"), dict(original.state_dict()))
    assert not same(text_of(tmp_path / "tuned"), text_of(tmp_path / "aligned"))


def test_the_tiny_tokenizer_gives_every_answer_back() -> None:
    words = tiny_model.tokenizer()

    for index in range(40):
        answer = synthetic.sample(index, seed=1, split="train").answer
        assert words.decode(words.encode(answer)) == answer
    everything = "".join(map(chr, range(32, 127))) + "\n" + "".join(tiny_model.SCAFFOLDING)
    assert words.decode(words.encode(everything)) == everything
    assert words.unk_token_id not in words.encode(everything)
    assert len(words.encode(IMAGE_PLACEHOLDER)) == 1


def test_labels_stand_one_before_the_answers_tokens() -> None:
    rows = pad([Question([5, 6, 7], [8, 1], [0])], pad_id=0)

    assert rows.ids.tolist() == [[5, 6, 7, 8, 1, 0, 0, 0]]
    assert rows.labels.tolist() == [[IGNORED, IGNORED, 8, 1, *[IGNORED] * 4]]


def test_groups_of_rows_keep_every_question() -> None:
    questions = [Question([2] * length, [3, 1], [length]) for length in (9, 30, 3, 18, 7)]
    rows = pad_by_length(questions, pad_id=0)

    assert sorted(image for group in rows for image in group.images.tolist()) == [3, 7, 9, 18, 30]
    assert [group.ids.shape[1] for group in rows] == [16, 24, 32]


def test_processes_share_a_step_without_sharing_an_image() -> None:
    words = tiny_model.tokenizer()
    ranks = [tiny_model.Batches(words, 1, rank=rank, processes=2) for rank in range(2)]
    batches = [one.batch(0, False) for one in ranks]

    assert sum(len(batch.pixels) for batch in batches) == 34
    assert not torch.equal(batches[0].pixels[0], batches[1].pixels[0])
    assert torch.equal(batches[0].pixels, ranks[0].batch(0, False).pixels)
    assert len(ranks[0].batch(0, True).rows) == 0


def test_glyph_targets_name_the_characters_of_a_patch_from_left_to_right() -> None:
    words = tiny_model.tokenizer()
    drawn = synthetic.receipt(synthetic.generator(0, seed=1, split="train"), "train")
    ids = tiny_model.Batches(words, 1).glyphs(drawn)

    assert (ids != 0).sum() == len(drawn.glyphs)
    row = drawn.glyphs[0].y // 32
    first_line = [one for one in ids[7 * row : 7 * row + 7].flatten().tolist() if one]
    assert words.decode(first_line) == drawn.lines[0].replace(" ", "")


def test_the_faster_patch_embedding_computes_the_same(tmp_path: Path) -> None:
    model = tiny_model.model(tiny_model.tokenizer()).eval()
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        plain = tower_features(model, pixels)
        tiny_model.speed_up(model, compiled=False)
        fast = tower_features(model, pixels)

    assert plain.shape == (2, 49, 192)
    torch.testing.assert_close(plain, fast, rtol=1e-4, atol=1e-4)


def test_the_recipe_trains_the_tower_alone_and_then_everything(tmp_path: Path) -> None:
    words = tiny_model.tokenizer()
    torch.manual_seed(0)
    model = tiny_model.model(words)
    head = tiny_model.glyph_head(model)
    before = model.lm_head.weight.detach().clone()
    batches = tiny_model.Batches(words, 1, processes=8)
    kinds: list[bool] = []

    def source(step: int, tower_only: bool) -> Batch:
        kinds.append(tower_only)
        assert not tower_only or torch.equal(model.lm_head.weight, before)
        return batches.batch(step, tower_only)

    schedule = Schedule(images=9, tower_share=0.3)
    Trainer(model, schedule, tmp_path / "state", head=head, report=lambda _: None).run(source, lambda _: None)

    assert [tower_only for tower_only, _ in groupby(kinds)] == [True, False]
    assert not torch.equal(model.lm_head.weight, before)


def test_frozen_parameters_get_no_optimiser_state(tmp_path: Path) -> None:
    model = tiny_model.model(tiny_model.tokenizer()).requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    trainer = Trainer(model, Schedule(images=1), tmp_path, report=lambda _: None)
    trainer._step(tiny_model.Batches(tiny_model.tokenizer(), 1, processes=13).batch(0, False))

    assert {name.split(".")[1] for name in trainer.trained} == {"multi_modal_projector"}


def test_wilsons_bound_is_the_known_one() -> None:
    assert evaluate_tiny.wilson_lower(95, 100) == pytest.approx(0.8882, abs=1e-4)
    assert evaluate_tiny.wilson_lower(100, 100) == pytest.approx(0.9630, abs=1e-4)
    assert evaluate_tiny.wilson_lower(0, 0) == 0.0


def test_an_evaluation_counts_every_sample_once_by_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_tiny, "_MAX_NEW_TOKENS", 4)
    processor = tiny_model.processor()
    align_module.export(tiny_model.model(processor.tokenizer), processor, tmp_path / "tiny", torch.float16)
    figures = tmp_path / "figures.json"

    assert main(["--evaluate", str(tmp_path / "tiny"), "--samples", "6", "--json", str(figures)]) == 0

    result = json.loads(figures.read_text())
    kinds = {name: group for name, group in result["groups"].items() if name.startswith("kind: ")}
    assert sum(group["n"] for group in kinds.values()) == 6
    assert "lower95" in capsys.readouterr().out


def test_a_batch_without_any_image_is_refused_with_the_remedy(tmp_path: Path) -> None:
    data = pairs(tmp_path / "data")
    data.write_text("\n".join([json.dumps({"prompt": "Hello", "images": [], "answer": "hi"})] * 3), encoding="utf-8")
    with pytest.raises(InvalidInput, match="raise the batch size"):
        align(
            text_model(tmp_path / "text"), tower(tmp_path / "tower"), data, tmp_path / "llava",
            images=6, batch_size=2, report=lambda _: None, device="cpu",
        )  # fmt: skip
