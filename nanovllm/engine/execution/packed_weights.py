"""Packed weights of a checkpoint: mapped from the user's cache, where they were packed before, else packed now."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.engine.config import EngineConfig
from nanovllm.engine.execution.batch_invariance import TILE
from nanovllm.engine.layers import huge_pages, linear
from nanovllm.engine.layers.linear import Linear, choose_torch_layouts
from nanovllm.engine.layers.packed_cache import PackedCache, key_of
from nanovllm.engine.layers.packed_file import DamagedFile, PackedFileWriter, PackedTensors
from nanovllm.engine.layers.packed_state import release, restore, state_of
from nanovllm.engine.models import registry
from nanovllm.engine.models.decoder import Decoder
from nanovllm.engine.models.registry import load_encoder, unfilled_text_model
from nanovllm.engine.models.text_model import TextModel
from nanovllm.start_phases import START, Phase
from nanovllm.vision.encoders import base
from nanovllm.vision.encoders.base import ImageEncoder

logger = logging.getLogger(__name__)

LEAST_BYTES = 16 << 20
"""Weights of a module that are worth a file: fewer are packed in no time."""

_META = torch.device("meta")
_ALIASES, _REVISION = "aliases", "revision"


def load_packed_text(config: EngineConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The text model with its weights in the layouts of this machine; raises as `unfilled_text_model`.

    The plain weights are read and packed layer by layer, and are never all there.
    """
    shell = unfilled_text_model(checkpoint, dtype).model
    cache, expected = _cache(config, dtype, device), _bytes(shell)
    if cache is not None and expected >= LEAST_BYTES:
        key = key_of(
            checkpoint.files,
            code=_code(),
            kind=config.quantization,
            deterministic=config.deterministic,
            config=checkpoint.fields,
            tensors=_shapes(shell),
        )

        def write(writer: PackedFileWriter) -> Mapping[str, str]:
            unfilled = unfilled_text_model(checkpoint, dtype)
            aliases: dict[str, str] = {}
            for linears in unfilled.fill(device):
                with START.timed(Phase.PACKING):
                    _pack(unfilled.model, linears, config)
                aliases |= _write_state(writer, unfilled.model)
                release(unfilled.model)
            return {_ALIASES: json.dumps(aliases)}

        if (kept := cache.open(key, expected, write)) is not None and _restored(shell, kept, config):
            for module in shell.modules():
                if isinstance(module, Linear):
                    module.use_tile(_tile(config))
            shell.packed_file = kept.path
            return shell
    unfilled = unfilled_text_model(checkpoint, dtype)
    with huge_pages.for_new_memory():
        for linears in unfilled.fill(device):
            with START.timed(Phase.PACKING):
                _pack(unfilled.model, linears, config)
    return unfilled.model


def load_packed_encoder(
    config: EngineConfig, checkpoint: Checkpoint, text: TextModel, dtype: torch.dtype, device: torch.device
) -> ImageEncoder | None:
    """The image encoder, if there is one, with its weights in the layouts of this machine; raises as `load_encoder`."""
    cache = _cache(config, dtype, device)
    if cache is not None:
        with warnings.catch_warnings(record=True) as told, _META:
            warnings.simplefilter("always")
            shell = load_encoder(checkpoint, config, text, dtype, _META)
        if shell is None:
            return None
        if (expected := _bytes(shell)) >= LEAST_BYTES:
            key = key_of(
                shell.weight_files,
                code=_code(),
                kind=shell.identity,
                deterministic=config.deterministic,
                tensors=_shapes(shell),
            )

            def write(writer: PackedFileWriter) -> Mapping[str, str]:
                encoder = _load_encoder(config, checkpoint, text, dtype, device)
                assert encoder is not None
                told.clear()  # it has warned itself
                return {_ALIASES: json.dumps(_write_state(writer, encoder)), _REVISION: encoder.revision}

            if (kept := cache.open(key, expected, write)) is not None and _restored(shell, kept, config):
                shell.revision = kept.notes[_REVISION]
                for one in told:
                    warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
                return shell
    return _load_encoder(config, checkpoint, text, dtype, device)


def _load_encoder(
    config: EngineConfig, checkpoint: Checkpoint, text: TextModel, dtype: torch.dtype, device: torch.device
) -> ImageEncoder | None:
    encoder = load_encoder(checkpoint, config, text, dtype, device)
    if encoder is not None:
        _ = encoder.revision  # computed now: it takes seconds and needs the plain weights, and an event loop reads it
        choose_torch_layouts(encoder, deterministic=config.deterministic)
    return encoder


def _cache(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> PackedCache | None:
    """The cache, where one is wanted and weights are packed to what a file can hold: our own panels."""
    stored = torch.int8 if config.quantization == "int8" else dtype
    if not config.packed_weights_bytes or not (linear.has_panels(stored, device) and linear.has_panels(dtype, device)):
        return None
    return PackedCache(config.packed_weights_bytes)


def _restored(module: nn.Module, kept: PackedTensors, config: EngineConfig) -> bool:
    """Give ``module`` what a file has; False, and told, where it is that of another module."""
    try:
        restore(module, kept.tensors, json.loads(kept.notes[_ALIASES]), deterministic=config.deterministic)
    except DamagedFile as error:
        logger.warning("%s is passed over, and weights are packed in memory: %s; remove it", kept.path, error)
        return False
    return True


def _pack(model: Decoder, linears: Sequence[Linear], config: EngineConfig) -> None:
    for layer in linears:
        layer.choose_layout(config.quantization, keep_weight=layer.weight is model.embed_tokens, tile=_tile(config))


def _tile(config: EngineConfig) -> int | None:
    return TILE if config.deterministic else None


def _write_state(writer: PackedFileWriter, module: nn.Module) -> dict[str, str]:
    """Write what has values; returns further names of it."""
    tensors, aliases = state_of(module)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    return aliases


@functools.cache
def _code() -> str:
    """Hash (hex) of the modules that decide how weights are packed, and what their names mean."""
    folders = {Path(module.__file__ or "").parent for module in (linear, registry, base)}
    sources = [path.read_bytes() for folder in sorted(folders) for path in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()


def _shapes(module: nn.Module) -> list[tuple[str, str, list[int]]]:
    everything = chain(module.named_parameters(), module.named_buffers())
    return [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in everything]


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in chain(module.parameters(), module.buffers()))
