"""Where a model's name leads: a directory, an alias, or the local hub cache. Never the network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nanovllm.errors import ConfigurationError, ModelNotFound

ALIASES_VARIABLE = "NANOVLLM_ENGINE__MODEL_ALIASES"

_aliases: dict[str, Path] = {
    "tiny-receipts": Path(__file__).resolve().parent.parent / "engine" / "assets" / "tiny-receipts",
}


def register_alias(name: str, directory: Path) -> None:
    """Let ``name`` stand for a checkpoint's ``directory`` in this process."""
    _aliases[name] = Path(directory)


def resolve_checkpoint(name: str | Path) -> Path:
    """Find the directory of a checkpoint.

    Tried in order: a directory of that name, the aliases (``NANOVLLM_ENGINE__MODEL_ALIASES``, a JSON object of names
    and directories, before the registered ones), the local cache of the Hugging Face hub.

    Raises:
        ModelNotFound: no place knows the name, or what it leads to holds no ``config.json``; says what was tried.
        ConfigurationError: the variable with the aliases is not a JSON object of strings.
    """
    tried: list[str] = []
    direct = Path(name).expanduser()
    if _is_checkpoint(direct):
        return direct
    tried.append(f"directory {direct}: {_what_is_missing(direct)}")

    alias = {**_aliases, **_environment_aliases()}.get(str(name))
    if alias is None:
        tried.append("aliases: no such name")
    elif _is_checkpoint(alias):
        return alias
    else:
        tried.append(f"alias to {alias}: {_what_is_missing(alias)}")

    cached = _from_hub_cache(str(name))
    if cached is not None:
        return cached
    tried.append("local hub cache: no complete snapshot")
    raise ModelNotFound(f"no checkpoint called {str(name)!r}; tried {'; '.join(tried)}")


def read_config(directory: Path) -> dict[str, Any]:
    """Read a checkpoint's ``config.json``.

    Raises:
        ModelNotFound: it is missing or is not a JSON object.
    """
    return read_json_object(Path(directory) / "config.json", missing=f"{directory} holds no config.json")


def read_json_object(path: Path, *, missing: str) -> dict[str, Any]:
    """Read one of a checkpoint's JSON files.

    Raises:
        ModelNotFound: it is not there (the message is ``missing``), or is not a JSON object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelNotFound(missing) from error
    except ValueError as error:
        raise ModelNotFound(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ModelNotFound(f"{path} holds no JSON object")
    return fields


def _is_checkpoint(directory: Path) -> bool:
    return (directory / "config.json").is_file()


def _what_is_missing(directory: Path) -> str:
    return "holds no config.json" if directory.is_dir() else "does not exist"


def _environment_aliases() -> dict[str, Path]:
    text = os.environ.get(ALIASES_VARIABLE, "")
    if not text:
        return {}
    try:
        table = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"{ALIASES_VARIABLE} is not valid JSON: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(directory, str) for directory in table.values()):
        raise ConfigurationError(f"{ALIASES_VARIABLE} must be a JSON object of names and directories")
    return {name: Path(directory).expanduser() for name, directory in table.items()}


def _from_hub_cache(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return snapshot if _is_checkpoint(snapshot) else None
