"""The doctor names every choice that an engine made by itself, the slow ones above all."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from nanovllm.cli.main import main
from nanovllm.engine import kernels
from nanovllm.engine.diagnostics import describe, measure
from nanovllm.engine.layers import fused
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ConfigurationError
from nanovllm.pipeline.build import build_engine, load_engine
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings.engine import EngineSettings
from nanovllm.settings.worker import Settings
from tests.checkpoints import make_llava


def told(engine: LLMEngine) -> dict[str, str]:
    return {finding.subject: f"{finding.value} {finding.note}" for finding in describe(engine)}


def test_what_was_chosen_is_told_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with LLMEngine(str(make_llava(tmp_path)), kv_cache_bytes=2 << 20, embedding_cache_bytes=1 << 20) as engine:
        findings = told(engine)
        tokens = engine.scheduler.blocks.num_blocks * 16
    assert findings["backend"].strip() == "native (engine.backend auto)"
    assert "CPU" in findings["device"]
    assert "GOMP_SPINCOUNT=0" in findings["threads"]
    assert "plain" in findings["weights"]
    assert f"2 MiB: {tokens:,} tokens in blocks of 16, float32" in findings["KV cache"]
    assert "1 MiB" in findings["embedding cache"]


def test_how_threads_wait_for_one_another_is_told(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(kernels, "missing", lambda: None)
    with LLMEngine(str(text), kv_cache_bytes=1 << 20) as engine:
        assert "spin between two operators of a step" in told(engine)["threads"]
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
        assert "more than the 1 cores" in told(engine)["threads"]
        assert "there are not enough cores" in told(engine)["threads"]
        monkeypatch.setattr(kernels, "missing", lambda: "there is no C++ compiler")
        assert "they sleep between two operators: there are no kernels" in told(engine)["threads"]
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        assert "sleep" not in told(engine)["threads"]


def test_a_fallback_is_called_slow_and_says_what_is_missing(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "missing", lambda: "there is no C++ compiler")
    with LLMEngine(str(text), kv_cache_bytes=1 << 20) as engine:
        assert "slow" in told(engine)["attention"]
        assert "no C++ compiler" in told(engine)["attention"]
        assert "embedding cache" not in told(engine)


def test_layers_on_a_gpu_are_told_with_what_they_run_on(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLMEngine(str(text), kv_cache_bytes=1 << 20) as engine:
        assert "layers" not in told(engine)
        monkeypatch.setattr(engine.model_runner, "device", torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
        monkeypatch.setattr(fused, "why_not", lambda *_: "triton is not installed")
        assert told(engine)["layers"].startswith("torch's operators: slow")
        assert told(engine)["layers"].endswith("triton is not installed")
        monkeypatch.setattr(fused, "why_not", lambda *_: None)
        assert told(engine)["layers"].startswith("fused Triton kernels")


def test_measuring_leaves_the_engine_idle(text: Path) -> None:
    with LLMEngine(str(text), kv_cache_bytes=8 << 20, max_num_seqs=8) as engine:
        found = {finding.subject: finding for finding in measure(engine, seconds=0.3)}
        assert set(found) == {"prefill, prompts of 64", "decode, batch 1", "decode, batch 8"}
        assert all(finding.value.endswith("tokens/s") for finding in found.values())
        assert all(
            re.match(r"the linear layers alone: [\d,]+, \d+% of which", finding.note) for finding in found.values()
        )
        assert engine.stats().spec_decode_draft_tokens == 0
        assert not engine.has_unfinished()
        engine.audit()


def test_no_more_is_measured_at_once_than_the_cache_holds(text: Path) -> None:
    with LLMEngine(str(text), kv_cache_bytes=16384 * 12) as engine:
        assert [finding.subject for finding in measure(engine, seconds=0.1)][1:] == ["decode, batch 1"]


def test_the_command_prints_one_json_array(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOVLLM_ENGINE__MODEL", str(text))
    monkeypatch.setenv("NANOVLLM_ENGINE__KV_CACHE_BYTES", "1048576")
    assert main(["doctor", "--json", "--seconds", "0"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"device", "threads", "model", "weights", "attention", "KV cache"} <= {row["what"] for row in rows}


@pytest.mark.skipif(kernels.missing() is not None, reason=str(kernels.missing()))
def test_a_bfloat16_cache_holds_twice_as_much_and_changes_logits_little(text: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5, prompt_logprobs=0)
    scores, blocks = [], []
    for kind in ("auto", "bfloat16"):
        with LLMEngine(str(text), kv_cache_bytes=1 << 20, kv_cache_dtype=kind) as engine:
            blocks.append(engine.scheduler.blocks.num_blocks)
            output = engine.generate([[7, 8, 9, 10] * 9], params, use_tqdm=False)[0]
            scores.append([next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]])
    assert blocks[1] == 2 * blocks[0]
    torch.testing.assert_close(torch.tensor(scores[0]), torch.tensor(scores[1]), rtol=0, atol=0.15)
    assert scores[0] != scores[1]


def test_a_bfloat16_cache_is_refused_where_nothing_reads_it(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "missing", lambda: "no compiler here")
    with pytest.raises(ConfigurationError, match=r"kv_cache_dtype='bfloat16' needs.*no compiler here"):
        LLMEngine(str(text), kv_cache_bytes=1 << 20, kv_cache_dtype="bfloat16")


async def test_the_first_lines_of_a_worker_s_log_say_the_same(
    text: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "missing", lambda: "there is no C++ compiler")
    caplog.set_level("INFO", "nanovllm")
    settings = Settings(engine=EngineSettings(model=str(text), kv_cache_bytes=1 << 20))
    engine = await load_engine(settings)
    lines = [record.getMessage() for record in caplog.records if record.name == "nanovllm.worker"]
    with build_engine(settings.engine) as same:
        findings = told(same)
    await engine.close()
    assert [line.split(":")[0] for line in lines] == [*findings, "profile"]
    assert any(line.startswith("attention: torch SDPA") and "no C++ compiler" in line for line in lines)
