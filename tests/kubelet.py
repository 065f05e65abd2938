"""A stand-in for scheduler and kubelet: the pods of a namespace run as processes of this machine.

A pod that no node has is bound to one of the nodes that are registered here. Its init containers run one after another,
then its container, from the specification alone. HTTP probes decide about start, restart and readiness, and the status
follows. A pod that is deleted gets SIGTERM, SIGKILL after its grace period, and is gone.

Not here: resources, taints and selectors (any node that is not cordoned takes a pod), images, networks, several
containers beside each other, hooks of the lifecycle, and probes that are not HTTP.
"""

from __future__ import annotations

import http.client
import random
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from kubernetes import client, watch
from local_pod import ENTRY_POINT, LocalPod, Variables
from urllib3.exceptions import HTTPError

from nanovllm.demo.child_process import LocalProcess, read_loopback

LOOK_S = 0.1
RESTART_S = 0.5
"""Wait before a container is started again; a real kubelet waits for 10 s at first."""
RELIST_S = 2
UNREADY_PROBE_S = 0.25
"""Wait after a probe that failed. A real kubelet waits for the whole period, which is spent in idleness."""


@dataclass(frozen=True)
class ContainerExit:
    """How a container ended; ``exit_code`` as in ``subprocess`` (negative: by that signal)."""

    pod: str
    container: str
    exit_code: int | None


class Kubelet:
    """Runs the pods of ``namespace`` while it is entered; ``LocalPod`` has the other arguments.

    Args:
        nodes: names of the nodes; those of two kubelets of one cluster differ.
    """

    def __init__(
        self,
        api: client.ApiClient,
        namespace: str,
        directory: Path,
        *,
        nodes: Sequence[str] = (),
        image: Sequence[str] = ENTRY_POINT,
        claims: Mapping[str, Path] | None = None,
        adapt: Callable[[Variables], Variables] = dict,
    ) -> None:
        self.api = api
        self.core = client.CoreV1Api(api)
        self.namespace = namespace
        self.directory = directory
        self.nodes = tuple(nodes) or (f"{namespace}-node",)
        self.exits: list[ContainerExit] = []
        """How containers ended, init containers left out where they succeeded."""
        self._local = {"image": image, "claims": claims, "adapt": adapt}
        self._addresses = self._free_addresses()
        self._pods: dict[str, _RunningPod] = {}
        self._bound: dict[str, str] = {}
        self._watch: watch.Watch | None = None
        self._is_closed = threading.Event()
        self._watching = threading.Thread(target=self._follow, name="kubelet", daemon=True)

    def __enter__(self) -> Kubelet:
        for name in self.nodes:
            self.core.create_node({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}})
            ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "a stand-in"}
            self.core.patch_node_status(name, {"status": {"conditions": [ready]}})
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed.set()
        if self._watch is not None:
            self._watch.stop()
        self._watching.join(2 * RELIST_S)
        for pod in self._pods.values():
            pod.kill()
        for pod in self._pods.values():
            pod.thread.join(10)
        for name in self.nodes:
            self.core.delete_node(name)

    def process(self, pod: str) -> LocalProcess:
        """The process of the container of the pod that is called ``pod``."""
        process = self._running(pod).process
        assert process is not None, f"{pod} has no process yet"
        return process

    def read(self, pod: str, path: str) -> bytes:
        """What the port ``http`` of the pod that is called ``pod`` answers. Raises OSError as ``read_loopback``."""
        return read_loopback(self._running(pod).url + path)

    def logs(self) -> str:
        """What all containers have printed."""
        return "\n".join(f"{log}:\n{log.read_text(errors='replace')}" for log in self.directory.rglob("*.log"))

    def local_pod(self, pod: client.V1Pod, address: str) -> LocalPod:
        """The folders of ``pod``, which listens on ``address``."""
        return LocalPod(self.api, pod, self.directory / pod.metadata.name, address=address, **self._local)

    def _running(self, pod: str) -> _RunningPod:
        (running,) = (one for one in self._pods.values() if one.pod_name == pod)
        return running

    @staticmethod
    def _free_addresses() -> Callable[[], str]:
        # Another network of loopback for each kubelet: several may run on one machine.
        network, numbers = f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}", count(1)
        return lambda: f"{network}.{next(numbers)}"

    def _follow(self) -> None:
        while not self._is_closed.is_set():
            self._watch = watch.Watch()
            try:
                # Listed anew each time: a pod that no node could take is seen again.
                events = self._watch.stream(self.core.list_namespaced_pod, self.namespace, timeout_seconds=RELIST_S)
                for event in events:
                    self._see(event["type"], event["object"])
                    if self._is_closed.is_set():
                        return
            except (client.ApiException, HTTPError, OSError):
                if self._is_closed.wait(LOOK_S):
                    return

    def _see(self, event: str, pod: client.V1Pod) -> None:
        uid = pod.metadata.uid
        if event == "DELETED":
            self._bound.pop(uid, None)
            if uid in self._pods:
                self._pods[uid].kill()
        elif pod.spec.node_name is None:
            if pod.metadata.deletion_timestamp is None and pod.spec.scheduler_name == "default-scheduler":
                self._bind(pod)
        elif uid in self._pods:
            if pod.metadata.deletion_timestamp is not None:
                self._pods[uid].end(pod.metadata.deletion_grace_period_seconds)
        elif pod.spec.node_name in self.nodes and pod.status.phase not in ("Succeeded", "Failed"):
            self._pods[uid] = _RunningPod(self, pod, self._addresses())
            self._pods[uid].thread.start()

    def _bind(self, pod: client.V1Pod) -> None:
        """Bind ``pod`` to the node with the fewest pods that is not cordoned, where there is one."""
        nodes = [name for name in self.nodes if not self.core.read_node(name).spec.unschedulable]
        if not nodes:
            return
        node = min(nodes, key=list(self._bound.values()).count)
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        body = {"metadata": {"name": pod.metadata.name}, "target": target}
        # The answer is a Status, which the client would take for a Binding.
        answer = self.core.create_namespaced_binding(self.namespace, body, _preload_content=False)
        if answer.status >= 300 and answer.status not in (404, 409):  # deleted, or bound, since it was seen
            raise client.ApiException(http_resp=answer)
        self._bound[pod.metadata.uid] = node


