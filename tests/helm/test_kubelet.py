"""The stand-in kubelet by itself: what a pod's specification says is what its process gets."""

from __future__ import annotations

from pathlib import Path

import pytest
from control_plane import secret, wait_for
from kubelet import Kubelet
from kubernetes import client

from nanovllm.demo.child_process import free_port

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(120)]

SERVER = """
import os, signal
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

signal.signal(signal.SIGTERM, signal.SIG_IGN)
work = Path(os.environ["WORK"])
print(os.environ["POD"], os.environ["PASSWORD"], os.environ["GREETING"], (work / "made-first").read_text(), flush=True)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if (work / self.path[1:]).exists() else 503)
        self.end_headers()


HTTPServer((os.environ["NANOVLLM_HTTP__HOST"], int(os.environ["PORT"])), Handler).serve_forever()
"""
FIRST = "import os; from pathlib import Path; w = Path(os.environ['WORK']); "
FIRST += "(w / 'made-first').write_text('from the init container'); (w / 'live').touch()"


def test_a_pods_process_has_its_variables_files_probes_restarts_and_end(
    api: client.ApiClient, namespace: str, tmp_path: Path
) -> None:
    core, port = client.CoreV1Api(api), free_port()
    core.create_namespaced_secret(namespace, secret("login", password="hunter2"))
    core.create_namespaced_config_map(namespace, {"metadata": {"name": "code"}, "data": {"server.py": SERVER}})
    work, code = {"name": "work", "mountPath": "/work-of-pod"}, {"name": "code", "mountPath": "/srv/code"}
    where = {"name": "WORK", "value": "/work-of-pod"}
    probe = {"periodSeconds": 1, "timeoutSeconds": 1, "failureThreshold": 1}
    server = {
        "name": "server",
        "image": "server",
        "command": ["python", "/srv/code/server.py"],
        "ports": [{"name": "http", "containerPort": port}],
        "env": [
            where,
            {"name": "PORT", "value": str(port)},
            {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "login", "key": "password"}}},
            {"name": "GREETING", "value": "hello-$(POD)"},
        ],
        "startupProbe": probe | {"failureThreshold": 30, "httpGet": {"path": "/live", "port": "http"}},
        "livenessProbe": probe | {"httpGet": {"path": "/live", "port": "http"}},
        "readinessProbe": probe | {"httpGet": {"path": "/ready", "port": "http"}},
        "volumeMounts": [work, code],
    }
    first = {"name": "first", "image": "first", "command": ["python", "-c", FIRST], "env": [where]}
    spec = {
        "terminationGracePeriodSeconds": 1,
        "initContainers": [first | {"volumeMounts": [work]}],
        "containers": [server],
        "volumes": [{"name": "work", "emptyDir": {}}, {"name": "code", "configMap": {"name": "code"}}],
    }
    core.create_namespaced_pod(namespace, {"metadata": {"name": "pod"}, "spec": spec})

    def state() -> tuple[str, bool, int]:
        status = core.read_namespaced_pod("pod", namespace).status
        (container,) = status.container_statuses or [client.V1ContainerStatus.model_construct()]
        is_ready = any(one.type == "Ready" and one.status == "True" for one in status.conditions or ())
        return status.phase, is_ready, getattr(container, "restart_count", 0)

    with Kubelet(api, namespace, tmp_path) as kubelet:
        folder = tmp_path / "pod" / "work"
        wait_for(lambda: state() == ("Running", False, 0), "the container does not start")
        (folder / "ready").touch()
        wait_for(lambda: state() == ("Running", True, 0), "the readiness probe is not asked")
        printed = (tmp_path / "pod" / "server.log").read_text().splitlines()[0]
        assert printed.split(maxsplit=3) == ["pod", "hunter2", "hello-pod", "from the init container"]
        (folder / "live").unlink()
        wait_for(lambda: state()[2] == 1, "a container that fails its liveness probe is not started again")
        (folder / "live").touch()
        wait_for(lambda: state()[1], "the container does not come back")
        core.delete_namespaced_pod("pod", namespace)
        wait_for(lambda: not core.list_namespaced_pod(namespace).items, "the pod does not end")
        assert {one.exit_code for one in kubelet.exits} == {-9}, "SIGTERM is ignored, and the grace period is a second"
