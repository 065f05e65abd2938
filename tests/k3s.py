"""A Kubernetes control plane with KEDA in containers: k3s without its agent, KEDA's operator and metrics adapter.

Without the agent there is no scheduler, no kubelet and no network of pods, and no container needs privileges: pods are
bound and run by the tests, as on the local control plane.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from certificates import write_certificate
from containers import IMAGES, ContainerProcess
from kubernetes import client, config, utils
from kubernetes.client.exceptions import ApiException
from parts import eventually
from urllib3.exceptions import HTTPError

from nanovllm.demo.child_process import free_port

KEDA_VERSION = IMAGES["keda"].partition("@")[0].rpartition(":")[2]
KEDA_MANIFEST = f"https://github.com/kedacore/keda/releases/download/v{KEDA_VERSION}/keda-{KEDA_VERSION}.yaml"
KEDA_SHA256 = "9bae123eb64fab8f96c67bbd576bb5819e4794df346c5aaa402a01c68b0557ab"
_NAMESPACE, _ADAPTER = "keda", "keda-metrics-apiserver"
START_S = 180.0


@contextlib.contextmanager
def k3s_with_keda(directory: Path) -> Iterator[Path]:
    """A control plane whose data is in ``directory``; gives its kubeconfig."""
    kubeconfig, keys = directory / "kubeconfig", directory / "keys"
    with contextlib.ExitStack() as stack:
        k3s = k3s_process(directory, free_port(), free_port())
        stack.callback(k3s.stop)
        k3s.start()
        _wait(kubeconfig.exists, k3s)
        api = config.new_client_from_config(str(kubeconfig))
        core, custom = client.CoreV1Api(api), client.CustomObjectsApi(api)
        _wait(partial(_answers, lambda: core.read_namespaced_service_account("default", "default")), k3s)
        utils.create_from_yaml(api, yaml_objects=keda_definitions())
        _wait(partial(_answers, lambda: custom.get_api_resources("keda.sh", "v1alpha1")), k3s)
        write_keys(keys)
        metrics_port, adapter_port = free_port(), free_port()
        for process in (
            operator_process(kubeconfig, keys, metrics_port),
            adapter_process(kubeconfig, keys, metrics_port, adapter_port),
        ):
            stack.callback(process.stop)
            process.start()
        ca = base64.b64encode((keys / "ca.crt").read_bytes()).decode()
        utils.create_from_yaml(api, yaml_objects=external_metrics_objects(adapter_port, ca))
        _wait(partial(_answers, lambda: custom.get_api_resources("external.metrics.k8s.io", "v1beta1")), process)
        yield kubeconfig


def k3s_process(directory: Path, port: int, manager_port: int) -> ContainerProcess:
    """k3s on ``port``, which listens on the next one too; its controllers look as often as the local ones do."""
    manager = {
        "secure-port": str(manager_port),
        # Nodes of the tests send no heartbeats.
        "controllers": "*,-node-lifecycle-controller",
        "horizontal-pod-autoscaler-sync-period": "2s",
        "horizontal-pod-autoscaler-downscale-stabilization": "10s",
    }
    command = ["server", "--disable-agent", "--disable-scheduler", "--disable-cloud-controller"]
    command += ["--disable-helm-controller", "--disable-network-policy", "--flannel-backend=none"]
    command += ["--disable=coredns,servicelb,traefik,local-storage,metrics-server"]
    command += ["--egress-selector-mode=disabled"]  # the API server then asks an ExternalName service directly
    command += ["--bind-address=127.0.0.1", f"--https-listen-port={port}", f"--data-dir={directory / 'k3s'}"]
    command += [f"--write-kubeconfig={directory / 'kubeconfig'}"]
    command += [f"--kube-controller-manager-arg={name}={value}" for name, value in manager.items()]
    return ContainerProcess("k3s", command, env={"HOME": str(directory)}, writes=directory)


def operator_process(kubeconfig: Path, keys: Path, metrics_port: int) -> ContainerProcess:
    """KEDA's operator, which serves the adapter on ``metrics_port``."""
    command = [f"--kubeconfig={kubeconfig}", f"--cert-dir={keys}", "--zap-encoder=console"]
    command += [f"--metrics-service-bind-address=127.0.0.1:{metrics_port}"]
    command += [f"--metrics-bind-address=127.0.0.1:{free_port()}"]
    command += [f"--health-probe-bind-address=127.0.0.1:{free_port()}"]
    command += ["--enable-webhook-patching=false", "--enable-apiservice-patching=false"]
    return _keda_process("keda", ["/keda"], command, kubeconfig, keys)


