"""Text models of transformers over the engine's attention: as transformers' own cached generation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import edit_json, edit_tensors
from generic_checkpoints import STATEFUL_FAMILIES, TEXT_FAMILIES, make_generic_text
from generic_parts import GREEDY, NEW, Recorded, assert_same, needs_release, transformers_answer
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.models.llama import modeling_llama

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.engine import llm_engine
from nanovllm.engine.attention.cpu_paged import PagedCpuAttention
from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.capabilities import Capabilities
from nanovllm.engine.backends.native import GENERIC, GENERIC_WITH_STATES, AsyncEngine
from nanovllm.engine.config import HAND_WRITTEN_ALONE, IMAGE_BOUNDS, EngineConfig
from nanovllm.engine.diagnostics import describe
from nanovllm.engine.execution.generic_models import one_image_processor
from nanovllm.engine.layers.linear import Linear
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.models.generic import GenericDecoder
from nanovllm.engine.models.generic_loading import check_release
from nanovllm.errors import ConfigurationError, UnsupportedModel
from nanovllm.sampling_params import SamplingParams

pytestmark = needs_release

PROMPTS = [[5 + start * 31 + step * 7 % 300 for step in range(length)] for start, length in enumerate((3, 40, 17))]
SMALL: dict[str, Any] = {"backend": "generic", "max_model_len": 112, "block_size": 16}

JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8,
         "mamba_dt_rank": 4, "num_experts": 2}  # fmt: skip
MINIMAX = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "num_local_experts": 2}
LLAMA4 = {"layer_types": ["full_attention"] * 2, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96,
          "attention_chunk_size": None}  # fmt: skip


@pytest.mark.parametrize("family", [*TEXT_FAMILIES, *STATEFUL_FAMILIES])
def test_logits_and_greedy_tokens_are_those_of_cached_generation(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_generic_text(tmp_path, family)
    plain = AutoModelForCausalLM.from_pretrained(directory).eval()
    wanted = [transformers_answer(plain, {"input_ids": torch.tensor([prompt])}) for prompt in PROMPTS]
    tolerance = 1e-4 if family in STATEFUL_FAMILIES else 1e-5
    engine = LLMEngine(str(directory), **SMALL, max_num_batched_tokens=16, num_speculative_tokens=0)
    recorded = Recorded(engine, monkeypatch)
    with recorded.engine:
        together = recorded.answers(PROMPTS)
        alone = [recorded.answers([prompt])[0] for prompt in PROMPTS]
        preempted = recorded.preempted(PROMPTS, tokens=max(map(len, PROMPTS)) + NEW)
        for found in (together, alone, preempted):
            for one, answer in zip(found, wanted, strict=True):
                assert_same(one, answer, tolerance)


@pytest.mark.parametrize("family", ["mistral", "qwen3_5_text"])
def test_a_preempted_request_with_drafts_stays_the_same(family: str, tmp_path: Path) -> None:
    directory = make_generic_text(tmp_path, family)
    plain = AutoModelForCausalLM.from_pretrained(directory).eval()
    with LLMEngine(str(directory), **SMALL) as roomy:
        block_bytes = sum(cache.nbytes for cache in roomy.model_runner.kv_caches) // roomy.model_runner.num_blocks
    with LLMEngine(str(directory), **SMALL, kv_cache_bytes=9 * block_bytes) as engine:
        outputs = engine.generate([list(prompt) for prompt in PROMPTS], GREEDY, use_tqdm=False)
        assert engine.stats().num_preemptions > 0
        engine.audit()
    assert [list(output.token_ids) for output in outputs] == [
        transformers_answer(plain, {"input_ids": torch.tensor([prompt])})[0] for prompt in PROMPTS
    ]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_hand_written_families_and_transformers_layers_give_the_same(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_generic_text(tmp_path, family)
    answers = []
    for backend in ("generic", "native"):
        engine = LLMEngine(str(directory), **{**SMALL, "backend": backend}, num_speculative_tokens=0)
        recorded = Recorded(engine, monkeypatch)
        with recorded.engine:
            assert isinstance(recorded.engine.model_runner.model, GenericDecoder) == (backend == "generic")
            answers.append(recorded.answers(PROMPTS))
    for generic, native in zip(*answers, strict=True):
        assert_same(generic, native, 1e-5)


def test_auto_takes_the_hand_written_family_where_there_is_one(tmp_path: Path) -> None:
    for family, is_generic in (("qwen3", False), ("mistral", True)):
        with LLMEngine(str(make_generic_text(tmp_path / family, family)), **{**SMALL, "backend": "auto"}) as engine:
            assert isinstance(engine.model_runner.model, GenericDecoder) is is_generic


def test_native_takes_no_other_family(tmp_path: Path) -> None:
    directory = make_generic_text(tmp_path, "mistral")
    with pytest.raises(UnsupportedModel, match="'MistralForCausalLM' is not supported; supported are LlamaForCausalLM"):
        LLMEngine(str(directory), **{**SMALL, "backend": "native"})


def test_prefixes_and_drafts_are_reused_as_by_a_hand_written_family(tmp_path: Path) -> None:
    prompt = [7, 8, 9, 10] * 12
    with LLMEngine(str(make_generic_text(tmp_path, "mistral")), **SMALL) as engine:
        first, second = (engine.generate([prompt], GREEDY, use_tqdm=False)[0].token_ids for _ in range(2))
        assert first == second
        assert engine.stats().prefix_cache_hits == 32
        assert engine.stats().spec_decode_draft_tokens > 0


def test_a_model_with_states_reuses_no_prefix_drafts_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [7, 8, 9, 10] * 12
    monkeypatch.setattr(llm_engine, "is_asynchronous", lambda _: True)
    with LLMEngine(str(make_generic_text(tmp_path, "lfm2")), **SMALL) as engine:
        first, second = (engine.generate([prompt], GREEDY, use_tqdm=False)[0].token_ids for _ in range(2))
        assert first == second
        assert engine.stats().prefix_cache_hits == engine.stats().spec_decode_draft_tokens == 0
        assert not engine._overlaps
        (support,) = [finding for finding in describe(engine) if finding.subject == "support"]
        assert "no prefix cache, no speculation" in support.note


def test_linear_layers_have_the_layouts_of_this_machine(tmp_path: Path) -> None:
    directory = make_generic_text(tmp_path, "mistral", hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    native = make_generic_text(
        tmp_path / "native", "qwen3", hidden_size=512, intermediate_size=1024, num_hidden_layers=1
    )
    kinds = []
    for checkpoint, backend in ((directory, "generic"), (native, "native")):
        with LLMEngine(str(checkpoint), **{**SMALL, "backend": backend}) as engine:
            layers = [one for one in engine.model_runner.model.modules() if isinstance(one, Linear)]
            kinds.append({layer.layout for layer in layers if layer.in_features == 1024})
            assert engine.model_runner.trial is None or engine.model_runner.trial.error_full < 1e-5
    assert kinds[0] == kinds[1]


def test_what_doctor_says_of_support_is_measured(tmp_path: Path) -> None:
    with LLMEngine(str(make_generic_text(tmp_path, "mistral")), **SMALL) as engine:
        trial = engine.model_runner.trial
        (support,) = [finding for finding in describe(engine) if finding.subject == "support"]
    assert trial is not None
    assert trial.num_tokens == 112
    assert max(trial.error_generated, trial.error_full) < 1e-5
    assert "measured over 112 tokens" in support.value


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("gemma2", {"head_dim": 16}, r"layer 0: a soft cap of 50\.0 is not supported"),
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 4}, "layer 0: attention sinks"),
        ("gemma3_text", {"head_dim": 16, "sliding_window": 8}, "layer 0: a window of 8 tokens"),
        ("stablelm", {}, r"layer 0 \(full_attention\): its attention does not go through"),
        ("bloom", {}, "no position_ids"),
        ("falcon", {"multi_query": True}, "has attention that does not go through transformers' interface"),
        ("jamba", JAMBA, r"layer 0 \(linear_attention\): its state does not reach this engine"),
        ("minimax", MINIMAX, r"a state of a kind that this engine does not keep \(get_linear_cache\)"),
        ("roberta", {"is_decoder": True}, "does not generate what its full forward pass says"),
        ("llama4_text", LLAMA4, "no decoder of it apart from its head"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic'",
        ),
    ],
)
def test_what_attention_lacks_is_refused_by_layer_and_name(
    family: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    directory = make_generic_text(tmp_path, family, **config)
    with pytest.raises(UnsupportedModel, match=message):
        LLMEngine(str(directory), **SMALL)


def test_up_to_its_window_a_model_with_one_runs(tmp_path: Path) -> None:
    directory = make_generic_text(tmp_path, "mistral", sliding_window=64)
    with pytest.raises(UnsupportedModel, match=r"layer 0: a window of 64 tokens .* up to max_model_len=64"):
        LLMEngine(str(directory), **SMALL)
    with LLMEngine(str(directory), **{**SMALL, "max_model_len": 64}) as engine:
        assert engine.max_model_len == 64


def test_layers_of_an_unknown_type_are_refused(tmp_path: Path) -> None:
    directory = make_generic_text(tmp_path, "llama")
    kinds = ["full_attention", "chunked_attention"]
    architectures = ["Gemma3ForCausalLM"]
    edit_json(directory / "config.json", model_type="gemma3_text", architectures=architectures, layer_types=kinds)
    with pytest.raises(UnsupportedModel, match="layer 1: layers of type 'chunked_attention'"):
        LLMEngine(str(directory), **SMALL)


def test_another_head_than_that_of_a_language_model_is_refused(tmp_path: Path) -> None:
    directory = make_generic_text(tmp_path, "mistral")
    edit_json(directory / "config.json", architectures=["MistralForSequenceClassification"])
    with pytest.raises(UnsupportedModel, match=r"'MistralForSequenceClassification' .* MistralForCausalLM is"):
        LLMEngine(str(directory), **SMALL)


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    directory = make_generic_text(tmp_path, "llama")
    ran = tmp_path / "ran"
    (directory / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit_json(directory / "config.json", model_type="own", architectures=["OwnModel"], auto_map=own)
    with pytest.raises(UnsupportedModel, match="model_type 'own'"):
        LLMEngine(str(directory), **SMALL)
    assert not ran.exists()


ASKED = {"deterministic": True, "quantization": "int8", "num_speculative_tokens": 4} | dict.fromkeys(IMAGE_BOUNDS, 1000)


@pytest.mark.parametrize("option", HAND_WRITTEN_ALONE)
def test_options_of_the_hand_written_layers_are_refused_by_name_before_weights_are_read(
    option: str, tmp_path: Path
) -> None:
    assert option == "deterministic" or option not in GENERIC.settings
    directory = make_generic_text(tmp_path, "mistral")
    config = EngineConfig.from_options(directory, {option: ASKED[option]})
    with pytest.raises(ConfigurationError, match=f"^{option}=.*{tmp_path.name}.* transformers' own layers.*: unset it"):
        one_image_processor(config, Checkpoint(directory))  # which loading begins with, and checks of routes


def test_drafts_that_are_asked_for_are_refused_where_layers_carry_states(tmp_path: Path) -> None:
    directory = make_generic_text(tmp_path, "lfm2")
    with pytest.raises(ConfigurationError, match=r"num_speculative_tokens=4, but layers of .* or set it to 0"):
        LLMEngine(str(directory), **SMALL, num_speculative_tokens=4)
    LLMEngine(str(directory), **SMALL, num_speculative_tokens=0).close()


@pytest.mark.parametrize(
    ("family", "declared"), [("mistral", GENERIC), ("lfm2", GENERIC_WITH_STATES), ("qwen3_5_text", GENERIC_WITH_STATES)]
)
async def test_what_the_backend_declares_it_does(family: str, declared: Capabilities, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["b"]}}, "required": ["a"], "additionalProperties": False}
    asked: dict[str, Any] = {
        "json_schema": schema,
        "regex": "(ab){2}c",
        "choice": ("left", "right"),
        "grammar": 'start: "x" "y" "z"',
        "logprobs": 20,
        "prompt_logprobs": 1,
        "n": 3,
        "loop_tokens": 2,
        "seed": 7,
    }
    async with AsyncEngine(LLMEngine(str(make_generic_text(tmp_path, family)), **SMALL)) as backend:
        assert backend.capabilities == replace(declared, images=False, context=SMALL["max_model_len"])
        running = {
            name: backend.submit(
                Request(name, prompt="w3 w4 w5", sampling=SamplingParams(max_tokens=24, **{name: value}))
            )
            for name, value in asked.items()
        }
        found = {name: await generation for name, generation in running.items()}
        alone = Request("alone", prompt="w3 w4 w5", sampling=SamplingParams(max_tokens=24, seed=7))
        assert (await backend.submit(alone)).token_ids == found["seed"].token_ids
    assert json.loads(found["json_schema"].text) == {"a": "b"}
    assert found["regex"].text == "ababc"
    assert found["choice"].text in asked["choice"]
    assert found["grammar"].text == "xyz"
    first = (found["logprobs"].logprobs or [])[0]
    assert len(first) >= 20
    assert len(found["prompt_logprobs"].prompt_logprobs or ()) == found["prompt_logprobs"].usage.input_tokens
    assert len(found["n"].outputs) == 3


def test_keys_and_values_in_half_the_bytes_serve_a_model_of_transformers_too(tmp_path: Path) -> None:
    directory = str(make_generic_text(tmp_path, "mistral"))
    with LLMEngine(directory, **SMALL, kv_cache_dtype="bfloat16") as engine:
        if not isinstance(engine.model_runner.attention, PagedCpuAttention):
            pytest.skip("keys and values in bfloat16: no C++ compiler")
        assert {cache.dtype for cache in engine.model_runner.kv_caches} == {torch.bfloat16}
        (output,) = engine.generate([PROMPTS[1]], GREEDY, use_tqdm=False)
    assert len(output.token_ids) == GREEDY.max_tokens


def test_image_bounds_of_a_model_without_images_are_refused(tmp_path: Path) -> None:
    directory = make_generic_text(tmp_path, "qwen3")
    for option in IMAGE_BOUNDS:
        with pytest.raises(ConfigurationError, match=f"{option}=1000, but {tmp_path.name!r} takes no images: unset it"):
            LLMEngine(str(directory), max_model_len=112, **{option: 1000})


def test_an_older_transformers_is_refused_by_its_release() -> None:
    check_release("5.24.0")
    with pytest.raises(ConfigurationError, match=r"transformers 5\.17\.0: .* need 5\.24 or later"):
        check_release("5.17.0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, r"lacks 1 tensor, such as model\.norm\.weight"),
        ({"model.extra.weight": torch.ones(2)}, r"has 1 tensor that a MistralForCausalLM .* model\.extra\.weight"),
        ({"model.norm.weight": torch.ones(32)}, r"model\.norm\.weight of .* shape \[32\], .* \[64\]"),
        ({"model.norm.weight": torch.full((64,), float("nan"))}, r"logits .* are not finite in torch\.float32"),
    ],
)
def test_tensors_that_are_missing_unknown_of_another_shape_or_damaged_are_refused(
    change: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    directory = make_generic_text(tmp_path, "mistral")

    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}

    edit_tensors(directory, edit)
    with pytest.raises(UnsupportedModel, match=message):
        LLMEngine(str(directory), **SMALL)


def test_a_tensor_that_its_family_is_known_to_store_in_vain_is_left_out(tmp_path: Path) -> None:
    directory = make_generic_text(tmp_path, "mistral")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(directory, lambda tensors: {**tensors, name: torch.ones(8)})
    LLMEngine(str(directory), **SMALL).close()


@pytest.mark.parametrize(("window", "max_model_len"), [(8, 112), (600, 700)])
def test_a_window_that_neither_configuration_nor_layer_names_fails_the_trial(
    window: int, max_model_len: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_generic_text(tmp_path, "llama")
    full_mask, update = modeling_llama.create_causal_mask, DynamicLayer.update

    def windowed(*args: Any, **kwargs: Any) -> Any:
        return full_mask(*args, **kwargs, and_mask_function=lambda batch, head, query, key: key > query - window)

    def forgetful(self: DynamicLayer, *args: Any, **kwargs: Any) -> Any:
        keys, values = update(self, *args, **kwargs)
        self.keys, self.values = keys[:, :, -window:], values[:, :, -window:]
        return keys, values

    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "create_causal_mask", windowed)
        with pytest.raises(UnsupportedModel, match="layer 0: a mask that hides earlier tokens is not supported"):
            LLMEngine(str(directory), **{**SMALL, "max_model_len": max_model_len})
    monkeypatch.setattr(DynamicLayer, "update", forgetful)  # a full forward pass does not show it
    with pytest.raises(UnsupportedModel, match=r"does not pass the trial at load: over \d+ tokens .* such as a window"):
        LLMEngine(str(directory), **{**SMALL, "max_model_len": max_model_len})


def test_logits_of_another_scale_fail_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_generic_text(tmp_path, "mistral")
    logits = GenericDecoder.logits
    monkeypatch.setattr(GenericDecoder, "logits", lambda self, hidden: 1.01 * logits(self, hidden))
    with pytest.raises(UnsupportedModel, match="does not pass the trial"):
        LLMEngine(str(directory), **SMALL)


def test_the_configuration_of_a_checkpoint_is_left_as_it_is(tmp_path: Path) -> None:
    directory = make_generic_text(tmp_path, "mistral")
    before = json.loads((directory / "config.json").read_text())
    LLMEngine(str(directory), **SMALL).close()
    assert json.loads((directory / "config.json").read_text()) == before
