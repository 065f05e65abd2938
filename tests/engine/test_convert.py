"""A .bin or GGUF checkpoint becomes a directory that the engine loads, with transformers' own answers."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from checkpoints import make_clip, make_llava, make_text, make_tokenizer
from engine_parts import Reference, assert_all_same, drain, draw_cases, greedy, recording_engine
from safetensors.torch import load_file

from nanovllm.cli.main import DONE, MISUSE, main
from nanovllm.engine.convert import convert
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
    weight_map = {}
    for shard in range(num_shards):
        names = sorted(state)[shard::num_shards]
        file_name = f"pytorch_model-{shard + 1:05}-of-{num_shards:05}.bin"
        save({name: state[name] for name in names}, directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def write_gguf(file: Path, checkpoint: Path) -> Path:
    """A Qwen2 checkpoint as one GGUF file in float32, written by the format's own library."""
    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = make_tokenizer()
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index in added else 1 for index in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        kind = "." + name.rsplit(".", 1)[1]
        writer.add_tensor(names.get_name(name.removesuffix(kind)) + kind, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


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


@pytest.mark.filterwarnings("ignore:The projector between")
def test_a_tower_converts_too(tmp_path: Path) -> None:
    convert(as_bin(make_clip(tmp_path / "bin")), tmp_path / "out")
    assert VisionEncoder(64, tmp_path / "out").num_vision_tokens == 49


def test_a_gguf_file_answers_as_the_checkpoint_it_was_made_of(tmp_path: Path) -> None:
    original = make_text(tmp_path / "original", family="qwen2")
    convert(write_gguf(tmp_path / "model.gguf", original), tmp_path / "made" / "out")
    assert_answers_equal(original, tmp_path / "made" / "out")
    assert sorted(file.name for file in (tmp_path / "made").iterdir()) == ["out"]


class Mischief:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("mischief"),)


def spoilt(directory: Path, kind: str) -> Path:
    """A source that cannot be converted."""
    source = directory / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
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
        ("cut gguf", UnsupportedModel, "'a.gguf' cannot be read as GGUF"),
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
    with pytest.raises(ModelNotFound, match=r"lacks model.safetensors; .* as pytorch_model.bin: `nanovllm convert "):
        recording_engine(tmp_path)
