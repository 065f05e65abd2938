"""A release of the chart in a control plane: its values, what it needs beside itself, and the load of its workers."""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import yaml
from aiokafka import AIOKafkaProducer
from chaos.checker import ANSWER, Expectation, Ledger, broken_promises
from control_plane import secret, wait_for
from helm_python.chart import Chart
from kubernetes import client
from parts import create_topic, unique_name
from world import PARTITIONS, World

from nanovllm.demo.child_process import free_port
from nanovllm.messages.codec import encode_job
from nanovllm.messages.job import Job

Values = dict[str, Any]
Object = dict[str, Any]

SLOW_WORKER = (sys.executable, str(Path(__file__).with_name("slow_worker.py")))
OPERATOR_KINDS = Path(__file__).parent / "helm" / "operator_crds.yaml"
WORK_S = 0.1
SEATS = 4
RETRY_DELAY_S = 1
TRANSACTION_JOBS = 20


def merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> Values:
    """``values`` with those of ``over`` in their place, as Helm takes one file after another."""
    both = dict(values)
    for name, value in over.items():
        old = both.get(name)
        both[name] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both


def values_of(world: World) -> Values:
    """The brokers, group and topics of ``world``, and a port that is free here."""
    names = ("jobs", "results", "metrics", "dead_letters", "events", "in_flight")
    return {
        "settings": {
            "kafka": {"bootstrap_servers": world.bootstrap_servers, "group_id": world.group},
            "topics": {name: getattr(world.topics, name) for name in names},
            "http": {"port": free_port()},
        }
    }


def slow_workers(world: World, delivery: str, attempts: Path, work_s: float = WORK_S, **more: Any) -> Values:
    """Values of workers that run ``SLOW_WORKER``, ``work_s`` seconds for a job; ``attempts`` is its folder."""
    own: Values = {
        "settings": {
            "delivery": delivery,
            "engine": {"backend": "echo", "max_num_seqs": SEATS},
            "retries": {"delays_s": [RETRY_DELAY_S]},
            "kafka": {"session_timeout_ms": 6_000, "heartbeat_interval_ms": 500},
            # A narrow window: jobs wait in Kafka, where KEDA counts them, and are many times as many as are in hand.
            "admission": {"drain_timeout_s": 10, "max_jobs": 2 * SEATS},
        },
        "extraVolumes": [{"name": "attempts", "hostPath": {"path": str(attempts)}}],
        "extraVolumeMounts": [{"name": "attempts", "mountPath": "/attempts"}],
        "extraEnv": [
            {"name": "SLOW_WORKER_S", "value": str(work_s)},
            {"name": "SLOW_WORKER_ATTEMPTS", "value": "/attempts"},
        ],
    }
    return merged(merged(values_of(world), own), more)


async def create_topics_of_slow_workers(world: World) -> None:
    """The topics of ``world``, and the retry topic that `slow_workers` names."""
    await world.create_topics()
    await create_topic(world.bootstrap_servers, f"{world.topics.jobs}.retry-{RETRY_DELAY_S}s")


def rendered(chart_path: Path, values: Values, namespace: str) -> list[Object]:
    """The objects of release ``nanovllm``."""
    texts = Chart.load(chart_path).render(values, name="nanovllm", namespace=namespace)
    files = [text for name, text in texts.items() if name.endswith(".yaml")]
    return [document for text in files for document in yaml.safe_load_all(text) if document]


def consumed_topics(objects: list[Object]) -> set[str]:
    """The topics whose lag KEDA is to watch."""
    triggers = [trigger for one in objects if one["kind"] == "ScaledObject" for trigger in one["spec"]["triggers"]]
    return {trigger["metadata"]["topic"] for trigger in triggers if trigger["type"] == "kafka"}


def provide(api: client.ApiClient, namespace: str, objects: list[Object]) -> None:
    """Make what ``objects`` refer to and do not hold: Secrets, ConfigMaps, classes of pods, other operators' kinds.

    Namespaces that some of them are made in, too.
    """
    own = {("ConfigMap", "kube-root-ca.crt"), *((one["kind"], one["metadata"]["name"]) for one in objects)}
    core, keys = client.CoreV1Api(api), defaultdict[tuple[str, str], set[str]](set)
    _provide_kinds(api, {one["kind"] for one in objects})
    for one in objects:
        if (other := one["metadata"].get("namespace", namespace)) != namespace:
            _unless_there(lambda name=other: core.create_namespace({"metadata": {"name": name}}))  # type: ignore[misc]
        if one["kind"] == "Deployment":
            spec = one["spec"]["template"]["spec"]
            _provide_classes(api, spec)
            for kind, name, of in _referred(spec):
                keys[kind, name] |= of
    for (kind, name), of in keys.items():
        if (kind, name) in own:
            continue
        texts = dict.fromkeys(of, "of-the-test")
        if kind == "Secret":
            core.create_namespaced_secret(namespace, secret(name, **texts))
        elif kind == "ConfigMap":
            core.create_namespaced_config_map(namespace, {"metadata": {"name": name}, "data": texts})
        elif name != "default":
            core.create_namespaced_service_account(namespace, {"metadata": {"name": name}})


