"""The worker's endpoints, over real HTTP."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from nanovllm.metrics import Metrics
from nanovllm.pipeline.operations.health import Health, HealthServer
from nanovllm.statistics import EngineStats


@dataclass
class Served:
    health: Health
    metrics: Metrics
    port: int

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture
def served() -> Iterator[Served]:
    health, metrics = Health(), Metrics()
    server = HealthServer(health, metrics, host="127.0.0.1", port=0)
    server.start()
    yield Served(health, metrics, server.port)
    server.close()


def test_a_worker_that_loads_its_model_is_alive_and_not_ready(served: Served) -> None:
    assert served.get("/healthz")[0] == 200
    status, body = served.get("/readyz")
    assert status == 503
    assert json.loads(body)["reasons"] == ["the model is not loaded", "the consumer group is not joined"]
    served.health.wait_for("topic jobs, which the brokers do not list")
    assert "waiting for topic jobs, which the brokers do not list" in json.loads(served.get("/readyz")[1])["reasons"]
    assert served.get("/healthz")[0] == 200


def test_the_start_ends_with_the_model_whatever_the_brokers_do(served: Served) -> None:
    assert served.get("/startupz") == (503, '{"status": "unavailable", "reasons": ["the model is not loaded"]}\n')
    served.health.is_model_loaded = True
    served.health.wait_for("the brokers kafka:9092")
    assert served.get("/startupz")[0] == 200
    served.health.is_engine_alive = False
    assert served.get("/startupz")[0] == 200


def test_a_worker_without_its_group_names_the_brokers() -> None:
    health = Health("kafka-0:9092,kafka-1:9092")
    health.is_model_loaded = True
    assert health.unready == ("the consumer group is not joined at the brokers kafka-0:9092,kafka-1:9092",)
    health.has_joined = True
    assert health.unready == ()


def test_a_worker_in_its_group_is_ready_until_it_drains_or_a_fault_is_systemic(served: Served) -> None:
    served.health.is_model_loaded = served.health.has_joined = True
    assert served.get("/readyz") == (200, '{"status": "ok", "reasons": []}\n')
    served.health.systemic = "object store: no credentials"
    assert served.get("/readyz")[0] == 503
    assert served.get("/healthz")[0] == 200
    served.health.systemic = None
    served.health.is_draining = True
    assert "draining" in served.get("/readyz")[1]


def test_what_is_held_back_from_one_tenant_is_a_note_while_others_are_answered(served: Served) -> None:
    served.health.is_model_loaded = served.health.has_joined = True
    served.health.set_held_buckets((), ("s3://b is held back from the jobs of tenant 'a'",))
    status, body = served.get("/readyz")
    assert (status, json.loads(body)["reasons"]) == (503, ["s3://b is held back from the jobs of tenant 'a'"])
    served.health.answer()
    status, body = served.get("/readyz")
    assert (status, json.loads(body)["notes"]) == (200, ["s3://b is held back from the jobs of tenant 'a'"])
    served.health.set_held_buckets(("s3://b is held back",), ())
    assert served.get("/readyz")[0] == 503


def test_a_dead_engine_or_a_stuck_event_loop_is_unhealthy(served: Served) -> None:
    served.health.is_model_loaded = True
    served.health.is_engine_alive = False
    assert served.get("/healthz")[0] == 503
    served.health.is_engine_alive = True
    served.health._last_tick -= 60
    status, body = served.get("/healthz")
    assert status == 503
    assert "event loop" in body
    served.health.tick()
    assert served.get("/healthz")[0] == 200


def test_metrics_carry_the_engines_figures_under_vllms_names(served: Served) -> None:
    served.metrics.watch_engine(lambda: EngineStats(num_requests_running=3, kv_cache_usage=0.5, generation_tokens=7))
    served.metrics.time_to_first_token.observe(0.2)
    status, text = served.get("/metrics")
    assert status == 200
    for line in (
        "nanovllm_num_requests_running 3.0",
        "nanovllm_kv_cache_usage_perc 0.5",
        "nanovllm_generation_tokens_total 7.0",
        "nanovllm_time_to_first_token_seconds_count 1.0",
    ):
        assert line in text.splitlines()


def test_an_unknown_path_is_not_found(served: Served) -> None:
    assert served.get("/secret")[0] == 404


def test_a_client_that_goes_away_before_its_answer_leaves_no_traceback(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG", "nanovllm")
    asked, gone = threading.Event(), threading.Event()
    exposition = served.metrics.exposition

    def after_it_has_gone() -> bytes:
        asked.set()
        assert gone.wait(30)
        return exposition()

    monkeypatch.setattr(served.metrics, "exposition", after_it_has_gone)
    for request in (b"GET /metrics HTTP/1.1\r\n\r\n", b"HEAD /metrics HTTP/1.0\r\n\r\n"):
        asked.clear()
        gone.clear()
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset at the end
            client.sendall(request)
            assert asked.wait(30)
        gone.set()
    while sum("went away" in line for line in caplog.messages) < 2:
        time.sleep(0.01)
    assert "Traceback" not in capfd.readouterr().err + caplog.text
    assert served.get("/healthz")[0] == 200


def test_a_fault_of_the_endpoints_themselves_is_logged(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(served.metrics, "exposition", lambda: 1 / 0)
    with pytest.raises(http.client.RemoteDisconnected):
        served.get("/metrics")
    while "ZeroDivisionError" not in caplog.text:
        time.sleep(0.01)
