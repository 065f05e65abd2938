"""What vLLM is given: arguments of its engine, sampling parameters, constraints, prompts. Needs no vLLM."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from pydantic import ValidationError

from nanovllm.checkpoints.resolve import resolve_checkpoint
from nanovllm.cli.main import main
from nanovllm.engine.backends.vllm.options import VllmOptions, engine_arguments
from nanovllm.engine.backends.vllm.prompt import ImageRun, image_runs, vllm_prompt
from nanovllm.engine.backends.vllm.sampling import constraint_fields, sampling_fields
from nanovllm.errors import ConfigurationError, InvalidInput, UnsupportedConstraint, UnsupportedModel
from nanovllm.pipeline.build import check_parts
from nanovllm.pipeline.build_vllm import check_vllm, vllm_options
from nanovllm.sampling_params import Constraint, SamplingParams
from nanovllm.settings.worker import Settings
from nanovllm.vision.images.preprocess import AS_DECODED, prepare_image

IMAGE = 9


class Range(NamedTuple):
    """As vLLM's ``PlaceholderRange``."""

    offset: int
    length: int


def options(**others: Any) -> VllmOptions:
    return VllmOptions(model="m", directory=Path("/models/m"), **others)


def rendered(tokens: list[int], *ranges: Range) -> dict[str, Any]:
    return {"prompt_token_ids": tokens, "mm_placeholders": {"image": list(ranges)}}


def test_the_engine_gets_the_settings_and_safetensors_without_code_of_the_checkpoint() -> None:
    arguments = engine_arguments(
        options(tensor_parallel_size=2, dtype="float32", max_images=3, extra_args={"quantization": "fp8"}),
        known={"quantization"},
    )
    assert arguments["model"] == "/models/m"
    assert (arguments["trust_remote_code"], arguments["load_format"]) == (False, "safetensors")
    assert arguments["structured_outputs_config"] == {"backend": "guidance"}
    assert (arguments["tensor_parallel_size"], arguments["dtype"], arguments["quantization"]) == (2, "float32", "fp8")
    assert arguments["limit_mm_per_prompt"]["image"] == 3
    assert "max_model_len" not in arguments  # vLLM's own


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("trust_remote_code", "never taken"),
        ("load_format", "never taken"),
        ("worker_cls", "never taken"),
        ("dtype", "the worker's to set"),
        ("structured_outputs_config", "the worker's to set"),
        ("quantisation", "has no argument quantisation"),
        ("_api_process_rank", "has no argument"),
    ],
)
def test_an_argument_that_vllm_has_not_or_must_not_have_is_refused_by_name(name: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        engine_arguments(options(extra_args={name: 1}), known={"quantization", "_api_process_rank"})


def test_sampling_goes_under_vllms_names_within_the_context() -> None:
    sampling = SamplingParams(
        temperature=0.7, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.5, n=2,
        frequency_penalty=0.25, logit_bias={5: 1.5}, seed=11, max_tokens=90, min_tokens=20, stop="x",
        stop_token_ids=[3], ignore_eos=True, skip_special_tokens=False, include_stop_str_in_output=True,
        logprobs=3, prompt_logprobs=1, bad_words=["no"],
    )  # fmt: skip
    fields = sampling_fields(sampling, room=8)
    assert fields == sampling.model_dump(exclude={"loop_tokens", "json_schema", "regex", "choice", "grammar"}) | {
        "max_tokens": 8,
        "min_tokens": 8,
        "stop": ["x"],
        "stop_token_ids": [3],
        "bad_words": ["no"],
        "spaces_between_special_tokens": False,
    }
    assert sampling_fields(SamplingParams(max_tokens=None), room=50)["max_tokens"] == 50
    with pytest.raises(InvalidInput, match="the backend vllm has no loop_tokens"):
        sampling_fields(SamplingParams(loop_tokens=8), room=50)


def test_a_schema_is_the_one_that_the_native_engine_compiles() -> None:
    schema = constraint_fields(
        Constraint("json_schema", '{"type": "object", "properties": {"day": {"format": "date"}}}')
    )
    assert schema["json"]["x-guidance"]["whitespace_flexible"] is False
    assert "format" not in schema["json"]["properties"]["day"]  # enforced by an expression
    assert constraint_fields(Constraint("choice", '["a", "b"]')) == {"choice": ["a", "b"]}
    assert constraint_fields(Constraint("regex", "[ab]+")) == {"regex": "[ab]+"}
    assert constraint_fields(Constraint("grammar", 'start: "a"')) == {"grammar": 'start: "a"'}
    with pytest.raises(UnsupportedConstraint):
        constraint_fields(Constraint("json_schema", '{"type": "nonsense"}'))


def test_images_go_as_pixels_under_names_that_hold_the_salt() -> None:
    image = prepare_image(np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3), AS_DECODED)
    plain, salted = vllm_prompt([1, IMAGE], [image], b""), vllm_prompt([1, IMAGE], [image], b"tenant")
    assert np.array_equal(np.asarray(plain["multi_modal_data"]["image"][0]), image.pixels)
    assert plain["multi_modal_uuids"] != salted["multi_modal_uuids"]
    assert "cache_salt" not in plain
    assert salted["cache_salt"] == hashlib.sha256(b"tenant").hexdigest()
    assert vllm_prompt([1], [], b"") == {"prompt_token_ids": [1]}


