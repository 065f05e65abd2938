"""The decoder by itself: what a step need not compute is not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import make_qwen3
from torch import Tensor

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.engine.attention.base import AttentionBatch
from nanovllm.engine.attention.sdpa import SdpaAttention
from nanovllm.engine.models.decoder import Decoder
from nanovllm.engine.models.registry import load_text_model

CPU = torch.device("cpu")
LENGTHS = (1, 5, 9)  # of the rows of a step; their last tokens are wanted
WANTED = torch.tensor([0, 5, 14])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_text_model(Checkpoint(make_qwen3(tmp_path_factory.mktemp("qwen3"))), torch.float32, CPU)


def compute(model: Decoder, **options: Any) -> tuple[Tensor, list[Tensor], list[int]]:
    """Hidden states of a step, the caches that it left, and how many rows each layer's feed-forward part saw."""
    config, attention = model.config, SdpaAttention(CPU, torch.float32)
    caches = [
        attention.allocate(len(LENGTHS), config.num_key_value_heads, config.head_dim, torch.float32)
        for _ in model.layers
    ]
    metadata = attention.metadata(AttentionBatch(LENGTHS, LENGTHS, [[block] for block in range(len(LENGTHS))]))
    seen: list[int] = []
    watches = [layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(len(args[0]))) for layer in model.layers]
    try:
        positions = torch.cat([torch.arange(length) for length in LENGTHS])
        ids = torch.arange(sum(LENGTHS)) % config.vocab_size
        with torch.inference_mode():
            return model(model.embed(ids), positions, caches, attention, metadata, **options), caches, seen
    finally:
        for watch in watches:
            watch.remove()


def test_the_last_layer_computes_the_rows_that_are_wanted_and_stores_the_keys_of_all(model: Decoder) -> None:
    everything, whole_caches, _ = compute(model)
    chosen, caches, seen = compute(model, wanted=WANTED)
    torch.testing.assert_close(chosen, everything[WANTED])
    assert all(torch.equal(cache, whole) for cache, whole in zip(caches, whole_caches, strict=True))
    assert seen == [sum(LENGTHS)] * (len(model.layers) - 1) + [len(WANTED)]


def test_a_step_that_samples_nothing_still_stores_its_keys(model: Decoder) -> None:
    _, whole_caches, _ = compute(model)
    chosen, caches, _ = compute(model, wanted=WANTED[:0])
    assert chosen.shape == (0, model.config.hidden_size)
    assert all(torch.equal(cache, whole) for cache, whole in zip(caches, whole_caches, strict=True))


@pytest.mark.parametrize("beyond", [0, 1])
def test_what_an_image_adds_behind_layers_reaches_the_wanted_rows(model: Decoder, beyond: int) -> None:
    width = model.config.hidden_size * (len(model.layers) + beyond)  # the last one is added behind the last layer
    images = [(3, torch.randn(6, width, generator=torch.Generator().manual_seed(0)))]
    everything, _, _ = compute(model, images=images)
    chosen, _, seen = compute(model, images=images, wanted=WANTED)
    torch.testing.assert_close(chosen, everything[WANTED])
    assert seen[-1] == (sum(LENGTHS) if beyond else len(WANTED))
