"""The local hub cache, laid out as huggingface_hub lays it out, and the commands that get what it lacks."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoints import into_hub_cache, make_clip, make_llava, make_qwen3
from safetensors.torch import load_file

from nanovllm.checkpoints.resolve import ALIASES_VARIABLE, resolve_checkpoint
from nanovllm.cli.main import DONE, main
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ModelNotFound
from nanovllm.sampling_params import SamplingParams
from nanovllm.vision.encoders.clip import VisionEncoder

ROOT = Path(__file__).resolve().parents[2]
QWEN = "Qwen/Qwen3-0.6B"
CLIP = "openai/clip-vit-base-patch32"

pytestmark = pytest.mark.filterwarnings("ignore:The projector between")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and an empty working directory."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "hub"


def stub(directory: Path, **files: str) -> Path:
    """A directory with a configuration and ``files``, whose names have a dot for each ``__``."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "qwen3"}')
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def as_bin(directory: Path, num_shards: int = 1) -> Path:
    """Weights in torch's own format alone: one file, or shards with their index."""
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if num_shards == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return directory
    weight_map = {}
    for shard in range(num_shards):
        part = {name: state[name] for name in sorted(state)[shard::num_shards]}
        torch.save(part, directory / f"pytorch_model-{shard}.bin")
        weight_map |= dict.fromkeys(part, f"pytorch_model-{shard}.bin")
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def refusal(name: str) -> str:
    with pytest.raises(ModelNotFound) as caught:
        resolve_checkpoint(name)
    return str(caught.value)


def command(message: str) -> list[str]:
    """The command between backticks."""
    found = re.findall(r"`([^`]+)`", message)
    assert len(found) == 1, message
    return shlex.split(found[0])


@pytest.mark.parametrize(
    "name", ["qwen3-0.6b", "Qwen3-0.6B", "QWEN3-0.6B", "Qwen/Qwen3-0.6B", "qwen/qwen3-0.6b", "QWEN/Qwen3-0.6b"]
)
def test_a_short_name_and_any_case_find_the_repository(cache: Path, tmp_path: Path, name: str) -> None:
    snapshot = into_hub_cache(cache, QWEN, stub(tmp_path / "made", model__safetensors=""))
    assert resolve_checkpoint(name) == snapshot
    # Laid out as the hub's own library does, which takes the exact name only.
    assert huggingface_hub.snapshot_download(QWEN, cache_dir=cache, local_files_only=True) == str(snapshot)


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        ("clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        ("openai/clip-vit-small-patch16", "openai/clip-vit-base-patch16"),
        ("OpenAI/CLIP-ViT-base-patch16", "openai/clip-vit-base-patch16"),
        ("qwen3-vl-2b-instruct", "Qwen/Qwen3-VL-2B-Instruct"),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M"),
        ("Somebody/Model", "somebody/model"),
        ("somebody/model", "Somebody/Model"),
    ],
)
def test_the_guides_names_lead_to_their_repositories(cache: Path, tmp_path: Path, name: str, repository: str) -> None:
    snapshot = into_hub_cache(cache, repository, stub(tmp_path / "made"))
    assert resolve_checkpoint(name) == snapshot


def test_the_exact_case_comes_first(cache: Path, tmp_path: Path) -> None:
    lower = into_hub_cache(cache, "some/model", stub(tmp_path / "a"))
    upper = into_hub_cache(cache, "Some/Model", stub(tmp_path / "b"))
    assert resolve_checkpoint("some/model") == lower
    assert resolve_checkpoint("Some/Model") == upper


def test_a_directory_and_an_alias_come_before_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into_hub_cache(cache, QWEN, stub(tmp_path / "made"))
    monkeypatch.setenv(ALIASES_VARIABLE, json.dumps({"qwen3-0.6B": str(stub(tmp_path / "alias"))}))
    assert resolve_checkpoint("qwen3-0.6B") == tmp_path / "alias"
    assert resolve_checkpoint(stub(Path("qwen3-0.6B"))) == Path("qwen3-0.6B")


