"""The images: built by buildah without a Docker engine, and run by crun as the chart's pods are."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import shlex
import shutil
import tarfile
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from openai_server import OpenAIServer
from parts import S3Part, eventually
from world import World

from nanovllm.demo.child_process import LocalProcess, free_port, read_loopback
from nanovllm.training import synthetic
from tools import build_image
from tools.build_image import VARIANTS, Storage, build, import_base, make_base, name_of
from tools.run_image import SECCOMP_PROFILE, Container, chart_values, runtime_configuration, seccomp

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("IMAGE_FOLDER") or build_image.FOLDER)
BUILD_OPTIONS = shlex.split(os.environ.get("IMAGE_BUILD_OPTIONS", ""))
STAND_INS = "localhost/stand-ins"
STATIC_SHELL = shutil.which("busybox")


def need(*programs: str) -> None:
    """Skip where a program is missing, or this is not root."""
    if missing := [program for program in programs if shutil.which(program) is None]:
        pytest.skip(f"no {', '.join(missing)} on this machine (apt-get install {' '.join(missing)})")
    if os.geteuid() != 0:
        pytest.skip("images are built and mounted by root")


@pytest.fixture
def stand_ins(tmp_path: Path) -> Storage:
    """A storage with a base of busybox, in which each program of a build only writes down how it was called."""
    need("buildah", "busybox")
    assert STATIC_SHELL is not None
    programs = tmp_path / "base" / "bin"
    programs.mkdir(parents=True)
    shutil.copy(STATIC_SHELL, programs / "busybox")
    for applet in ("sh", "mkdir", "rm", "find"):
        (programs / applet).symlink_to("busybox")
    log = 'mkdir -p /opt/nanovllm/bin /opt/nanovllm/lib; echo "${0##*/} $*" >> /opt/nanovllm/log'
    for program in ("python3", "python", "pip", "apt-get", "strip"):
        (programs / program).write_text(f"#!/bin/sh\n{log}\n[ ! -d /src ] || find /src -type f > /opt/nanovllm/sent\n")
        (programs / program).chmod(0o755)
    storage = Storage(tmp_path / "storage")
    storage.folder.mkdir()
    with tarfile.open(tmp_path / "base.tar", "w") as archive:
        archive.add(tmp_path / "base", arcname=".")
    import_base(storage, tmp_path / "base.tar", STAND_INS)
    return storage


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_buildah_reads_each_dockerfile_and_sends_it_the_package_alone(stand_ins: Storage, variant: str) -> None:
    image = build(stand_ins, variant, base=STAND_INS)
    configuration = stand_ins.configuration(image)
    assert configuration["User"] == "65532:65532"
    assert (configuration["Entrypoint"], configuration["Cmd"]) == (["nanovllm"], ["worker"])
    assert configuration["WorkingDir"] == "/tmp"
    assert any(variable.startswith("PATH=/opt/nanovllm/bin:") for variable in configuration["Env"])
    root = stand_ins.root(image)
    assert not (root / "src").exists(), "the sources are not in the image twice"
    log = (root / "opt/nanovllm/log").read_text()
    assert ("torch" in log) == ("g++" in log) == (variant != "remote")
    sent = set((root / "opt/nanovllm/sent").read_text().split())
    tracked = {f"/src/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / "nanovllm").rglob("*.py")}
    assert tracked <= sent
    assert not [path for path in sent if "__pycache__" in path or path.startswith(("/src/tests", "/src/.git"))]


async def check_that_it_answers(
    storage: Storage, variant: str, pod: Mapping[str, Any], kafka: str, s3: S3Part, directory: Path
) -> None:
    """A job on Kafka with an image in S3 is answered by the variant's image, confined as the chart's ``pod`` is."""
    (worker,) = pod["containers"]
    async with AsyncExitStack() as stack:
        settings: dict[str, str] = {}
        if variant == "remote":
            server = await stack.enter_async_context(OpenAIServer())
            settings = {"ENGINE__BACKEND": "openai", "ENGINE__MODEL": server.model, "REMOTE__ENDPOINTS": server.url}
        world = World(kafka, s3, directory, {f"NANOVLLM_{name}": value for name, value in settings.items()})
        await world.create_topics()
        sample, picture, port = synthetic.sample(1, seed=1, split="heldout", kind="total"), io.BytesIO(), free_port()
        sample.images[0].save(picture, "PNG")
        uri = world.s3.put(world.bucket, "receipt.png", picture.getvalue())
        async with world.producer() as producer:
            await producer.send(sample.prompt, images=[uri], job_id="receipt")
        plain = {entry["name"]: entry["value"] for entry in worker["env"] if "value" in entry}
        own = {"OMP_NUM_THREADS": "2", "NANOVLLM_HTTP__HOST": "127.0.0.1", "NANOVLLM_HTTP__PORT": str(port)}
        container = Container(
            storage,
            name_of(variant),
            directory,
            environment=plain | world.environment | own,
            arguments=worker["args"],
            pod=pod["securityContext"],
            container=worker["securityContext"],
        )
        process = LocalProcess(variant, container.command, directory / f"{variant}.log")
        process.start()
        stack.callback(process.kill)
        stack.callback(container.remove)
        async with world.reader() as reader:
            while not world.results and not world.dead_letters:
                assert process.is_running, process.tail(30)
                await world.read(reader)
        assert not world.dead_letters, world.dead_letters
        ((result,),) = world.results.values()
        expected = sample.answer if variant == "cpu" else sample.prompt.partition("<")[0].lower().strip()
        assert result.text.lower().startswith(expected.lower())
        await eventually(lambda: is_ready(port), why="the worker answers jobs and is not ready")
        check_that_it_is_confined(container.pid, compiled=variant == "cpu")
        assert await asyncio.to_thread(process.stop, 60) == 0, process.tail(30)
        assert await world.lag() == 0
        log = process.log.read_text()
        assert "Traceback" not in log
        assert "Read-only file system" not in log


def is_ready(port: int) -> bool:
    try:
        return bool(read_loopback(f"http://127.0.0.1:{port}/readyz"))
    except OSError:
        return False


def check_that_it_is_confined(pid: int, *, compiled: bool) -> None:
    """User, rights, mounts and environment of a container's first process, as the kernel tells them."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = {name: text.split() for name, _, text in (line.partition(":") for line in lines)}
    context = chart_values()["podSecurityContext"]
    assert status["Uid"] == [str(context["runAsUser"])] * 4
    assert status["Gid"] == [str(context["runAsGroup"])] * 4
    assert set(status["Groups"]) <= {str(context["fsGroup"])}
    assert {int(status[kind][0], 16) for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
    root = Path(f"/proc/{pid}/root")
    for folder in ("", "etc", "opt/nanovllm", "opt/nanovllm/bin", "var/tmp"):
        with pytest.raises(OSError) as refused:
            (root / folder / "written").write_text("")
        assert refused.value.errno == errno.EROFS, folder
    (root / "tmp" / "written").write_text("")
    environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
    assert {"HF_HUB_OFFLINE=1", "GOMP_SPINCOUNT=0", "HOME=/tmp"} <= set(environment)
    if compiled:
        assert "/opt/nanovllm/cache/nanovllm/cpu-" in Path(f"/proc/{pid}/maps").read_text(), "kernels of the image"
    for absent in ("opt/nanovllm/bin/pip", "usr/bin/g++", "usr/bin/gcc", "src"):
        assert not (root / absent).exists(), absent
    assert compiled or not list(root.glob("opt/nanovllm/lib/python3*/site-packages/torch"))


@pytest.mark.slow
@pytest.mark.kafka
@pytest.mark.s3
@pytest.mark.parametrize("variant", ["cpu", "remote"])
async def test_an_image_that_was_built_answers_a_job_without_root_on_a_read_only_root(
    variant: str, kafka_broker: str, versity_s3: S3Part, render: Callable[..., Any], tmp_path: Path
) -> None:
    need("buildah", "crun")
    storage = Storage(FOLDER)
    if not (storage.folder / "storage").exists() or not storage.has(name_of(variant)):
        pytest.skip(f"no image was built here (tools/build_image.py {variant}; IMAGE_FOLDER)")
    pod = render()["Deployment"]["spec"]["template"]["spec"]
    await check_that_it_answers(storage, variant, pod, kafka_broker, versity_s3, tmp_path)


@pytest.mark.proof
@pytest.mark.kafka
@pytest.mark.s3
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", ["remote", "cpu"])
async def test_an_image_is_built_from_this_tree_and_answers_a_job(
    variant: str, kafka_broker: str, versity_s3: S3Part, render: Callable[..., Any], tmp_path: Path
) -> None:
    """``IMAGE_BUILD_OPTIONS`` are options of ``buildah bud``, for a machine that does not reach the public indexes."""
    need("buildah", "crun", "debootstrap")
    storage = Storage(tmp_path / "images")
    make_base(storage)
    build(storage, variant, BUILD_OPTIONS)
    pod = render()["Deployment"]["spec"]["template"]["spec"]
    await check_that_it_answers(storage, variant, pod, kafka_broker, versity_s3, tmp_path)


def test_a_security_context_that_the_container_would_not_have_is_refused(tmp_path: Path) -> None:
    values = chart_values()
    image = {"Entrypoint": ["nanovllm"], "Cmd": ["worker"], "Env": [], "WorkingDir": "/tmp"}
    for pod, container in (
        ({"runAsNonRoot": False}, {}),
        ({"supplementalGroups": [5]}, {}),
        ({}, {"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}),
    ):
        with pytest.raises(ValueError, match="would not have it"):
            runtime_configuration(
                image,
                tmp_path,
                pod=values["podSecurityContext"] | pod,
                container=values["securityContext"] | container,
                tmp_size="1Gi",
                environment={},
                arguments=(),
            )


def test_the_seccomp_profile_keeps_calls_that_need_a_capability_from_the_process() -> None:
    if not SECCOMP_PROFILE.exists():
        pytest.skip(f"no {SECCOMP_PROFILE} (apt-get install golang-github-containers-common)")
    rules = seccomp()["syscalls"]
    allowed = {name for rule in rules if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}
    assert {"read", "openat", "futex"} <= allowed
    assert not {"init_module", "bpf", "kexec_load"} & allowed


def test_the_documents_have_the_sizes_and_the_start_that_were_measured() -> None:
    measured = json.loads((REPOSITORY / "benchmarks" / "results" / "image.json").read_text())
    page = (REPOSITORY / "docs" / "deploy.md").read_text(encoding="utf-8")
    assert measured["machine"]["cpu"]
    for variant, image in measured["images"].items():
        own = image["layers"][-1]
        row = f"| `{variant}` | {megabytes(own['bytes'])} MB | {megabytes(own['compressed_bytes'])} MB |"
        assert row in page, row
        if start := image.get("start"):
            assert f"| {start['cpu_seconds']:.1f} s |" in page[page.index(row) :].splitlines()[0]


def megabytes(size: int) -> str:
    return f"{round(size / 1e6):,}"
