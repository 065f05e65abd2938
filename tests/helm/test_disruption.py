"""Workers that go while jobs come: a new revision, a node that is drained, a process that dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from chart_release import SLOW_WORKER, Load, Values, create_topics_of_slow_workers, slow_workers
from control_plane import ready_workers, until
from helm_python import Config
from kubelet import Kubelet
from kubernetes import client
from parts import S3Part
from world import World

pytestmark = [pytest.mark.k8s, pytest.mark.kafka, pytest.mark.timeout(280)]

JOBS_PER_S = 40
BEFORE = 60
AFTER = 60


class Release:
    """Workers of a release that KEDA does not scale, and the load on them."""

    def __init__(
        self,
        chart_path: Path,
        kubeconfig: Path,
        api: client.ApiClient,
        namespace: str,
        broker: str,
        s3: S3Part,
        folder: Path,
    ) -> None:
        self.chart_path, self.kubeconfig, self.api, self.namespace = chart_path, kubeconfig, api, namespace
        self.world = World(broker, s3, folder, {})
        self.folder = folder

    @asynccontextmanager
    async def loaded(self, values: Values, nodes: tuple[str, ...] = ()) -> AsyncIterator[tuple[Config, Kubelet, Load]]:
        """Helm, the kubelet and the load, once every worker is ready and some jobs are answered."""
        await create_topics_of_slow_workers(self.world)
        with (
            Config(kubeconfig_path=self.kubeconfig, namespace=self.namespace) as helm,
            Kubelet(self.api, self.namespace, self.folder / "pods", image=SLOW_WORKER, nodes=nodes) as kubelet,
        ):
            helm.install(self.chart_path, "nanovllm", values, namespace=self.namespace)
            await until(lambda: len(self.ready()) == values["replicaCount"], "the workers did not become ready")
            async with Load(self.world) as load:
                await load.send(BEFORE)
                await until(lambda: load.answered >= BEFORE // 2, "no jobs are answered")
                yield helm, kubelet, load
                await load.send(AFTER)
                await load.all_answered()
                helm.uninstall("nanovllm")
                await until(lambda: not self.pods(), "a pod does not end")
                assert not await load.broken_promises(values["settings"]["delivery"])
                assert {one.exit_code for one in kubelet.exits} == {0}, kubelet.logs()

    def pods(self) -> list[client.V1Pod]:
        return client.CoreV1Api(self.api).list_namespaced_pod(self.namespace).items

    def ready(self) -> list[client.V1Pod]:
        return ready_workers(self.api, self.namespace)


@pytest.fixture
def release(
    chart_path: Path,
    kubeconfig: Path,
    api: client.ApiClient,
    namespace: str,
    kafka_broker: str,
    s3: S3Part,
    tmp_path: Path,
) -> Release:
    return Release(chart_path, kubeconfig, api, namespace, kafka_broker, s3, tmp_path)


async def test_an_upgrade_under_load_loses_nothing(release: Release) -> None:
    values = slow_workers(release.world, "at_least_once", release.folder, keda={"enabled": False}, replicaCount=2)
    async with release.loaded(values) as (helm, _, load):
        before = {pod.metadata.uid for pod in release.ready()}
        values["settings"]["engine"]["max_num_seqs"] += 1

        def is_replaced() -> bool:
            pods = release.pods()
            return len(release.ready()) == len(pods) == 2 and not before & {pod.metadata.uid for pod in pods}

        async def upgrade() -> None:
            await asyncio.to_thread(helm.upgrade, release.chart_path, "nanovllm", values, namespace=release.namespace)
            await until(is_replaced, "the new revision does not take the place of the old one")

        await load.send_until(asyncio.create_task(upgrade()), JOBS_PER_S)


async def test_a_drained_node_loses_nothing_and_its_workers_go_one_by_one(release: Release) -> None:
    values = slow_workers(
        release.world,
        "exactly_once",
        release.folder,
        keda={"enabled": False},
        replicaCount=3,
        podDisruptionBudget={"enabled": True, "maxUnavailable": 1},
    )
    nodes = (f"{release.namespace}-a", f"{release.namespace}-b")
    async with release.loaded(values, nodes) as (_, _, load):
        ((drained, two),) = [(node, on) for node in nodes if len(on := pods_on(release, node)) == 2]
        refusals: list[str] = []

        async def drain() -> None:
            core = client.CoreV1Api(release.api)
            core.patch_node(drained, {"spec": {"unschedulable": True}})
            for pod in two:
                await until(lambda pod=pod: evict(core, pod, refusals), "an eviction is refused for ever")
            await until(lambda: not pods_on(release, drained), "the node is not empty")
            await until(lambda: len(release.ready()) == 3, "the workers do not come back on the other node")

        await load.send_until(asyncio.create_task(drain()), JOBS_PER_S)
        assert set(refusals) == {two[1].metadata.name}, "the budget let both workers go at once"


def pods_on(release: Release, node: str) -> list[client.V1Pod]:
    return [pod for pod in release.pods() if pod.spec.node_name == node]


def evict(core: client.CoreV1Api, pod: client.V1Pod, refusals: list[str]) -> bool:
    """Ask for the eviction of ``pod``, as `kubectl drain` does; False where its budget refuses for now."""
    named = {"name": pod.metadata.name, "namespace": pod.metadata.namespace}
    try:
        # The answer is a Status, which the client would take for an Eviction.
        answer = core.create_namespaced_pod_eviction(
            named["name"], named["namespace"], {"metadata": named}, _preload_content=False
        )
    except client.ApiException as error:
        answer = error
    if answer.status == 429:
        refusals.append(named["name"])
        return False
    assert answer.status < 300, answer.reason
    return True


async def test_a_worker_that_dies_is_started_again_in_its_pod_and_loses_nothing(release: Release) -> None:
    values: dict[str, Any] = slow_workers(
        release.world, "exactly_once", release.folder, keda={"enabled": False}, replicaCount=1
    )
    async with release.loaded(values) as (_, kubelet, load):
        (pod,) = release.ready()

        def restarts() -> int:
            (found,) = release.ready() or [None]
            return found.status.container_statuses[0].restart_count if found else 0

        await load.send(BEFORE)
        kubelet.process(pod.metadata.name).kill()
        await until(lambda: restarts() == 1, "the container is not started again")
        assert [one.exit_code for one in kubelet.exits] == [-9]
        kubelet.exits.clear()
