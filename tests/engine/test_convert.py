"""A .bin or GGUF checkpoint becomes a directory that the engine loads, with transformers' own answers."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import as_lfs_pointer, edit_json, edit_tensors
from checkpoints import Family, make_clip, make_llava, make_qwen_vl, make_siglip, make_text, make_tokenizer
from engine_parts import Reference, assert_all_same, drain, draw_cases, greedy, recording_engine
from gguf_checkpoints import write_gguf
from safetensors.torch import load_file
from transformers import AutoConfig

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.cli.main import DONE, MISUSE, main
from nanovllm.engine import convert as conversion
from nanovllm.engine.convert import convert
from nanovllm.engine.layers.rotary import rotary_table
from nanovllm.errors import ConfigurationError, ModelNotFound, UnsupportedModel
from nanovllm.vision.encoders.clip import VisionEncoder


def as_bin(directory: Path, num_shards: int = 1, *, tied: bool = False, legacy: bool = False) -> Path:
    """Replace the safetensors of a checkpoint by torch's own files, as older releases of transformers wrote them."""
    state: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors*"):
        if file.suffix == ".safetensors":
            state |= load_file(file)
        file.unlink()
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    save = partial(torch.save, _use_new_zipfile_serialization=not legacy)
    if num_shards == 1:
        save(state, directory / "pytorch_model.bin")
        return directory
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        names = sorted(state)[shard::num_shards]
        file_name = f"pytorch_model-{shard + 1:05}-of-{num_shards:05}.bin"
        save({name: state[name] for name in names}, directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def assert_answers_equal(original: Path, converted: Path, *, sees: bool = False) -> None:
    """transformers on the original, this engine on the converted one."""
    drawn = draw_cases(Reference(original, sees=sees), [0, 1, 2] if sees else [0, 0, 0], max_tokens=12)
    engine = recording_engine(converted)
    for number, case in enumerate(drawn):
        engine.add_request(case.prompt, greedy(12), images=case.images, request_id=str(number))
    assert_all_same(engine, {str(number): case for number, case in enumerate(drawn)}, drain(engine))
    assert engine.tokenizer.chat_template


@pytest.mark.parametrize(
    ("make", "form"),
    [
        (partial(make_text, family="llama"), {}),
        (partial(make_text, family="qwen2", tie_word_embeddings=True), {"tied": True}),
        (partial(make_text, family="qwen3"), {"num_shards": 3}),
        (partial(make_text, family="llama"), {"legacy": True}),
        (partial(make_llava, text="llama"), {"num_shards": 2}),
    ],
    ids=["one file", "tied head stored twice", "shards", "format before zip", "llava"],
)
def test_bin_checkpoints_answer_as_before(tmp_path: Path, make: Callable[[Path], Path], form: dict[str, Any]) -> None:
    make(tmp_path / "original")
    make(tmp_path / "bin")
    convert(as_bin(tmp_path / "bin", **form), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin*"))
    assert_answers_equal(tmp_path / "original", tmp_path / "out", sees=make.func is make_llava)  # type: ignore[attr-defined]


TOWERS: dict[str, Callable[[Path], Path]] = {
    "clip": make_clip,
    "whole clip": partial(make_clip, with_text_tower=True),
    "siglip": make_siglip,
}


@pytest.mark.filterwarnings("ignore:The projector between")
@pytest.mark.parametrize("make", TOWERS.values(), ids=list(TOWERS))
def test_a_tower_converts_too_and_its_features_are_compared(
    tmp_path: Path, make: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    difference = convert(as_bin(make(tmp_path / "bin")), tmp_path / "out")
    assert difference < 1e-4
    assert VisionEncoder(64, tmp_path / "out").num_vision_tokens in (49, 196)
    change_what_is_saved(monkeypatch)
    with pytest.raises(UnsupportedModel, match=r"features differ from its source's by .* nothing is written"):
        convert(tmp_path / "bin", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "NoModelAtAll", ""])
def test_a_bin_checkpoint_of_another_architecture_is_refused_before_it_is_read(
    tmp_path: Path, architecture: str
) -> None:
    source = as_bin(make_text(tmp_path / "bin"))
    edit_json(source / "config.json", architectures=[architecture] if architecture else None)
    (source / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(UnsupportedModel, match=f"architecture '{architecture}'; supported are LlamaForCausalLM"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rope(kind: str, **parameters: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 2e4, **parameters}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
GGUF: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2"},
    "qwen3, tied": {"family": "qwen3", "tie_word_embeddings": True},
    "llama, another theta": {"family": "llama", **rope("default")},
    "linear": {"family": "llama", **rope("linear", factor=4.0)},
    "yarn": {"family": "qwen2", **rope("yarn", factor=4.0, original_max_position_embeddings=512)},
    "llama3": {"family": "llama", **rope("llama3", factor=8.0, **LLAMA3)},
    "llama3 of other parameters": {
        "family": "llama", **rope("llama3", factor=32.0, **{**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 9.0})
    },
}  # fmt: skip


@pytest.mark.parametrize("options", list(GGUF.values()), ids=list(GGUF))
def test_a_gguf_file_answers_as_the_checkpoint_it_was_made_of(tmp_path: Path, options: dict[str, Any]) -> None:
    original = make_text(tmp_path / "original", **options)
    difference = convert(write_gguf(tmp_path / "model.gguf", original), tmp_path / "made" / "out")
    assert difference < 1e-4
    assert_answers_equal(original, tmp_path / "made" / "out")
    assert sorted(file.name for file in (tmp_path / "made").iterdir()) == ["out"]
    scaled, source = (rotary_of(directory) for directory in (tmp_path / "made" / "out", original))
    assert float((scaled - source).abs().max()) < 1e-3  # at every position of the context


def rotary_of(directory: Path) -> torch.Tensor:
    config: Any = AutoConfig.from_pretrained(directory)
    dimensions = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return rotary_table(config, dimensions, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_special_tokens_of_a_gguf_file_are_those_of_its_checkpoint(tmp_path: Path, family: Family) -> None:
    original = make_text(tmp_path / "original", family=family)
    tokens = make_tokenizer()
    think, end = tokens.convert_tokens_to_ids(["<think>", "</think>"])
    metadata = {"eos_token_id": end, "eot_token_id": think, "bos_token_id": 0, "add_bos_token": True}
    convert(write_gguf(tmp_path / "model.gguf", original, metadata=metadata), tmp_path / "out")
    tokenizer = Checkpoint(tmp_path / "out").tokenizer()
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / "out" / name).read_text())
        assert (fields["eos_token_id"], fields["bos_token_id"]) == ([end, think], 0)
        assert fields.get("pad_token_id") is None
    assert tokenizer.eos_token_id == end
    assert tokenizer("the total </think> it").input_ids == [0, *tokens("the total </think> it").input_ids]


@pytest.mark.parametrize("named", ["first part", "last part", "directory"])
def test_a_split_gguf_converts_whole_whichever_part_is_named(tmp_path: Path, named: str) -> None:
    original, source = make_text(tmp_path / "original", family="qwen2"), tmp_path / "source"
    source.mkdir()
    first = write_gguf(source / "model.gguf", original, tensors_a_part=7)
    parts = sorted(source.iterdir())
    assert len(parts) > 2
    place = {"first part": first, "last part": parts[-1], "directory": source}[named]
    convert(place, tmp_path / "out")
    assert_answers_equal(original, tmp_path / "out")


def test_a_split_gguf_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "model.gguf", make_text(tmp_path / "it", family="qwen2"), tensors_a_part=7)
    parts = sorted(tmp_path.glob("*.gguf"))
    second = parts[1].read_bytes()
    parts[1].unlink()
    for source in (first, parts[2], tmp_path):
        with pytest.raises(ModelNotFound, match=f"one of {len(parts)} parts, and beside it is no {parts[1].name}"):
            convert(source, tmp_path / "out")
    shutil.copyfile(parts[2], parts[1])
    with pytest.raises(UnsupportedModel, match=f"'{parts[1].name}' is by its metadata part 3 of {len(parts)}"):
        convert(first, tmp_path / "out")
    parts[1].write_bytes(second)
    renamed = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(UnsupportedModel, match=r"'renamed.gguf' is one of \d parts by its metadata"):
        convert(renamed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, r"lacks 1 tensor: blk\.1\.ffn_up\.weight"),
        ({"token_embd.weight": None}, r"lacks 1 tensor: token_embd\.weight"),
        ({"blk.0.attn_q.bias": torch.ones(128)}, r"holds 1 tensor that .* 'llama': blk\.0\.attn_q\.bias"),
        ({"rope_factors_long.weight": torch.ones(16)}, r"rope_factors_long"),
        ({"rope_freqs.weight": torch.linspace(1, 3, 16)}, r"not those of Llama 3's scaling"),
        ({"rope_freqs.weight": torch.ones(8)}, r"8 factors for 16 pairs"),
    ],
)
def test_a_gguf_whose_tensors_are_not_its_models_is_refused_by_their_names(
    tmp_path: Path, extra: dict[str, Any], message: str
) -> None:
    source = write_gguf(tmp_path / "model.gguf", make_text(tmp_path / "it", family="llama"), **extra)
    with pytest.raises(UnsupportedModel, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [make_text, make_llava, make_qwen_vl])
