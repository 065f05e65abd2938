"""Turn a ``.bin`` or GGUF checkpoint into the directory of safetensors that the engine loads.

This is the only place that opens either format. A ``.bin`` file is a pickle: it is read as weights only, so that
nothing in it runs. GGUF is dequantised by transformers, which also takes configuration, tokenizer and chat template
out of it.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import shlex
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.checkpoints.resolve import read_config, read_json_object, resolve_checkpoint
from nanovllm.engine.models.registry import TEXT_FAMILIES, text_architecture
from nanovllm.errors import ConfigurationError, ModelNotFound, UnsupportedModel

_BIN = "pytorch_model.bin"
_BIN_INDEX = "pytorch_model.bin.index.json"
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model")  # configuration, tokenizer, chat template, preprocessing
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def convert(source: Path, output: Path) -> None:
    """Write the checkpoint of ``source`` (a directory of ``.bin`` files, a GGUF file) to the new directory ``output``.

    A ``source`` that is no path is a name that ``resolve_checkpoint`` knows. ``output`` appears complete or not at all.

    Raises:
        ConfigurationError: ``output`` exists, or a package for GGUF is missing.
        ModelNotFound: ``source`` leads nowhere or holds no weights in either format.
        UnsupportedModel: an architecture that the engine does not implement, or a file that is not what it says.
    """
    if output.exists() or output.is_symlink():
        raise ConfigurationError(f"the output {str(output)!r} exists already; name a directory that does not")
    if not source.exists():
        source = resolve_checkpoint(str(source))
    gguf = _find_gguf(source)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        made = Path(scratch) / output.name
        made.mkdir()
        if gguf is not None:
            _convert_gguf(gguf, made)
        else:
            _convert_bin(source, made)
        Checkpoint(made)  # complete, as the engine sees it
        made.rename(output)


def how_to_use(directory: Path) -> str:
    """The call that loads a converted checkpoint, and the worker's setting where a worker can run it alone."""
    fields, path = read_config(directory), json.dumps(str(directory), ensure_ascii=False)
    if str(fields.get("model_type")).removesuffix("_vision_model") in ("clip", "siglip"):
        return f'MultiModalLLM("…", enable_multimodal=True, vision_model={path}) behind a text model'
    sees = not {*TEXT_FAMILIES}.intersection(fields.get("architectures") or ())
    call = f"MultiModalLLM({path}, enable_multimodal=True)" if sees else f"LLM({path})"
    return f"{call}, or for the worker NANOVLLM_ENGINE__MODEL={shlex.quote(str(directory))}"


def _find_gguf(source: Path) -> Path | None:
    """The GGUF file that ``source`` is or holds; None for a directory of ``.bin`` files."""
    if source.is_file():
        if source.suffix != ".gguf":
            raise UnsupportedModel(f"{str(source)!r} is not a .gguf file; give the directory of a .bin checkpoint")
        return source
    if (source / _BIN).is_file() or (source / _BIN_INDEX).is_file():
        return None
    found = sorted(source.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ConfigurationError(f"{str(source)!r} holds {len(found)} GGUF files ({names}); name the one to convert")
    if not found:
        raise ModelNotFound(f"{str(source)!r} holds neither {_BIN} nor {_BIN_INDEX} nor a .gguf file")
    return found[0]


def _convert_bin(source: Path, made: Path) -> None:
    read_config(source)  # without it the weights are of no use
    state: dict[str, Tensor] = {}
    for file in _bin_files(source):
        state |= _read_bin(file)
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.name != _BIN_INDEX:
                shutil.copyfile(file, made / file.name)
    _save(state, made)
    if not (made / "tokenizer.json").is_file() and any((made / name).is_file() for name in _TOKENIZER_FILES):
        _save_tokenizer(source, made)


def _bin_files(source: Path) -> list[Path]:
    if not (source / _BIN_INDEX).is_file():
        return [source / _BIN]
    names = read_json_object(source / _BIN_INDEX, missing=_BIN_INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UnsupportedModel(f"{_BIN_INDEX} holds no weight_map of tensor and file names")
    files = sorted(set(names.values()))
    foreign = [name for name in files if Path(name).name != name]
    if foreign:
        raise UnsupportedModel(f"{_BIN_INDEX} names {foreign[0]!r}, which is not a file beside it")
    missing = [name for name in files if not (source / name).is_file()]
    if missing:
        raise ModelNotFound(f"{str(source)!r} lacks {', '.join(missing)}, which {_BIN_INDEX} names")
    return [source / name for name in files]


def _read_bin(file: Path) -> Mapping[str, Tensor]:
    try:
        # Mapped, the tensors of a large checkpoint pass through memory one shard of output at a time.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        raise UnsupportedModel(
            f"{file.name!r} is no file of weights only: it is damaged, or reading it would run code of its author"
        ) from None
    except (RuntimeError, ValueError, EOFError) as error:
        raise UnsupportedModel(f"{file.name!r} cannot be read: {_first_line(error)}") from None
    if not isinstance(state, dict):
        raise UnsupportedModel(f"{file.name!r} holds a {type(state).__name__}, not a table of tensors")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UnsupportedModel(f"{file.name!r} holds {str(name)!r}, a {type(value).__name__}, among its tensors")
    return state


def _convert_gguf(file: Path, made: Path) -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(f"reading GGUF needs {', '.join(missing)}: pip install '.[convert]' in a clone")
    architecture = text_architecture(_from_gguf(AutoConfig, file))
    if architecture not in TEXT_FAMILIES:
        raise UnsupportedModel(f"{file.name!r} is a {architecture}; supported are {', '.join(TEXT_FAMILIES)}")
    _from_gguf(AutoTokenizer, file).save_pretrained(made)
    model = _from_gguf(AutoModelForCausalLM, file, dtype=torch.float32)
    config = model.config
    del config.quantization_config  # what transformers says of the file, not of what is written here
    config.architectures = [architecture]
    config.save_pretrained(made)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(made)
    _save(model.state_dict(), made)


def _from_gguf(kind: Any, file: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True, **options)
    except Exception as error:  # a damaged file makes its reader fail in any way
        raise UnsupportedModel(f"{file.name!r} cannot be read as GGUF: {_first_line(error)}") from error


def _save(state: dict[str, Tensor], made: Path) -> None:
    """One safetensors file, or shards of 5 GB with their index."""
    heads = [name for name in state if name.endswith("lm_head.weight")]
    save_torch_state_dict(state, made, shared_tensors_to_discard=heads)  # a head tied to the embedding is not stored
    for file in made.glob("*.safetensors"):  # made for their owner alone, and a worker may be another user
        file.chmod((made / "config.json").stat().st_mode)


def _save_tokenizer(source: Path, made: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UnsupportedModel(
            f"{source.name!r}: no tokenizer.json, nor can one be made: {_first_line(error)}"
        ) from error
    tokenizer.save_pretrained(made)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
