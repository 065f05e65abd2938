"""Turn a ``.bin`` or GGUF checkpoint into the directory of safetensors that the engine loads.

This is the only place that opens either format. A ``.bin`` file is a pickle: it is read as weights only, so that
nothing in it runs. GGUF is dequantised by transformers, which also takes configuration, tokenizer and chat template
out of it; what it leaves out of account is checked or read in ``checkpoints/gguf_files.py``. A conversion ends with the
comparison of the source's logits in transformers with the result's in this engine; of a vision tower, of its features.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import shlex
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.checkpoints.resolve import is_lfs_pointer, read_config, read_json_object, resolve_checkpoint
from nanovllm.engine.attention.base import AttentionBatch
from nanovllm.engine.attention.sdpa import SdpaAttention
from nanovllm.engine.layers.rotary import known_positions
from nanovllm.engine.models.registry import LLAVA, QWEN_VL, TEXT_FAMILIES, load_text_model, text_architecture
from nanovllm.errors import ConfigurationError, ModelNotFound, UnsupportedModel, counted
from nanovllm.vision.encoders.clip import VisionEncoder

if TYPE_CHECKING:
    from nanovllm.checkpoints.gguf_files import SpecialTokens

_BIN = "pytorch_model.bin"
_BIN_INDEX = "pytorch_model.bin.index.json"
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model")  # configuration, tokenizer, chat template, preprocessing
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_ARCHITECTURES = (*TEXT_FAMILIES, LLAVA, *QWEN_VL)
_REPORTING = {"output_loading_info": True}
_COMPARED_TOKENS = 24
_TOLERANCE = {torch.float32: 1e-3}  # of the largest logit; narrower types round in every layer
_NARROW_TOLERANCE = 5e-2


def convert(source: Path, output: Path) -> float:
    """Write the checkpoint of ``source`` (a directory of ``.bin`` files, a GGUF file) to the new directory ``output``.

    A ``source`` that is no path is a name that ``resolve_checkpoint`` knows; of a split GGUF any part is named, or the
    directory. ``output`` appears complete or not at all. Needs memory for the model once, in the type it is written in.

    Returns:
        The largest difference between the logits (of a vision tower: features) of source and result, as a part of the
        largest one.

    Raises:
        ConfigurationError: ``output`` exists, or a package for GGUF is missing.
        ModelNotFound: ``source`` leads nowhere, or holds no weights in either format, or not all of them.
        UnsupportedModel: an architecture that the engine does not implement, a file that is not what it says, or a
            result whose logits are not the source's.
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
        expected = _convert_bin(source, made) if gguf is None else _convert_gguf(gguf, made, Path(scratch))
        difference = _compare(expected, made)
        made.rename(output)
    return difference


def how_to_use(directory: Path) -> str:
    """The call that loads a converted checkpoint, and the worker's setting where a worker can run it alone."""
    fields, path = read_config(directory), json.dumps(str(directory), ensure_ascii=False)
    if _is_tower(fields):
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
    wholes = {re.sub(r"-\d{5}-of-\d{5}$", "", file.stem) for file in found}
    if len(wholes) > 1 or (len(found) > 1 and found[0].stem in wholes):
        names = ", ".join(file.name for file in found)
        raise ConfigurationError(f"{str(source)!r} holds {len(found)} GGUF files ({names}); name the one to convert")
    if not found and any(source.glob("*.safetensors")):
        raise ConfigurationError(f"{str(source)!r} holds safetensors already: {how_to_use(source.resolve())}")
    if not found:
        raise ModelNotFound(f"{str(source)!r} holds neither {_BIN} nor {_BIN_INDEX} nor a .gguf file")
    return found[0]


