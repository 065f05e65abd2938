"""GGUF files: the parts of a split one, the names of their tensors, and their rotary scaling.

``transformers`` reads one file, takes what it does not know for absent, and leaves what is absent random. These checks
come before it. They need the extra ``convert``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from nanovllm.checkpoints.resolve import why_unreadable
from nanovllm.errors import ModelNotFound, UnsupportedModel, counted

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_ROTARY_FACTORS = "rope_freqs.weight"
_NAMED_TENSORS = 5  # in a message
_MAGIC, _HEADER_BYTES = b"GGUF", 8  # with the version
_LLAMA3_CONTEXT = 8192  # of Llama 3, which 3.1 to 3.3 extend; any other value only rescales the other two parameters
_TOLERANCE = 1e-3  # of a rotary factor, relative


def parts_of(file: Path) -> list[Path]:
    """All parts of the GGUF checkpoint of which ``file`` is one; ``file`` alone where it is not split.

    Raises:
        ModelNotFound: parts are missing.
        UnsupportedModel: a part is no GGUF file, or of another checkpoint.
    """
    name = _PART.fullmatch(file.name)
    count = int(_value(_open(file), "split.count", 1))
    if count == 1 and name is None:
        return [file]
    if name is None or int(name["count"]) != max(count, 1):
        raise UnsupportedModel(
            f"{file.name!r} is one of {counted(count, 'part')} by its metadata; the parts of a split GGUF are called "
            "NAME-00001-of-0000N.gguf"
        )
    files = [file.with_name(f"{name['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in files if not part.is_file()]
    if missing:
        raise ModelNotFound(f"{file.name!r} is one of {counted(count, 'part')}, and beside it is no {missing[0]}")
    readers = [_open(part) for part in files]
    for number, (part, reader) in enumerate(zip(files, readers, strict=True)):
        found = (int(_value(reader, "split.no", 0)), int(_value(reader, "split.count", 1)))
        if found != (number, count):
            raise UnsupportedModel(f"{part.name!r} is by its metadata part {found[0] + 1} of {found[1]}")
    stored = sum(len(reader.tensors) for reader in readers)
    wanted = int(_value(readers[0], "split.tensors.count", stored))
    if stored != wanted:
        raise UnsupportedModel(f"the parts of {file.name!r} hold {counted(stored, 'tensor')}, and should hold {wanted}")
    return files


def join_parts(files: Iterable[Path], output: Path) -> None:
    """Write the parts of a split GGUF as one file; UnsupportedModel where a tensor is in two of them."""
    readers = [_open(file) for file in files]
    first = readers[0]
    writer = gguf.GGUFWriter(output, _architecture(first), endianess=first.endianess)
    for field in first.fields.values():
        if field.name.startswith(("GGUF.", "split.")) or field.name == "general.architecture":
            continue
        value = field.contents()
        if value is not None and value != []:
            kind = field.types[0]
            writer.add_key_value(field.name, value, kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    names = [tensor.name for tensor in tensors]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UnsupportedModel(f"tensor {twice[0]!r} is in two parts of the split GGUF")
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data, tensor_endianess=first.endianess)
    writer.close()


def check_tensors(file: Path, parameters: Iterable[str], num_layers: int) -> None:
    """Compare the tensors of a GGUF file with the ``parameters`` of its model in transformers; reads their names only.

    Raises UnsupportedModel for tensors that are missing, and for those that the model has no parameter for.
    """
    reader = _open(file)
    architecture = _architecture(reader)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, num_layers)
    expected = {names.get_name(name, try_suffixes=(".weight", ".bias")) or name for name in parameters}
    stored = {tensor.name for tensor in reader.tensors}
    if missing := sorted(expected - stored):
        raise UnsupportedModel(f"{file.name!r} lacks {counted(len(missing), 'tensor')}: {_listed(missing)}")
    if unknown := sorted(stored - expected - {_ROTARY_FACTORS}):
        raise UnsupportedModel(
            f"{file.name!r} holds {counted(len(unknown), 'tensor')} that transformers has no place for in a model "
            f"of architecture {architecture!r}: {_listed(unknown)}"
        )


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens that a GGUF file says more of than their text."""

    control: dict[int, str]  # never the outcome of plain text
    user_defined: dict[int, str]  # matched before the text around them is split
    bos: int | None
    pad: int | None
    ends: tuple[int, ...]  # of a text, of a turn, of a message: the first is the tokenizer's eos_token
    adds_bos: bool | None  # None: the file leaves it to the reader


