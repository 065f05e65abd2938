"""The choice of instructions by number of rows: measured once, recorded, and never behind a promise of bits."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanovllm.engine.kernels import tiles
from nanovllm.engine.layers import product_choice
from nanovllm.engine.layers.linear import has_panels
from nanovllm.engine.layers.product_choice import Choice, choice_from, choose
from nanovllm.engine.llm_engine import LLMEngine
from tests import amx
from tests.engine.test_doctor import told

NUM_ROWS = len(product_choice._ROWS)
needs_panels = pytest.mark.skipif(
    not has_panels(torch.bfloat16, torch.device("cpu")), reason="panels of bfloat16 need AVX-512 with its extension"
)


@pytest.fixture(autouse=True)
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "nanovllm" / "products.json"
    monkeypatch.setattr(product_choice, "record_path", lambda: path)
    choose.cache_clear()
    yield path
    choose.cache_clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The types that were measured; the result is always the same."""
    asked = []

    def measure(dtype: torch.dtype, can_have_tiles: bool) -> product_choice.Microseconds:
        asked.append(dtype)
        found = {"vectors": [9.0] * NUM_ROWS, "floats": [9.5] * 3 + [5.0] * (NUM_ROWS - 3)}
        return found | ({"tiles": [99.0] * 4 + [1.0] * (NUM_ROWS - 4)} if can_have_tiles else {})

    monkeypatch.setattr(product_choice, "measure", measure)
    return asked


def test_a_choice_is_measured_once_and_recorded(record: Path, measured: list[torch.dtype]) -> None:
    choice = choose(torch.bfloat16)
    choose.cache_clear()  # as in another process
    assert choose(torch.bfloat16) == choice == Choice(floats_from=8)
    assert measured == [torch.bfloat16]
    assert json.loads(record.read_text())["bfloat16"]["microseconds"]["vectors"] == [9.0] * NUM_ROWS


def test_an_edited_record_counts(record: Path, measured: list[torch.dtype]) -> None:
    choose(torch.bfloat16)
    found = json.loads(record.read_text())
    found["bfloat16"]["choice"] = {"floats_from": None, "tiles_from": 7}
    record.write_text(json.dumps(found))
    choose.cache_clear()
    assert choose(torch.bfloat16) == Choice(tiles_from=7)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"bfloat16": 3}', '{"bfloat16": {"choice": {"rows": 3}}}']
    + [f'{{"bfloat16": {{"choice": {{"floats_from": {rows}}}}}}}' for rows in ("true", "-1", '"8"', "1.5")],
)
def test_a_record_that_is_none_is_measured_anew(text: str, record: Path, measured: list[torch.dtype]) -> None:
    record.parent.mkdir()
    record.write_text(text)
    assert choose(torch.bfloat16) == Choice(floats_from=8)
    assert len(measured) == 1


def test_a_record_that_others_may_write_does_not_count(record: Path, measured: list[torch.dtype]) -> None:
    choose(torch.bfloat16)
    record.chmod(0o666)
    choose.cache_clear()
    choose(torch.bfloat16)
    assert len(measured) == 2


def test_a_record_that_cannot_be_kept_is_told(
    record: Path, measured: list[torch.dtype], caplog: pytest.LogCaptureFixture
) -> None:
    record.parent.write_text("no folder")
    assert choose(torch.bfloat16) == Choice(floats_from=8)
    assert "every start measures" in caplog.text


def test_both_types_have_their_place_in_one_record(
    record: Path, measured: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "why_not", lambda: None)
    assert choose(torch.bfloat16) == Choice(floats_from=8, tiles_from=16)
    assert choose(torch.int8).tiles_from == 16
    assert set(json.loads(record.read_text())) == {"bfloat16", "int8"}


def test_tiles_of_bfloat16_serve_all_rows_of_the_deterministic_mode_whatever_was_measured(
    measured: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "why_not", lambda: None)
    assert choose(torch.bfloat16, deterministic=True) == Choice(tiles_from=1)
    assert measured == []


