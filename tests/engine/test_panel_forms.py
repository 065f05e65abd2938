"""Products of panels in every form that a CPU may have: the same bits, and 16 bits widened where it has no others."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanovllm.engine import kernels
from nanovllm.engine.layers import linear, panel_forms
from nanovllm.engine.layers.linear import Linear, int8_multiply, panels_multiply
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ConfigurationError
from tests.checkpoints import make_qwen3
from tests.kernel_programs import compile_program, output_of

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(kernels.missing() is not None, reason=f"no kernels: {kernels.missing()}")


@pytest.mark.skipif(not torch.cpu._is_avx2_supported() or not shutil.which("g++"), reason="needs AVX2 and g++")
def test_forms_for_avx2_sum_as_plain_cpp_does(tmp_path: Path) -> None:
    program = compile_program("g++", "panels", tmp_path, "-mavx2", "-mfma", "-mf16c", "-Wall", "-Wextra", "-Werror")
    assert output_of(program).startswith("FMA (AVX2); vpmaddubsw (AVX2)")


def digest_of_products() -> str:
    """Of products in float32, from 16 bits, and in int8, with weights that some of the checks above do not have."""
    generator = torch.Generator().manual_seed(5)
    digest = hashlib.sha256()
    weight, bias = torch.randn(200, 258, generator=generator), torch.randn(200, generator=generator)
    for rows in (1, 2, 5, 30, 61):
        x = torch.randn(rows, 258, generator=generator)
        for stored in (weight, weight.bfloat16().float(), weight.half().float()):
            digest.update(panels_multiply(stored, bias)(x).numpy().tobytes())
        multiply = int8_multiply(weight, bias)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            digest.update(multiply(x.to(dtype)).float().numpy().tobytes())
    return digest.hexdigest()


@needs_kernels
@pytest.mark.slow
def test_avx2_multiplies_to_the_bits_of_avx512() -> None:
    if kernels.kind() != "AVX512":
        pytest.skip("this CPU has no AVX-512")
    program = "from tests.engine.test_panel_forms import *; print(kernels.kind(), digest_of_products())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.stdout.split() == ["AVX2", digest_of_products()], done.stderr[-2000:]


@needs_kernels
@pytest.mark.parametrize("outputs", [47, 768])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_without_instructions_are_widened_and_each_row_stands_by_itself(
    dtype: torch.dtype, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = {name: form for name, form in panel_forms.panel_forms().items() if name not in ("bfloat16", "float16")}
    for module in (linear, panel_forms):
        monkeypatch.setattr(module, "panel_forms", lambda: forms)
        monkeypatch.setattr(module, "is_emulated", lambda asked: asked in (torch.bfloat16, torch.float16))
    torch.manual_seed(outputs)
    layer = Linear(258, outputs, bias=True)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape))
    layer = layer.to(dtype)
    weight, bias, x = layer.weight.double(), layer.bias, torch.randn(37, 258).to(dtype)
    assert bias is not None
    layer.choose_layout()
    assert layer.layout == "panels"
    product = layer(x)
    assert product.dtype == dtype
    expected = (x.double() @ weight.T + bias.double()).to(dtype)
    # The sum is float32's: it rounds to another number of 16 bits only where it lies between two.
    assert (product != expected).double().mean() < 0.01
    torch.testing.assert_close(product, expected, rtol=torch.finfo(dtype).eps, atol=1e-3)
    for size in (1, 3, 4, 5, 16):
        assert torch.equal(torch.cat([layer(rows) for rows in x.split(size)]), product)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_that_would_be_emulated_is_refused_with_the_remedy(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if platform.machine() == "x86_64":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    else:
        pytest.skip("other CPUs have no kind without kernels")
    monkeypatch.setattr(kernels, "missing", lambda: "there is no C++ compiler; install g++, or name one in CXX")
    with pytest.raises(
        ConfigurationError, match=f"dtype='{dtype}': .* no instructions .* install g\\+\\+.*dtype='float32'"
    ):
        LLMEngine(str(make_qwen3(tmp_path)), dtype=dtype, kv_cache_bytes=1 << 20)