def test_a_head_of_its_own_stays_where_the_configuration_ties_it(tmp_path: Path, make: Callable[..., Path]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
        return {**tensors, "lm_head.weight": tensors[embedding].flip(0)}  # as merging a LoRA of the head leaves it

    for name in ("original", "bin"):
        edit_tensors(make(tmp_path / name, tie_word_embeddings=True), change)
    convert(as_bin(tmp_path / "bin"), tmp_path / "out")
    assert_answers_equal(tmp_path / "original", tmp_path / "out", sees=make is not make_text)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_checkpoints_are_compared_in_their_own_type(tmp_path: Path, dtype: torch.dtype) -> None:
    difference = convert(as_bin(make_text(tmp_path / "bin", dtype=dtype)), tmp_path / "out")
    assert 0 < difference < 5e-2


def change_what_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    save = conversion._save
    monkeypatch.setattr(
        conversion,
        "_save",
        lambda state, made: save({name: value * 1.05 for name, value in state.items()}, made),
    )


def test_a_result_with_other_logits_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_what_is_saved(monkeypatch)
    with pytest.raises(UnsupportedModel, match=r"logits differ from its source's by .* nothing is written"):
        convert(as_bin(make_text(tmp_path / "bin")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bin_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(tmp_path: Path) -> None:
    source = make_text(tmp_path / "bin")
    edit_tensors(source, lambda stored: {name: value for name, value in stored.items() if "1.mlp.up" not in name})
    with pytest.raises(UnsupportedModel, match=r"lacks 1 tensor, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        convert(as_bin(source), tmp_path / "out")


class Mischief:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("mischief"),)


def spoilt(directory: Path, kind: str) -> Path:
    """A source that cannot be converted."""
    source = directory / "source"
    source.mkdir()
    (source / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    binary = source / "pytorch_model.bin"
    index = source / "pytorch_model.bin.index.json"
    match kind:
        case "code":
            binary.write_bytes(pickle.dumps({"weight": Mischief()}, protocol=2))
        case "truncated":
            torch.save({"weight": torch.ones(100)}, binary)
            binary.write_bytes(binary.read_bytes()[:300])
        case "no config":
            torch.save({"weight": torch.ones(2)}, binary)
            (source / "config.json").unlink()
        case "list":
            torch.save([torch.ones(2)], binary)
        case "nested":
            torch.save({"model": {"weight": torch.ones(2)}}, binary)
        case "outside":
            index.write_text(json.dumps({"weight_map": {"weight": "../pytorch_model.bin"}}))
        case "no map":
            index.write_text("{}")
        case "lost shard":
            index.write_text(json.dumps({"weight_map": {"weight": "a.bin"}}))
        case "two":
            (source / "a.gguf").touch()
            (source / "b.gguf").touch()
        case "no gguf":
            (source / "a.gguf").write_bytes(b"GGUFnot really")
        case "cut gguf":
            write_gguf(source / "a.gguf", make_text(directory / "model", family="qwen2"))
            (source / "a.gguf").write_bytes((source / "a.gguf").read_bytes()[:-4000])
            shutil.rmtree(directory / "model")
        case "pointer":
            as_lfs_pointer(binary)
        case "gguf pointer":
            as_lfs_pointer(source / "a.gguf")
        case "text file":
            return source / "config.json"
        case "missing":
            return source / "elsewhere"
    return source


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("code", UnsupportedModel, "'pytorch_model.bin' is no file of weights only"),
        ("truncated", UnsupportedModel, "'pytorch_model.bin'"),
        ("no config", ModelNotFound, r"holds no config\.json"),
        ("list", UnsupportedModel, "holds a list, not a table"),
        ("nested", UnsupportedModel, "holds 'model', a dict, among its tensors"),
        ("outside", UnsupportedModel, r"'\.\./pytorch_model.bin', which is not a file beside it"),
        ("no map", UnsupportedModel, "no weight_map"),
        ("lost shard", ModelNotFound, r"lacks a\.bin"),
        ("two", ConfigurationError, r"holds 2 GGUF files \(a.gguf, b.gguf\); name the one"),
        ("no gguf", UnsupportedModel, "'a.gguf' cannot be read as GGUF"),
        ("cut gguf", ModelNotFound, "'a.gguf' is cut or damaged: get it again"),
        ("pointer", ModelNotFound, "'pytorch_model.bin' is a Git LFS pointer: `git lfs pull`"),
        ("gguf pointer", ModelNotFound, "'a.gguf' is a Git LFS pointer: `git lfs pull`"),
        ("text file", UnsupportedModel, "is not a .gguf file; give the directory"),
        ("missing", ModelNotFound, "does not exist"),
        ("empty", ModelNotFound, "holds neither"),
    ],
)
def test_what_cannot_be_converted_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = spoilt(tmp_path, kind)
    with pytest.raises(error, match=message):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_directory_of_safetensors_is_said_to_need_no_conversion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_text(tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "out")]) == MISUSE
    said = capsys.readouterr().err
    assert f'holds safetensors already: LLM("{source}"), or for the worker NANOVLLM_ENGINE__MODEL={source}' in said
    assert not (tmp_path / "out").exists()


def test_the_command_converts_once_and_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = as_bin(make_text(tmp_path / "bin")), tmp_path / "out"
    assert main(["convert", str(source), str(output)]) == DONE
    assert f"NANOVLLM_ENGINE__MODEL={output}" in capsys.readouterr().out
    written = (output / "model.safetensors").stat()
    assert main(["convert", str(source), str(output)]) == MISUSE
    assert "exists already; name a directory that does not" in capsys.readouterr().err
    assert (output / "model.safetensors").stat().st_mtime_ns == written.st_mtime_ns


def test_the_engine_points_to_the_conversion(tmp_path: Path) -> None:
    as_bin(make_text(tmp_path))
    with pytest.raises(
        ModelNotFound, match=r"lacks model.safetensors; .* as pytorch_model.bin: `nanovllm convert "
    ) as no:
        recording_engine(tmp_path)
    assert no.value.in_one_line.endswith("`"), "no other remedy stands behind the command"
