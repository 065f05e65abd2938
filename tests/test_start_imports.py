"""What a start does not import: each module's time is the user's, who waits for the first token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.checkpoints import make_qwen3
from tests.parts import REPOSITORY

OF_OTHER_MODELS = {
    "transformers.modeling_utils": "transformers' own models; with torch._dynamo it takes a second",
    "transformers.core_model_loading": "their weights; with torch's distributed tensors and sympy half a second",
    "transformers.activations": "imports the loading of models",
    "transformers.processing_utils": "processors of images, sound and video",
    "transformers.generation.utils": "transformers' own generation",
    "torch._dynamo": "compiles; here nothing is",
    "torch.distributed.tensor": "one process computes",
    "accelerate": "of transformers' models",
    "triton": "there is no GPU, or its kernels are tried when there is one",
    "torchvision": "images are decoded by Pillow",
    "scipy": "none of it is called",
    "sklearn": "transformers imports it for assisted generation",
    "nanovllm.vision.encoders.clip": "the checkpoint has no tower",
    "nanovllm.vision.encoders.qwen": "the checkpoint has no tower",
    "nanovllm.vision.encoders.packed_attention": "the checkpoint has no tower",
    "nanovllm.engine.models.generic": "the family's code is written",
}
OF_THE_WORKER = {
    "aiokafka": "of the worker",
    "boto3": "of the worker",
    "botocore": "of the worker",
    "typer": "of the command line",
    "rich": "of the command line",
    "pydantic_settings": "of the worker and the command line",
    "prometheus_client": "of the worker",
    "opentelemetry": "of traces",
}
OF_ENGINES = {
    "torch": "a second",
    "transformers": "half a second",
    "tokenizers": "of engines",
    "safetensors": "of engines",
    "numpy": "of images and engines",
    "PIL": "of images",
    "jinja2": "of templates",
    "boto3": "a client is made when an object is asked for",
    "moto": "of the demo",
    "opentelemetry": "of traces",
}

FIRST_TOKEN = """
from nanovllm import LLM, SamplingParams
with LLM({checkpoint!r}, kv_cache_bytes=4 << 20) as llm:
    llm.generate(["Hello"], SamplingParams(temperature=0.0, max_tokens=2), use_tqdm=False)
"""
COMMAND = """
from nanovllm.cli.main import main
assert main({arguments!r}) == 0
"""


def imported_by(script: str, unneeded: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The modules among ``unneeded`` that a fresh interpreter has when ``script`` has run, and why they are not."""
    tell = f"\nimport json, sys\njson.dump([name for name in {list(unneeded)!r} if name in sys.modules], sys.stderr)\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script + tell],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: unneeded[name] for name in json.loads(done.stderr.splitlines()[-1])}


def test_the_first_token_of_a_text_model_comes_without_what_other_models_and_the_worker_need(tmp_path: Path) -> None:
    checkpoint = str(make_qwen3(tmp_path / "text"))
    assert imported_by(FIRST_TOKEN.format(checkpoint=checkpoint), {**OF_OTHER_MODELS, **OF_THE_WORKER}, tmp_path) == {}


@pytest.mark.parametrize("arguments", [["--help"], ["worker", "--help"], ["worker", "--print-config"]])
def test_commands_that_compute_nothing_import_no_engine(arguments: list[str], tmp_path: Path) -> None:
    assert imported_by(COMMAND.format(arguments=arguments), OF_ENGINES, tmp_path) == {}


CONFIGURATIONS = """
import json
from dataclasses import dataclass
from pathlib import Path
{first}
import transformers
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import import_utils
from transformers.utils.type_validators import activation_fn_key
models = Path(transformers.__file__).parent / "models"
found = import_utils.define_import_structure(str(models / "__init__.py"))
structure = sorted((sorted(needed), sorted((name, sorted(names)) for name, names in parts.items()))
                   for needed, parts in found.items())
@strict
@dataclass
class Fields:
    act: str = activation_fn_key(default="silu")
Fields(act="relu2")
try:
    Fields(act="no such thing")
except Exception as error:
    refusal = str(error)
from transformers.activations import ACT2FN, get_activation
from transformers import LlamaForCausalLM
print(json.dumps([structure, refusal, sorted(ACT2FN), LlamaForCausalLM.__name__]))
"""


def test_transformers_is_the_same_whether_it_was_imported_for_a_checkpoint_or_by_itself(tmp_path: Path) -> None:
    def told(first: str) -> list[object]:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CONFIGURATIONS.format(first=first)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=True,
        )
        found: list[object] = json.loads(done.stdout)
        return found

    ours, plain = told("import nanovllm.checkpoints.checkpoint"), told("")
    assert ours == plain
    assert "Make sure to use a string that corresponds to an activation function" in str(ours[1])


def test_the_names_that_are_known_without_transformers_tables_are_in_them() -> None:
    from transformers.activations import ACT2FN
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    from nanovllm.checkpoints.checkpoint import WITHOUT_PROCESSOR
    from nanovllm.checkpoints.transformers_imports import ACTIVATIONS

    assert set(dict.keys(ACTIVATIONS)) <= set(ACT2FN)
    assert set(ACTIVATIONS.keys()) == set(ACT2FN)
    assert "relu2" in ACTIVATIONS
    assert not set(WITHOUT_PROCESSOR) & set(PROCESSOR_MAPPING_NAMES)
