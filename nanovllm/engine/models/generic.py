"""Any decoder of transformers over the engine's paged attention.

transformers computes the layers; attention comes to the engine through transformers' own interface. What each layer
wants of it is learnt by a probe, not read from a configuration, and before a model serves, its logits are held against
its own cached generation (`nanovllm.engine.models.generic_trial`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.engine.attention.base import AttentionBackend
from nanovllm.engine.layers import huge_pages
from nanovllm.engine.layers.linear import Linear, adopt_torch_linears
from nanovllm.engine.models.generic_attention import (
    IMPLEMENTATION,
    STEP,
    AttendsForLayer,
    AttentionLayer,
    AttentionProbe,
    PagedStep,
)
from nanovllm.engine.models.generic_loading import known_window, max_positions
from nanovllm.engine.models.generic_states import (
    STATEFUL_LAYERS,
    RowStates,
    SequenceStates,
    run_by_sequence,
    stateful_modules,
)
from nanovllm.engine.models.text_model import TextModel
from nanovllm.engine.scheduling.sequence import ImageSpan
from nanovllm.errors import ConfigurationError, UnsupportedModel

_HIDDEN = "nanovllm_hidden"
_PROBE_TOKENS = 2
PROVEN_TOKENS = 4096
"""The longest window that the trial at load goes beyond."""
_IMAGE_LEVELS = "deepstack_visual_embeds"


@dataclass(frozen=True)
class GenericConfig:
    """The shape of a model, most of it as its probe found it. ``layers`` are those with keys and values, by index."""

    name: str  # of the architecture, for messages
    vocab_size: int
    hidden_size: int
    max_positions: int
    layers: Mapping[int, AttentionLayer]
    position_axes: tuple[int, ...] | None
    unproven_window: int | None  # in tokens, named by the configuration and too long for the trial; None: there is none

    @property
    def num_axes(self) -> int:
        """How many positions a token has."""
        return 1 if self.position_axes is None else len(self.position_axes)

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the first attention layer."""
        return next(iter(self.layers.values())).num_heads

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]:
        """Of every layer with keys and values, their heads and width."""
        return tuple(layer.kv_shape for layer in self.layers.values())

    def context_limit(self, asked: int | None) -> int:
        """The longest context in tokens: what was ``asked`` for, or else all positions that the model knows.

        Raises ConfigurationError beyond those, and UnsupportedModel beyond a layer's window.
        """
        limit = asked or min(self.max_positions, self.unproven_window or self.max_positions)
        if limit > self.max_positions:
            raise ConfigurationError(f"max_model_len={limit}, but the model's positions end at {self.max_positions}")
        for index, layer in self.layers.items():
            if layer.window is not None and limit > layer.window:
                raise UnsupportedModel(
                    f"{self.name}, layer {index}: a window of {layer.window} tokens is not supported with "
                    f"max_model_len={limit}; up to max_model_len={layer.window} it is full attention"
                )
        if self.unproven_window is not None and limit > self.unproven_window:
            raise UnsupportedModel(
                f"{self.name}: its configuration names a window of {self.unproven_window} tokens, which the trial at "
                f"load is too short for; max_model_len={limit} may be {self.unproven_window} at most"
            )
        return limit


def stated_config(config: Any) -> GenericConfig:
    """What a transformers ``config`` itself says of the shape: an estimate for what is to be known without weights."""
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    layer = AttentionLayer(heads, getattr(text, "num_key_value_heads", None) or heads, dim, dim, dim**-0.5, None, ())
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * int(text.num_hidden_layers)
    return GenericConfig(
        name=str(config.model_type),
        vocab_size=int(text.vocab_size),
        hidden_size=int(text.hidden_size),
        max_positions=max_positions(config),
        layers={index: layer for index, kind in enumerate(kinds) if kind not in STATEFUL_LAYERS},
        position_axes=None,
        unproven_window=window if (window := known_window(text)) > PROVEN_TOKENS else None,
    )


