"""A stand-in for an adapter of metrics: one external metric, which the API server passes on to the HPA controller."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from control_plane import wait_for
from kubernetes import client

GROUP, VERSION = "external.metrics.k8s.io", "v1beta1"
ROOT = f"/apis/{GROUP}/{VERSION}"


class ExternalMetric:
    """The metric ``name`` of every namespace, whose value is what ``value()`` returns when it is asked for.

    ``selectors`` has the label selectors with which it was asked for.
    """

    def __init__(self, name: str, value: Callable[[], int]) -> None:
        self.name = name
        self.value = value
        self.selectors: set[str] = set()

    @contextmanager
    def served(self, api: client.ApiClient, pki: Path) -> Iterator[None]:
        """Serve the group on loopback with the certificate in ``pki``, and have the API server pass requests on."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pki / "tls.crt", pki / "tls.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            self._register(api, server.server_address[1])
            yield
        finally:
            server.shutdown()
            server.server_close()

    def _register(self, api: client.ApiClient, port: int) -> None:
        service = {"type": "ExternalName", "externalName": "localhost", "ports": [{"name": "https", "port": port}]}
        client.CoreV1Api(api).create_namespaced_service(
            "kube-system", {"metadata": {"name": "adapter"}, "spec": service}
        )
        services, name = client.ApiregistrationV1Api(api), f"{VERSION}.{GROUP}"
        spec = {
            "group": GROUP,
            "version": VERSION,
            "groupPriorityMinimum": 100,
            "versionPriority": 100,
            "insecureSkipTLSVerify": True,
            "service": {"name": "adapter", "namespace": "kube-system", "port": port},
        }
        services.create_api_service({"metadata": {"name": name}, "spec": spec})

        def is_available() -> bool:
            conditions = services.read_api_service(name).status.conditions or ()
            return any(one.type == "Available" and one.status == "True" for one in conditions)

        wait_for(is_available, "the API server does not reach the adapter")

    def _answer(self, path: str, selector: str) -> dict[str, Any] | None:
        if path == ROOT:
            metric = {"name": self.name, "singularName": "", "namespaced": True, "kind": "ExternalMetricValueList"}
            resources = [metric | {"verbs": ["get"]}]
            return {
                "kind": "APIResourceList",
                "apiVersion": "v1",
                "groupVersion": f"{GROUP}/{VERSION}",
                "resources": resources,
            }
        if not path.startswith(f"{ROOT}/namespaces/") or not path.endswith(f"/{self.name}"):
            return None
        self.selectors.add(selector)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        item = {"metricName": self.name, "metricLabels": {}, "timestamp": now, "value": str(self.value())}
        return {
            "kind": "ExternalMetricValueList",
            "apiVersion": f"{GROUP}/{VERSION}",
            "metadata": {},
            "items": [item],
        }

    def _handler(metric) -> type[BaseHTTPRequestHandler]:  # noqa: N805  # the handler has a self of its own
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                asked = urlsplit(self.path)
                selector = parse_qs(asked.query).get("labelSelector", [""])[0]
                answer = metric._answer(asked.path, selector)
                body = json.dumps(answer or {}).encode()
                self.send_response(404 if answer is None else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler
