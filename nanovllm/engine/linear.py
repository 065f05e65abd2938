"""A linear layer whose weight is stored the way the machine multiplies it fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PACKED_ROWS_HINT = 16  # the batch that oneDNN lays the weight out for; measured to serve 1 to 512 rows as well
_MIN_PACKED_ELEMENTS = 1 << 18  # a smaller product is over before oneDNN's call (20 microseconds) has begun


class Linear(nn.Module):
    """y = x W^T + b. ``pack`` on a CPU takes oneDNN's layout: two to five times as fast below 32 rows."""

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        """Uninitialised parameters in the default dtype and device; a checkpoint fills them."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self._packed: Tensor | None = None

    def pack(self, *, keep_weight: bool = False) -> None:
        """Pack a large float32 weight on a CPU with oneDNN; elsewhere do nothing. The plain one goes unless kept."""
        weight = self.weight
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() < _MIN_PACKED_ELEMENTS:
            return
        if not torch.backends.mkldnn.is_available():
            return
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACKED_ROWS_HINT)
        if not keep_weight:
            self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features]."""
        if self._packed is None:
            return F.linear(x, self.weight, self.bias)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return output
