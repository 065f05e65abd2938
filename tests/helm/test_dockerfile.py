"""The Dockerfile against the files and names that it relies on; a build itself needs Docker and the internet."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from nanovllm.settings.worker import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
Stage = list[tuple[str, str]]


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    """(instruction, arguments) pairs of every build stage."""
    text = (REPOSITORY / "Dockerfile").read_text()
    lines = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    found: list[Stage] = []
    for line in filter(str.strip, lines.splitlines()):
        instruction, _, arguments = line.strip().partition(" ")
        if instruction == "FROM":
            found.append([])
        found[-1].append((instruction, arguments.strip()))
    return found


@pytest.fixture(scope="module")
def project() -> dict[str, dict[str, object]]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def only(stage: Stage, instruction: str) -> str:
    (arguments,) = [arguments for name, arguments in stage if name == instruction]
    return arguments


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
    copied = [shlex.split(arguments) for name, arguments in stages[0] if name == "COPY"]
    sources = [source for words in copied for source in words[:-1]]
    assert "nanovllm" in sources
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert is_sent_to_the_build(source), source


def test_the_wheels_build_has_all_the_files_that_it_names(
    stages: list[Stage], project: dict[str, dict[str, object]]
) -> None:
    copied = {word for name, arguments in stages[0] if name == "COPY" for word in shlex.split(arguments)[:-1]}
    assert {project["readme"], *project["license-files"], "pyproject.toml"} <= copied


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
    assert set(default_extras(stages).split(",")) <= set(project["optional-dependencies"])


def default_extras(stages: list[Stage]) -> str:
    name, _, extras = only(stages[0], "ARG").partition("=")
    assert name == "EXTRAS"
    return extras


def commands(stages: list[Stage], extras: str, directory: Path) -> list[str]:
    """What the build's shell runs with these extras; programs that write down their names stand in for all."""
    log = directory / "log"
    log.touch()
    for program in ("pip", "apt-get", "python", "rm"):
        (directory / program).write_text(f'#!/bin/sh\necho "${{0##*/}} $*" >> {log}\n')
        (directory / program).chmod(0o755)
    for instruction, arguments in stages[0]:
        if instruction == "RUN":
            environment = {"PATH": str(directory), "EXTRAS": extras}
            subprocess.run(["/bin/sh", "-c", arguments], env=environment, check=True)
    return log.read_text().splitlines()


def test_the_image_for_servers_is_built_without_torch_and_compiler(stages: list[Stage], tmp_path: Path) -> None:
    assert commands(stages, "remote", tmp_path) == ["python -m venv /opt/nanovllm", "pip install .[remote]"]


def test_the_image_with_an_engine_has_torch_before_the_package_and_compiled_kernels(
    stages: list[Stage], tmp_path: Path
) -> None:
    run = commands(stages, default_extras(stages), tmp_path)
    kinds = [" ".join(command.split()[:3]) for command in run]
    assert [kind for kind in kinds if not kind.startswith(("apt-get", "rm"))] == [
        "python -m venv",
        "pip install --index-url",
        "pip install .[worker,documents,remote]",
        "python -m nanovllm.engine.kernels",
    ]


def test_torch_comes_from_the_cpu_index_in_the_range_of_the_package(
    stages: list[Stage], project: dict[str, dict[str, object]]
) -> None:
    runs = [arguments for name, arguments in stages[0] if name == "RUN" and "torch" in arguments]
    (requirement,) = [one for one in project["optional-dependencies"]["worker"] if one.startswith("torch>")]  # type: ignore[attr-defined]
    assert len(runs) == 1
    assert "https://download.pytorch.org/whl/cpu" in runs[0]
    assert f'"{requirement}"' in runs[0]


def test_the_python_is_one_that_the_package_supports(
    stages: list[Stage], project: dict[str, dict[str, object]]
) -> None:
    bases = {only(stage, "FROM").split()[0] for stage in stages}
    (base,) = bases  # a virtual environment moves between stages of one Python only
    minor = int(re.fullmatch(r"python:3\.(\d+)-slim", base)[1])  # type: ignore[index]
    assert minor >= int(str(project["requires-python"]).removeprefix(">=3."))


def test_the_port_is_the_workers(stages: list[Stage]) -> None:
    assert int(only(stages[-1], "EXPOSE")) == Settings().http.port


def test_nothing_is_fetched_by_add(stages: list[Stage]) -> None:
    assert not [arguments for stage in stages for name, arguments in stage if name == "ADD"]
