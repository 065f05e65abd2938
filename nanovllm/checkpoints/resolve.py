"""Resolution of a model's name: a directory, an alias, or the local hub cache. Never the network."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanovllm.errors import ConfigurationError, ModelNotFound

ALIASES_VARIABLE = "NANOVLLM_ENGINE__MODEL_ALIASES"

# The models of README and guide, as the hub spells them; each is known by its last part too, in any case.
_REPOSITORIES = (
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen/Qwen3-VL-2B-Instruct",
    "HuggingFaceTB/SmolLM2-135M",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "openai/clip-vit-base-patch32",
    "openai/clip-vit-base-patch16",
)
_SHORT_NAMES = {
    **{repository.lower(): repository for repository in _REPOSITORIES},
    **{repository.split("/")[1].lower(): repository for repository in _REPOSITORIES},
    "openai/clip-vit-small-patch16": "openai/clip-vit-base-patch16",  # CLIP with patches of 16 has no smaller size
}

_SAFETENSORS = "model.safetensors"
_SAFETENSORS_INDEX = "model.safetensors.index.json"
_FILES_OF_WEIGHTS = (".safetensors", ".bin", ".gguf")
_BIN_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

_LFS_POINTER = b"version https://git-lfs"

_aliases: dict[str, Path] = {"tiny-receipts": Path(__file__).resolve().parent / "assets" / "tiny-receipts"}


def register_alias(name: str, directory: Path) -> None:
    """Register ``name`` for a checkpoint's ``directory`` in this process."""
    _aliases[name] = Path(directory)


def resolve_checkpoint(name: str | Path) -> Path:
    """Directory of the checkpoint ``name``.

    Tried in order: a directory of that name, the aliases (``NANOVLLM_ENGINE__MODEL_ALIASES``, a JSON object of names
    and directories, before the registered ones), the local cache of the Hugging Face hub. In the cache case does not
    matter, and the models of the guide are known by their last part too: ``qwen3-0.6b`` is ``Qwen/Qwen3-0.6B``.

    Raises:
        ModelNotFound: an unknown name, or a place without ``config.json``; says what was tried, and the command that
            gets the checkpoint.
        ConfigurationError: the variable with the aliases is not a JSON object of strings.
    """
    direct = Path(name).expanduser()
    if _is_checkpoint(direct):
        return direct
    alias = {**_aliases, **_environment_aliases()}.get(str(name))
    if alias is not None and _is_checkpoint(alias):
        return alias
    repository = _SHORT_NAMES.get(str(name).lower(), str(name))
    snapshot = _snapshot(repository)
    if snapshot is not None and _is_checkpoint(snapshot):
        return snapshot
    tried = (
        f"directory {direct}: {_what_is_missing(direct)}",
        "aliases: no such name" if alias is None else f"alias to {alias}: {_what_is_missing(alias)}",
        f"local hub cache: {'no snapshot' if snapshot is None else 'no config.json in the snapshot'} of {repository!r}",
    )
    remedies = [remedy_for(place) for place in (direct, alias, snapshot) if place is not None]
    remedy = next(filter(None, remedies), _download(repository))
    raise ModelNotFound(f"no checkpoint called {str(name)!r}; tried {'; '.join(tried)}{remedy}")


def checkpoint_name(directory: Path) -> str:
    """Name of a checkpoint for messages: the repository's where the directory is a snapshot of the hub cache."""
    return repository_of(directory) or directory.name


def repository_of(directory: Path) -> str | None:
    """Repository whose snapshot in the hub cache ``directory`` is."""
    folder = directory.parent.parent.name
    if directory.parent.name != "snapshots" or not folder.startswith("models--"):
        return None
    return folder.removeprefix("models--").replace("--", "/", 1)


