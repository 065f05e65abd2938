"""A checkpoint comes in as transformers loads it, or not at all: then the error names the tensor or the file."""

from __future__ import annotations

import functools
import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import as_lfs_pointer, as_shards, cut, edit_json, edit_tensors, empty
from checkpoints import CHAT_TEMPLATE, MAKERS, make_llava, make_qwen3, make_qwen_vl, make_text
from engine_parts import Reference, drain, greedy, noise_image, recording_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from nanovllm.checkpoints import transformers_version
from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.checkpoints.transformers_version import OLDEST, untested_version
from nanovllm.cli.main import MISUSE, main
from nanovllm.engine import diagnostics
from nanovllm.engine.config import EngineConfig
from nanovllm.engine.execution import kv_cache_size
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ConfigurationError, ModelNotFound, UnsupportedModel

SEE = ("llava", "qwen2.5-vl", "qwen3-vl")


def assert_loads_as_transformers_does(directory: Path, *, sees: bool, reference: Path | None = None) -> None:
    prompt = "the total" + " <|image|> and" * sees
    images = [noise_image(1, 90, 70)] * sees
    engine = recording_engine(directory, kv_cache_bytes=1 << 20)
    engine.add_request(prompt, greedy(1), images=images, request_id="it")
    drain(engine)
    ours = engine.sampler.logits["it"][0]  # type: ignore[attr-defined]
    expected = Reference(reference or directory, sees=sees).answer(prompt, images, max_tokens=1).logits[0]
    assert float((ours - expected).abs().max() / expected.abs().max()) <= 1e-4


def drop(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {other: tensor for other, tensor in tensors.items() if other != name}


CHANGES: dict[str, Callable[[dict[str, Tensor], str], dict[str, Tensor]]] = {
    "drop": drop,
    "rename": lambda tensors, name: {**drop(tensors, name), f"{name}_old": tensors[name]},
    "one more": lambda tensors, name: {**tensors, f"{name}_old": tensors[name].clone()},
    "more rows": lambda tensors, name: {**tensors, name: torch.cat([tensors[name], tensors[name][:1]])},
    "fewer rows": lambda tensors, name: {**tensors, name: tensors[name][:-1].clone()},
    "half": lambda tensors, name: {**tensors, name: tensors[name].half()},
    "double": lambda tensors, name: {**tensors, name: tensors[name].double()},
    "int8": lambda tensors, name: {**tensors, name: tensors[name].to(torch.int8)},
    "float8": lambda tensors, name: {**tensors, name: tensors[name].to(torch.float8_e4m3fn)},
    "bool": lambda tensors, name: {**tensors, name: tensors[name] > 0},
}
DUPLICATES: dict[str, Callable[[Tensor], Tensor]] = {"equal": torch.clone, "other": lambda tensor: tensor + 1}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp("original") / "it") for name, make in MAKERS.items()}


@settings(max_examples=60)
@given(data=st.data(), kind=st.sampled_from(sorted(MAKERS)), change=st.sampled_from([*CHANGES, *DUPLICATES]))
def test_any_tensor_that_is_changed_is_named_or_means_what_it_means_in_transformers(
    originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str, change: str
) -> None:
    directory = tmp_path_factory.mktemp("changed") / "it"
    shutil.copytree(originals[kind], directory)
    tensors = load_file(directory / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(tensors)))
    if change in DUPLICATES:
        as_shards(directory, tensors, {name: DUPLICATES[change](tensors[name])})
    else:
        edit_tensors(directory, lambda stored: CHANGES[change](stored, name))
    refusal = None
    try:
        recording_engine(directory, kv_cache_bytes=1 << 20).close()
    except ConfigurationError as error:
        refusal = str(error)
    if refusal is None:
        # transformers refuses another shape of a tensor that no feature depends on: layers behind the selected one.
        reference = originals[kind] if "rows" in change else directory
        assert_loads_as_transformers_does(directory, sees=kind.startswith(SEE), reference=reference)
    else:
        assert ".".join(name.split(".")[-2:]) in refusal
        assert change not in ("half", "double", "equal")
    shutil.rmtree(directory)


HEADS: dict[str, tuple[Callable[..., Path], str, bool]] = {
    "text": (functools.partial(make_text, family="llama"), "model.embed_tokens.weight", False),
    "llava": (make_llava, "model.language_model.embed_tokens.weight", True),
    "qwen2.5-vl": (make_qwen_vl, "model.language_model.embed_tokens.weight", True),
    "qwen3-vl": (functools.partial(make_qwen_vl, family="qwen3_vl"), "model.language_model.embed_tokens.weight", True),
}