class _RunningPod:
    """The life of one pod, from its binding to its deletion."""

    def __init__(self, kubelet: Kubelet, pod: client.V1Pod, address: str) -> None:
        self.thread = threading.Thread(target=self._run, name=pod.metadata.name, daemon=True)
        self.pod_name: str = pod.metadata.name
        self.node: str = pod.spec.node_name
        self.process: LocalProcess | None = None
        self._kubelet = kubelet
        self._pod = pod
        self._address = address
        (self._container,) = pod.spec.containers
        ports = {port.name: port.container_port for port in self._container.ports or ()}
        self.url = f"http://{address}:{ports.get('http')}"
        self._grace_s: int = pod.spec.termination_grace_period_seconds
        self._is_ending = threading.Event()
        self._is_killed = threading.Event()
        self._restarts = 0
        self._last_state: dict[str, Any] = {}
        self._conditions: dict[str, dict[str, str]] = {}
        self._reported: dict[str, Any] = {}

    def end(self, grace_s: int) -> None:
        """SIGTERM, and SIGKILL after ``grace_s`` seconds."""
        if not self._is_ending.is_set():
            self._grace_s = grace_s
            self._is_ending.set()

    def kill(self) -> None:
        """SIGKILL; the API server is not told."""
        self._is_killed.set()
        self._is_ending.set()
        if self.process is not None and self.process.is_running:
            self.process.kill()

    def _run(self) -> None:
        try:
            self._live()
            if self._is_ending.wait() and not self._is_killed.is_set():
                self._delete()
        except client.ApiException as error:
            if error.status != 404 and not self._is_killed.is_set():  # 404: deleted by force, or with its namespace
                raise
        finally:
            if self.process is not None:
                self.process.kill()

    def _live(self) -> None:
        local = self._prepared()
        if local is None or not self._initialise(local):
            return
        while not self._is_ending.is_set():
            exit_code = self._run_container(local)
            policy = self._pod.spec.restart_policy
            is_over = policy == "Never" or (policy == "OnFailure" and exit_code == 0)
            if self._is_ending.is_set() or is_over:
                self._report("Succeeded" if exit_code == 0 else "Failed", _terminated(exit_code))
                return
            self._restarts += 1
            self._last_state = _terminated(exit_code)
            self._report("Running", _waiting("CrashLoopBackOff"))
            self._is_ending.wait(RESTART_S)

    def _prepared(self) -> LocalPod | None:
        """The pod's folders; None where it was deleted before all that it refers to existed."""
        while not self._is_ending.is_set():
            try:
                return self._kubelet.local_pod(self._pod, self._address)
            except client.ApiException as error:
                if error.status != 404:
                    raise
                self._report("Pending", _waiting("CreateContainerConfigError"))
                self._is_ending.wait(1)
        return None

    def _initialise(self, local: LocalPod) -> bool:
        """Run the init containers one after another, each until it succeeds; False where the pod ends before."""
        for container in self._pod.spec.init_containers or ():
            while True:
                exit_code = self._run_to_end(container.name, local.process(container))
                if self._is_ending.is_set():
                    return False
                if exit_code == 0:
                    break
                if self._pod.spec.restart_policy == "Never":
                    self._report("Failed", _waiting("PodInitializing"))
                    return False
                self._is_ending.wait(RESTART_S)
        return True

    def _run_to_end(self, name: str, process: LocalProcess) -> int | None:
        self._report("Pending", _waiting("PodInitializing"))
        self.process = process
        process.start()
        while process.is_running and not self._is_ending.wait(LOOK_S):
            pass
        exit_code = self._stop(process)
        if exit_code != 0:
            self._kubelet.exits.append(ContainerExit(self.pod_name, name, exit_code))
        return exit_code

    def _run_container(self, local: LocalPod) -> int | None:
        """Run the container until it ends, fails its startup or liveness probe, or the pod is deleted."""
        self.process = process = local.process(self._container)
        process.start()
        running = {"running": {"startedAt": _now()}}
        probes = _Probes(self._container, self._address)
        self._report("Running", running)
        while process.is_running and not self._is_ending.wait(LOOK_S):
            probes.look()
            self._report("Running", running, is_started=probes.is_started, is_ready=probes.is_ready)
            if probes.failed is not None:
                break
        exit_code = self._stop(process, probes.failed.grace_s if probes.failed else None)
        self._kubelet.exits.append(ContainerExit(self.pod_name, self._container.name, exit_code))
        return exit_code

    def _stop(self, process: LocalProcess, grace_s: int | None = None) -> int | None:
        """SIGTERM, and SIGKILL after the grace period, to a process that may have ended."""
        if self._is_killed.is_set():
            process.kill()
        exit_code = process.stop(grace_s=self._grace_s if grace_s is None else grace_s)
        process.kill()  # the rest of its session
        return exit_code

    def _report(self, phase: str, state: dict[str, Any], *, is_started: bool = False, is_ready: bool = False) -> None:
        """Patch the pod's status where it has changed."""
        if self._is_killed.is_set():
            return
        is_running = phase == "Running"
        seen = {"PodScheduled": True, "Initialized": phase != "Pending", "ContainersReady": is_ready, "Ready": is_ready}
        for kind, is_true in seen.items():
            status = str(is_true)
            if self._conditions.get(kind, {}).get("status") != status:
                self._conditions[kind] = {"type": kind, "status": status, "lastTransitionTime": _now()}
        container = {
            "name": self._container.name,
            "image": self._container.image,
            "imageID": self._container.image,
            "state": state,
            "lastState": self._last_state,
            "ready": is_ready,
            "started": is_started and is_running,
            "restartCount": self._restarts,
        }
        # The network of pods is 10.0.0.0/8 to the cluster, which takes no loopback for an address of a Service.
        address = "10." + self._address.partition(".")[2]
        status = {
            "phase": phase,
            "conditions": [dict(condition) for condition in self._conditions.values()],
            "containerStatuses": [container],
            "podIP": address,
            "podIPs": [{"ip": address}],
        }
        if status != self._reported:
            self._reported = status
            self._kubelet.core.patch_namespaced_pod_status(
                self.pod_name, self._kubelet.namespace, {"metadata": {"uid": self._pod.metadata.uid}, "status": status}
            )

    def _delete(self) -> None:
        self._kubelet.core.delete_namespaced_pod(
            self.pod_name,
            self._kubelet.namespace,
            body={"gracePeriodSeconds": 0, "preconditions": {"uid": self._pod.metadata.uid}},
        )


