"""States of linear-attention and convolution layers: one set a sequence, under transformers' cache protocol."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

STATEFUL_LAYERS = ("linear_attention", "conv")
"""``layer_types`` whose layers carry a state instead of keys and values."""


class SequenceStates:
    """One sequence's states, by the layer's index: what transformers' layers call a cache."""

    def __init__(self) -> None:
        self.conv: dict[int, Tensor] = {}  # [1, channels, kernel]
        self.recurrent: dict[int, Tensor] = {}  # [1, …], as the layer has it

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The last inputs of a layer's convolution; None before its first token."""
        return self.conv.get(layer_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A layer's recurrent state; None before its first token."""
        return self.recurrent.get(layer_idx)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether earlier states are kept to go back to: never."""
        return False

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int
    ) -> Tensor:
        """What came before, zeros at first, and ``conv_states``, [1, channels, before + new]; keeps the last of it."""
        before = self.conv.get(layer_idx)
        if before is None:
            before = conv_states.new_zeros(*conv_states.shape[:2], conv_kernel_size)
        both = torch.cat([before, conv_states], -1)
        self.conv[layer_idx] = both[..., -conv_kernel_size:].clone()
        return both

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        """Keep and return a layer's recurrent state."""
        self.recurrent[layer_idx] = recurrent_states
        return recurrent_states


RowStates = tuple[int, int, SequenceStates]
"""First token of a row of the step, the token after its last, and the states of its sequence."""


def stateful_modules(decoder: nn.Module, layer_types: Sequence[str]) -> list[nn.Module]:
    """The modules of ``decoder`` that carry a state: those of stateful layers that take transformers' cache."""
    return [
        module
        for module in decoder.modules()
        if isinstance(index := getattr(module, "layer_idx", None), int)
        and index < len(layer_types)
        and layer_types[index] in STATEFUL_LAYERS
        and "cache" in inspect.signature(module.forward).parameters
    ]


def run_by_sequence(module: Any, step: str) -> None:
    """Let a stateful ``module`` compute a step's packed rows one by one, each on its sequence's states.

    ``step`` is the keyword argument that holds them as ``states``. Rows of a single token that have states already are
    one batched call.
    """
    forward: Callable[..., Tensor] = module.forward
    layer = int(module.layer_idx)

    def run(hidden_states: Tensor, *args: Any, cache: Any = None, **kwargs: Any) -> Tensor:
        found = kwargs.pop(step, None)
        rows: Sequence[RowStates] = () if found is None else found.states
        if not rows:
            return forward(hidden_states, *args, cache=cache, **kwargs)
        outputs: dict[int, Tensor] = {}
        singles = [row for row in rows if row[1] - row[0] == 1 and layer in row[2].conv]
        if len(singles) > 1:
            tokens = hidden_states[0, [start for start, *_ in singles], None]
            stacked = _stacked([states for *_, states in singles], layer)
            output = forward(tokens, *args, cache=stacked, **kwargs)
            for place, (start, _, states) in enumerate(singles):
                _take(states, stacked, layer, place)
                outputs[start] = output[place : place + 1]
        for start, end, states in rows:
            if start not in outputs:
                outputs[start] = forward(hidden_states[:, start:end], *args, cache=states, **kwargs)
        return torch.cat([outputs[start] for start, *_ in rows], 1)

    module.forward = run


def _stacked(members: Sequence[SequenceStates], layer: int) -> SequenceStates:
    batch = SequenceStates()
    batch.conv[layer] = torch.cat([states.conv[layer] for states in members])
    if layer in members[0].recurrent:
        batch.recurrent[layer] = torch.cat([states.recurrent[layer] for states in members])
    return batch


def _take(states: SequenceStates, batch: SequenceStates, layer: int, place: int) -> None:
    states.conv[layer] = batch.conv[layer][place : place + 1]
    if layer in batch.recurrent:
        states.recurrent[layer] = batch.recurrent[layer][place : place + 1]
