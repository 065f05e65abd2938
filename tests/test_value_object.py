"""Value objects: the equality and hash of frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from nanovllm.sampling_params import SamplingParams
from nanovllm.value_object import changed, value_object


@value_object
class Point:
    x: int
    y: int = 0


@dataclass(frozen=True)
class Frozen:
    x: int
    y: int = 0


def test_equality_hash_and_text_are_those_of_a_frozen_dataclass() -> None:
    assert Point(1, 2) == Point(1, y=2) != Point(2, 1)
    assert hash(Point(1, 2)) == hash(Frozen(1, 2))
    assert repr(Point(1)) == repr(Frozen(1)).replace("Frozen", "Point")


def test_a_changed_copy_leaves_the_original() -> None:
    point = Point(1, 2)
    assert changed(point, y=3) == replace(point, y=3) == Point(1, 3)
    assert point == Point(1, 2)


@pytest.mark.parametrize("seed", [None, 0, 2**63 - 1])
def test_parameters_with_a_seed_are_what_pydantic_copies(seed: int | None) -> None:
    params = SamplingParams(temperature=0.5, stop=("a",), seed=7)
    ours, theirs = params.with_seed(seed), params.model_copy(update={"seed": seed})
    assert ours == theirs
    assert ours.model_fields_set == theirs.model_fields_set
    assert ours.model_dump_json(exclude_unset=True) == theirs.model_dump_json(exclude_unset=True)
    assert params.seed == 7
