"""A real trace of autoscaling: the chart, installed by Helm, on a control plane with KEDA, over Apache Kafka.

Pods are consumers in this process: a pod that exists joins the group after ``LOAD_S``, takes one job at a time, which
lasts ``SERVICE_S``, commits it, and leaves when its pod is gone. All else is real: API server, controllers, KEDA's
scaler and the brokers. It takes `K8S_CLUSTER` and `KAFKA_NODE`, or what lies beside the repository.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.structs import OffsetAndMetadata
from helm_python import Config
from kubernetes import client, config
from parts import KafkaNode, create_topic

from benchmarks.autoscale import SCALE_UP, Behaviour, Policy, Scaling, Workers
from nanovllm.demo.child_process import LocalProcess

TOPIC, GROUP, NAMESPACE = "autoscale-jobs", "autoscale", "default"
FIRST_PORT = 31_450
LOAD_S, SERVICE_S, PARTITIONS = 6.0, 0.5, 24
SYNC_S = 2
BURSTS = ((0.0, 480), (110.0, 100))
LONGEST_S = 300.0
WORKERS = Workers(
    partitions=PARTITIONS, service_s=SERVICE_S, spread=0, jobs_at_once=1, load_s=LOAD_S, drain_s=5, rebalance_s=2
)
SCALING = Scaling(
    target=10,
    per_message=SERVICE_S,
    formula=True,
    max_replicas=6,
    polling_s=2,
    cooldown_s=20,
    lag_threshold=20,
    sync_s=SYNC_S,
    up=SCALE_UP,
    down=Behaviour(15, (Policy("Percent", 50, 10),)),
)


def record() -> dict[str, Any]:
    """Start everything, send the bursts, and watch until no worker is left; the trace as JSON."""
    with tempfile.TemporaryDirectory(prefix="nanovllm-autoscale-") as temporary:
        directory = Path(temporary)
        default = ROOT.parent / "shared" / "k8s" / "cluster"
        program = [sys.executable, os.environ.get("K8S_CLUSTER") or str(default), "--dir", str(directory / "k8s")]
        program += ["--port", str(FIRST_PORT), "--hpa-sync", f"{SYNC_S}s"]
        cluster = LocalProcess("cluster", program, directory / "cluster.log")
        cluster.start()
        try:
            _wait_until_ready(cluster)
            return asyncio.run(_record(directory))
        finally:
            cluster.stop(grace_s=30)


def _wait_until_ready(cluster: LocalProcess) -> None:
    deadline = time.monotonic() + 180
    while "ready kubeconfig=" not in cluster.tail(20):
        if not cluster.is_running or time.monotonic() > deadline:
            raise RuntimeError(f"the control plane did not start: {cluster.tail(20)}")
        time.sleep(0.2)


def _values(bootstrap_servers: str) -> dict[str, Any]:
    """The chart's values that say what ``SCALING`` says."""
    down = [{"type": one.type, "value": one.value, "periodSeconds": int(one.period_s)} for one in SCALING.down.policies]
    behaviour = {"scaleDown": {"stabilizationWindowSeconds": int(SCALING.down.window_s), "policies": down}}
    return {
        "settings": {
            "kafka": {"bootstrap_servers": bootstrap_servers, "group_id": GROUP},
            "topics": {"jobs": TOPIC},
        },
        "keda": {
            "secondsPerWorker": int(SCALING.target),
            "secondsPerJob": SERVICE_S,
            "maxReplicaCount": SCALING.max_replicas,
            "pollingInterval": int(SCALING.polling_s),
            "cooldownPeriod": int(SCALING.cooldown_s),
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behaviour}},
        },
    }