def _referred(spec: Any) -> Iterator[tuple[str, str, set[str]]]:
    """Kind, name and keys of each Secret, ConfigMap and ServiceAccount in a pod's specification."""
    kinds = {
        "secretKeyRef": ("Secret", "name"),
        "secretRef": ("Secret", "name"),
        "secret": ("Secret", "secretName"),
        "configMapKeyRef": ("ConfigMap", "name"),
        "configMapRef": ("ConfigMap", "name"),
        "configMap": ("ConfigMap", "name"),
    }
    if isinstance(spec, list):
        for part in spec:
            yield from _referred(part)
    elif isinstance(spec, dict):
        for name, part in spec.items():
            if name in kinds and isinstance(part, dict):
                kind, field = kinds[name]
                keys = {item["key"] for item in part.get("items", ())} | ({part["key"]} if "key" in part else set())
                yield kind, part.get(field) or part["name"], keys
            elif name == "serviceAccountName":
                yield "ServiceAccount", part, set()
            else:
                yield from _referred(part)


def _provide_classes(api: client.ApiClient, spec: Object) -> None:
    if name := spec.get("runtimeClassName"):
        body = {"metadata": {"name": name}, "handler": name}
        _unless_there(lambda: client.NodeV1Api(api).create_runtime_class(body))
    if (name := spec.get("priorityClassName")) and not name.startswith("system-"):
        of_pods = {"metadata": {"name": name}, "value": 1000}
        _unless_there(lambda: client.SchedulingV1Api(api).create_priority_class(of_pods))


def _provide_kinds(api: client.ApiClient, kinds: set[str]) -> None:
    """Definitions of ``kinds``, as far as they are other operators'."""
    definitions = client.ApiextensionsV1Api(api)
    for definition in yaml.safe_load_all(OPERATOR_KINDS.read_text(encoding="utf-8")):
        name = definition["metadata"]["name"]
        if definition["spec"]["names"]["kind"] not in kinds:
            continue
        _unless_there(lambda definition=definition: definitions.create_custom_resource_definition(definition))

        def is_established(name: str = name) -> bool:
            conditions = definitions.read_custom_resource_definition(name).status.conditions or ()
            return any(one.type == "Established" and one.status == "True" for one in conditions)

        wait_for(is_established, f"{name} is not served")


def _unless_there(create: Callable[[], object]) -> None:
    try:
        create()
    except client.ApiException as error:
        if error.status != 409:
            raise


class Load:
    """Jobs for the workers of a release, and what came of them. An async context manager.

    They are sent in transactions, whose markers stand among the jobs and behind the last one. ``outcomes`` has what a
    read_committed reader has seen.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.outcomes = Ledger()

    async def __aenter__(self) -> Load:
        async with AsyncExitStack() as stack:
            self._reader = await stack.enter_async_context(self._world.reader())
            producer = AIOKafkaProducer(
                bootstrap_servers=self._world.bootstrap_servers, transactional_id=unique_name("load")
            )
            self._producer = await stack.enter_async_context(producer)
            self._reading = asyncio.create_task(self._read())
            self._connections = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        await self._connections.aclose()

    @property
    def answered(self) -> int:
        """Jobs that have a result or a dead letter."""
        return len(self.outcomes.expected) - len(self.outcomes.missing)

    async def send(self, count: int, prompt: str = "Say", partition: int | None = None) -> None:
        """Send ``count`` jobs to ``partition``, or evenly to all."""
        sent = 0
        while sent < count:
            async with self._producer.transaction():
                for _ in range(min(TRANSACTION_JOBS, count - sent)):
                    await self._send_one(prompt, partition)
                    sent += 1

    async def send_until(self, task: asyncio.Task[Any], per_s: float) -> None:
        """Send ``per_s`` jobs a second until ``task`` is done; returns or raises what it does."""
        while not task.done():
            await self.send(TRANSACTION_JOBS)
            await asyncio.wait([task], timeout=TRANSACTION_JOBS / per_s)
        await task

    async def all_answered(self, within_s: float = 120.0) -> None:
        """Return when no job is without its outcome."""
        async with asyncio.timeout(within_s):
            while self.outcomes.missing:
                if self._reading.done():
                    await self._reading
                await asyncio.sleep(0.05)

    async def broken_promises(self, delivery: str) -> dict[str, Any]:
        """What ``delivery`` forbids and was found: kinds of finding, and their jobs; empty where all is well.

        Lag counts as KEDA counts it: the log's end, markers of transactions included, without the committed offset.
        """
        await asyncio.sleep(1)  # for an answer that comes twice
        topics = [self._world.topics.jobs, f"{self._world.topics.jobs}.retry-{RETRY_DELAY_S}s"]
        lags = {number: await self._world.lag(topic) for number, topic in enumerate(topics)}
        report = self.outcomes.check(lags)
        return {kind: report[kind] for kind in broken_promises(report, delivery)}

    async def _send_one(self, prompt: str, partition: int | None) -> None:
        number = len(self.outcomes.expected)
        partition = number % PARTITIONS if partition is None else partition
        job = Job(job_id=f"job-{number:05d}", prompt=f"{prompt} {number:05d}")
        self.outcomes.expected[str(job.job_id)] = Expectation(frozenset({ANSWER}), job.prompt)
        await self._producer.send(self._world.topics.jobs, encode_job(job), partition=partition)

    async def _read(self) -> None:
        while True:
            for outcome in await self._reader.read(timeout_ms=100):
                self.outcomes.see(outcome)
