from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm.checkpoints.resolve import ALIASES_VARIABLE, read_config, register_alias, resolve_checkpoint
from nanovllm.errors import ConfigurationError, ModelNotFound

ROOT = Path(__file__).resolve().parents[2]


def checkpoint(directory: Path, **config: object) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3", **config}))
    return directory


def test_a_directory_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = checkpoint(tmp_path / "model")
    assert resolve_checkpoint(directory) == directory
    assert resolve_checkpoint(str(directory)) == directory
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("model").resolve() == directory


def test_an_alias_leads_to_its_directory_and_the_environments_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered, from_environment = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    register_alias("an/alias-of-this-test", registered)
    assert resolve_checkpoint("an/alias-of-this-test") == registered
    monkeypatch.setenv(ALIASES_VARIABLE, json.dumps({"an/alias-of-this-test": str(from_environment)}))
    assert resolve_checkpoint("an/alias-of-this-test") == from_environment


@pytest.mark.parametrize("value", ["{", "[]", '{"a": 1}'])
def test_aliases_that_are_no_table_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALIASES_VARIABLE, value)
    with pytest.raises(ConfigurationError, match=ALIASES_VARIABLE):
        resolve_checkpoint("anything")


def test_the_local_hub_cache_is_found_without_the_network(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--model"
    snapshot = checkpoint(repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    script = "from nanovllm.checkpoints.resolve import resolve_checkpoint; print(resolve_checkpoint('someone/model'))"
    found = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()) == snapshot


@pytest.mark.parametrize("name", ["nobody/has-this", "not a valid/hub name!", "/nowhere/at/all", "a/b/c", ""])
def test_an_unknown_name_says_what_was_tried(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound) as caught:
        resolve_checkpoint(name)
    for place in ("directory", "aliases", "local hub cache"):
        assert place in str(caught.value)


def test_a_directory_or_alias_without_a_configuration_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"holds no config\.json"):
        resolve_checkpoint(tmp_path)
    register_alias("alias-to-nowhere", tmp_path / "missing")
    with pytest.raises(ModelNotFound, match=r"alias to .*missing: does not exist"):
        resolve_checkpoint("alias-to-nowhere")


def test_a_configuration_is_read_or_refused_clearly(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "model", hidden_size=8)
    assert read_config(directory)["hidden_size"] == 8
    (directory / "config.json").write_text("{")
    with pytest.raises(ModelNotFound, match="not valid JSON"):
        read_config(directory)
    (directory / "config.json").write_text("[]")
    with pytest.raises(ModelNotFound, match="no JSON object"):
        read_config(directory)
    with pytest.raises(ModelNotFound, match=r"holds no config\.json"):
        read_config(tmp_path)


def test_decoding_and_the_cache_do_not_import_torch() -> None:
    images = [f"vision.images.{name}" for name in ("decode", "preprocess", "child", "pool")]
    modules = ("checkpoints.resolve", *images, "vision.embedding_cache")
    imports = "; ".join(f"import nanovllm.{module}" for module in modules)
    script = f"{imports}; import sys; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
