"""A Kubernetes control plane with KEDA, and what the tests ask of it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kubernetes import client
from parts import REPOSITORY, program_of

from nanovllm.demo.child_process import LocalProcess

LOOK_S = 0.2


def cluster_program() -> Path | None:
    """The program that runs a control plane with KEDA: ``K8S_CLUSTER``, or the one beside the repository."""
    return program_of("K8S_CLUSTER", REPOSITORY.parent / "shared" / "k8s" / "cluster")


@contextlib.contextmanager
def control_plane(program: Path, directory: Path) -> Iterator[Path]:
    """A control plane that runs ``program`` on ``directory``; gives its kubeconfig."""
    port = first_of_free_ports(8)
    command = [sys.executable, str(program), "--dir", str(directory), "--port", str(port)]
    cluster = LocalProcess("cluster", command, directory / "cluster.log")
    cluster.start()

    def is_ready() -> bool:
        assert cluster.is_running, cluster.tail(20)
        return re.search(r"^ready kubeconfig=", cluster.tail(20), re.MULTILINE) is not None

    try:
        wait_for(is_ready, "the control plane did not become ready", within_s=150)
        yield directory / "kubeconfig"
    finally:
        cluster.stop(grace_s=30)


def first_of_free_ports(count: int) -> int:
    """The first of ``count`` neighbouring ports that are free, below those that the kernel hands out by itself."""
    while True:
        first = random.randrange(15_000, 30_000)
        try:
            with contextlib.ExitStack() as stack:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


def wait_for(is_true: Callable[[], object], why: str, within_s: float = 90.0) -> Any:
    """What ``is_true()`` returns, once that is true."""
    deadline = time.monotonic() + within_s
    while not (answer := is_true()):
        assert time.monotonic() < deadline, why
        time.sleep(LOOK_S)
    return answer


async def until(is_true: Callable[[], object], why: str, within_s: float = 120.0) -> Any:
    """``wait_for`` beside other tasks."""
    return await asyncio.to_thread(wait_for, is_true, why, within_s)


def scaled_object(api: client.ApiClient, namespace: str) -> dict[str, Any]:
    custom = client.CustomObjectsApi(api)
    return custom.get_namespaced_custom_object("keda.sh", "v1alpha1", namespace, "scaledobjects", "nanovllm")


def condition(found: dict[str, Any], kind: str) -> str | None:
    conditions = found.get("status", {}).get("conditions", [])
    return next((one["status"] for one in conditions if one["type"] == kind), None)


def replicas(api: client.ApiClient, namespace: str) -> int:
    return client.AppsV1Api(api).read_namespaced_deployment("nanovllm", namespace).spec.replicas or 0


def workers(api: client.ApiClient, namespace: str) -> list[client.V1Pod]:
    """Pods of the release that are not told to end."""
    pods = client.CoreV1Api(api).list_namespaced_pod(namespace, label_selector="app.kubernetes.io/name=nanovllm").items
    return [pod for pod in pods if pod.metadata.deletion_timestamp is None]


def ready_workers(api: client.ApiClient, namespace: str) -> list[client.V1Pod]:
    """Those of ``workers`` that are ready."""
    return [
        pod
        for pod in workers(api, namespace)
        if any(one.type == "Ready" and one.status == "True" for one in pod.status.conditions or ())
    ]


def lags_by_keda(api: client.ApiClient, namespace: str) -> dict[str, str]:
    """What KEDA tells the HPA of each trigger: a Quantity by the metric's name."""
    custom, found = client.CustomObjectsApi(api), {}
    for name in scaled_object(api, namespace)["status"]["externalMetricNames"]:
        answer = custom.list_namespaced_custom_object(
            "external.metrics.k8s.io", "v1beta1", namespace, name, label_selector="scaledobject.keda.sh/name=nanovllm"
        )
        (found[name],) = (item["value"] for item in answer["items"])
    return found


def secret(name: str, **texts: str) -> dict[str, Any]:
    return {"metadata": {"name": name}, "stringData": texts}


def leftovers(api: client.ApiClient, namespace: str) -> list[str]:
    """Names of what an uninstalled release left in its namespace."""
    core, apps, custom = client.CoreV1Api(api), client.AppsV1Api(api), client.CustomObjectsApi(api)
    found = [apps.list_namespaced_deployment(namespace), core.list_namespaced_service(namespace)]
    found += [
        core.list_namespaced_pod(namespace),
        client.AutoscalingV2Api(api).list_namespaced_horizontal_pod_autoscaler(namespace),
    ]
    found += [client.PolicyV1Api(api).list_namespaced_pod_disruption_budget(namespace)]
    found += [client.NetworkingV1Api(api).list_namespaced_network_policy(namespace)]
    names = [item.metadata.name for one in found for item in one.items]
    for kind in ("scaledobjects", "triggerauthentications"):
        listed = custom.list_namespaced_custom_object("keda.sh", "v1alpha1", namespace, kind)
        names += [item["metadata"]["name"] for item in listed["items"]]
    names += [
        one.metadata.name
        for one in core.list_namespaced_config_map(namespace).items
        if "kube-root" not in one.metadata.name
    ]
    names += [
        one.metadata.name
        for one in core.list_namespaced_service_account(namespace).items
        if one.metadata.name != "default"
    ]
    return names
