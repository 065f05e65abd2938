"""Linear layers whose weights have the memory layout that this machine multiplies by fastest."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.engine import kernels
from nanovllm.engine.layers import huge_pages, product_choice
from nanovllm.engine.layers.panel_forms import is_emulated, is_wide, name_of, panel_forms, panel_product
from nanovllm.engine.layers.token_ops import scale_rows

Quantization = Literal["int8"]
Layout = Literal["plain", "packed", "panels", "int8"]  # packed: oneDNN's; panels: our kernels'
Multiply = Callable[[Tensor], Tensor]

_PACKED_ROWS_HINT = 16  # the batch that oneDNN lays the weight out for; measured to serve 1 to 512 rows as well
_INT8_CALL = "linear_with_input_q_dq_qweight_dq_output_fp32"
_PANEL = 48  # outputs of a panel, as kernels/panels.cpp has it
_MIN_PACKED_ELEMENTS = 1 << 18  # a smaller product is over before oneDNN's call (20 microseconds) has begun


class Panels(nn.Module):
    """A weight [out, in] in the layout of kernels/panels.cpp, with what belongs to its outputs, padded to whole panels.

    int8 has ``scales`` and ``excess``.
    """

    panels: Tensor
    bias: Tensor | None
    scales: Tensor | None
    excess: Tensor | None

    def __init__(self, width: int, dtype: torch.dtype, tensors: Mapping[str, Tensor | None]) -> None:
        """``dtype`` is the weight's own; the panels may store its values in fewer bits."""
        super().__init__()
        self.width, self.dtype = width, dtype
        for name in ("panels", "bias", "scales", "excess"):
            self.register_buffer(name, tensors.get(name))

    @property
    def layout(self) -> Layout:
        """What the layer's layout is called."""
        return "int8" if self.panels.dtype == torch.int8 else "panels"

    def product(self, *, deterministic: bool = False) -> Multiply:
        """The product of inputs [..., in] with the weight.

        The number of rows chooses the instructions; with ``deterministic`` no bit depends on it.
        """
        panels, width, per_output = self.panels, self.width, (self.bias, self.scales, self.excess)
        if not is_wide(self.dtype):
            return panel_product(panels, width, per_output)
        choice = product_choice.choose(self.dtype, deterministic=deterministic)
        if self.dtype == torch.float32 and choice.tiles_from is not None and not _has_three_products(panels):
            choice = product_choice.Choice()
        if panels.dtype == self.dtype == torch.bfloat16:
            # Its inputs are read in pairs, and the weight has a zero beside the last one.
            return lambda x: product_choice.multiply(_in_pairs(x).contiguous(), panels, width, per_output, choice)
        return lambda x: product_choice.multiply(x.contiguous(), panels, width, per_output, choice)


