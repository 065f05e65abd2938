"""``nanovllm smoke`` against a worker process with the shipped checkpoint, and against none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from parts import REPOSITORY, worker_process

from nanovllm.cli.main import main
from nanovllm.cli.smoke import PICTURE, PROMPT

Capture = pytest.CaptureFixture[str]
TOPICS = ("jobs", "results", "metrics", "dead_letters")


@pytest.fixture
def settings(
    embedded_broker: str, unique: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> dict[str, str]:
    """Variables of a group of this test's own, also in this process; its topics exist."""
    variables = {f"NANOVLLM_TOPICS__{name.upper()}": unique(name) for name in TOPICS}
    variables |= {"NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": embedded_broker, "NANOVLLM_KAFKA__GROUP_ID": unique("group")}
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    assert main(["topics", "create"]) == 0
    capsys.readouterr()
    return variables


@pytest.fixture
def worker(settings: dict[str, str], tmp_path: Path) -> Iterator[None]:
    process = worker_process(tmp_path, settings=settings)
    process.start()
    yield
    process.stop()


@pytest.mark.usefixtures("worker")
def test_a_known_receipt_is_read_and_every_call_sends_a_job_of_its_own(
    settings: dict[str, str], capsys: Capture
) -> None:
    assert main(["smoke", "--expect", "61.85", "--timeout", "120", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["passed"] is True
    assert first["outcome"]["text"] == "61.85"
    assert main(["smoke", "--timeout", "120"]) == 0
    told = capsys.readouterr().out
    assert first["outcome"]["job_id"] not in told
    assert f"went to {settings['NANOVLLM_TOPICS__JOBS']}" in told
    assert "model tiny-receipts: 61.85" in told
    assert f"its outcome in {settings['NANOVLLM_TOPICS__RESULTS']}; nothing is removed" in told
    # Another answer than the one that is expected, and a job that no worker could answer.
    assert main(["smoke", "--expect", "62", "--timeout", "120"]) == 1
    assert "it does not contain '62'" in capsys.readouterr().out
    assert main(["smoke", "--image", "s3://elsewhere/a.png", "--timeout", "120"]) == 1
    assert "dead letter forbidden_uri" in capsys.readouterr().out


def test_without_a_worker_the_line_says_where_to_look(settings: dict[str, str], capsys: Capture) -> None:
    assert main(["smoke", "--timeout", "1"]) == 1
    said = capsys.readouterr().err
    assert f"has no result in {settings['NANOVLLM_TOPICS__RESULTS']} after 1 s" in said
    assert settings["NANOVLLM_KAFKA__GROUP_ID"] in said


def test_a_prompt_without_a_place_for_the_picture_is_refused(settings: dict[str, str], capsys: Capture) -> None:
    assert main(["smoke", "--prompt", "hello"]) == 2
    assert "<|image|>" in capsys.readouterr().err


def test_the_pod_of_helm_test_needs_neither_torch_nor_pillow(settings: dict[str, str]) -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'numpy', 'PIL', 'transformers')))\n"
        "from nanovllm.cli.main import main; sys.exit(main(['smoke', '--timeout', '1']))"
    )
    environment = {**os.environ, **settings, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert ended.returncode == 1
    assert "has no result" in ended.stderr


def test_the_picture_is_small_enough_for_every_topic() -> None:
    assert PICTURE.stat().st_size < 10_000
    assert "<|image|>" in PROMPT