async def _record(directory: Path) -> dict[str, Any]:
    kubeconfig = directory / "k8s" / "kubeconfig"
    api = config.new_client_from_config(str(kubeconfig))
    async with KafkaNode(directory / "kafka") as node:
        brokers = node.bootstrap_servers
        await create_topic(brokers, TOPIC, partitions=PARTITIONS)
        with Config(kubeconfig_path=kubeconfig, namespace=NAMESPACE) as helm:
            helm.install(ROOT / "helm" / "nanovllm", "nanovllm", _values(brokers), namespace=NAMESPACE)
            await asyncio.sleep(10)  # the ScaledObject becomes ready
            pods = asyncio.create_task(_run_pods(client.CoreV1Api(api), brokers))
            try:
                arrivals, samples = await _watch(client.AppsV1Api(api), brokers)
            finally:
                pods.cancel()
                await asyncio.gather(pods, return_exceptions=True)
    return {
        "what": "Apache Kafka 4.3, KEDA 2.20, Kubernetes 1.35; samples are seconds, replicas, lag",
        "workers": asdict(WORKERS),
        "scaling": asdict(SCALING),
        "arrivals": arrivals,
        "samples": samples,
    }


async def _watch(apps: client.AppsV1Api, brokers: str) -> tuple[list[tuple[float, int]], list[tuple[float, int, int]]]:
    """Send the bursts, and sample replicas and lag until none of either is left."""
    arrivals: list[tuple[float, int]] = []
    samples: list[tuple[float, int, int]] = []
    partitions = [TopicPartition(TOPIC, number) for number in range(PARTITIONS)]
    async with (
        AIOKafkaProducer(bootstrap_servers=brokers) as producer,
        AIOKafkaConsumer(bootstrap_servers=brokers, group_id=GROUP, enable_auto_commit=False) as reader,
    ):
        began, waiting = time.monotonic(), list(BURSTS)
        while (now := time.monotonic() - began) < LONGEST_S:
            if waiting and now >= waiting[0][0]:
                _, count = waiting.pop(0)
                for number in range(count):
                    await producer.send(TOPIC, b"{}", partition=number % PARTITIONS)
                await producer.flush()
                arrivals.append((round(now, 2), count))
            ends = await reader.end_offsets(partitions)
            committed = [await reader.committed(one) or 0 for one in partitions]
            lag = sum(ends.values()) - sum(committed)
            deployment = await asyncio.to_thread(apps.read_namespaced_deployment, "nanovllm", NAMESPACE)
            samples.append((round(time.monotonic() - began, 2), deployment.spec.replicas or 0, lag))
            print(*samples[-1], flush=True)
            if not waiting and not lag and not samples[-1][1]:
                break
            await asyncio.sleep(0.5)
    return arrivals, samples


async def _run_pods(core: client.CoreV1Api, brokers: str) -> None:
    """One consumer for each pod that exists, until cancelled."""
    running: dict[str, asyncio.Event] = {}
    tasks: set[asyncio.Task[None]] = set()
    try:
        while True:
            listed = await asyncio.to_thread(core.list_namespaced_pod, NAMESPACE)
            names = {pod.metadata.name for pod in listed.items if pod.metadata.deletion_timestamp is None}
            for gone in running.keys() - names:
                running.pop(gone).set()
            for name in names - running.keys():
                running[name] = asyncio.Event()
                task = asyncio.create_task(_worker(brokers, running[name]), name=name)
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(0.25)
    finally:
        for stop in running.values():
            stop.set()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _worker(brokers: str, stop: asyncio.Event) -> None:
    """Load, join, and take jobs one after another until ``stop``."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), LOAD_S)
    if stop.is_set():
        return
    async with AIOKafkaConsumer(
        TOPIC,
        bootstrap_servers=brokers,
        group_id=GROUP,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        heartbeat_interval_ms=500,
        session_timeout_ms=6_000,
    ) as consumer:
        while not stop.is_set():
            is_idle = True
            for partition in sorted(consumer.assignment()):  # in turn, as a worker reads them
                if stop.is_set() or partition not in consumer.assignment():
                    continue
                for record in (await consumer.getmany(partition, timeout_ms=0, max_records=1)).get(partition, []):
                    is_idle = False
                    await asyncio.sleep(SERVICE_S)
                    # A rebalance meanwhile: the next owner repeats the job.
                    with contextlib.suppress(KafkaError):
                        await consumer.commit({partition: OffsetAndMetadata(record.offset + 1, "")})
            if is_idle:
                await asyncio.sleep(0.05)
