"""`helm test` on a control plane: its pod sends a job to a worker of the release and waits for the result."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from chart_release import Values, merged, values_of
from control_plane import ready_workers, wait_for
from helm_python import Config
from helm_python.errors import HelmError
from kubelet import Kubelet
from kubernetes import client
from parts import S3Part
from world import World

pytestmark = [pytest.mark.k8s, pytest.mark.kafka, pytest.mark.timeout(280)]


def test_helm_test_passes_where_a_worker_answers_and_fails_on_another_answer(
    chart_path: Path,
    kubeconfig: Path,
    api: client.ApiClient,
    namespace: str,
    kafka_broker: str,
    s3: S3Part,
    tmp_path: Path,
) -> None:
    world = World(kafka_broker, s3, tmp_path, {})
    asyncio.run(world.create_topics())
    echo: Values = {
        "settings": {"engine": {"backend": "echo"}},
        "keda": {"enabled": False},
        "smokeTest": {"expect": "What is the total?", "timeoutSeconds": 90},
    }
    values = merged(values_of(world), echo)
    with (
        Config(kubeconfig_path=kubeconfig, namespace=namespace) as helm,
        Kubelet(api, namespace, tmp_path / "pods") as kubelet,
    ):
        helm.install(chart_path, "nanovllm", values, namespace=namespace)
        wait_for(lambda: ready_workers(api, namespace), "no worker became ready")
        helm.test("nanovllm", timeout=120)
        helm.upgrade(chart_path, "nanovllm", merged(values, {"smokeTest": {"expect": "a sum"}}), namespace=namespace)
        with pytest.raises(HelmError):
            helm.test("nanovllm", timeout=120)
        told = kubelet.logs()
        assert "it does not contain 'a sum'" in told
        assert f"went to {world.topics.jobs}" in told
        helm.uninstall("nanovllm")
