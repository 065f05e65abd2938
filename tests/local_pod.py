"""A pod's container as a process of this machine: the environment and the files that its specification names."""

from __future__ import annotations

import base64
import math
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from kubernetes import client
from kubernetes.utils.quantity import parse_quantity
from parts import python_process

from nanovllm.demo.child_process import LocalProcess

_COMPILED = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
"""Where the kernels are, which the image has compiled."""


class LocalPod:
    """Runs the image's entry point with a pod's own arguments. Mounts lie below ``directory``; paths follow them."""

    def __init__(self, api: client.ApiClient, pod: client.V1Pod, directory: Path) -> None:
        self._core = client.CoreV1Api(api)
        self._namespace: str = pod.metadata.namespace
        self._spec = pod.spec
        (self._container,) = pod.spec.containers
        self._directory = directory
        places = {mount.mount_path: str(self._mounted(mount.name)) for mount in self._container.volume_mounts}
        self.environment = {name: _moved(text, places) for name, text in self._variables().items()}
        self.process: LocalProcess = python_process(
            directory,
            *("-m", "nanovllm.cli.main", *self._container.args),
            settings=self.environment | {"XDG_CACHE_HOME": _COMPILED},
            name=pod.metadata.name,
        )

    def passes(self, probe: str) -> bool:
        """Whether the ``probe`` (startup, liveness, readiness) of the container succeeds now."""
        asked = getattr(self._container, f"{probe}_probe").http_get
        (port,) = (one.container_port for one in self._container.ports if one.name == asked.port)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{asked.path}", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _mounted(self, name: str) -> Path:
        """The folder of the volume ``name``, with the files that a Secret or ConfigMap gives it."""
        (volume,) = (one for one in self._spec.volumes if one.name == name)
        if volume.host_path is not None:
            return Path(volume.host_path.path)
        folder = self._directory / name
        folder.mkdir()
        source = volume.secret or volume.config_map
        if source is not None:
            data = self._secret(source.secret_name) if volume.secret else self._config(source.name)
            for item in source.items or [client.V1KeyToPath(key, path=key) for key in data]:
                (folder / item.path).write_text(data[item.key])
        return folder

    def _variables(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in self._container.env_from:
            found |= self._config(source.config_map_ref.name) if source.config_map_ref else {}
            found |= self._secret(source.secret_ref.name) if source.secret_ref else {}
        for entry in self._container.env:
            origin: Any = entry.value_from
            if origin is None:
                found[entry.name] = entry.value
            elif origin.secret_key_ref is not None:
                found[entry.name] = self._secret(origin.secret_key_ref.name)[origin.secret_key_ref.key]
            else:
                group, resource = origin.resource_field_ref.resource.split(".")
                amount = parse_quantity(getattr(self._container.resources, group)[resource])
                found[entry.name] = str(math.ceil(amount / parse_quantity(origin.resource_field_ref.divisor)))
        return found

    def _secret(self, name: str) -> dict[str, str]:
        data = self._core.read_namespaced_secret(name, self._namespace).data
        return {key: base64.b64decode(text).decode() for key, text in data.items()}

    def _config(self, name: str) -> dict[str, str]:
        return dict(self._core.read_namespaced_config_map(name, self._namespace).data)


def _moved(text: str, places: dict[str, str]) -> str:
    for path, folder in places.items():
        if text == path or text.startswith(f"{path}/"):
            return folder + text.removeprefix(path)
    return text
