"""Workers from none to several and back, on a topic of Apache Kafka; each pod is a worker process."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import Any

import pytest
from chart_release import SLOW_WORKER, Load, create_topics_of_slow_workers, slow_workers
from control_plane import lags_by_keda, ready_workers, replicas, until, workers
from helm_python import Config
from kubelet import Kubelet
from kubernetes import client
from parts import S3Part
from world import World

pytestmark = [pytest.mark.k8s, pytest.mark.kafka, pytest.mark.timeout(280)]

JOBS = 400
AGAIN = 20
JOBS_PER_S = 40
"""What one worker answers: the lag stays until there are more."""
MOST = 4
NOT_MOST = f"{MOST} workers did not become ready"
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
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
    await create_topics_of_slow_workers(world)

    def are_most() -> bool:
        return len(ready_workers(api, namespace)) == MOST

    (attempts := tmp_path / "attempts").mkdir()
    values = slow_workers(world, delivery, attempts, keda=KEDA)
    with Config(kubeconfig_path=kubeconfig, namespace=namespace) as helm:
        helm.install(chart_path, "nanovllm", values, namespace=namespace)
        await until(lambda: not workers(api, namespace), "no job waits, and still there is a worker")
        async with Load(world) as load:
            with Kubelet(api, namespace, tmp_path / "pods", image=SLOW_WORKER) as kubelet:
                await load.send(AGAIN, "Again")
                await load.send(JOBS)
                await load.send_until(asyncio.create_task(until(are_most, NOT_MOST)), JOBS_PER_S)
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


async def test_the_idle_worker_goes_first_though_it_is_the_older_one(
    chart_path: Path,
    kubeconfig: Path,
    api: client.ApiClient,
    namespace: str,
    kafka_broker: str,
    s3: S3Part,
    tmp_path: Path,
) -> None:
    world = World(kafka_broker, s3, tmp_path, {})
    await create_topics_of_slow_workers(world)
    settings = {"kubernetes": {"pod_deletion_cost_every_s": 0.5}}
    more = {"settings": settings, "podDeletionCost": {"enabled": True}}
    values = slow_workers(world, "at_least_once", tmp_path, 8.0, keda={"enabled": False}, replicaCount=1, **more)
    with (
        Config(kubeconfig_path=kubeconfig, namespace=namespace) as helm,
        Kubelet(api, namespace, tmp_path / "pods", image=SLOW_WORKER) as kubelet,
    ):

        def scale(count: int) -> None:
            client.AppsV1Api(api).patch_namespaced_deployment_scale(
                "nanovllm", namespace, {"spec": {"replicas": count}}
            )

        def names() -> set[str]:
            return {pod.metadata.name for pod in workers(api, namespace)}

        def costs() -> dict[str, int]:
            annotations = {pod.metadata.name: pod.metadata.annotations or {} for pod in workers(api, namespace)}
            return {name: int(found[DELETION_COST]) for name, found in annotations.items() if DELETION_COST in found}

        def partitions_of(pod: str) -> list[int]:
            owned = rf'^nanovllm_consumer_watermark_offset{{partition="(\d+)",topic="{re.escape(world.topics.jobs)}"}}'
            return [int(number) for number in re.findall(owned, kubelet.read(pod, "/metrics").decode(), re.MULTILINE)]

        helm.install(chart_path, "nanovllm", values, namespace=namespace)
        await until(lambda: ready_workers(api, namespace), "the first worker did not become ready")
        (older,) = names()
        scale(2)
        await until(lambda: len(ready_workers(api, namespace)) == 2, "the second worker did not become ready")
        (younger,) = names() - {older}
        mine = await until(lambda: partitions_of(younger), "the second worker got no partitions")
        async with Load(world) as load:
            await load.send(4, partition=mine[0])
            await until(lambda: costs().get(younger, 0) > 0 == costs().get(older), "costs do not follow the jobs")
            scale(1)
            await until(lambda: len(names()) == 1, "no worker went")
            assert names() == {younger}, "the busy worker went"
            await load.all_answered()
            assert not await load.broken_promises("at_least_once")
        helm.uninstall("nanovllm")


async def test_without_keda_an_hpa_follows_the_work_that_waits(
    chart_path: Path,
    kubeconfig: Path,
    api: client.ApiClient,
    namespace: str,
    kafka_broker: str,
    s3: S3Part,
    tmp_path: Path,
) -> None:
    world = World(kafka_broker, s3, tmp_path, {})
    await create_topics_of_slow_workers(world)

    def are_most() -> bool:
        return len(ready_workers(api, namespace)) == MOST

    at_once = {"stabilizationWindowSeconds": 2, "policies": [{"type": "Pods", "value": MOST, "periodSeconds": 1}]}
    hpa = {
        "enabled": True,
        "maxReplicas": MOST,
        "secondsPerWorker": 20,  # a job counts as a second
        "metric": meter(api, namespace, world),
        "behavior": {"scaleDown": at_once},
    }
    values = slow_workers(world, "exactly_once", tmp_path, keda={"enabled": False}, autoscaling={"hpa": hpa})
    with (
        Config(kubeconfig_path=kubeconfig, namespace=namespace) as helm,
        Kubelet(api, namespace, tmp_path / "pods", image=SLOW_WORKER) as kubelet,
    ):
        helm.install(chart_path, "nanovllm", values, namespace=namespace)
        await until(lambda: ready_workers(api, namespace), "no worker became ready")
        async with Load(world) as load:
            await load.send(JOBS // 2)
            await load.send_until(asyncio.create_task(until(are_most, NOT_MOST)), JOBS_PER_S)
            await load.all_answered()
            await until(lambda: len(workers(api, namespace)) == 1, "no work waits, and more than one worker stays")
            await until(lambda: len(kubelet.exits) >= MOST - 1, "a worker does not end")
            assert {one.exit_code for one in kubelet.exits} == {0}, kubelet.logs()
            assert not await load.broken_promises("exactly_once")
        helm.uninstall("nanovllm")


def meter(api: client.ApiClient, namespace: str, world: World) -> dict[str, Any]:
    """An external metric: the group's lag, which KEDA serves in the place of an adapter for Prometheus.

    It is that of a ScaledObject over a Deployment that no node takes.
    """
    labels = {"app": "meter"}
    spec = {"schedulerName": "none", "containers": [{"name": "meter", "image": "meter"}]}
    template = {"metadata": {"labels": labels}, "spec": spec}
    deployment = {"metadata": {"name": "meter"}, "spec": {"selector": {"matchLabels": labels}, "template": template}}
    client.AppsV1Api(api).create_namespaced_deployment(namespace, deployment)
    metadata = {
        "bootstrapServers": world.bootstrap_servers,
        "consumerGroup": world.group,
        "topic": world.topics.jobs,
        "offsetResetPolicy": "earliest",
        "lagThreshold": "1000",
        "allowIdleConsumers": "true",
    }
    scaled = {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": "meter"},
        "spec": {"scaleTargetRef": {"name": "meter"}, "triggers": [{"type": "kafka", "metadata": metadata}]},
    }
    client.CustomObjectsApi(api).create_namespaced_custom_object(
        "keda.sh", "v1alpha1", namespace, "scaledobjects", scaled
    )
    name = world.topics.jobs.replace(".", "-")  # as KEDA writes it
    return {"name": f"s0-kafka-{name}", "matchLabels": {"scaledobject.keda.sh/name": "meter"}}