def _convert_bin(source: Path, made: Path) -> Tensor:
    """Write the tensors as they are, with all that stands beside them; returns the source's logits, or features."""
    fields = read_config(source)
    architecture = next(iter(fields.get("architectures") or ()), "")
    is_tower = _is_tower(fields)
    if not hasattr(transformers, architecture) or not (is_tower or architecture in _ARCHITECTURES):
        raise UnsupportedModel(
            f"{str(source)!r} is of architecture {architecture!r}; supported are {', '.join(_ARCHITECTURES)}, and "
            "towers of CLIP and SigLIP"
        )
    state: dict[str, Tensor] = {}
    for file in _bin_files(source):
        state |= _read_bin(file)
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.name != _BIN_INDEX:
                shutil.copyfile(file, made / file.name)
    dtype = next((value.dtype for value in state.values() if value.is_floating_point()), torch.float32)
    _save(state, made)
    if not (made / "tokenizer.json").is_file() and any((made / name).is_file() for name in _TOKENIZER_FILES):
        _save_tokenizer(source, made)
    loaded = getattr(transformers, architecture).from_pretrained(
        None, config=Checkpoint(made).config, state_dict=state, dtype=dtype, **_REPORTING
    )
    model = _complete(source, loaded)
    return _features(model) if is_tower else _logits(model, architecture)


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
    _refuse_pointer(file)
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