def test_the_revision_of_main_is_taken_and_else_the_latest(cache: Path, tmp_path: Path) -> None:
    old = into_hub_cache(cache, QWEN, stub(tmp_path / "a", text="a"), revision="b" * 40, main=False)
    assert resolve_checkpoint(QWEN) == old
    new = into_hub_cache(cache, QWEN, stub(tmp_path / "b", text="b"), revision="a" * 40, main=False)
    os.utime(old, (1, 1))
    assert resolve_checkpoint(QWEN) == new
    refs = cache / "models--Qwen--Qwen3-0.6B" / "refs"
    (refs / "main").write_text("b" * 40 + "\n")
    assert resolve_checkpoint(QWEN) == old
    (refs / "main").write_text("c" * 40)  # whose snapshot was deleted
    assert resolve_checkpoint(QWEN) == new
    (refs / "main").unlink()
    refs.rmdir()
    assert resolve_checkpoint(QWEN) == new


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_hubs_own_variables_say_where_the_cache_is(tmp_path: Path, variable: str) -> None:
    snapshot = into_hub_cache(tmp_path / "home" / "hub", QWEN, stub(tmp_path / "made"))
    value = {"HF_HOME": tmp_path / "home", "HF_HUB_CACHE": tmp_path / "home" / "hub"}[variable]
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    script = "from nanovllm.checkpoints.resolve import resolve_checkpoint; print(resolve_checkpoint('qwen3-0.6b'))"
    found = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, variable: str(value), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()) == snapshot


@pytest.mark.parametrize(
    ("name", "download"),
    [
        ("qwen3-0.6b", "Qwen/Qwen3-0.6B"),
        ("qwen/QWEN3-0.6b", "Qwen/Qwen3-0.6B"),
        ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        ("openai/clip-vit-small-patch16", "openai/clip-vit-base-patch16"),
        ("someone/Their-Model_1.0", "someone/Their-Model_1.0"),
        ("my-model", "ORGANISATION/my-model"),
    ],
)
def test_an_unknown_name_comes_with_the_download_that_helps(cache: Path, name: str, download: str) -> None:
    assert command(refusal(name)) == ["hf", "download", download]


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./model", "~/model", "a/b/c", "", "two words", "model.gguf"])
def test_what_is_no_name_of_the_hub_comes_with_no_download(cache: Path, name: str) -> None:
    assert "`" not in refusal(name)


def test_the_part_of_a_cached_name_is_answered_with_the_whole(cache: Path, tmp_path: Path) -> None:
    into_hub_cache(cache, "someone/My-Model", stub(tmp_path / "made"))
    assert refusal("my-model").endswith("the cache has 'someone/My-Model': give that name")


def test_a_cache_without_the_model_or_with_an_empty_one_says_so(cache: Path) -> None:
    assert "local hub cache: no snapshot of 'Qwen/Qwen3-0.6B'" in refusal("qwen3-0.6b")
    (cache / "models--Qwen--Qwen3-0.6B" / "snapshots").mkdir(parents=True)
    assert "local hub cache: no snapshot of 'Qwen/Qwen3-0.6B'" in refusal("qwen3-0.6b")
    (cache / "models--Qwen--Qwen3-0.6B" / "snapshots" / "abc").mkdir()
    message = refusal("qwen3-0.6b")
    assert "no config.json in the snapshot of 'Qwen/Qwen3-0.6B'" in message
    assert command(message) == ["hf", "download", QWEN]


def test_a_download_that_was_cut_is_named_and_taken_up_again(cache: Path, tmp_path: Path) -> None:
    snapshot = into_hub_cache(cache, QWEN, stub(tmp_path / "made"))
    (cache / "models--Qwen--Qwen3-0.6B" / "blobs" / "feed.incomplete").write_bytes(b"0")
    with pytest.raises(ModelNotFound, match=r"checkpoint 'Qwen/Qwen3-0.6B' lacks model.safetensors") as caught:
        LLMEngine("qwen3-0.6b")
    assert command(str(caught.value)) == ["hf", "download", QWEN]
    (snapshot / "model.safetensors").symlink_to("../../blobs/gone")  # its blob was deleted
    with pytest.raises(ModelNotFound, match=r"lacks model.safetensors"):
        LLMEngine("qwen3-0.6b")
    (snapshot / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {str(n): f"model-{n}.safetensors" for n in range(3)}})
    )
    with pytest.raises(ModelNotFound, match=r"lacks model-0.safetensors and 2 more; .*`hf download Qwen/Qwen3-0.6B`"):
        LLMEngine("qwen3-0.6b")
    (snapshot / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelNotFound, match=r"of 'Qwen/Qwen3-0.6B' holds no weight_map"):
        LLMEngine("qwen3-0.6b")