def embedding_of(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if name.endswith("embed_tokens.weight"))


def head_of(tensors: dict[str, Tensor]) -> str:
    """Its name in the layout that the embedding's name is of."""
    embedding = embedding_of(tensors)
    return "language_model.lm_head.weight" if embedding.startswith("language_model.model.") else "lm_head.weight"


@pytest.mark.parametrize("kind", list(HEADS))
def test_a_stored_head_that_differs_is_used_whatever_the_configuration_says(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, _, sees = HEADS[kind]
    directory = make(tmp_path, tie_word_embeddings=True)
    edit_tensors(directory, lambda stored: {**stored, head_of(stored): stored[embedding_of(stored)].flip(0)})
    assert_loads_as_transformers_does(directory, sees=sees)
    assert "stores both with different values" in caplog.text


@pytest.mark.parametrize("kind", ["llava", "qwen2.5-vl"])
def test_a_text_configuration_that_ties_alone_discards_no_head(tmp_path: Path, kind: str) -> None:
    directory = HEADS[kind][0](tmp_path)
    config = directory / "config.json"
    text = {**json.loads(config.read_text())["text_config"], "tie_word_embeddings": True}
    edit_json(config, text_config=text, tie_word_embeddings=None)
    assert_loads_as_transformers_does(directory, sees=True)


@pytest.mark.parametrize("stored", ["head", "both"])
def test_a_tied_checkpoint_may_store_either_or_both(tmp_path: Path, stored: str) -> None:
    directory = make_qwen3(tmp_path, tie_word_embeddings=True)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        embedding = tensors["model.embed_tokens.weight"]
        rest = drop(tensors, "model.embed_tokens.weight") if stored == "head" else tensors
        return {**rest, "lm_head.weight": embedding.clone()}

    edit_tensors(directory, change)
    assert_loads_as_transformers_does(directory, sees=False)


@pytest.mark.parametrize("name", ["image_newline", "model.adapter.weight", "language_model.adapter.weight"])
@pytest.mark.parametrize("make", [make_llava, make_qwen_vl])
def test_a_tensor_beside_text_and_tower_is_refused_by_its_name(
    tmp_path: Path, make: Callable[[Path], Path], name: str
) -> None:
    edit_tensors(make(tmp_path), lambda stored: {**stored, name: torch.ones(2)})
    with pytest.raises(UnsupportedModel, match=rf"tensor '{name}' has no place"):
        recording_engine(tmp_path)


def test_an_untied_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    edit_tensors(make_qwen3(tmp_path), lambda stored: drop(stored, "lm_head.weight"))
    with pytest.raises(UnsupportedModel, match=r"lacks 1 tensor, such as lm_head\.weight"):
        recording_engine(tmp_path)


def test_quantised_checkpoints_are_refused_by_their_method(tmp_path: Path) -> None:
    edit_json(make_qwen3(tmp_path) / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(UnsupportedModel, match=r"quantised \('awq'\).*quantization='int8'"):
        recording_engine(tmp_path)


def test_one_file_counts_before_the_shards_of_an_index_as_in_transformers(tmp_path: Path) -> None:
    directory = make_qwen3(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    whole = (directory / "model.safetensors").read_bytes()
    as_shards(directory, {name: tensor + 1 for name, tensor in tensors.items()})
    (directory / "model.safetensors").write_bytes(whole)
    assert_loads_as_transformers_does(directory, sees=False)


@pytest.mark.parametrize("damage", [as_lfs_pointer, cut, empty])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_a_file_that_did_not_come_whole_is_named_with_its_remedy_at_load(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    directory = make_text(tmp_path / "it", family="llama")
    damage(directory / name)
    with pytest.raises((ModelNotFound, UnsupportedModel)) as caught:
        recording_engine(directory)
    assert name in str(caught.value) or (damage is cut and "tokenizer" in str(caught.value))
    assert ("`git lfs pull`" in str(caught.value)) == (damage is as_lfs_pointer)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_checkpoint_without_tokenizer_files_is_refused_at_load(tmp_path: Path, family: Any) -> None:
    directory = make_text(tmp_path / "it", family=family)
    for file in directory.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelNotFound, match=r"'it' .* has no tokenizer that can be read .* tokenizer.json"):
        recording_engine(directory)


@pytest.mark.parametrize(
    ("name", "damage"), [("model.safetensors", as_lfs_pointer), ("tokenizer.json", cut), ("config.json", cut)]
)
def test_the_doctor_names_a_broken_checkpoint_without_a_traceback(
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(make_text(tmp_path / "it", family="llama") / name)
    monkeypatch.setenv("NANOVLLM_ENGINE__MODEL", str(tmp_path / "it"))
    capsys.readouterr()
    assert main(["doctor", "--seconds", "0"]) == MISUSE
    error = capsys.readouterr().err
    assert error.startswith("nanovllm: ")
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_a_byte_level_tokenizer_keeps_its_spaces_whatever_class_its_configuration_names(
    tmp_path: Path, named: str
) -> None:
    directory = make_text(tmp_path, family="llama")
    stored = Tokenizer.from_file(str(directory / "tokenizer.json"))
    edit_json(directory / "tokenizer_config.json", tokenizer_class=named)
    tokenizer = Checkpoint(directory).tokenizer()
    text = "a b : ℕ, the total is 18.40"
    assert tokenizer.encode(text, add_special_tokens=False) == stored.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(stored.encode(text, add_special_tokens=False).ids) == text
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template


@pytest.mark.parametrize(
    ("version", "said"),
    [("5.17.0", ""), ("5.24.1", ""), ("5.20.0.dev0", ""), ("5.2.0", "older"), ("5.16.9", "older"), ("5.25.0", "newer")],
)
def test_a_release_of_transformers_outside_the_tested_ones_is_said(version: str, said: str) -> None:
    note = untested_version(version)
    assert bool(note) == bool(said)
    assert said in note


def test_an_engine_and_the_doctor_say_so_at_start_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    note = untested_version("5.99.0")
    for module in (transformers_version, diagnostics):
        monkeypatch.setattr(module, "untested_version", lambda: note)
    transformers_version.warn_untested_version.cache_clear()
    directory = make_qwen3(tmp_path)
    for _ in range(2):
        with LLMEngine(str(directory), kv_cache_bytes=1 << 20) as engine:
            findings = {finding.subject: finding.note for finding in diagnostics.describe(engine)}
    assert caplog.text.count(note) == 1
    assert findings["transformers"] == note
    transformers_version.warn_untested_version.cache_clear()


def test_the_oldest_tested_release_is_the_oldest_that_is_installed() -> None:
    bounds = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert f"transformers>={OLDEST},<6" in bounds["optional-dependencies"]["worker"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", None),
        ("rms_norm_eps", -1.0),
        ("eos_token_id", "2"),
        ("eos_token_id", [2, "3"]),
        ("hidden_size", 64.0),
        ("hidden_size", -64),
        ("hidden_size", 0),
        ("vocab_size", "383"),
        ("head_dim", 15),
        ("num_attention_heads", 0),
        ("num_attention_heads", 3),
        ("num_key_value_heads", 3),
        ("num_hidden_layers", True),
        ("max_position_embeddings", "2048"),
        ("dtype", "float17"),
        ("dtype", 16),
        ("dtype", "nn"),
        ("rope_scaling", "linear"),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": "2"}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", ["full_attention"]),
        ("architectures", "LlamaForCausalLM"),
        ("tie_word_embeddings", "false"),
        ("hidden_act", 5),
    ],
)
def test_a_wrong_value_of_the_configuration_is_named_with_file_and_field(
    tmp_path: Path, field: str, value: Any
) -> None:
    file = make_text(tmp_path / "it", family="llama") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(UnsupportedModel) as caught:
        recording_engine(tmp_path / "it")
    said = str(caught.value)
    assert "config.json" in said
    assert "tokenizer" not in said
    assert field.split("_")[-1] in said


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (make_llava, "vision_config", {"hidden_size": "32"}),
        (make_llava, "vision_config", {"num_attention_heads": 0}),
        (make_llava, "vision_config", {"hidden_act": "none"}),
        (make_llava, "text_config", {"rms_norm_eps": "1e-6"}),
        (make_llava, "projector_hidden_act", "none"),
        (make_qwen_vl, "vision_config", {"depth": -1}),
        (make_qwen_vl, "text_config", {"rope_parameters": {"mrope_section": "abc"}}),
        (make_qwen_vl, "vision_config", []),
    ],
)
def test_a_wrong_value_of_either_half_is_named_with_file_and_field(
    tmp_path: Path, make: Callable[[Path], Path], field: str, value: Any
) -> None:
    file = make(tmp_path / "it") / "config.json"
    fields = json.loads(file.read_text())
    fields[field] = fields[field] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(fields))
    with pytest.raises(UnsupportedModel, match=r"config\.json of 'it'") as caught:
        recording_engine(tmp_path / "it")
    assert (next(iter(value)) if isinstance(value, dict) else field).split("_")[-1] in str(caught.value)