class Linear(nn.Module):
    """y = x W^T + b, with the weight as it was loaded, in our CPU kernel's layout, in oneDNN's, or in int8."""

    bias: nn.Parameter | None
    panels: Panels | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.in_features = in_features
        self.out_features = out_features
        self.panels = None
        self.layout: Layout = "plain"
        self._multiply: Multiply | None = None
        self._tile: int | None = None

    @classmethod
    def sharing(cls, layer: nn.Linear) -> Self:
        """A layer with the weight and bias of ``layer``."""
        with torch.device("meta"):
            made = cls(layer.in_features, layer.out_features)
        made.weight, made.bias = layer.weight, layer.bias  # type: ignore[assignment]
        return made

    def choose_layout(
        self, quantization: Quantization | None = None, *, keep_weight: bool = False, tile: int | None = None
    ) -> None:
        """Store the weight in int8 if asked to, else in its fastest layout; drop the plain ``weight`` unless kept.

        With ``tile`` an output row depends on its input row alone, to the bit: our kernel's does anyhow, and other
        products are computed in tiles of that many rows.
        """
        product: Panels | Multiply | None
        if quantization == "int8":
            self.layout, product = "int8", int8_product(self.weight, self.bias)
        else:
            self.layout, product = fastest_layout(self.weight, self.bias, deterministic=tile is not None)
        self.use_tile(tile)
        if isinstance(product, Panels):
            self.take_panels(product, deterministic=tile is not None)
        else:
            self._multiply = product
        if self._multiply is not None and not keep_weight:
            self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def take_panels(self, panels: Panels, *, deterministic: bool) -> None:
        """Multiply by ``panels`` from now on, whatever the plain weight is."""
        self.panels, self.layout = panels, panels.layout
        self._multiply = panels.product(deterministic=deterministic)

    def give_up_panels(self) -> None:
        """Multiply by the plain weight again, whose values are elsewhere."""
        self.panels, self.layout, self._multiply = None, "plain", None

    def use_tile(self, tile: int | None) -> None:
        """Compute so many rows at a time where a library multiplies; see `choose_layout`."""
        self._tile = tile if self.layout in ("plain", "packed") else None

    def forward(self, x: Tensor) -> Tensor:
        """[T, in_features] → [T, out_features]."""
        if self._tile is None:
            return self._product(x)
        padded = F.pad(x, (0, 0, 0, -len(x) % self._tile))
        return torch.cat([self._product(rows) for rows in padded.split(self._tile)])[: len(x)]

    def _product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) if self._multiply is None else self._multiply(x)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN lays this weight out: on a CPU in float32, and in bfloat16 where the CPU computes in that."""
    has_calls = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not has_calls:
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and not is_emulated(weight.dtype))


def fastest_layout(
    weight: Tensor, bias: Tensor | None, *, deterministic: bool = False
) -> tuple[Layout, Panels | Multiply | None]:
    """The fastest layout of a weight [out, in] without a change of type, and what multiplies by it; None: as it is.

    With ``deterministic`` small weights are in panels too: the bits of a library's products depend on its threads.
    """
    is_small = weight.numel() < _MIN_PACKED_ELEMENTS and not is_emulated(weight.dtype)
    if has_panels(weight.dtype, weight.device) and (deterministic or not is_small):
        return "panels", make_panels(weight, bias)
    if is_small:
        return "plain", None
    return ("packed", packed_multiply(weight, bias)) if can_pack(weight) else ("plain", None)


def choose_torch_layouts(module: nn.Module, *, deterministic: bool = False) -> None:
    """Store the weights of ``torch.nn.Linear`` layers inside ``module`` in their fastest layouts.

    Their plain weights are dropped: read them (for a digest, a checkpoint) before.
    """
    with huge_pages.for_new_memory():
        for layer in module.modules():
            if type(layer) is not nn.Linear:
                continue
            _, product = fastest_layout(layer.weight, layer.bias, deterministic=deterministic)
            if isinstance(product, Panels):
                give_panels(layer, product, deterministic=deterministic)
            elif product is not None:
                layer.forward = product  # type: ignore[assignment]
                _drop_weight(layer)


def give_panels(layer: nn.Linear, panels: Panels, *, deterministic: bool) -> None:
    """Let a layer of torch's multiply by ``panels``, in place of its plain weight."""
    layer.add_module("panels", panels)
    layer.forward = panels.product(deterministic=deterministic)  # type: ignore[assignment]
    _drop_weight(layer)


def _drop_weight(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.empty(0, dtype=layer.weight.dtype), requires_grad=False)


def adopt_torch_linears(module: nn.Module, *, only: nn.Module | None = None) -> None:
    """Put a `Linear` in the place of every ``torch.nn.Linear`` inside ``module``, or of ``only`` that one.

    It shares the weight, and takes inputs [1, T, in_features] too.
    """
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and only in (None, layer):
                setattr(parent, name, Linear.sharing(layer))


