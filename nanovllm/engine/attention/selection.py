"""The choice of an attention backend for a device and a dtype."""

from __future__ import annotations

import importlib.util
import inspect
import logging

import torch

from nanovllm.engine import kernels
from nanovllm.engine.attention.base import AttentionBackend
from nanovllm.engine.attention.cpu_paged import PagedCpuAttention
from nanovllm.engine.attention.sdpa import SdpaAttention

logger = logging.getLogger(__name__)


def choose_backend(device: torch.device, dtype: torch.dtype, block_size: int | None = None) -> AttentionBackend:
    """The best backend that is there, told by what can be imported, compiled and called, not by version strings."""
    if device.type == "cuda":
        # From torch 2.11 on, scaled_dot_product_attention prefers cuDNN on sm_90, which builds a plan for every shape
        # that it has not seen, and here nearly every step has a new one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        from nanovllm.engine.attention.varlen import PagedVarlenAttention, flash_attn_kernels, torch_varlen_kernel

        if importlib.util.find_spec("flash_attn") is not None:
            return PagedVarlenAttention(device, flash_attn_kernels(), block_size)
        if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
            from torch.nn.attention.varlen import varlen_attn

            if "block_table" in inspect.signature(varlen_attn).parameters:
                return PagedVarlenAttention(device, torch_varlen_kernel(), block_size)
    if device.type == "cpu":
        reason = kernels.missing()
        if reason is None:
            return PagedCpuAttention(block_size)
        logger.warning("attention copies its pages, because our kernels for CPUs cannot be used: %s", reason)
    return SdpaAttention(device, dtype, block_size)
