"""A container of a built image, run by crun as the chart's pods are: user, read-only root, no capabilities, seccomp.

    python tools/run_image.py [cpu|remote] [--env NAME=VALUE ...] [-- nanovllm's arguments]

It runs as root on Debian (`apt-get install buildah crun`), on what tools/build_image.py has built. Entry point,
environment and working directory are the image's; user, group and what the process may do are those of the chart's
``podSecurityContext`` and ``securityContext``. The network is this machine's.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from tools.build_image import FOLDER, ROOT, Storage, name_of

# What buildah and CRI-O take for RuntimeDefault; Debian's golang-github-containers-common, which buildah depends on.
SECCOMP_PROFILE = Path("/usr/share/containers/seccomp.json")
# crun refuses a machine with both versions of cgroups, though it is asked for none: one version, in mounts of its own.
OWN_MOUNTS = ["unshare", "--mount", "sh", "-c", 'mount -t cgroup2 cgroup2 /sys/fs/cgroup; exec "$@"', "sh"]
# What a kubelet writes into each container.
HOST_FILES = ("/etc/hosts", "/etc/resolv.conf")
MASKED = ("/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug", "/proc/timer_list")
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_UNITS = {"Mi": 1 << 20, "Gi": 1 << 30}


def chart_values() -> dict[str, Any]:
    """The chart's own values."""
    text = (ROOT / "helm" / "nanovllm" / "values.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def seccomp(profile: Path = SECCOMP_PROFILE) -> dict[str, Any]:
    """The ``profile`` of containers for a process without capabilities, as the OCI runtime specification has it.

    Raises:
        FileNotFoundError: there is no such profile.
    """
    found = json.loads(profile.read_text())
    machine = _ARCHITECTURES.get(platform.machine(), platform.machine())
    native = next(one for one in found["archMap"] if one["architecture"].endswith(platform.machine().upper()))
    kept = ("names", "action", "args", "errnoRet")
    return {
        "defaultAction": found["defaultAction"],
        "defaultErrnoRet": found["defaultErrnoRet"],
        "architectures": [native["architecture"], *native["subArchitectures"]],
        "syscalls": [
            {key: rule[key] for key in kept if rule.get(key) not in (None, "", [])}
            for rule in found["syscalls"]
            # A rule that is included for a capability is not for us; one that is excluded for a capability is.
            if not rule.get("includes", {}).get("caps")
            and machine in rule.get("includes", {}).get("arches", [machine])
            and machine not in rule.get("excludes", {}).get("arches", [])
        ],
    }


def runtime_configuration(
    image: Mapping[str, Any],
    root: Path,
    *,
    pod: Mapping[str, Any],
    container: Mapping[str, Any],
    tmp_size: str,
    environment: Mapping[str, str],
    arguments: Sequence[str],
) -> dict[str, Any]:
    """A container's ``config.json`` of the OCI runtime specification.

    Args:
        image: the image's configuration.
        root: its files.
        pod: a pod's security context.
        container: its container's.
        tmp_size: of /tmp, such as ``1Gi``.
        environment: variables beside the image's, which they win over.
        arguments: in the place of the image's; none: the image's.

    Raises:
        ValueError: the contexts ask for what is not done here.
    """
    done = {
        "runAsNonRoot": True,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    free = {"runAsUser", "runAsGroup", "fsGroup", "readOnlyRootFilesystem"}
    strange = {key: value for key, value in {**pod, **container}.items() if key not in free and done.get(key) != value}
    if strange:
        raise ValueError(f"the security context asks for {strange}, and this container would not have it: add it here")
    number, unit = int(tmp_size[:-2]), _UNITS[tmp_size[-2:]]
    private = ["nosuid", "nodev", "noexec"]
    host_files = [name for name in HOST_FILES if Path(name).exists()]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": pod["runAsUser"], "gid": pod["runAsGroup"], "additionalGids": [pod["fsGroup"]]},
            "args": [*image["Entrypoint"], *(arguments or image["Cmd"])],
            "env": [f"{name}={value}" for name, value in {**_variables(image), **environment}.items()],
            "cwd": image["WorkingDir"],
            "capabilities": {},
            "noNewPrivileges": True,
        },
        "root": {"path": str(root), "readonly": bool(container["readOnlyRootFilesystem"])},
        "hostname": "nanovllm",
        "mounts": [
            _mount("/proc", "proc"),
            _mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=64k"),
            _mount("/dev/shm", "tmpfs", *private, "mode=1777", "size=64m"),
            _mount("/sys", "bind", *private, "rbind", "ro", source="/sys"),
            _mount("/tmp", "tmpfs", "nosuid", "nodev", f"gid={pod['fsGroup']}", "mode=2777", f"size={number * unit}"),
            *(_mount(name, "bind", *private, "bind", "ro", source=name) for name in host_files),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")],
            "maskedPaths": list(MASKED),
            "readonlyPaths": list(READ_ONLY),
            "seccomp": seccomp(),
        },
    }


def _variables(image: Mapping[str, Any]) -> dict[str, str]:
    return dict(variable.split("=", 1) for variable in image["Env"])


def _mount(destination: str, kind: str, *options: str, source: str = "") -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source or kind, "options": list(options)}


class Container:
    """A container of ``image``, whose own files lie in ``directory``; `command` runs it until it ends.

    The other arguments are those of `runtime_configuration`; security contexts that are not given are the chart's.
    """

    def __init__(
        self,
        storage: Storage,
        image: str,
        directory: Path,
        *,
        environment: Mapping[str, str],
        arguments: Sequence[str] = (),
        pod: Mapping[str, Any] | None = None,
        container: Mapping[str, Any] | None = None,
    ) -> None:
        values = chart_values()
        self.name = f"nanovllm-{uuid4().hex[:10]}"
        self._bundle = directory / self.name
        self._bundle.mkdir(parents=True)
        self._crun = ["crun", "--root", str(self._bundle / "state"), "--cgroup-manager", "disabled"]
        configuration = runtime_configuration(
            storage.configuration(image),
            storage.root(image),
            pod=pod or values["podSecurityContext"],
            container=container or values["securityContext"],
            tmp_size=values["tmpSizeLimit"],
            environment=environment,
            arguments=arguments,
        )
        (self._bundle / "config.json").write_text(json.dumps(configuration, indent=1))

    @property
    def command(self) -> list[str]:
        """The command line that runs it in the foreground; signals go to its process."""
        return [*OWN_MOUNTS, *self._crun, "run", "--bundle", str(self._bundle), self.name]

    @property
    def pid(self) -> int:
        """The process as this machine numbers it. Raises CalledProcessError where it does not run."""
        state = subprocess.run([*self._crun, "state", self.name], check=True, capture_output=True, text=True)
        return int(json.loads(state.stdout)["pid"])

    def remove(self) -> None:
        """End what still runs of it."""
        subprocess.run([*self._crun, "delete", "--force", self.name], check=False, capture_output=True)


def main() -> None:
    """Run a container until it ends, with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", nargs="?", default="cpu")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--driver", default="vfs")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="none: the image's")
    asked = parser.parse_args()
    storage = Storage(asked.folder, asked.driver)
    environment = dict(variable.split("=", 1) for variable in asked.env)
    image, bundles = name_of(asked.variant), storage.folder / "bundles"
    container = Container(storage, image, bundles, environment=environment, arguments=asked.arguments)
    try:
        sys.exit(subprocess.run(container.command, check=False).returncode)
    finally:
        container.remove()


if __name__ == "__main__":
    main()
