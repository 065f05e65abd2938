"""Deletion cost of the worker's own pod: when a ReplicaSet loses pods, the one with the least work goes first."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import ssl
from collections.abc import Callable
from http.client import HTTPException, HTTPSConnection
from urllib.parse import quote

from nanovllm.objects.daemon_threads import DaemonThreads
from nanovllm.settings.kubernetes import KubernetesSettings

logger = logging.getLogger("nanovllm.worker")

ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
REQUEST_TIMEOUT_S = 5.0


def deletion_cost(jobs: int) -> int:
    """Cost of a pod with ``jobs`` at work: 0 when idle, and one more each time that their number doubles."""
    return jobs.bit_length()


class OwnPod:
    """The pod of this process at the API server, asked with the token of its ServiceAccount."""

    def __init__(self, settings: KubernetesSettings) -> None:
        self._folder = settings.service_account_folder
        self._name = settings.pod_name or socket.gethostname()

    def set_deletion_cost(self, cost: int) -> None:
        """Set the annotation; blocks for ``REQUEST_TIMEOUT_S`` at each step of a request at most.

        It goes through ``pods/status``: a token for that may change nothing in a pod's specification.

        Raises:
            OSError: no address or credentials, the API server is out of reach, or it refuses.
            HTTPException: it does not answer in HTTP.
        """
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise OSError("KUBERNETES_SERVICE_HOST is not set: this is no pod")
        token, namespace = (
            (self._folder / name).read_text(encoding="utf-8").strip()  # read again: tokens are renewed
            for name in ("token", "namespace")
        )
        path = f"/api/v1/namespaces/{quote(namespace, safe='')}/pods/{quote(self._name, safe='')}/status"
        body = json.dumps({"metadata": {"annotations": {ANNOTATION: str(cost)}}})
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/merge-patch+json"}
        context = ssl.create_default_context(cafile=str(self._folder / "ca.crt"))
        connection = HTTPSConnection(host, int(port), timeout=REQUEST_TIMEOUT_S, context=context)
        try:
            connection.request("PATCH", path, body, headers)
            response = connection.getresponse()
            response.read()
        finally:
            connection.close()
        if response.status >= 300:
            raise OSError(f"PATCH {path} was answered with {response.status} {response.reason}")


async def keep_deletion_cost(set_cost: Callable[[int], None], jobs: Callable[[], int], every_s: float) -> None:
    """Call ``set_cost`` in a thread when the cost of ``jobs()`` has changed, every ``every_s`` seconds at most.

    Runs until the task is cancelled. A failure is logged, and tried again.
    """
    threads = DaemonThreads("nanovllm-deletion-cost")
    shown: int | None = None  # a container that was started again in its pod does not know
    while True:
        cost = deletion_cost(jobs())
        if cost != shown:
            try:
                await threads.run(lambda: set_cost(cost))  # noqa: B023  # awaited before the next round
                shown = cost
            except (OSError, HTTPException, ValueError) as error:
                logger.warning("the pod's deletion cost could not be set: %s", error)
        await asyncio.sleep(every_s)