def special_tokens(file: Path) -> SpecialTokens:
    """Special tokens of a GGUF file; transformers takes some releases' own list, and the family's default ids."""
    reader = _open(file)

    def value(key: str, default: Any = None) -> Any:
        return _value(reader, f"tokenizer.ggml.{key}", default)

    texts, kinds = value("tokens", []), value("token_type", [])

    def of_kind(kind: gguf.TokenType) -> dict[int, str]:
        return {token: texts[token] for token, found in enumerate(kinds[: len(texts)]) if found == kind}

    ends = [value(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    return SpecialTokens(
        of_kind(gguf.TokenType.CONTROL),
        of_kind(gguf.TokenType.USER_DEFINED),
        value("bos_token_id"),
        value("padding_token_id"),
        tuple(dict.fromkeys(token for token in ends if token is not None)),
        value("add_bos_token"),
    )


def head_dim(file: Path) -> int:
    """Dimensions of an attention head."""
    return _head_dim(_open(file))


def _head_dim(reader: Any) -> int:
    prefix = _architecture(reader)
    width, heads = (_value(reader, f"{prefix}.{key}", 0) for key in ("embedding_length", "attention.head_count"))
    return int(_value(reader, f"{prefix}.attention.key_length", 0) or int(width) // max(1, int(heads)))


def rope_parameters(file: Path) -> dict[str, Any]:
    """Rotary positions of a GGUF file, as ``rope_parameters`` of transformers; it reads none of them but theta.

    Raises UnsupportedModel for a scaling that transformers' configurations of the supported families cannot express.
    """
    reader = _open(file)
    prefix = f"{_architecture(reader)}.rope."

    def value(key: str, default: Any = None) -> Any:
        return _value(reader, prefix + key, default)

    dimensions = _head_dim(reader)
    if (rotated := value("dimension_count", dimensions)) != dimensions:
        raise UnsupportedModel(f"{file.name!r} rotates {rotated} of the {dimensions} dimensions of a head")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(value("freq_base", 10_000.0))}
    kind = value("scaling.type", "linear" if value("scale_linear") is not None else "none")
    factor = float(value("scaling.factor", value("scale_linear", 1.0)))
    factors = next((tensor for tensor in reader.tensors if tensor.name == _ROTARY_FACTORS), None)
    if kind not in ("none", "linear", "yarn") or (kind != "none" and factors is not None):
        also = "" if factors is None else f" beside {_ROTARY_FACTORS}"
        raise UnsupportedModel(f"{file.name!r} scales its rotary positions by {kind!r}{also}, which is not supported")
    if kind == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        for key in ("scaling.yarn_ext_factor", "scaling.yarn_log_multiplier"):
            if value(key) is not None:
                raise UnsupportedModel(f"{file.name!r}: {prefix}{key} is not supported")
        context = _value(reader, f"{_architecture(reader)}.context_length", 0)
        attention = float(value("scaling.yarn_attn_factor", value("scaling.attn_factor", 1.0)))
        rope |= {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": int(value("scaling.original_context_length", context)),
            "beta_fast": float(value("scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(value("scaling.yarn_beta_slow", 1.0)),
        }
        if attention != 1.0:
            rope["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    if factors is not None:
        values = gguf.dequantize(factors.data, factors.tensor_type).astype(np.float64).reshape(-1)
        rope |= _llama3(file, values, rope["rope_theta"], dimensions)
    return rope


def _llama3(file: Path, factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """Parameters of Llama 3's scaling from the factors that llama.cpp stores in their place.

    Between two wavelengths the reciprocal of a factor grows linearly with the frequency, so that a line through these
    gives the parameters, up to a common scale.
    """
    turns = theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)  # of a pair, in one position
    if factors.shape != turns.shape:
        raise UnsupportedModel(f"{file.name!r}: {_ROTARY_FACTORS} has {len(factors)} factors for {len(turns)} pairs")
    factor = float(factors.max())
    if np.allclose(factors, 1.0, rtol=_TOLERANCE):
        return {}
    candidates = [(1.0, 4.0)]
    smooth = (1.0 / factors - 1.0 / factor) / (1.0 - 1.0 / factor)
    between = (smooth > _TOLERANCE) & (smooth < 1.0 - _TOLERANCE)
    if between.sum() >= 2:
        slope, intercept = np.polyfit(turns[between], smooth[between], 1)
        width = _LLAMA3_CONTEXT / slope
        low = -intercept * width
        candidates.append((float(low), float(low + width)))
    for low, high in candidates:
        expected = 1.0 / factor + (1.0 - 1.0 / factor) * np.clip(
            (_LLAMA3_CONTEXT * turns - low) / (high - low), 0.0, 1.0
        )
        if np.allclose(1.0 / factors, expected, rtol=_TOLERANCE):
            return {
                "rope_type": "llama3",
                "factor": round(factor, 6),
                "low_freq_factor": round(low, 6),
                "high_freq_factor": round(high, 6),
                "original_max_position_embeddings": _LLAMA3_CONTEXT,
            }
    raise UnsupportedModel(f"{file.name!r}: the factors of {_ROTARY_FACTORS} are not those of Llama 3's scaling")


def _open(file: Path) -> Any:
    try:
        return gguf.GGUFReader(file)
    except Exception as error:  # a damaged file makes the reader fail in any way
        with file.open("rb") as start:
            header = start.read(_HEADER_BYTES)
        if header[:4] == _MAGIC and int.from_bytes(header[4:], "little") in gguf.READER_SUPPORTED_VERSIONS:
            raise ModelNotFound(f"{file.name!r} {why_unreadable(file)}") from error
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnsupportedModel(f"{file.name!r} cannot be read as GGUF: {first}") from error


def _architecture(reader: Any) -> str:
    return str(_value(reader, "general.architecture", ""))


def _value(reader: Any, key: str, default: Any) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED_TENSORS]) + (", …" if len(names) > _NAMED_TENSORS else "")
