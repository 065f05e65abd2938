"""The house itself: links, imports, and what must never stand in the tree."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("engine", "pipeline", "sinks", "vision")


@pytest.mark.parametrize("room", ROOMS)
def test_the_root_shows_each_room_by_a_relative_link(room: str) -> None:
    link = ROOT / room
    assert link.is_symlink()
    assert os.readlink(link) == f"nanovllm/{room}"


def test_the_set_up_says_that_it_goes_on_while_pip_is_silent(tmp_path: Path) -> None:
    programs = {
        ".venv/bin/python": 'case "$*" in *pip*) until [ -e second ]; do command -p sleep 0.01; done ;; esac',
        # The line comes between two waits: pip ends after the second has begun.
        "bin/sleep": '[ "$1" = 5 ] || exec command -p sleep "$1"; [ -e first ] && touch second; touch first; '
        "command -p sleep 0.05",
    }
    for name, body in programs.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": ".venv/bin/python"}
    command = ["sh", str(ROOT / "tools" / "setup.sh"), "demo"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "Installing nanovllm[demo]" in ended.stdout
    assert re.search(r"^    \d+ s, \d+ MB in \.venv$", ended.stdout, re.MULTILINE), ended.stdout


def test_the_package_wins_beside_packages_of_the_same_names_as_its_rooms(tmp_path: Path) -> None:
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text(f"OWNER = 'the user of {room}'\n")
    script = (
        "import engine, pipeline, vision, sinks\n"
        "import nanovllm.engine.scheduling.sequence, nanovllm.vision.processor, nanovllm.messages.job\n"
        "assert engine.OWNER == 'the user of engine' and vision.OWNER == 'the user of vision'\n"
        "assert nanovllm.engine.__file__ != engine.__file__\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)


def test_no_tracked_text_names_a_registry_host_or_a_path_of_one_machine() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    forbidden = re.compile(r"pypi\.org|pythonhosted|registry\.npmjs|deb\.debian|/root/|/work/main|/home/\w+/")
    found = []
    for name in tracked.stdout.split("\0"):
        path = ROOT / name
        if not name or path.is_symlink() or path.suffix in {".safetensors", ".png"} or path == Path(__file__):
            continue
        found += [f"{name}: {match.group()}" for match in [forbidden.search(path.read_text(errors="ignore"))] if match]
    assert not found


def test_make_help_names_every_promised_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in shown.splitlines()} >= {"demo", "test", "test-all", "proof", "check", "bench"}


def test_the_engine_is_read_in_an_evening() -> None:
    engine = ROOT / "nanovllm" / "engine"
    files = [path for pattern in ("*.py", "*.cpp", "*.h") for path in engine.rglob(pattern)]
    lines = {str(path.relative_to(engine)): path.read_text().splitlines() for path in files}
    assert {name: len(text) for name, text in lines.items() if len(text) > 400} == {}
    assert [name for name in lines if name.endswith(".py") and max(map(len, lines[name]), default=0) > 120] == []
    core = {
        f"{name}.py" for name in ("scheduler", "block_manager", "sequence", "model_runner", "sampler", "llm_engine")
    }
    assert sum(len(text) for name, text in lines.items() if Path(name).name in core) < 1500


# Names of an earlier private language, as modules, classes and qualified methods. Each has a term of the field now.
FORMER_MODULES = set(
    re.findall(
        r"\w+",
        """
        places rounds delays passage refusals spare_time in_flight suspects solitude poison systemic section
        dispatch reuse outgoing reference submission intake completion loops rows staging determinism guided
        speculation login_tokens native_encoder image_encoder decoder_pool tiny_recipe evaluate_tiny kv_memory
        attention_cuda doctor topic_plan assignment breaker console local_process client_commands dlq_commands
        topic_commands results_view
        """,
    )
)
FORMER_NAMES = set(
    re.findall(
        r"\w+",
        """
        Passage Delivery Assignment Places Rounds DelayedHeads InFlight Charge PartitionRecord Solitude
        PoisonLimit SystemicFaults Section Dispatch Claim Ticket SharedWork ImageReuse AnswerReuse
        RenewingProducer is_breakdown BuriedJob Refusals Refused OutgoingRecords RetryTiers Intake Plan
        VarlenPlan decode_plan leave_with among_others rejoin isolate can_take bury_up_to
        """,
    )
)
FORMER_METHODS = ("scheduler.plan(", "blocks.take(", "blocks.match(", "blocks.remember(", "dispatch.place(")


def test_the_former_private_names_are_gone() -> None:
    modules = {path.stem for path in (ROOT / "nanovllm").rglob("*.py")}
    assert modules & FORMER_MODULES == set()
    word = re.compile(rf"(?<![\w.])({'|'.join(sorted(FORMER_NAMES))})(?=[(.:\[,\]]| =)")
    found = []
    for path in (ROOT / "nanovllm").rglob("*.py"):
        text = path.read_text()
        names = {match[1] for match in word.finditer(text)} | {name for name in FORMER_METHODS if name in text}
        names |= set(re.findall(r"import Sequence as Rows", text))
        found += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(names)]
    assert found == []


def test_process_job_fits_one_screen_and_names_each_stage_once() -> None:
    from nanovllm.pipeline.stages.process import Stages, process_job

    source = inspect.getsource(process_job)
    assert len(source.splitlines()) <= 30
    of_records = {"receive", "invalid_records"}  # called by the worker, before there is a job
    stages = {field.name for field in dataclasses.fields(Stages)} - of_records
    assert {name: source.count(f"stages.{name}(") for name in stages} == dict.fromkeys(stages, 1)