def adapter_process(kubeconfig: Path, keys: Path, metrics_port: int, port: int) -> ContainerProcess:
    """KEDA's metrics adapter, which serves the API server on ``port``."""
    command = ["--bind-address=127.0.0.1", f"--secure-port={port}", "--port=0", f"--cert-dir={keys}"]
    command += [f"--tls-cert-file={keys / 'tls.crt'}", f"--tls-private-key-file={keys / 'tls.key'}"]
    command += [f"--metrics-service-address=localhost:{metrics_port}"]
    command += [f"--{use}-kubeconfig={kubeconfig}" for use in ("lister", "authentication", "authorization")]
    return _keda_process("keda-adapter", ["/keda-adapter"], command, kubeconfig, keys)


def _keda_process(
    part: str, entrypoint: list[str], command: list[str], kubeconfig: Path, keys: Path
) -> ContainerProcess:
    env = {"KUBECONFIG": str(kubeconfig), "POD_NAMESPACE": _NAMESPACE, "KEDA_CLUSTER_OBJECT_NAMESPACE": _NAMESPACE}
    return ContainerProcess(
        part, command, entrypoint=entrypoint, env={**env, "WATCH_NAMESPACE": ""}, reads=(kubeconfig, keys)
    )


def write_keys(folder: Path) -> None:
    """One certificate for KEDA's two servers and the client between them, and its own authority."""
    folder.mkdir()
    names = ("localhost", f"keda-operator.{_NAMESPACE}.svc", f"{_ADAPTER}.{_NAMESPACE}.svc")
    ca = write_certificate(folder / "ca.crt", address="127.0.0.1", names=names)
    shutil.copyfile(ca, folder / "tls.crt")
    shutil.copyfile(ca.with_suffix(".pem"), folder / "tls.key")


def keda_definitions() -> list[dict[str, Any]]:
    """Namespace and CustomResourceDefinitions of KEDA's release."""
    with urllib.request.urlopen(KEDA_MANIFEST, timeout=60) as answer:
        manifest = answer.read()
    assert hashlib.sha256(manifest).hexdigest() == KEDA_SHA256, f"{KEDA_MANIFEST} is another file than before"
    kinds = ("Namespace", "CustomResourceDefinition")
    return [one for one in yaml.safe_load_all(manifest) if one and one["kind"] in kinds]


def external_metrics_objects(port: int, ca: str) -> list[dict[str, Any]]:
    """What leads the API server to the adapter on ``port``; ``ca``: the adapter's authority as base64."""
    metadata = {"name": "external-metrics-reader"}
    group, rbac = "external.metrics.k8s.io", "rbac.authorization.k8s.io"
    service = {"name": _ADAPTER, "namespace": _NAMESPACE}
    role = {"apiGroup": rbac, "kind": "ClusterRole", **metadata}
    # The service account as which k3s runs this controller.
    reader = {"kind": "ServiceAccount", "name": "horizontal-pod-autoscaler", "namespace": "kube-system"}
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": service,
            "spec": {"type": "ExternalName", "externalName": "localhost", "ports": [{"name": "https", "port": port}]},
        },
        {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": f"v1beta1.{group}"},
            "spec": {
                "group": group,
                "version": "v1beta1",
                "groupPriorityMinimum": 100,
                "versionPriority": 100,
                "caBundle": ca,
                "service": {**service, "port": port},
            },
        },
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "ClusterRole",
            "metadata": metadata,
            "rules": [{"apiGroups": [group], "resources": ["*"], "verbs": ["*"]}],
        },
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": metadata,
            "roleRef": role,
            "subjects": [reader],
        },
    ]


def _answers(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except (ApiException, HTTPError):
        return False
    return True


def _wait(is_true: Callable[[], object], process: ContainerProcess) -> None:
    def is_done() -> object:
        assert process.is_running, process.tail(30)
        return is_true()

    asyncio.run(eventually(is_done, within_s=START_S, why=f"{process.part} is not ready"))