def test_a_prompt_whose_placeholders_alone_were_expanded_is_taken() -> None:
    tokens = [1, IMAGE, 2, IMAGE, 3]
    runs = image_runs(tokens, IMAGE, rendered([1, 9, 9, 2, 7, 9, 8, 3], Range(4, 3), Range(1, 2)))
    assert runs == (ImageRun(1, 2), ImageRun(4, 3))
    assert image_runs([1, 2], None, {"prompt_token_ids": [1, 2]}) == ()


@pytest.mark.parametrize(
    "made",
    [
        rendered([1, 9, 9, 5, 3], Range(1, 2)),  # another token behind the image
        rendered([4, 1, 9, 9, 2, 3], Range(2, 2)),  # one before all
        rendered([1, 9, 9, 2, 3, 4], Range(1, 2)),
        rendered([1, 9, 9, 2, 3]),  # nothing said of the image
    ],
)
def test_a_prompt_that_was_rewritten_otherwise_is_refused(made: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match="rewrites"):
        image_runs([1, IMAGE, 2, 3], IMAGE, made)


def settings(engine: dict[str, Any] | None = None, **others: Any) -> Settings:
    return Settings.model_validate({"engine": {"backend": "vllm", **(engine or {})}, **others})


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"engine": {"quantization": "int8"}}, "engine.quantization is set"),
        ({"engine": {"deterministic": True}}, "engine.deterministic is set"),
        ({"engine": {"num_speculative_tokens": 3}}, "engine.num_speculative_tokens is set"),
        ({"sampling": {"loop_tokens": 64}}, "sampling: the backend vllm has no loop_tokens"),
        ({}, "needs vLLM"),
    ],
)
def test_a_setting_that_vllm_has_not_ends_the_worker_before_its_first_job(changed: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        check_parts(settings(**changed))
    with pytest.raises(ConfigurationError, match=why):
        check_vllm(settings(**changed), Path("/models/m"))


def test_results_name_a_directory_by_its_last_part_alone() -> None:
    directory = resolve_checkpoint("tiny-receipts")
    assert vllm_options(settings({"model": str(directory)}), directory).model == "tiny-receipts"
    assert vllm_options(settings(), directory).model == "tiny-receipts"
    aliased = settings({"model": "receipts-8b", "model_aliases": {"receipts-8b": str(directory)}})
    assert vllm_options(aliased, directory).model == "receipts-8b"


def test_the_section_takes_names_of_executors_and_sizes_alone() -> None:
    assert settings(vllm={"distributed_executor_backend": "ray", "pipeline_parallel_size": 2}).vllm.extra_args == {}
    for wrong in (
        {"distributed_executor_backend": "os.system"},
        {"tensor_parallel_size": 0},
        {"trust_remote_code": True},
    ):
        with pytest.raises(ValidationError):
            settings(vllm=wrong)


def test_the_command_line_says_which_extra_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOVLLM_ENGINE__BACKEND", "vllm")
    assert main(["doctor"]) == 2
    assert "'.[vllm]'" in capsys.readouterr().err
