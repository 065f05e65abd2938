"""What may be imported where: producing jobs needs no torch, and the package stands beside a user's own rooms."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nanovllm

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "PIL", "jinja2", "tqdm")
REFUSE_HEAVY = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f'{{name}} is not installed here', name=name)
sys.meta_path.insert(0, Refuse())
"""


def run(script: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    script = f"import sys, nanovllm\nprint([name for name in {HEAVY!r} if name in sys.modules], len(nanovllm.__all__))"
    assert run(script, tmp_path) == "[] 7\n"


def test_producers_and_readers_import_without_torch_installed(tmp_path: Path) -> None:
    run(
        REFUSE_HEAVY
        + "from nanovllm import JobProducer, Job, Result, DeadLetter, SamplingParams\n"
        + "import nanovllm.messages.job, nanovllm.messages.codec, nanovllm.settings.worker, nanovllm.cli.main\n"
        + "import nanovllm.messages.result, nanovllm.sinks.kafka, nanovllm.sinks.jsonl, nanovllm.metrics\n"
        + "import nanovllm.engine.backends.base, nanovllm.engine.outputs\n"
        + "import nanovllm.engine.text.prompt_encoder, nanovllm.engine.backends.echo\n",
        tmp_path,
    )


def test_a_job_is_made_and_a_result_is_read_without_torch_installed(tmp_path: Path) -> None:
    run(
        REFUSE_HEAVY
        + "from nanovllm import Job, JobProducer, SamplingParams\n"
        + "from nanovllm.messages.codec import decode_job, encode_job\n"
        + "job = Job(prompt='Say hello', sampling={'max_tokens': 8})\n"
        + "assert decode_job(encode_job(job, 'json')) == job\n"
        + "JobProducer(bootstrap_servers='localhost:9092')\n",
        tmp_path,
    )


def test_the_engine_without_torch_says_what_is_missing(tmp_path: Path) -> None:
    script = "import nanovllm\ntry:\n    nanovllm.LLM\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    assert run(REFUSE_HEAVY + script, tmp_path) in {"torch\n", "transformers\n", "numpy\n"}


def test_every_public_name_imports_beside_packages_of_the_users_own(tmp_path: Path) -> None:
    for room in ("engine", "pipeline", "sinks", "vision", "layers"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("OWNER = 'user'\n")
    script = (
        "import engine, pipeline, sinks, vision, layers, nanovllm\n"
        "from nanovllm.layers.vision import VisionEncoder\n"
        "print(*(getattr(nanovllm, name).__module__.split('.')[0] for name in nanovllm.__all__))\n"
        "assert {room.OWNER for room in (engine, pipeline, sinks, vision, layers)} == {'user'}\n"
    )
    assert set(run(script, tmp_path).split()) == {"nanovllm"}


def test_the_public_names_are_listed_and_others_are_not_there() -> None:
    assert set(nanovllm.__all__) <= set(dir(nanovllm))
    with pytest.raises(AttributeError, match="Nothing"):
        nanovllm.Nothing  # noqa: B018 (looking is the test)
