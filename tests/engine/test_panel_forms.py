"""Products of panels in every form that a CPU may have: the same bits, and 16 bits widened where it has no others."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanovllm.engine import kernels
from nanovllm.engine.layers import linear, panel_forms
from nanovllm.engine.layers.linear import Linear, Panels, int8_product, make_panels
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ConfigurationError
from tests.checkpoints import make_qwen3
from tests.kernel_programs import compile_program, output_of

needs_kernels = pytest.mark.skipif(kernels.missing() is not None, reason=f"no kernels: {kernels.missing()}")


@pytest.mark.skipif(not torch.cpu._is_avx2_supported() or not shutil.which("g++"), reason="needs AVX2 and g++")
def test_forms_for_avx2_sum_as_plain_cpp_does(tmp_path: Path) -> None:
    program = compile_program("g++", "panels", tmp_path, "-mavx2", "-mfma", "-mf16c", "-Wall", "-Wextra", "-Werror")
    assert output_of(program).startswith("FMA (AVX2); vpmaddubsw (AVX2)")


@pytest.fixture
def lesser_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes this CPU one that multiplies floats by the named instructions, and has none for 16 bits."""

    def degrade(floats: str) -> None:
        forms = {"float32": floats, "int8": "vpdpbusd (AVX-VNNI)"}
        for module in (linear, panel_forms):
            monkeypatch.setattr(module, "panel_forms", lambda: forms)
            monkeypatch.setattr(module, "is_emulated", lambda asked: asked in (torch.bfloat16, torch.float16))

    return degrade


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 30, 61])
def test_avx2_multiplies_to_the_bits_of_avx512(rows: int, lesser_cpu: Callable[[str], None]) -> None:
    if kernels.kind() != "AVX512":
        pytest.skip("this CPU has no AVX-512")
    generator = torch.Generator().manual_seed(rows)
    weight, bias, x = (torch.randn(shape, generator=generator) for shape in ((200, 258), (200,), (rows, 258)))
    stored = (weight, weight.bfloat16().float(), weight.half().float())
    types = (torch.float32, torch.bfloat16, torch.float16)

    def products() -> list[bytes]:
        found = [make_panels(one, bias).product()(x) for one in stored]
        whole = int8_product(weight, bias)
        assert isinstance(whole, Panels)
        found += [whole.product()(x.to(dtype)).float() for dtype in types]
        return [one.numpy().tobytes() for one in found]

    expected = products()
    lesser_cpu("FMA (AVX2)")
    assert products() == expected


@needs_kernels
@pytest.mark.parametrize("floats", [None, "FMA (AVX2)"])
@pytest.mark.parametrize("outputs", [47, 768])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_without_instructions_are_widened_and_each_row_stands_by_itself(
    dtype: torch.dtype, outputs: int, floats: str | None, lesser_cpu: Callable[[str], None]
) -> None:
    lesser_cpu(floats or panel_forms.panel_forms()["float32"])
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