def _convert_gguf(file: Path, made: Path, scratch: Path) -> Tensor:
    """Write what transformers reads out of the file, in float32; returns the source's logits."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(f"reading GGUF needs {', '.join(missing)}: pip install '.[convert]' in a clone")
    from nanovllm.checkpoints.gguf_files import (
        check_tensors,
        head_dim,
        join_parts,
        parts_of,
        rope_parameters,
        special_tokens,
    )

    _refuse_pointer(file)
    parts = parts_of(file)
    if len(parts) > 1:
        file = scratch / file.name.replace(f"-of-{len(parts):05}", "")
        join_parts(parts, file)
    config = _from_gguf(AutoConfig, file)
    architecture = text_architecture(config)
    if architecture not in TEXT_FAMILIES:
        raise UnsupportedModel(f"{file.name!r} is a {architecture}; supported are {', '.join(TEXT_FAMILIES)}")
    if hasattr(config, "head_dim"):  # transformers reads it for Llama only, and else takes its family's default
        config.head_dim = head_dim(file)
    config.rope_parameters = rope_parameters(file)
    with torch.device("meta"):
        names = [name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()]
    check_tensors(file, names, config.num_hidden_layers)
    tokenizer, special = _from_gguf(AutoTokenizer, file), special_tokens(file)
    _complete_tokenizer(tokenizer, special)
    tokenizer.save_pretrained(made)
    model = _complete(file, _from_gguf(AutoModelForCausalLM, file, config=config, dtype=torch.float32, **_REPORTING))
    config = model.config
    del config.quantization_config  # what transformers says of the file, not of what is written here
    config.architectures = [architecture]
    for fields in filter(None, (config, model.generation_config)):
        fields.bos_token_id, fields.pad_token_id = special.bos, special.pad
        fields.eos_token_id = special.ends[0] if len(special.ends) == 1 else list(special.ends) or None
        fields.save_pretrained(made)
    _save(model.state_dict(), made)
    return _logits(model, architecture)


def _refuse_pointer(file: Path) -> None:
    if is_lfs_pointer(file):
        raise ModelNotFound(f"{file.name!r} is a Git LFS pointer: `git lfs pull` gets the file")


def _complete(source: Path, loaded: tuple[Any, dict[str, Any]]) -> Any:
    """A model that transformers has loaded; UnsupportedModel where it drew tensors that the source lacks."""
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UnsupportedModel(f"{source.name!r} lacks {counted(len(missing), 'tensor')}, such as {missing[0]}")
    return model


@torch.inference_mode()
def _logits(model: Any, architecture: str) -> Tensor:
    """Logits [tokens, vocab] of a model of transformers for the sample that ``_compare`` takes."""
    ids, positions = _sample(model.config)
    # Those of Qwen-VL are three-dimensional, and of text alone those that it counts itself.
    located = {} if architecture in QWEN_VL else {"position_ids": positions[None]}
    return model.eval()(input_ids=ids[None], **located).logits[0].clone()


def _is_tower(fields: Mapping[str, Any]) -> bool:
    return str(fields.get("model_type")).removesuffix("_vision_model") in ("clip", "siglip")


@torch.inference_mode()
def _features(model: Any) -> Tensor:
    """Features [1, patches, width × layers] of a tower of transformers, alone or with its text half, of one image."""
    tower = getattr(model.eval(), "vision_model", model)
    # Releases of transformers differ in whether the last hidden state is taken before this norm.
    tower.post_layernorm = torch.nn.Identity()
    config = tower.config
    states = tower(_sample_image(config.image_size, model.dtype), output_hidden_states=True).hidden_states
    patches = (config.image_size // config.patch_size) ** 2
    return torch.cat([state[:, -patches:] for state in states], -1)


def _made_features(made: Path, dtype: torch.dtype) -> Tensor:
    """What ``_features`` takes, by this engine's encoder."""
    fields = read_config(made)
    config = fields.get("vision_config", fields)
    size, patch, layers = (config[name] for name in ("image_size", "patch_size", "num_hidden_layers"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the projector, which is not asked
        encoder = VisionEncoder(
            8,
            made,
            max_image_size=size,
            num_vision_tokens=(size // patch) ** 2,
            vision_feature_layer=list(range(layers + 1)),
            dtype=dtype,
        )
    return encoder.features(_sample_image(size, dtype))


def _sample_image(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn((1, 3, size, size), generator=torch.Generator().manual_seed(0)).to(dtype)


@torch.inference_mode()
def _compare(expected: Tensor, made: Path) -> float:
    """The largest difference of the result from ``expected``, as a part of the largest value; UnsupportedModel."""
    what, dtype = "logits", expected.dtype
    if _is_tower(read_config(made)):
        what, found = "features", _made_features(made, dtype)
    else:
        found = _made_logits(Checkpoint(made), dtype)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE.get(dtype, _NARROW_TOLERANCE):
        raise UnsupportedModel(
            f"the converted checkpoint's {what} differ from its source's by {difference:.2g} of the largest: nothing "
            "is written"
        )
    return difference


def _made_logits(made: Checkpoint, dtype: torch.dtype) -> Tensor:
    """What ``_logits`` takes, by this engine's model."""
    device = torch.device("cpu")
    model = load_text_model(made, dtype, device)
    ids, positions = _sample(made.config)
    attention, config = SdpaAttention(device, dtype), model.config
    blocks = -(-len(ids) // attention.block_size)
    caches = [
        attention.allocate(blocks, config.num_key_value_heads, config.head_dim, dtype)
        for _ in range(config.num_hidden_layers)
    ]
    if config.position_axes is not None:
        positions = torch.arange(len(ids))[:, None].expand(-1, 3)
    batch = AttentionBatch([len(ids)], [len(ids)], [list(range(blocks))])
    return model.logits(model(model.embed(ids), positions, caches, attention, attention.metadata(batch)))


def _sample(config: Any) -> tuple[Tensor, Tensor]:
    """Tokens of text [n], and positions [n] over the whole context: short distances hide how positions are scaled."""
    text = config.get_text_config()
    fields = config.to_dict().items()
    special = {value for name, value in fields if name.endswith(("_token_id", "_token_index")) and type(value) is int}
    plain = [token for token in range(min(text.vocab_size, 50_000)) if token not in special]
    ids = torch.tensor([plain[number * 7919 % len(plain)] for number in range(1, _COMPARED_TOKENS + 1)])
    return ids, torch.linspace(0, known_positions(text) - 1, len(ids)).long()


def _complete_tokenizer(tokenizer: Any, special: SpecialTokens) -> None:
    """Give a tokenizer that transformers made of a GGUF file the special tokens which that file names."""
    for texts, is_control in ((special.control, True), (special.user_defined, False)):
        known = tokenizer.added_tokens_decoder
        lost = [text for token, text in texts.items() if token not in known]
        lost = [text for text in lost if tokenizer.convert_tokens_to_ids(text) in texts]
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in lost], special_tokens=is_control)
    if special.ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(special.ends[0])
    if special.adds_bos is None or special.bos is None:
        return
    bos, backend = tokenizer.convert_ids_to_tokens(special.bos), tokenizer.backend_tokenizer
    tokenizer.bos_token = bos
    if backend.encode("").ids != [special.bos] * special.adds_bos:
        before = f"{bos} " * special.adds_bos
        backend.post_processor = TemplateProcessing(single=f"{before}$A", special_tokens=[(bos, special.bos)])


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