@pytest.mark.parametrize(
    ("vocab_size", "why"),
    [
        (1 << 40, r"'lm_head\.weight' is \[383, 64\], expected \[1099511627776, 64\]"),
        (1 << 60, r"config\.json of 'it' cannot be made: "),
    ],
)
def test_a_model_that_no_memory_holds_is_refused_by_its_configuration(
    tmp_path: Path, vocab_size: int, why: str
) -> None:
    edit_json(make_text(tmp_path / "it", family="llama") / "config.json", vocab_size=vocab_size)
    with pytest.raises(UnsupportedModel, match=why):
        recording_engine(tmp_path / "it")


@pytest.mark.parametrize("asked", [99_999_999_999_999, 1 << 62, 1 << 80])
def test_a_kv_cache_that_no_memory_holds_is_refused_by_its_setting(tmp_path: Path, asked: int) -> None:
    with pytest.raises(ConfigurationError, match=f"cannot be allocated: lower kv_cache_bytes={asked}"):
        recording_engine(make_text(tmp_path / "it", family="llama"), kv_cache_bytes=asked)


@pytest.mark.parametrize("block_size", [None, 1 << 50])
def test_a_kv_cache_that_no_memory_holds_names_what_sizes_it(
    tmp_path: Path, block_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache_size, "memory_limit", lambda: 1 << 70)
    options = {"max_num_seqs": 1 << 60, "kv_cache_bytes": None, "block_size": block_size}
    remedy = "set kv_cache_bytes, or lower cpu_memory_utilization=0.4" if block_size is None else "lower block_size="
    with pytest.raises(ConfigurationError, match=f"cannot be allocated: {remedy}"):
        recording_engine(make_text(tmp_path / "it", family="llama"), **options)


