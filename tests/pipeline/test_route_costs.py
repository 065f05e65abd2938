"""Costs of routes: synthetic documents are extracted as others are, and each page of them is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nanovllm.cli.routes import receipts_document
from nanovllm.engine.backends.native import AsyncEngine
from nanovllm.pipeline import build
from nanovllm.pipeline.route_costs import ROUNDS, Cost, measure, pages_at_once
from nanovllm.pipeline.routing.routes import load_routes
from nanovllm.settings.routes import Route
from nanovllm.settings.worker import Settings

TINY = Settings.model_validate({"engine": {"device": "cpu"}})
POINTS = (224.0, 224.0)


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Route]:
    def read(lines: str) -> Route:
        file = tmp_path / "routes.yaml"
        file.write_text(f"routes:\n- name: r\n  prompt: Total?\n  match: {{bucket: inbox, key: a}}\n{lines}")
        return load_routes(file).entries[0].route

    return read


Load = Callable[[str], Route]


def draw(numbers: Sequence[int]) -> bytes:
    return receipts_document(POINTS, numbers)


def test_a_cost_is_the_mean_with_the_quickest_and_slowest_round() -> None:
    assert Cost((0.5, 1.0, 1.5), (3,), 0).of(1_000) == (1_000, 500, 1_500)


@pytest.mark.parametrize(("seqs", "of_document", "expected"), [(64, 4, 64), (64, 9, 64), (64, 1, 16), (2, 9, 2)])
def test_as_many_pages_are_asked_at_once_as_an_extraction_asks(seqs: int, of_document: int, expected: int) -> None:
    assert pages_at_once(Settings(), seqs, of_document) == expected


def test_each_measured_page_is_computed_and_one_document_is_not_counted(load: Load) -> None:
    routes = {
        "all": load("  sampling: {max_tokens: 4, temperature: 0}\n"),
        "few": load("  sampling: {max_tokens: 2, temperature: 0}\n  pages: {max_pages: 2}\n"),
    }
    numbers: list[int] = []

    def noted(given: Sequence[int]) -> bytes:
        numbers.extend(given)
        return draw(given)

    with build.build_engine(TINY.engine) as engine:
        costs = measure(AsyncEngine(engine), routes, TINY, noted, pages=3, document_pages=3)
        stats = engine.stats()
    assert {name: len(cost.seconds_a_page) for name, cost in costs.items()} == {"all": ROUNDS, "few": ROUNDS}
    assert all(seconds > 0 for cost in costs.values() for seconds in cost.seconds_a_page)
    assert len(costs["all"].answer_tokens) == ROUNDS * 3
    assert len(costs["few"].answer_tokens) == ROUNDS * 2, "documents have no more pages than the route takes"
    assert max(costs["all"].answer_tokens) <= 4
    assert stats.encoder_images == len(numbers) == len(set(numbers)) == (3 + 2) * (1 + ROUNDS)


def test_pages_of_a_document_are_measured_in_as_few_requests_as_take_them(load: Load) -> None:
    route = load("  sampling: {max_tokens: 4, temperature: 0}\n  pages: {request: document}\n")
    settings = Settings.model_validate({"engine": {"device": "cpu", "max_images_per_request": 3}})
    with build.build_engine(settings.engine) as engine:
        costs = measure(AsyncEngine(engine), {"r": route}, settings, draw, pages=4, document_pages=4)
        stats = engine.stats()
    assert stats.encoder_images == 4 * (1 + ROUNDS)
    assert sum(costs["r"].answer_tokens) <= 4 * 2 * ROUNDS, "of three pages and of one"