class GenericDecoder(TextModel):
    """The decoder and the head of a model of transformers; its other parts (towers) belong to an encoder.

    Raises UnsupportedModel for what the engine's attention does not have, by layer and name.
    """

    config: GenericConfig
    why_no_graphs = "transformers' layers are not recorded"

    def __init__(self, model: Any) -> None:
        """``model`` is in evaluation mode, with its weights; its attention is the engine's from here on."""
        super().__init__()
        self.model = model
        self.text: Any = model.config.get_text_config()
        self.text._attn_implementation = IMPLEMENTATION
        self.decoder = model.get_decoder()
        self.embed_tokens = model.get_input_embeddings().weight
        self.lm_head = model.get_output_embeddings()
        if self.decoder is model:
            raise UnsupportedModel(f"{type(model).__name__}: transformers has no decoder of it apart from its head")
        if self.lm_head is None:
            raise UnsupportedModel(f"{type(model).__name__} has no output head")
        if "position_ids" not in inspect.signature(self.decoder.forward).parameters:
            raise UnsupportedModel(f"{type(model).__name__}: its decoder takes no position_ids")
        kinds = getattr(self.text, "layer_types", None) or ()
        stateful = stateful_modules(self.decoder, kinds)
        for module in stateful:
            run_by_sequence(module, STEP)
        self.has_states = bool(stateful)
        for module in {model.base_model, self.decoder}:  # the head's forward calls one or the other
            _return_given_hidden(module)
        num_axes = self._num_axes()
        self.config = GenericConfig(
            name=type(model).__name__,
            vocab_size=model.get_output_embeddings().weight.shape[0],
            hidden_size=self.embed_tokens.shape[1],
            max_positions=max_positions(model.config),
            layers=self._probe(kinds, stateful),
            position_axes=tuple(range(num_axes)) if num_axes > 1 else None,
            unproven_window=window if (window := known_window(self.text)) > PROVEN_TOKENS else None,
        )
        self.never_sampled = [token for token in image_token_ids(model.config) if token < self.config.vocab_size]

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] → [T, hidden]."""
        embedded: Tensor = self.model.get_input_embeddings()(token_ids)
        return embedded

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        caches: Sequence[Tensor],
        attention: AttentionBackend,
        metadata: Any,
        images: Sequence[tuple[int, Tensor]] = (),
        wanted: Tensor | None = None,
        states: Sequence[RowStates] = (),
    ) -> Tensor:
        """Embeddings [T, hidden] at ``positions`` [T] or [T, axes] → hidden states [T, hidden], or of ``wanted`` rows.

        ``images`` as in `Decoder.forward`. ``states`` are those of every row, where the model has any.
        """
        size = self.config.hidden_size
        more: dict[str, Any] = {}
        for first, embedding in images:
            hidden[first : first + len(embedding)] = embedding[:, :size]
        if images and (depth := images[0][1].shape[1] // size) > 1:
            where = torch.zeros(1, len(hidden), dtype=torch.bool, device=hidden.device)
            for first, embedding in images:
                where[0, first : first + len(embedding)] = True
            levels = torch.cat([embedding for _, embedding in sorted(images, key=lambda image: image[0])])
            more = {
                "visual_pos_masks": where,
                _IMAGE_LEVELS: [levels[:, at * size : (at + 1) * size] for at in range(1, depth)],
            }
        by_layer = dict(zip(self.config.layers, caches, strict=True))
        output = self._run(hidden, positions, PagedStep(attention, by_layer, metadata, states), **more)
        return output if wanted is None else output.index_select(0, wanted)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] → [rows, vocab], scaled and capped as the model does it; image tokens are never sampled."""
        given = {_HIDDEN: hidden.unsqueeze(0)}
        logits: Tensor = self.model(inputs_embeds=hidden.unsqueeze(0), use_cache=False, **given).logits[0]
        for token in self.never_sampled:
            logits[:, token] = float("-inf")
        return logits

    def choose_layouts(self) -> None:
        """Store the weights of linear layers as this machine multiplies by fastest."""
        adopt_torch_linears(self.decoder)
        adopt_torch_linears(self.model, only=self.lm_head)
        self.lm_head = self.model.get_output_embeddings()
        with huge_pages.for_new_memory():
            for module in (*self.decoder.modules(), self.lm_head):
                if isinstance(module, Linear):
                    module.choose_layout(keep_weight=module.weight is self.embed_tokens)

    def _run(self, hidden: Tensor, positions: Tensor, step: AttendsForLayer, **more: Any) -> Tensor:
        located = positions.unsqueeze(0) if positions.ndim == 1 else positions.T.unsqueeze(1)
        output = self.decoder(
            inputs_embeds=hidden.unsqueeze(0), position_ids=located, use_cache=False, **{STEP: step}, **more
        )
        computed: Tensor = output[0][0]
        return computed

    def _num_axes(self) -> int:
        """Positions of a token: those that the model's own function gives."""
        rope_index = getattr(self.model.base_model, "get_rope_index", None)
        if rope_index is None:
            return 1
        ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device=self.embed_tokens.device)
        return len(rope_index(ids, mm_token_type_ids=torch.zeros_like(ids))[0])

    @torch.inference_mode()
    def _probe(self, kinds: Sequence[str], stateful: Sequence[nn.Module]) -> dict[int, AttentionLayer]:
        """What every layer asks of attention, from one forward pass; raises UnsupportedModel for what is lacking."""
        states = SequenceStates()
        probe = AttentionProbe(states=[(0, _PROBE_TOKENS, states)] if stateful else ())
        name = type(self.model).__name__
        hidden = self.embed_tokens.new_zeros(_PROBE_TOKENS, self.embed_tokens.shape[1])
        try:
            self._run(hidden, torch.arange(_PROBE_TOKENS, device=hidden.device), probe)
        except Exception as error:  # a model of transformers raises whatever it likes
            why = f"does not run over this engine's attention: {type(error).__name__}: {error}"
            if isinstance(error, AttributeError) and error.obj is states:
                why = f"has layers with a state of a kind that this engine does not keep ({error.name})"
            elif not getattr(self.model, "_supports_attention_backend", False):
                why = "has attention that does not go through transformers' interface"
            raise UnsupportedModel(f"{name} {why}") from error
        for index, layer in sorted(probe.layers.items()):
            for feature in layer.lacking:
                raise UnsupportedModel(f"{name}, layer {index}: {feature} is not supported")
        kinds = kinds or ["full_attention"] * int(self.text.num_hidden_layers)
        for index, kind in enumerate(kinds):
            if (kind in STATEFUL_LAYERS) == (index in probe.layers):
                raise UnsupportedModel(
                    f"{name}, layer {index} ({kind}): its attention does not go through transformers' interface"
                )
            if kind in STATEFUL_LAYERS and index not in {*states.conv, *states.recurrent}:
                raise UnsupportedModel(f"{name}, layer {index} ({kind}): its state does not reach this engine")
        if not probe.layers:
            raise UnsupportedModel(f"{name} has no layer of attention")
        return dict(sorted(probe.layers.items()))


