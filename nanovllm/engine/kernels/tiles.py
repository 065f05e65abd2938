"""Permission for AMX tiles, which Linux gives to a process that asks."""

from __future__ import annotations

import functools
import logging

import torch

from nanovllm.engine import kernels

logger = logging.getLogger(__name__)


@functools.cache
def why_not() -> str | None:
    """Why kernels cannot multiply by tiles in this process, which is asked for once; None if they can."""
    reason = _request()
    if reason.startswith("Linux"):
        logger.warning(
            "the CPU has AMX tiles, but %s: vectors multiply, which is several times slower for many rows; "
            "a kernel of 5.16 or later grants them, unless a container's seccomp profile forbids arch_prctl",
            reason,
        )
    return reason or None


def _request() -> str:
    """Why there are no tiles; empty if this process now has them."""
    if (reason := kernels.missing()) is not None:
        return reason
    if not hasattr(torch.ops.nanovllm, "request_tiles"):
        return "there are none without AVX-512"
    refusal: str = torch.ops.nanovllm.request_tiles()
    return refusal
