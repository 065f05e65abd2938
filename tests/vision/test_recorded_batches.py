"""Recorded passes of towers of one size: right at every number of images, by a record that runs no Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tape
import torch
from checkpoints import make_llava

from nanovllm.vision.encoders.clip import VisionEncoder
from nanovllm.vision.encoders.recorded_batches import RecordedBatches, batch_sizes
from nanovllm.vision.images.preprocess import PreparedImage


def prepared(count: int, seed: int = 0) -> list[PreparedImage]:
    drawn = np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return [PreparedImage(image, b"", 64, 64, (64, 64)) for image in drawn]


@pytest.mark.parametrize(
    ("tower", "options"),
    [
        ("clip", {}),
        ("clip", {"max_image_size": 96}),
        ("siglip", {"num_vision_tokens": 4}),
        ("siglip", {"vision_feature_layer": [0, 2, -1]}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*was trained on images")
def test_recorded_batches_equal_those_that_are_launched_kernel_by_kernel(
    tmp_path: Path, tower: Any, options: dict[str, Any]
) -> None:
    layers = {"vision_feature_layer": options.pop("vision_feature_layer")} if "vision_feature_layer" in options else {}
    make_llava(tmp_path, tower=tower, patch=16, size=64, **layers)
    encoder = VisionEncoder.from_llava(tmp_path, **options)
    encoder.batch_size = 6
    side = options.get("max_image_size", 64)
    drawn = np.random.default_rng(1).integers(0, 256, (6, side, side, 3), dtype=np.uint8)
    images = [PreparedImage(image, b"", side, side, (side, side)) for image in drawn]
    expected = {count: encoder.embed(images[:count]) for count in (6, 1, 2, 3, 4, 5)}
    recorded: list[None] = []
    encoder.record(lambda compute: recorded.append(None) or tape.record(compute))
    assert len(recorded) == len(batch_sizes(6)) == 4
    for count, wanted in expected.items():
        for found, one in zip(encoder.embed(images[:count]), wanted, strict=True):
            assert torch.allclose(found, one, atol=1e-5)
    assert encoder.num_replays == len(expected)


def test_more_images_than_the_largest_batch_come_in_parts_that_stay_as_they_were(tmp_path: Path) -> None:
    encoder = VisionEncoder.from_llava(make_llava(tmp_path, tower="clip", patch=16, size=64))
    encoder.batch_size = 4
    images = prepared(11)
    expected = encoder.embed(images)
    encoder.record(tape.record)
    found = encoder.embed(images)
    encoder.embed(prepared(4, seed=1))
    for one, wanted in zip(found, expected, strict=True):
        assert torch.allclose(one, wanted, atol=1e-5)


def test_a_number_of_images_runs_in_the_smallest_batch_that_holds_it() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(8) == [1, 2, 4, 8]
    assert batch_sizes(28) == [1, 2, 4, 8, 16, 28]
    ran: list[int] = []

    def compute(pixels: torch.Tensor) -> torch.Tensor:
        ran.append(len(pixels))
        return pixels.float().sum((1, 2, 3))

    batches = RecordedBatches(compute, torch.zeros(5, 2, 2, 3, dtype=torch.uint8), lambda run: run)
    assert ran == [5]
    drawn = torch.randint(256, (5, 2, 2, 3), dtype=torch.uint8)
    for count, size in ((1, 1), (2, 2), (3, 4), (4, 4), (5, 5)):
        assert torch.equal(batches(drawn[:count]), drawn[:count].float().sum((1, 2, 3)))
        assert ran[-1] == size
