"""The Dockerfiles against the files and names that they rely on; test_image.py builds and starts them."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from string import Template

import pytest
import yaml
from packaging.requirements import Requirement

from nanovllm.engine.kernels import installed_folder
from nanovllm.settings.worker import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
INDEXES = {
    "Dockerfile": "https://download.pytorch.org/whl/cpu",
    "Dockerfile.cuda": "https://download.pytorch.org/whl/cu130",
}
QUIET = ("find", "mkdir", "rm", "strip")
WITHOUT_PIP = "python -m pip uninstall -y pip"
Stage = list[tuple[str, str]]


def read(name: str) -> list[Stage]:
    """(instruction, arguments) pairs of every build stage of a Dockerfile, on the bases that it names by default."""
    text = (REPOSITORY / name).read_text()
    lines = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    before: Stage = []
    found: list[Stage] = []
    for line in filter(str.strip, lines.splitlines()):
        instruction, _, arguments = line.strip().partition(" ")
        if instruction == "FROM":
            arguments = Template(arguments).substitute(defaults_of(before))
            found.append([])
        (found[-1] if found else before).append((instruction, arguments.strip()))
    return found


@pytest.fixture(scope="module", params=list(INDEXES))
def name(request: pytest.FixtureRequest) -> str:
    """Each Dockerfile."""
    return str(request.param)


@pytest.fixture(scope="module")
def stages(name: str) -> list[Stage]:
    """Its stages; the last two are ``build`` and the image."""
    return read(name)


@pytest.fixture(scope="module")
def project() -> dict[str, dict[str, object]]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def all_of(stage: Stage, instruction: str) -> list[str]:
    return [arguments for name, arguments in stage if name == instruction]


def only(stage: Stage, instruction: str) -> str:
    (arguments,) = all_of(stage, instruction)
    return arguments


def defaults_of(stage: Stage) -> dict[str, str]:
    found: dict[str, str] = {}
    for argument in all_of(stage, "ARG"):
        name, _, value = argument.partition("=")
        found[name] = Template(value).substitute(found)
    return found


def copied_by(stage: Stage) -> list[str]:
    """What comes from the repository."""
    words = [shlex.split(arguments) for arguments in all_of(stage, "COPY") if "--from=" not in arguments]
    return [source for line in words for source in line[:-1]]


def is_sent_to_the_build(path: str) -> bool:
    """Whether .dockerignore lets ``path`` (or the folder it lies in) through; the last rule that matches decides."""
    is_sent = True
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        rule = line.strip()
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!").removeprefix("**/")
        parents = [str(parent) for parent in Path(path).parents if str(parent) != "."]
        names = [path, *parents] + ([Path(path).name] if "**/" in rule else [])
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            is_sent = rule.startswith("!")
    return is_sent


def test_the_image_runs_as_the_charts_user(stages: list[Stage]) -> None:
    values = yaml.safe_load((REPOSITORY / "helm" / "nanovllm" / "values.yaml").read_text())
    context = values["podSecurityContext"]
    assert only(stages[-1], "USER") == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert context["runAsUser"] != 0


def test_what_is_copied_exists_and_reaches_the_build(stages: list[Stage]) -> None:
    sources = copied_by(stages[-2])
    assert "nanovllm" in sources
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert is_sent_to_the_build(source), source


def test_the_wheels_build_has_all_the_files_that_it_names(
    stages: list[Stage], project: dict[str, dict[str, object]]
) -> None:
    assert {project["readme"], *project["license-files"], "pyproject.toml"} <= {*copied_by(stages[-2])}


@pytest.mark.parametrize(
    "path",
    [
        "engine",
        "pipeline/app.py",
        "vision",
        "sinks",
        "tests/parts.py",
        ".venv/bin/python",
        "build/demo/report.html",
        ".git/config",
        "nanovllm/__pycache__/errors.cpython-312.pyc",
        ".env",
    ],
)
def test_links_tests_and_litter_stay_out_of_the_build(path: str) -> None:
    assert not is_sent_to_the_build(path)


def test_every_file_of_the_package_reaches_the_build() -> None:
    kept_back = [
        path
        for path in (REPOSITORY / "nanovllm").rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and not is_sent_to_the_build(str(path.relative_to(REPOSITORY)))
    ]
    assert not kept_back


def test_the_command_and_the_extra_are_the_packages_own(
    stages: list[Stage], project: dict[str, dict[str, object]]
) -> None:
    (program,) = json.loads(only(stages[-1], "ENTRYPOINT"))
    assert program in project["scripts"]
    values = yaml.safe_load((REPOSITORY / "helm" / "nanovllm" / "values.yaml").read_text())
    assert json.loads(only(stages[-1], "CMD")) == values["args"]
    assert set(defaults_of(stages[-2])["EXTRAS"].split(",")) <= set(project["optional-dependencies"])


def commands(stage: Stage, directory: Path, **arguments: str) -> list[str]:
    """What the shell runs of a stage with these arguments; programs that write down their names stand in for all."""
    log = directory / "log"
    log.touch()
    for program in ("pip", "apt-get", "python", "python3", *QUIET):
        (directory / program).write_text(f'#!/bin/sh\necho "${{0##*/}} $*" >> {log}\n')
        (directory / program).chmod(0o755)
    environment = {**defaults_of(stage), **arguments, "PATH": str(directory)}
    for command in all_of(stage, "RUN"):
        subprocess.run(["/bin/sh", "-c", command], env=environment, check=True)
    return [line for line in log.read_text().splitlines() if not line.startswith(("apt-get", *QUIET))]


def test_the_image_for_servers_is_built_without_torch_and_compiler(tmp_path: Path) -> None:
    run = commands(read("Dockerfile")[0], tmp_path, EXTRAS="remote")
    assert run == ["python3 -m venv /opt/nanovllm", "pip install .[remote]", WITHOUT_PIP]


def test_the_image_with_an_engine_has_torch_before_the_package_and_compiled_kernels(
    name: str, stages: list[Stage], tmp_path: Path
) -> None:
    venv, torch, package, kernels, end = commands(stages[-2], tmp_path)
    assert venv == "python3 -m venv /opt/nanovllm"
    assert torch.startswith(f"pip install --index-url {INDEXES[name]} torch")
    assert package.endswith(".[worker,documents,remote]")
    assert kernels == "python -m nanovllm.engine.kernels"
    assert end == WITHOUT_PIP
    (tmp_path / "own").mkdir()
    own_index = commands(stages[-2], tmp_path / "own", TORCH_INDEX="")[1]
    assert own_index == f"pip install {torch.split()[-1]}"


def test_torch_is_in_the_range_of_the_package(
    name: str, stages: list[Stage], project: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    extra = project["optional-dependencies"]["worker"]
    (requirement,) = [Requirement(one) for one in extra if one.startswith("torch>")]  # type: ignore[attr-defined]
    asked = [
        Requirement(one.split()[-1]) for one in commands(stages[-2], tmp_path) if " torch" in one and "[" not in one
    ]
    assert [one.name for one in asked] == ["torch"]
    if name == "Dockerfile":
        assert asked == [requirement]
    else:  # one torch, and the same one after the package's other requirements are there
        (pinned,) = (one.version for one in asked[0].specifier)
        assert pinned in requirement.specifier
        assert commands(stages[-2], tmp_path)[-3] == f"pip install torch=={pinned} .[worker,documents,remote]"


def test_flash_attn_is_built_for_the_torch_and_python_of_the_image_or_left_out(
    project: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    builder, build, image = read("Dockerfile.cuda")
    assert {name: defaults_of(builder)[name] for name in ("TORCH", "TORCH_CUDA")} == {
        name: defaults_of(build)[name] for name in ("TORCH", "TORCH_CUDA")
    }
    cuda = re.fullmatch(r"nvidia/cuda:(\d+)\.(\d+)\.\d+-devel-ubuntu24\.04 AS flash-attn", only(builder, "FROM"))
    assert cuda is not None
    assert defaults_of(build)["TORCH_CUDA"] == f"cu{cuda[1]}{cuda[2]}"
    assert only(image, "FROM").startswith("python:3.12-")  # Ubuntu 24.04's, which builds the wheel
    built = commands(builder, tmp_path)[-1]
    (requirement,) = [one for one in project["optional-dependencies"]["cuda"] if one.startswith("flash-attn")]  # type: ignore[attr-defined]
    asked = Requirement(built.split()[-1])
    assert "pip wheel --no-build-isolation" in built
    assert {one.version for one in asked.specifier} == {defaults_of(builder)["FLASH_ATTN"]}
    assert defaults_of(builder)["FLASH_ATTN"] in Requirement(requirement).specifier
    (tmp_path / "without").mkdir()
    assert commands(builder, tmp_path / "without", FLASH_ATTN="") == []


def test_all_that_a_gpus_image_writes_is_below_tmp_and_kernels_find_a_compiler() -> None:
    image = read("Dockerfile.cuda")[-1]
    environment = dict(word.split("=", 1) for word in shlex.split(" ".join(all_of(image, "ENV"))))
    assert environment["HOME"] == "/tmp"
    assert environment["TRITON_CACHE_DIR"].startswith("/tmp/")
    assert "compute" in environment["NVIDIA_DRIVER_CAPABILITIES"].split(",")
    assert "gcc" in only(image, "RUN").split()
    plain = read("Dockerfile")[-1]
    shared = dict(word.split("=", 1) for word in shlex.split(" ".join(all_of(plain, "ENV"))))
    assert shared.items() <= environment.items()


def test_kernels_lie_where_a_worker_with_another_cache_finds_them(
    stages: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chart gives the worker a volume as its cache; the image's kernels are those of its Python environment."""
    environment = dict(word.split("=", 1) for word in shlex.split(" ".join(all_of(stages[-1], "ENV"))))
    (virtual,) = [one.split()[-1] for one in all_of(stages[-1], "COPY") if one.startswith("--from=build")]
    assert environment["PATH"].startswith(f"{virtual}/bin:")
    monkeypatch.setattr(sys, "prefix", virtual)
    assert installed_folder() == Path(environment["XDG_CACHE_HOME"], "nanovllm")


def test_the_python_is_one_that_the_package_supports(
    stages: list[Stage], project: dict[str, dict[str, object]]
) -> None:
    bases = {only(stage, "FROM").split()[0] for stage in stages[-2:]}
    (base,) = bases  # a virtual environment moves between stages of one Python only
    minor = int(re.fullmatch(r"python:3\.(\d+)-slim(?:-trixie)?", base)[1])  # type: ignore[index]
    assert minor >= int(str(project["requires-python"]).removeprefix(">=3."))


def test_the_port_is_the_workers(stages: list[Stage]) -> None:
    assert int(only(stages[-1], "EXPOSE")) == Settings().http.port


def test_nothing_is_fetched_by_add(stages: list[Stage]) -> None:
    assert not [arguments for stage in stages for name, arguments in stage if name == "ADD"]
