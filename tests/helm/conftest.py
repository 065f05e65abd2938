"""The chart, rendered, linted and installed by real Helm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from control_plane import cluster_program, control_plane
from helm_python.chart import Chart
from kubernetes import client, config

REPOSITORY = Path(__file__).resolve().parents[2]
Objects = dict[str, dict[str, Any]]
Render = Callable[..., Objects]


@pytest.fixture(scope="session")
def chart_path() -> Path:
    return REPOSITORY / "helm" / "nanovllm"


@pytest.fixture(scope="session")
def render(chart_path: Path) -> Render:
    """``render({"gpu": {"count": 1}})`` → the objects by kind, of release ``demo`` in namespace ``ns``.

    The ConfigMap of routes is ``RoutesConfigMap``, that of the dashboard ``DashboardConfigMap``, the rules of scaling
    ``ScalingPrometheusRule``, and the KafkaTopic of a topic ``KafkaTopic NAME``.
    """
    chart = Chart.load(chart_path)

    def objects_by_kind(values: dict[str, Any] | None = None) -> Objects:
        chart.validate_schema(values or {})
        texts = chart.render(values or {}, name="demo", namespace="ns")
        documents = [
            document
            for name, text in texts.items()
            if name.endswith(".yaml")
            for document in yaml.safe_load_all(text)
            if document
        ]
        by_kind = {kind_of(document): document for document in documents}
        assert len(by_kind) == len(documents), "two objects of one kind"
        return by_kind

    return objects_by_kind


def kind_of(document: dict[str, Any]) -> str:
    kind: str = document["kind"]
    if kind == "KafkaTopic":
        return f"{kind} {document['spec']['topicName']}"
    name = document["metadata"]["name"]
    return next(
        (f"{part.title()}{kind}" for part in ("routes", "dashboard", "scaling") if name.endswith(f"-{part}")), kind
    )


@pytest.fixture(scope="session")
def kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The kubeconfig of a control plane with KEDA. Tests that use it carry the marker ``k8s``."""
    program = cluster_program()
    if program is None:
        pytest.skip("a Kubernetes control plane: no K8S_CLUSTER and no ../shared/k8s/cluster")
    with control_plane(program, tmp_path_factory.mktemp("k8s")) as kubeconfig:
        yield kubeconfig


@pytest.fixture(scope="session")
def api(kubeconfig: Path) -> client.ApiClient:
    return config.new_client_from_config(str(kubeconfig))


@pytest.fixture
def namespace(api: client.ApiClient, unique: Callable[[str], str]) -> str:
    """The name of a namespace of the test's own."""
    name = unique("ns")
    client.CoreV1Api(api).create_namespace({"metadata": {"name": name}})
    return name