def image_token_ids(config: Any) -> tuple[int, ...]:
    """The tokens that a transformers ``config`` has in the places of images and videos."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = {getattr(config, name, None) for name in names}
    return tuple(sorted(token for token in found if isinstance(token, int)))


def positions(images: Sequence[ImageSpan], start: int, end: int, num_axes: int) -> list[tuple[int, ...]]:
    """The positions of a sequence's tokens [start, end) on each of ``num_axes``.

    Text counts on, the same on all; the positions of an image's tokens are those of its layout from there.
    """
    found: list[tuple[int, ...]] = []
    saved = 0  # token index minus position
    for span in images:
        layout = span.layout
        assert layout is not None  # the encoder of such a model gives one
        assert layout.offsets is not None
        found += [(index - saved,) * num_axes for index in range(start + len(found), min(end, span.start))]
        begin = span.start - saved
        for index in range(max(start, span.start), min(end, span.end)):
            found.append(tuple(begin + offset for offset in layout.offsets[index - span.start]))
        saved += span.length - layout.advance
    return found + [(index - saved,) * num_axes for index in range(start + len(found), end)]


class _GivenHidden:
    """Stands for a base model's output that was computed before: its hidden states, and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def _return_given_hidden(base: nn.Module) -> None:
    """Let the ``base`` of a model return the hidden states of the keyword `_HIDDEN` where that is given.

    So the model's own forward computes the logits of hidden states that the engine has: some scale or cap them.
    """
    forward = base.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        hidden = kwargs.pop(_HIDDEN, None)
        return forward(*args, **kwargs) if hidden is None else _GivenHidden(hidden)

    base.forward = run
