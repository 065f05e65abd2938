"""KEDA on seconds of work, Prometheus beside it, what a pod may write of itself: a control plane and Apache Kafka."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiokafka import AIOKafkaProducer
from control_plane import condition, leftovers, replicas, scaled_object, wait_for
from helm_python import Config
from kubernetes import client
from parts import create_topic

from nanovllm.demo.child_process import LocalProcess, free_port
from nanovllm.metrics import Metrics
from nanovllm.pipeline.operations.health import Health, HealthServer
from nanovllm.pipeline.operations.pod_deletion_cost import ANNOTATION, OwnPod
from nanovllm.settings.kubernetes import KubernetesSettings

pytestmark = [pytest.mark.k8s, pytest.mark.kafka, pytest.mark.timeout(280)]

Values = dict[str, Any]


async def produce(bootstrap_servers: str, topic: str, count: int) -> None:
    async with AIOKafkaProducer(bootstrap_servers=bootstrap_servers) as producer:
        for number in range(count):
            await producer.send_and_wait(topic, b"{}", partition=number % 4)


def test_lanes_are_summed_up_and_workers_stay_while_prometheus_is_away(
    chart_path: Path,
    kubeconfig: Path,
    api: client.ApiClient,
    namespace: str,
    kafka_broker: str,
    unique: Callable[[str], str],
) -> None:
    topic, lane = unique("jobs"), unique("urgent")
    asyncio.run(create_topic(kafka_broker, topic, lane))
    values: Values = {
        "settings": {
            "kafka": {"bootstrap_servers": kafka_broker, "group_id": topic},
            "topics": {"jobs": topic, "lanes": {lane: -10}},
        },
        "keda": {"secondsPerWorker": 10, "secondsPerJob": 0.5, "pollingInterval": 1, "cooldownPeriod": 3},
    }
    with Config(kubeconfig_path=kubeconfig, namespace=namespace) as helm:
        helm.install(chart_path, "nanovllm", values, namespace=namespace)
        wait_for(lambda: condition(scaled_object(api, namespace), "Ready") == "True", "ScaledObject is not ready")
        asyncio.run(produce(kafka_broker, topic, 40))
        asyncio.run(produce(kafka_broker, lane, 20))
        wait_for(lambda: replicas(api, namespace) == 3, "60 jobs of half a second did not bring three workers of 10 s")
        values["keda"]["prometheus"] = {"serverAddress": f"http://127.0.0.1:{free_port()}"}
        helm.upgrade(chart_path, "nanovllm", values, namespace=namespace)
        wait_for(lambda: condition(scaled_object(api, namespace), "Fallback") == "True", "no fallback came")
        time.sleep(7)  # twice the cooldown
        assert replicas(api, namespace) == 3
        helm.uninstall("nanovllm")
    wait_for(lambda: not leftovers(api, namespace), "an uninstalled release leaves objects behind")


def test_what_a_job_takes_is_measured_by_prometheus(
    chart_path: Path,
    kubeconfig: Path,
    api: client.ApiClient,
    namespace: str,
    kafka_broker: str,
    unique: Callable[[str], str],
    tmp_path: Path,
) -> None:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus on this machine (apt install prometheus)")
    topic, metrics, port = unique("jobs"), Metrics(), free_port()
    asyncio.run(create_topic(kafka_broker, topic))
    server = HealthServer(Health(kafka_broker), metrics, host="127.0.0.1", port=0)
    server.start()
    labels = {"namespace": namespace, "pod": "nanovllm-worker"}
    scrape = {"job_name": "w", "static_configs": [{"targets": [f"127.0.0.1:{server.port}"], "labels": labels}]}
    (tmp_path / "prometheus.yaml").write_text(
        yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]})
    )
    options = [f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/tsdb"]
    prometheus = LocalProcess(
        "prometheus", [program, *options, f"--web.listen-address=127.0.0.1:{port}"], tmp_path / "prometheus.log"
    )
    values: Values = {
        "settings": {"kafka": {"bootstrap_servers": kafka_broker, "group_id": topic}, "topics": {"jobs": topic}},
        "keda": {
            "secondsPerWorker": 10,
            "secondsPerJob": 0.01,
            "pollingInterval": 1,
            "prometheus": {"serverAddress": f"http://127.0.0.1:{port}", "window": "10s"},
        },
    }
    ended = threading.Event()

    def work() -> None:
        """One worker that is never idle ends two jobs a second."""
        metrics.engine_idle_seconds.labels("empty").inc(0)
        while not ended.wait(0.5):
            metrics.jobs.labels("result").inc()

    working = threading.Thread(target=work)
    try:
        prometheus.start()
        with Config(kubeconfig_path=kubeconfig, namespace=namespace) as helm:
            helm.install(chart_path, "nanovllm", values, namespace=namespace)
            wait_for(lambda: condition(scaled_object(api, namespace), "Ready") == "True", "ScaledObject is not ready")
            asyncio.run(produce(kafka_broker, topic, 100))
            wait_for(lambda: replicas(api, namespace) == 1, "100 jobs of a hundredth did not bring one worker")
            working.start()
            # 50 s of work; rates are estimates.
            wait_for(lambda: replicas(api, namespace) in (4, 5, 6), "100 jobs of half a second did not bring five")
            helm.uninstall("nanovllm")
    finally:
        ended.set()
        prometheus.stop()
        server.close()
    wait_for(lambda: not leftovers(api, namespace), "an uninstalled release leaves objects behind")


def test_a_pod_may_write_its_own_deletion_cost_alone(
    chart_path: Path,
    kubeconfig: Path,
    api: client.ApiClient,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    core = client.CoreV1Api(api)
    values: Values = {"keda": {"enabled": False}, "replicaCount": 2, "podDeletionCost": {"enabled": True}}
    host, port = api.configuration.host.removeprefix("https://").split(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)

    def listed() -> list[str]:
        return [pod.metadata.name for pod in core.list_namespaced_pod(namespace).items]

    with Config(kubeconfig_path=kubeconfig, namespace=namespace) as helm:
        helm.install(chart_path, "nanovllm", values, namespace=namespace)
        wait_for(lambda: len(listed()) == 2, "the pods do not exist")
        first, second = names = listed()
        for pod in core.list_namespaced_pod(namespace).items:
            write_credentials(core, pod, tmp_path / pod.metadata.name)
        own = [OwnPod(KubernetesSettings(pod_name=name, service_account_folder=tmp_path / name)) for name in names]
        # The API server learns of a new Role and a new policy within a second or two.
        wait_for(lambda: has_set(own[0], 3), "the Role does not let a pod write its own cost")
        stranger = OwnPod(KubernetesSettings(pod_name=second, service_account_folder=tmp_path / first))
        wait_for(lambda: not has_set(stranger, 9), "the policy lets a pod write another's cost")
        own[1].set_deletion_cost(1)
        annotated = core.read_namespaced_pod(first, namespace).metadata.annotations
        assert annotated[ANNOTATION] == "3"

        worker = client.CoreV1Api(client.ApiClient(as_pod(api, tmp_path / first)))
        for change in (
            {"metadata": {"labels": {"app": "other"}}},
            {"metadata": {"annotations": {"other": "1"}}},
            {"status": {"phase": "Succeeded"}},
        ):
            with pytest.raises(client.ApiException, match="pod-deletion-cost alone"):
                worker.patch_namespaced_pod_status(first, namespace, change)
        with pytest.raises(client.ApiException, match="forbidden"):
            worker.patch_namespaced_pod(first, namespace, {"metadata": {"labels": {"app": "other"}}})
        helm.uninstall("nanovllm")
    wait_for(lambda: not leftovers(api, namespace), "an uninstalled release leaves objects behind")


def write_credentials(core: client.CoreV1Api, pod: client.V1Pod, folder: Path) -> None:
    """What the projected volume of a ServiceAccount holds: a token bound to the pod, the CA, and the namespace."""
    named = {"apiVersion": "v1", "kind": "Pod", "name": pod.metadata.name, "uid": pod.metadata.uid}
    request = {"spec": {"audiences": [], "expirationSeconds": 3_600, "boundObjectRef": named}}
    account, namespace = pod.spec.service_account_name, pod.metadata.namespace
    token = core.create_namespaced_service_account_token(account, namespace, request).status.token
    authority = Path(core.api_client.configuration.ssl_ca_cert).read_text()
    folder.mkdir()
    for name, text in (("token", token), ("ca.crt", authority), ("namespace", namespace)):
        (folder / name).write_text(text)


def has_set(pod: OwnPod, cost: int) -> bool:
    try:
        pod.set_deletion_cost(cost)
    except OSError:
        return False
    return True


def as_pod(api: client.ApiClient, credentials: Path) -> client.Configuration:
    """A client's configuration with a pod's own token."""
    own = client.Configuration(host=api.configuration.host)
    own.ssl_ca_cert = str(credentials / "ca.crt")
    own.api_key = {"authorization": f"Bearer {(credentials / 'token').read_text()}"}
    return own
