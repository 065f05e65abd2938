"""A decoder's tensors: their names in a checkpoint, and the slices of this engine's fused parameters that they fill."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.checkpoints.resolve import checkpoint_name
from nanovllm.checkpoints.tensors import StoredTensors
from nanovllm.engine.layers.linear import Linear
from nanovllm.engine.models.decoder import Decoder, DecoderConfig, DecoderLayer
from nanovllm.errors import UnsupportedModel

logger = logging.getLogger(__name__)

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


def _outer_places(model: Decoder) -> dict[str, list[Tensor]]:
    """Where the tensors of a ``…ForCausalLM`` checkpoint go that belong to no layer."""
    return {
        _EMBEDDING: [model.embed_tokens.data],
        _HEAD: [model.lm_head.weight.data],
        "model.norm.weight": [model.norm.weight.data],
    }


def _layer_places(index: int, layer: DecoderLayer, config: DecoderConfig) -> dict[str, list[Tensor]]:
    """Where the tensors of layer ``index`` go: views of its parameters."""
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    half, prefix = config.intermediate_size, f"model.layers.{index}."
    attention, mlp = layer.self_attn, layer.mlp
    places: dict[str, list[Tensor]] = {
        f"{prefix}input_layernorm.weight": [layer.input_layernorm.weight.data],
        f"{prefix}post_attention_layernorm.weight": [layer.post_attention_layernorm.weight.data],
        **_split(attention.qkv_proj, f"{prefix}self_attn.", {"q_proj": query, "k_proj": key, "v_proj": key}),
        **_split(attention.o_proj, f"{prefix}self_attn.", {"o_proj": config.hidden_size}),
        **_split(mlp.gate_up_proj, f"{prefix}mlp.", {"gate_proj": half, "up_proj": half}),
        **_split(mlp.down_proj, f"{prefix}mlp.", {"down_proj": config.hidden_size}),
    }
    if attention.qk_norm is not None:
        heads = attention.qk_norm.data.split((config.num_attention_heads, config.num_key_value_heads))
        places[f"{prefix}self_attn.q_norm.weight"] = list(heads[0])
        places[f"{prefix}self_attn.k_norm.weight"] = list(heads[1])
    return places


def _split(linear: Linear, prefix: str, rows: dict[str, int]) -> dict[str, list[Tensor]]:
    """The parts of a fused layer, weight and bias, by their names in a checkpoint; ``rows`` are outputs of each."""
    targets: dict[str, list[Tensor]] = {}
    for kind, parameter in (("weight", linear.weight), ("bias", linear.bias)):
        if parameter is not None:
            parts = parameter.data.split(list(rows.values()))
            targets |= {f"{prefix}{name}.{kind}": [part] for name, part in zip(rows, parts, strict=True)}
    return targets


class UnfilledDecoder:
    """A text model on the meta device, and where in a checkpoint its parameters are.

    ``tied`` is the configuration's word on head and embedding, and means what it means in transformers: where one of
    them is stored, it serves as both; where both are, with different values, each is used.
    ``prefixes`` are those of stored names, each with its replacement in a ``…ForCausalLM``; the first that fits counts.
    None marks a tensor of the vision model.

    Raises UnsupportedModel where no model can be made of ``config``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        *,
        tied: bool,
        prefixes: Sequence[tuple[str, str | None]],
        dtype: torch.dtype,
    ) -> None:
        self._checkpoint, self._tied, self._prefixes = checkpoint, tied, prefixes
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                self.model = Decoder(config).eval()
        except (RuntimeError, MemoryError) as error:  # torch's words for a size that cannot be
            raise self._impossible(error) from error
        finally:
            torch.set_default_dtype(default)

    def fill(self, device: torch.device) -> Iterator[Sequence[Linear]]:
        """Read the parameters to ``device``, part by part; yields the linear layers of each part when it is there.

        Every parameter is a stored tensor. Raises UnsupportedModel for tensors that are missing, unknown, or not what
        the configuration says, and names them, and where the device has no memory for them.
        """
        model = self.model
        outer, layers = _outer_places(model), _layers(model)
        places = outer.copy()
        for index, layer in enumerate(layers):
            places |= _layer_places(index, layer, model.config)
        names = {self._rename(name) for name in self._checkpoint.names}
        is_shared = self._tied and not {_HEAD, _EMBEDDING} <= names
        if is_shared:
            del places[_EMBEDDING if _HEAD in names else _HEAD]
        stored = StoredTensors(self._checkpoint.files, places, self._rename)
        for index, layer in enumerate(layers):
            with self._making():
                layer.to_empty(device=device)
            stored.copy_to(_layer_places(index, layer, model.config))
            yield (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
        with self._making():
            model.embed_tokens = _made_on(device, model.embed_tokens)
            model.norm.to_empty(device=device)
            model.lm_head.weight = model.embed_tokens if is_shared else _made_on(device, model.lm_head.weight)
        stored.copy_to({name: place for name, place in _outer_places(model).items() if name in places})
        if self._tied and not is_shared:
            self._tie_equal()
        yield (model.lm_head,)

    def _tie_equal(self) -> None:
        model = self.model
        if torch.equal(model.lm_head.weight, model.embed_tokens):
            model.lm_head.weight = model.embed_tokens
            return
        logger.warning(
            "config.json of %r ties the output head to the embedding, and the checkpoint stores both with "
            "different values: both are used. Its tie_word_embeddings should be false",
            checkpoint_name(self._checkpoint.directory),
        )

    def _rename(self, stored: str) -> str | None:
        for prefix, replacement in self._prefixes:
            if stored.startswith(prefix):
                return None if replacement is None else replacement + stored.removeprefix(prefix)
        return stored

    @contextmanager
    def _making(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch's words for a size that is not to be had here
            raise self._impossible(error) from error

    def _impossible(self, error: Exception) -> UnsupportedModel:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        name = checkpoint_name(self._checkpoint.directory)
        return UnsupportedModel(f"the model of config.json of {name!r} cannot be made: {why}")


def _layers(model: Decoder) -> list[DecoderLayer]:
    return [layer for layer in model.layers if isinstance(layer, DecoderLayer)]


def _made_on(device: torch.device, parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
