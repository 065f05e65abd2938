"""A pod's containers as processes of this machine: the command, variables and files that its specification names.

A process sees the root of this machine and not that of an image: each mount is a folder of its own, and variables and
arguments that name a path below a mount name that folder instead.
"""

from __future__ import annotations

import base64
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kubernetes import client
from kubernetes.utils.quantity import parse_quantity
from parts import process_environment

from nanovllm.demo.child_process import LocalProcess

ENTRY_POINT = (sys.executable, "-m", "nanovllm.cli.main")
"""What the image starts where a container names no command."""

CREDENTIALS = "/var/run/secrets/kubernetes.io/serviceaccount"
"""Where a ServiceAccount's token is mounted. No variable names it: clients know the path, the worker by its default."""

_COMPILED = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
"""Where the kernels are, which the image has compiled."""

Variables = Mapping[str, str]


class LocalPod:
    """Folders of a pod's volumes below ``directory``, and processes of its containers.

    Args:
        address: what the pod listens on, in place of every address.
        image: program of the image's entry point.
        claims: folders of the volumes behind claims, by the claim's name.
        adapt: changes a container's variables.

    Raises:
        ApiException: a ConfigMap or Secret that is not optional does not exist.
    """

    def __init__(
        self,
        api: client.ApiClient,
        pod: client.V1Pod,
        directory: Path,
        *,
        address: str,
        image: Sequence[str] = ENTRY_POINT,
        claims: Mapping[str, Path] | None = None,
        adapt: Callable[[Variables], Variables] = dict,
    ) -> None:
        self._core = client.CoreV1Api(api)
        self._server = urlsplit(api.configuration.host)
        self._pod = pod
        self._directory = directory
        self._address = address
        self._image = image
        self._claims = {} if claims is None else claims
        self._adapt = adapt
        self._volumes = {volume.name: self._folder(volume) for volume in pod.spec.volumes or ()}

    def process(self, container: client.V1Container) -> LocalProcess:
        """The process of ``container``, not started yet. It ends with the thread that starts it (Linux)."""
        places = self._places(container)
        variables = {name: _moved(text, places) for name, text in self._adapt(self._variables(container)).items()}
        own = {
            "PYTHONUNBUFFERED": "1",
            "HOSTNAME": self._pod.metadata.name,
            "KUBERNETES_SERVICE_HOST": self._server.hostname or "",
            "KUBERNETES_SERVICE_PORT": str(self._server.port),
        }
        if credentials := places.get(CREDENTIALS):
            own["NANOVLLM_KUBERNETES__SERVICE_ACCOUNT_FOLDER"] = credentials
        command = self._command(container, lambda text: _moved(_expanded(text, variables), places))
        if setpriv := shutil.which("setpriv"):
            command = [setpriv, "--pdeathsig", "KILL", "--", *command]
        return LocalProcess(
            container.name,
            command,
            self.log(container.name),
            env=process_environment(
                own | variables | {"NANOVLLM_HTTP__HOST": self._address, "XDG_CACHE_HOME": _COMPILED}
            ),
        )

    def log(self, container: str) -> Path:
        """The file of what ``container`` prints."""
        return self._directory / f"{container}.log"

    def _command(self, container: client.V1Container, outside: Callable[[str], str]) -> list[str]:
        """The command line; ``outside`` says what a word of the container means here, as the image's program does."""
        program, *arguments = container.command or ["nanovllm"]
        known = {"nanovllm": self._image, "python": (sys.executable,), "python3": (sys.executable,)}
        return [*known.get(program, (outside(program),)), *map(outside, [*arguments, *(container.args or ())])]

    def _places(self, container: client.V1Container) -> dict[str, str]:
        """The folder or file of each mount, by its path in the container."""
        return {
            mount.mount_path: str(self._volumes[mount.name] / (mount.sub_path or ""))
            for mount in container.volume_mounts or ()
        }

    def _folder(self, volume: client.V1Volume) -> Path:
        if volume.host_path is not None:
            return Path(volume.host_path.path)
        if volume.persistent_volume_claim is not None:
            return self._claims[volume.persistent_volume_claim.claim_name]
        folder = self._directory / volume.name
        folder.mkdir(parents=True, exist_ok=True)
        projected = volume.projected.sources if volume.projected else [volume]
        for source in projected:
            for path, text in self._files(source):
                file = folder / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
        return folder

    def _files(self, source: client.V1Volume | client.V1VolumeProjection) -> list[tuple[str, str]]:
        """Paths and texts of a volume, or of a part of a projected one; an emptyDir has none."""
        if source.downward_api is not None:
            return [(item.path, self._field(item.field_ref.field_path)) for item in source.downward_api.items]
        if getattr(source, "service_account_token", None) is not None:
            return [(source.service_account_token.path, self._token(source.service_account_token))]
        if (origin := source.secret or source.config_map) is None:
            return []
        if source.secret is not None:
            name = getattr(origin, "secret_name", None) or origin.name
            data = self._secret(name, is_optional=origin.optional)
        else:
            data = self._config(origin.name, is_optional=origin.optional)
        items = origin.items or [client.V1KeyToPath(key=key, path=key) for key in data]
        return [(item.path, data[item.key]) for item in items if item.key in data or not origin.optional]

    def _token(self, source: client.V1ServiceAccountTokenProjection) -> str:
        audiences = [source.audience] if source.audience else []
        bound = {"apiVersion": "v1", "kind": "Pod", "name": self._pod.metadata.name, "uid": self._pod.metadata.uid}
        request = {"spec": {"audiences": audiences, "expirationSeconds": 3_600, "boundObjectRef": bound}}
        account = self._pod.spec.service_account_name
        answer = self._core.create_namespaced_service_account_token(account, self._namespace, request)
        return str(answer.status.token)

    def _variables(self, container: client.V1Container) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in container.env_from or ():
            if (origin := source.config_map_ref) is not None:
                data = self._config(origin.name, is_optional=origin.optional)
            else:
                origin = source.secret_ref
                data = self._secret(origin.name, is_optional=origin.optional)
            found |= {f"{source.prefix or ''}{name}": text for name, text in data.items()}
        for entry in container.env or ():
            if entry.value_from is None:
                found[entry.name] = _expanded(entry.value or "", found)
            elif (text := self._referred(container, entry.value_from)) is not None:
                found[entry.name] = text
        return found

    def _referred(self, container: client.V1Container, origin: client.V1EnvVarSource) -> str | None:
        if (key := origin.secret_key_ref) is not None:
            data = self._secret(key.name, is_optional=key.optional)
            return data.get(key.key) if key.optional else data[key.key]
        if (key := origin.config_map_key_ref) is not None:
            data = self._config(key.name, is_optional=key.optional)
            return data.get(key.key) if key.optional else data[key.key]
        if origin.field_ref is not None:
            return self._field(origin.field_ref.field_path)
        group, resource = origin.resource_field_ref.resource.split(".")
        amount = parse_quantity(getattr(container.resources, group)[resource])
        return str(math.ceil(amount / parse_quantity(origin.resource_field_ref.divisor)))

    def _field(self, path: str) -> str:
        metadata, spec = self._pod.metadata, self._pod.spec
        if labelled := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
            return str((getattr(metadata, labelled[1]) or {}).get(labelled[2], ""))
        fields = {
            "metadata.name": metadata.name,
            "metadata.namespace": metadata.namespace,
            "metadata.uid": metadata.uid,
            "spec.nodeName": spec.node_name,
            "spec.serviceAccountName": spec.service_account_name,
            "status.podIP": self._address,
        }
        return str(fields[path])

    @property
    def _namespace(self) -> str:
        return str(self._pod.metadata.namespace)

    def _secret(self, name: str, *, is_optional: bool | None) -> dict[str, str]:
        found = _unless_missing(self._core.read_namespaced_secret, name, self._namespace, is_optional)
        data = (found.data or {}) if found else {}
        return {key: base64.b64decode(text).decode() for key, text in data.items()}

    def _config(self, name: str, *, is_optional: bool | None) -> dict[str, str]:
        found = _unless_missing(self._core.read_namespaced_config_map, name, self._namespace, is_optional)
        return dict(found.data or {}) if found else {}


def _unless_missing(read: Callable[[str, str], Any], name: str, namespace: str, is_optional: bool | None) -> Any:
    try:
        return read(name, namespace)
    except client.ApiException as error:
        if error.status == 404 and is_optional:
            return None
        raise


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    """``text`` with ``$(NAME)`` replaced where there is such a variable; ``$$`` is a dollar sign."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda found: "$" if not found[1] else variables.get(found[1], found[0]), text)


def _moved(text: str, places: Mapping[str, str]) -> str:
    """``text`` with each path that lies in one of ``places`` replaced; no part of a longer path is one."""
    if not places:
        return text
    paths = "|".join(re.escape(path) for path in sorted(places, key=len, reverse=True))
    return re.sub(rf"(?<![\w./-])(?:{paths})(?![\w.-])", lambda found: places[found[0]], text)