class _Probes:
    """The three probes of a container: readiness and liveness begin when the startup probe has passed."""

    def __init__(self, container: client.V1Container, address: str) -> None:
        self._startup, self._liveness, self._readiness = (
            _Probe(probe, container, address) if probe is not None else None
            for probe in (container.startup_probe, container.liveness_probe, container.readiness_probe)
        )
        self.is_started = self._startup is None
        self.is_ready = False
        self.failed: _Probe | None = None

    def look(self) -> None:
        """Ask what is due."""
        if not self.is_started and self._startup is not None:
            outcome = self._startup.ask()
            self.is_started = outcome is True
            self.failed = self._startup if outcome is False else None
            for later in (self._liveness, self._readiness):
                if self.is_started and later is not None:
                    later.begin()
            return
        if self._liveness is not None and self._liveness.ask() is False:
            self.failed = self._liveness
        outcome = True if self._readiness is None else self._readiness.ask()
        if outcome is not None:
            self.is_ready = outcome


class _Probe:
    """An HTTP probe of a container."""

    def __init__(self, probe: client.V1Probe, container: client.V1Container, address: str) -> None:
        asked = probe.http_get
        ports = {port.name: port.container_port for port in container.ports or ()}
        self._url = f"http://{address}:{ports.get(asked.port, asked.port)}{asked.path}"
        self.grace_s: int | None = probe.termination_grace_period_seconds
        self._period_s: int = probe.period_seconds
        self._timeout_s: int = probe.timeout_seconds
        self._delay_s: int = probe.initial_delay_seconds or 0
        self._patience_s = self._period_s * probe.failure_threshold
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self._passed_at = time.monotonic() + self._delay_s
        self._due_at = self._passed_at

    def ask(self) -> bool | None:
        """True: it passes; False: it has not passed for as long as it may fail; None: neither, or it is not due."""
        if time.monotonic() < self._due_at:
            return None
        passes = self._passes()
        now = time.monotonic()
        self._due_at = now + (self._period_s if passes else min(self._period_s, UNREADY_PROBE_S))
        if passes:
            self._passed_at = now
            return True
        return False if now - self._passed_at >= self._patience_s else None

    def _passes(self) -> bool:
        try:
            with self._open(self._url, timeout=self._timeout_s) as answer:
                return 200 <= answer.status < 400
        except (OSError, http.client.HTTPException):
            return False


def _terminated(exit_code: int | None) -> dict[str, Any]:
    # A shell's way to write a signal, which is the runtime's too.
    code = 0 if exit_code is None else exit_code if exit_code >= 0 else 128 - exit_code
    return {"terminated": {"exitCode": code, "finishedAt": _now()}}


def _waiting(reason: str) -> dict[str, Any]:
    return {"waiting": {"reason": reason}}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