def has_panels(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether our kernels multiply by weights of ``dtype`` here, and no slower than torch's own.

    They widen 16 bits where the CPU has no instructions for them. Where it has some, ours serve bfloat16 on AVX-512.
    """
    return device.type == "cpu" and (name_of(dtype) in panel_forms() or (bool(panel_forms()) and is_emulated(dtype)))


def make_panels(
    weight: Tensor, bias: Tensor | None, scales: Tensor | None = None, excess: Tensor | None = None
) -> Panels:
    """A weight [out, in] in the layout of kernels/panels.cpp; int8 has ``scales`` and ``excess`` [out]."""
    stored, width = shortest(weight.detach()), len(weight)
    is_widened = stored.dtype != weight.dtype or name_of(stored.dtype) not in panel_forms()
    if is_widened and stored.dtype == torch.bfloat16 and is_wide(torch.float32):
        # The kernel reads such weights in pairs.
        panels = to_panels(stored if stored.shape[1] % 2 == 0 else stored.float())
    else:
        panels = to_panels(stored, 1 if is_widened else None)
    per_output = {"bias": None if bias is None else bias.detach().float(), "scales": scales, "excess": excess}
    padded = {
        name: None if values is None else F.pad(values, (0, -width % _PANEL)) for name, values in per_output.items()
    }
    return Panels(width, weight.dtype, {"panels": panels, **padded})


def _has_three_products(stored: Tensor) -> bool:
    """Whether kernels/three_products.h multiplies float32 by a weight as well as vectors do."""
    return stored.dtype == torch.bfloat16 and all(end.isfinite() for end in stored.aminmax())


def _in_pairs(x: Tensor) -> Tensor:
    """Inputs with a zero behind an odd number of them."""
    return F.pad(x, (0, 1)) if x.shape[-1] % 2 else x


def shortest(weight: Tensor) -> Tensor:
    """A float32 weight in bfloat16 or float16 if that has all its values, as it has of most checkpoints.

    Our kernel widens them as it multiplies: the result has the same bits, from half the memory.
    """
    if weight.dtype == torch.float32:
        # Pairs of bfloat16 need an even number of inputs.
        for dtype in (torch.bfloat16, torch.float16)[weight.shape[1] % 2 :]:
            stored = weight.to(dtype)
            if torch.equal(stored.float(), weight):
                return stored
    return weight


def to_panels(weight: Tensor, group: int | None = None) -> Tensor:
    """A weight [out, in] as [panels, steps, 48, n]: n neighbouring inputs of 48 outputs side by side.

    n is ``group``, by default as many as are four bytes.
    """
    group = group or 4 // weight.itemsize
    padded = F.pad(weight, (0, -weight.shape[1] % group, 0, -len(weight) % _PANEL))
    return padded.view(-1, _PANEL, padded.shape[1] // group, group).transpose(1, 2).contiguous()


def packed_multiply(weight: Tensor, bias: Tensor | None) -> Multiply:
    """Multiply by a weight [out, in] in oneDNN's layout."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACKED_ROWS_HINT)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def why_no_int8(device: torch.device) -> str | None:
    """Why this machine cannot compute int8 products; None if it can."""
    if device.type != "cpu":
        return "it is for CPUs"
    if has_panels(torch.int8, device):
        return None
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return f"our kernels cannot be used ({kernels.missing()}), and this build of torch comes without FBGEMM"
    if not hasattr(torch.ops.quantized, _INT8_CALL):
        return f"torch {torch.__version__} has no quantized.{_INT8_CALL}"
    return None


def int8_product(weight: Tensor, bias: Tensor | None) -> Panels | Multiply:
    """What multiplies in int8 by a weight [out, in], with one scale for each row of weight and of input.

    An input row is divided by its largest magnitude first, so the product's own scale is a constant: a row's result
    depends on nothing but the row, and is the same to the bit in any batch.
    """
    weight = weight.detach().float()
    largest_weights = scale_rows(weight)[1]
    if has_panels(torch.int8, weight.device):
        scales = largest_weights / 127
        quantized = (weight / scales).round_().clamp_(-127, 127).to(torch.int8)
        # The kernel's inputs are 128 too high: they have no sign.
        return make_panels(quantized, bias, scales.squeeze(1), 128 * quantized.sum(1, dtype=torch.int32))
    # Without VNNI pairs of products are added in 16 bits, which overflow unless the weights leave a bit free.
    scales = largest_weights.squeeze(1) / (127 if torch.cpu._is_vnni_supported() else 63)
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        # Of deprecation: `why_no_int8` checks for removal.
        with warnings.catch_warnings(category=UserWarning, action="ignore"):
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantized, None)
    finally:
        torch.backends.quantized.engine = engine
    product_of = getattr(torch.ops.quantized, _INT8_CALL)

    def multiply(x: Tensor) -> Tensor:
        rows, largest = scale_rows(x)
        product = product_of(rows, 1 / 127, 128, packed)
        product *= largest
        if bias is not None:
            product += bias
        return product.to(x.dtype)

    return multiply
