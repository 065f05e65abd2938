"""Metrics of a worker: what batches of observations show, and gauges of partitions."""

from __future__ import annotations

from threading import Thread

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from nanovllm.metrics import _SECONDS, MAX_PENDING_VALUES, MAX_ROUTES, OTHER_ROUTE, Metrics

# Dyadic numbers: their sum is the same in any order.
SECONDS = st.integers(-1_024, 400 * 1_024).map(lambda number: number / 1_024) | st.sampled_from(_SECONDS[8:])


def lines_of(exposition: bytes, name: str) -> list[str]:
    return [line for line in exposition.decode().splitlines() if name in line and "_created" not in line]


@given(st.lists(SECONDS, max_size=40), st.lists(SECONDS, max_size=40))
def test_histograms_show_what_those_of_prometheus_client_do(whole: list[float], staged: list[float]) -> None:
    ours, registry = Metrics(), CollectorRegistry()
    process = Histogram(
        "nanovllm_messaging_process_duration_seconds",
        "From the receipt of a job to its settlement.",
        registry=registry,
        buckets=_SECONDS,
    )
    stages = Histogram(
        "nanovllm_stage_seconds", "Time of a job in each stage.", ("stage",), "", "", "", registry, None, _SECONDS
    )
    for value in whole:
        ours.process_seconds.observe(value)
        process.observe(value)
        ours.process_seconds.observe(value)  # before and after a scrape
        process.observe(value)
    ours.exposition()
    for value in staged:
        ours.stage_seconds.labels("infer").observe(value)
        stages.labels("infer").observe(value)
    for name in ("nanovllm_messaging_process_duration_seconds", "nanovllm_stage_seconds"):
        assert lines_of(ours.exposition(), name) == lines_of(generate_latest(registry), name)


def test_values_that_wait_to_be_counted_are_bounded() -> None:
    histogram = Metrics().process_seconds
    for _ in range(10 * MAX_PENDING_VALUES):
        histogram.observe(1.0)
    assert len(histogram._pending) < MAX_PENDING_VALUES


def test_no_value_is_lost_or_counted_twice_while_threads_observe_and_scrape() -> None:
    metrics, each = Metrics(), 20_000

    def observe() -> None:
        for number in range(each):
            metrics.process_seconds.observe(number % 7)

    threads = [Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        metrics.exposition()
    name = "nanovllm_messaging_process_duration_seconds"
    metrics.exposition()
    assert metrics.registry.get_sample_value(f"{name}_count") == 4 * each
    assert metrics.registry.get_sample_value(f"{name}_sum") == 4 * sum(number % 7 for number in range(each))


def test_routes_are_told_apart_up_to_a_bound() -> None:
    metrics, names = Metrics(), [f"route-{number}" for number in range(2 * MAX_ROUTES)]
    assert metrics.route("") == OTHER_ROUTE
    for _ in range(2):
        assert {metrics.route(name) for name in names} == {*names[:MAX_ROUTES], OTHER_ROUTE}


def test_partitions_that_have_left_show_nothing_and_come_back() -> None:
    metrics = Metrics()

    def shown() -> dict[str, float]:
        samples = next(iter(metrics.consumer_lag.collect())).samples
        return {sample.labels["partition"]: sample.value for sample in samples}

    metrics.consumer_lag.show({("jobs", 0): 3, ("jobs", 1): 4})
    assert shown() == {"0": 3, "1": 4}
    metrics.consumer_lag.show({("jobs", 1): 5})
    assert shown() == {"1": 5}
    metrics.consumer_lag.show({("jobs", 0): 1, ("jobs", 1): 2})
    assert shown() == {"0": 1, "1": 2}
