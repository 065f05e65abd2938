"""Workers from none to several and back, by KEDA on a topic of Apache Kafka; each pod is a worker process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from chart_release import SLOW_WORKER, Load, slow_workers
from control_plane import lags_by_keda, ready_workers, replicas, until, workers
from helm_python import Config
from kubelet import Kubelet
from kubernetes import client
from parts import S3Part, create_topic
from world import World

pytestmark = [pytest.mark.k8s, pytest.mark.kafka, pytest.mark.timeout(280)]

JOBS = 400
AGAIN = 20
MOST = 4
KEDA = {"lagThreshold": 20, "maxReplicaCount": MOST, "pollingInterval": 1, "cooldownPeriod": 5}


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_replicas_follow_the_lag_from_none_to_four_and_back_and_no_job_is_lost(
    delivery: str,
    chart_path: Path,
    kubeconfig: Path,
    api: client.ApiClient,
    namespace: str,
    kafka_broker: str,
    s3: S3Part,
    tmp_path: Path,
) -> None:
    world = World(kafka_broker, s3, tmp_path, {})
    await world.create_topics()
    await create_topic(kafka_broker, f"{world.topics.jobs}.retry-1s")
    (attempts := tmp_path / "attempts").mkdir()
    values = slow_workers(world, delivery, attempts, keda=KEDA)
    with Config(kubeconfig_path=kubeconfig, namespace=namespace) as helm:
        helm.install(chart_path, "nanovllm", values, namespace=namespace)
        await until(lambda: not workers(api, namespace), "no job waits, and still there is a worker")
        async with Load(world) as load:
            with Kubelet(api, namespace, tmp_path / "pods", image=SLOW_WORKER) as kubelet:
                await load.send(AGAIN, "Again")
                await load.send(JOBS)
                await until(lambda: len(ready_workers(api, namespace)) == MOST, f"no {MOST} workers became ready")
                await load.all_answered()
                await until(
                    lambda: set(lags_by_keda(api, namespace).values()) == {"0"}, "every job is done, and lag remains"
                )
                await until(lambda: not workers(api, namespace), "there is no lag, and still there is a worker")
                await until(lambda: len(kubelet.exits) == MOST, "a worker does not end")
                assert {one.exit_code for one in kubelet.exits} == {0}, kubelet.logs()
            assert not await load.broken_promises(delivery)
            assert len(os.listdir(attempts)) == AGAIN, "no job took the way of a delayed retry"
        assert replicas(api, namespace) == 0
        assert set(lags_by_keda(api, namespace).values()) == {"0"}
        helm.uninstall("nanovllm")