def test_a_tower_whose_download_was_cut_is_named_too(cache: Path, tmp_path: Path) -> None:
    snapshot = into_hub_cache(cache, CLIP, make_clip(tmp_path / "made"))
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(ModelNotFound, match=f"checkpoint '{CLIP}' lacks model.safetensors; .*`hf download {CLIP}`"):
        VisionEncoder(64)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_tower_of_bin_files_names_the_conversion_whose_last_line_says_how_to_go_on(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], num_shards: int
) -> None:
    into_hub_cache(cache, CLIP, as_bin(make_clip(tmp_path / "made", with_text_tower=True), num_shards))
    with pytest.raises(ModelNotFound, match=f"'{CLIP}' lacks model.safetensors; .* as pytorch_model.bin") as caught:
        VisionEncoder(64)
    program, *arguments = command(str(caught.value))
    assert (program, arguments) == ("nanovllm", ["convert", CLIP, "clip-vit-base-patch32-safetensors"])
    assert main(arguments) == DONE
    last = capsys.readouterr().out.splitlines()[-1]
    path = re.search(r'vision_model="([^"]+)"', last)
    assert path is not None
    assert VisionEncoder(64, path[1]).num_vision_tokens == 49
    assert "NANOVLLM_ENGINE__MODEL" not in last  # no worker runs a tower alone


@pytest.mark.parametrize("kind", ["text", "llava"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_model_of_bin_files_names_the_conversion_whose_last_line_says_how_to_go_on(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, num_shards: int
) -> None:
    make = {"text": make_qwen3, "llava": make_llava}[kind]
    into_hub_cache(cache, QWEN, as_bin(make(tmp_path / "made"), num_shards))
    with pytest.raises(ModelNotFound) as caught:
        LLMEngine("qwen3-0.6b")
    program, *arguments = command(str(caught.value))
    assert (program, arguments) == ("nanovllm", ["convert", QWEN, "Qwen3-0.6B-safetensors"])
    assert main(arguments) == DONE
    last = capsys.readouterr().out.splitlines()[-1]
    call, path = re.search(r'(\w+)\("([^"]+)"', last).groups()  # type: ignore[union-attr]
    assert call == {"text": "LLM", "llava": "MultiModalLLM"}[kind]
    assert ("enable_multimodal=True" in last) == (kind == "llava")
    assert last.endswith(f"NANOVLLM_ENGINE__MODEL={path}")
    with LLMEngine(path, kv_cache_bytes=4 << 20) as engine:
        assert engine.generate("hello", SamplingParams(max_tokens=2), use_tqdm=False)[0].token_ids


def test_a_directory_of_bin_files_is_named_by_its_path(cache: Path, tmp_path: Path) -> None:
    directory = as_bin(make_qwen3(tmp_path / "my model"))
    with pytest.raises(ModelNotFound, match=r"checkpoint 'my model' lacks model.safetensors") as caught:
        LLMEngine(str(directory))
    assert command(str(caught.value)) == ["nanovllm", "convert", str(directory), "my model-safetensors"]


def test_other_bin_files_are_no_weights(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        LLMEngine(str(stub(tmp_path / "made", training_args__bin="")))
    assert "convert" not in str(caught.value)


def test_a_gguf_file_names_the_conversion(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    file.touch()
    message = refusal(str(file))
    assert "is a file, not a directory" in message
    assert command(message) == ["nanovllm", "convert", str(file), "small-safetensors"]
    (tmp_path / "made").mkdir()
    file.rename(tmp_path / "made" / "q8.gguf")
    snapshot = into_hub_cache(cache, "Qwen/Qwen3-0.6B-GGUF", tmp_path / "made")
    message = refusal("qwen/qwen3-0.6b-gguf")
    assert command(message) == ["nanovllm", "convert", str(snapshot / "q8.gguf"), "q8-safetensors"]


def test_the_conversion_finds_what_the_engine_finds(cache: Path, tmp_path: Path) -> None:
    into_hub_cache(cache, QWEN, as_bin(make_qwen3(tmp_path / "made")))
    assert main(["convert", "qwen3-0.6b", str(tmp_path / "out")]) == DONE
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:20_000]), "model.safetensors of checkpoint 'mine' is cut or"),
        (lambda file: file.write_bytes(b""), "model.safetensors of checkpoint 'mine' is cut or damaged"),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "`git lfs pull`"),
    ],
)
def test_a_weight_file_that_is_no_safetensors_is_named_with_its_cure(
    tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    directory = make_qwen3(tmp_path / "mine")
    damage(directory / "model.safetensors")
    with pytest.raises(ModelNotFound, match=re.escape(reason)):
        LLMEngine(str(directory))
    tower = make_clip(tmp_path / "tower" / "mine")
    damage(tower / "model.safetensors")
    with pytest.raises(ModelNotFound, match=re.escape(reason)):
        VisionEncoder(64, str(tower))


def test_a_checkpoint_without_a_tokenizer_does_not_load(tmp_path: Path) -> None:
    directory = make_qwen3(tmp_path / "mine")
    for file in directory.glob("tokenizer*"):
        file.unlink()
    for missing in (directory, make_clip(tmp_path / "tower")):
        with pytest.raises(ModelNotFound, match="no tokenizer that can be read"):
            LLMEngine(str(missing))
