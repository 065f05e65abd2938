"""The deletion cost of a pod: when it is written, and what a failure does. At an API server: tests/helm."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from parts import eventually

from nanovllm.pipeline.operations.pod_deletion_cost import OwnPod, deletion_cost, keep_deletion_cost
from nanovllm.settings.kubernetes import KubernetesSettings
from nanovllm.settings.worker import Settings


def test_an_idle_pod_is_the_cheapest_and_the_cost_grows_as_jobs_double() -> None:
    assert [deletion_cost(jobs) for jobs in (0, 1, 2, 3, 4, 7, 8, 512)] == [0, 1, 2, 2, 3, 3, 4, 10]


async def test_the_cost_is_written_when_it_has_changed_and_not_otherwise() -> None:
    jobs, written, looks = [0, 0, 5, 6, 7, 4, 0, 0], list[int](), 0

    def at_work() -> int:
        nonlocal looks
        looks += 1
        return jobs[min(looks, len(jobs)) - 1]

    task = asyncio.create_task(keep_deletion_cost(written.append, at_work, every_s=0.001))
    await eventually(lambda: looks > len(jobs))
    task.cancel()
    assert written == [0, 3, 0]


async def test_a_failure_is_logged_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    written: list[int] = []

    def refuse_twice(cost: int) -> None:
        written.append(cost)
        if len(written) < 3:
            raise OSError("PATCH … was answered with 403 Forbidden")

    with caplog.at_level(logging.WARNING):
        task = asyncio.create_task(keep_deletion_cost(refuse_twice, lambda: 1, every_s=0.001))
        await eventually(lambda: len(written) == 3)
        await asyncio.sleep(0.05)
        assert not task.done()
        task.cancel()
    assert written == [1, 1, 1]
    assert caplog.text.count("403 Forbidden") == 2


def test_outside_of_a_pod_the_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pod = OwnPod(KubernetesSettings(service_account_folder=tmp_path))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(OSError, match="KUBERNETES_SERVICE_HOST is not set"):
        pod.set_deletion_cost(1)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    with pytest.raises(FileNotFoundError):
        pod.set_deletion_cost(1)


def test_replicas_of_one_pod_cannot_share_its_cost() -> None:
    with pytest.raises(ValueError, match="one pod has one cost"):
        Settings(replicas=2, kubernetes=KubernetesSettings(pod_deletion_cost=True))