def test_without_tiles_only_instructions_of_the_same_bits_are_chosen(
    measured: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "why_not", lambda: "none")
    assert choose(torch.int8) == choose(torch.int8, deterministic=True) == Choice()
    assert choose(torch.bfloat16, deterministic=True).tiles_from is None
    assert choose(torch.float32) == Choice()


def ramp(*factors: float) -> list[float]:
    """Times by number of rows, each a factor of 100."""
    return [100.0 * factor for factor in factors]


@pytest.mark.parametrize(
    ("floats", "tiles", "expected"),
    [
        (ramp(1, 1, 1, 1, 1, 1), None, Choice()),  # what gains nothing is left as it is
        (ramp(0.99, 0.98, 0.99, 0.98, 0.99, 0.98), None, Choice()),
        (ramp(1.1, 1, 0.9, 0.5, 0.5, 0.5), None, Choice(floats_from=4)),
        (ramp(0.5, 0.5, 3.0, 0.5, 0.5, 0.5), None, Choice(floats_from=1)),  # a neighbour took one turn
        (ramp(0.9, 0.9, 3.0, 0.5, 0.5, 0.5), None, Choice(floats_from=8)),
        (ramp(1, 1, 1, 0.5, 0.5, 0.5), ramp(1.1, 0.9, 0.7, 0.6, 0.3, 0.3), Choice(8, 2)),
        (None, ramp(1.1, 1.1, 1.1, 1.1, 1.1, 0.8), Choice(tiles_from=32)),
        (None, ramp(2, 2, 2, 2, 2, 2), Choice()),
    ],
)
def test_a_limit_is_where_the_gains_from_there_on_are_the_most(
    floats: list[float] | None, tiles: list[float] | None, expected: Choice
) -> None:
    found = {"vectors": ramp(*[1.0] * NUM_ROWS), "floats": floats, "tiles": tiles}
    assert choice_from({kind: times for kind, times in found.items() if times is not None}) == expected


@needs_panels
def test_a_measurement_of_panels_tells_every_kind_for_every_number_of_rows() -> None:
    found = product_choice.measure(torch.bfloat16, False)
    assert set(found) == {"vectors", "floats"}
    assert all(len(times) == NUM_ROWS and min(times) > 0 for times in found.values())
    assert set(product_choice.measure(torch.int8, False)) == {"vectors"}


@needs_panels
@pytest.mark.parametrize("withheld", ["the CPU has none", "Linux refuses them (arch_prctl: Operation not permitted)"])
def test_withheld_tiles_leave_vectors_in_panels_and_are_told(
    withheld: str,
    text: Path,
    measured: list[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tiles, "_request", lambda: withheld)
    tiles.why_not.cache_clear()
    try:
        with caplog.at_level(logging.WARNING), LLMEngine(str(text), kv_cache_bytes=1 << 20, dtype="bfloat16") as engine:
            finding = told(engine)["products"]
    finally:
        tiles.why_not.cache_clear()
    assert f"no AMX tiles: {withheld}" in finding
    assert "AMX tiles" not in finding.partition("no AMX")[0]
    assert ("vectors multiply" in caplog.text) == withheld.startswith("Linux")


@needs_panels
def test_the_doctor_tells_the_rows_and_where_they_are_recorded_for_panels(
    text: Path, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with amx.granted(monkeypatch, Choice(8, 16)):
        for options, expected in (
            ({"dtype": "bfloat16"}, "from 8 rows on float32 vectors of the same bits, from 16 rows on AMX tiles"),
            ({"quantization": "int8"}, "vectors of its own type, from 16 rows on AMX tiles"),
            ({"dtype": "bfloat16", "deterministic": True}, "from 1 row on AMX tiles"),
        ):
            with LLMEngine(str(text), kv_cache_bytes=1 << 20, **options) as engine:
                finding = told(engine)["products"]
            assert expected in finding
            assert (str(record) in finding) == ("deterministic" not in options)
    with LLMEngine(str(text), kv_cache_bytes=1 << 20) as engine:
        assert "products" not in told(engine)