def weight_files(directory: Path) -> list[Path]:
    """Safetensors files of a checkpoint: model.safetensors, else the shards of the index, as in transformers.

    Raises:
        ModelNotFound: files are missing, or the index is damaged; says the command that gets them.
    """
    names: Any = [_SAFETENSORS]
    if not (directory / _SAFETENSORS).is_file() and (directory / _SAFETENSORS_INDEX).is_file():
        names = read_json_object(directory / _SAFETENSORS_INDEX, missing=_SAFETENSORS_INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ModelNotFound(f"{_SAFETENSORS_INDEX} of {checkpoint_name(directory)!r} holds no weight_map of files")
        names = sorted(set(names.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        name = checkpoint_name(directory)
        raise ModelNotFound(f"checkpoint {name!r} lacks {missing[0]}{more}{remedy_for(directory)}")
    return [directory / name for name in names]


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is the pointer that Git LFS leaves in place of a file which it has not downloaded."""
    with file.open("rb") as start:
        return start.read(len(_LFS_POINTER)) == _LFS_POINTER


def why_unreadable(file: Path) -> str:
    """What is wrong with a file that cannot be parsed, and the command that mends it, to end a message."""
    if is_lfs_pointer(file):
        return "is a Git LFS pointer: `git lfs pull` gets the file"
    return "is cut or damaged: get it again"


def remedy_for(place: Path) -> str:
    """Command that gets the safetensors that a checkpoint lacks, to end a message; empty where none is known."""
    repository = repository_of(place)
    binary = next((name for name in _BIN_FILES if (place / name).is_file()), None)
    if binary is not None and _is_checkpoint(place):
        return _conversion(binary, repository or place, place.name if repository is None else repository)
    files = [place] if place.is_file() else sorted(place.glob("*.gguf"))
    if files and files[0].suffix == ".gguf":
        return _conversion(files[0].name, files[0], files[0].stem)
    return "" if repository is None else _download(repository)


def _conversion(file: str, source: str | Path, name: str) -> str:
    command = shlex.join(["nanovllm", "convert", str(source), f"{name.rpartition('/')[2] or 'model'}-safetensors"])
    return f"; its weights are there as {file}: `{command}`"


def _download(name: str) -> str:
    """Command that downloads ``name``, where it can be a name on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return ""
    if Path(name).suffix in _FILES_OF_WEIGHTS:
        return ""
    if "/" in name:
        return f"; to download it: `hf download {name}`"
    cached = [repository for repository, _ in _cached() if repository.lower().endswith(f"/{name.lower()}")]
    if cached:
        return f"; the cache has {', '.join(map(repr, cached))}: give that name"
    return f"; to download it, by its full name on the hub: `hf download ORGANISATION/{name}`"


def read_config(directory: Path) -> dict[str, Any]:
    """Read a checkpoint's ``config.json``; raises ModelNotFound where it is missing or is not a JSON object."""
    return read_json_object(Path(directory) / "config.json", missing=f"{directory} holds no config.json")


def read_json_object(path: Path, *, missing: str) -> dict[str, Any]:
    """Read a JSON file; raises ModelNotFound where it does not exist (``missing``) or is not a JSON object."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelNotFound(missing) from error
    except (ValueError, RecursionError) as error:
        why = why_unreadable(path) if is_lfs_pointer(path) else f"is not valid JSON: {error}"
        raise ModelNotFound(f"{path} {why}") from error
    if not isinstance(fields, dict):
        raise ModelNotFound(f"{path} holds no JSON object")
    return fields


def _is_checkpoint(directory: Path) -> bool:
    return (directory / "config.json").is_file()


def _what_is_missing(directory: Path) -> str:
    if (directory / "adapter_config.json").is_file():
        return "holds an adapter (adapter_config.json), not a model: merge it into its base model first"
    if directory.is_dir():
        return "holds no config.json"
    return "is a file, not a directory" if directory.exists() else "does not exist"


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


def _cached() -> Iterator[tuple[str, Path]]:
    """Models in the hub cache: repository and folder."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    for folder in sorted(cache.glob("models--*")):
        yield folder.name.removeprefix("models--").replace("--", "/", 1), folder


def _snapshot(name: str) -> Path | None:
    """Snapshot of a repository in the hub cache: of ``main``, or else the latest.

    ``snapshot_download(local_files_only=True)`` of huggingface_hub is case-sensitive, needs ``refs/main``, and since
    1.0 refuses a snapshot of which only the safetensors were downloaded.
    """
    folders = [(repository != name, folder) for repository, folder in _cached() if repository.lower() == name.lower()]
    for _, folder in sorted(folders):
        try:
            revision = (folder / "refs" / "main").read_text(errors="replace").strip()
        except OSError:
            revision = ""
        if revision and (folder / "snapshots" / revision).is_dir():
            return folder / "snapshots" / revision
        snapshots = [place for place in (folder / "snapshots").glob("*") if place.is_dir()]
        if snapshots:
            return max(snapshots, key=lambda place: place.stat().st_mtime)
    return None