@pytest.mark.parametrize("name", ["cpu_memory_utilization", "gpu_memory_utilization", "embedding_cache_bytes"])
@pytest.mark.parametrize("value", ["0.4", None, True, float("nan"), -1])
def test_an_option_that_is_no_number_of_its_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"{name} must be a number.*got {value!r}"):
        EngineConfig.from_options("m", {name: value})


def test_a_preprocessor_that_is_a_pointer_is_named_at_load(tmp_path: Path) -> None:
    directory = make_llava(tmp_path)
    as_lfs_pointer(directory / "processor_config.json")
    with pytest.raises(ModelNotFound, match=r"processor_config\.json is a Git LFS pointer: `git lfs pull`"):
        recording_engine(directory)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
@pytest.mark.parametrize("damage", [as_lfs_pointer, cut, empty])
def test_a_template_that_did_not_come_whole_is_named_at_load(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    directory = make_text(tmp_path / "it", family="llama")
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text(CHAT_TEMPLATE)
    damage(directory / name)
    with pytest.raises(ModelNotFound, match=rf"{name} of checkpoint 'it' is (cut or damaged|a Git LFS pointer)"):
        recording_engine(directory)


def test_a_template_with_the_tags_that_transformers_adds_is_whole(tmp_path: Path) -> None:
    directory = make_text(tmp_path / "it", family="llama")
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% break %}{% endfor %}"
    )
    assert Checkpoint(directory).tokenizer().chat_template


@pytest.mark.parametrize("part", ["multi_modal_projector.", "vision_tower."])
def test_tensors_of_a_half_that_is_missing_are_named_in_full(tmp_path: Path, part: str) -> None:
    directory = edit_tensors(
        make_llava(tmp_path / "it"),
        lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name},
    )
    with pytest.raises(ModelNotFound, match=rf"lacks \d+ tensors, such as {part}"):
        recording_engine(directory)


def test_an_adapter_is_named_for_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelNotFound, match=r"holds an adapter .* merge it into its base model first"):
        recording_engine(tmp_path)
