"""The error of float32 as three bfloat16 products on AMX tiles, beside today's kernel of float32 and beside bfloat16.

Of kernels, against float64, with weights that are bfloat16: inputs that are uniform, normal, with outliers, over many
exponents, and real ones: of the linear layers of SmolLM2-135M-Instruct under the README. Where the CPU has no
AMX the tests' emulator carries its instructions out: errors are the same, times are none. Writes a JSON file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from benchmarks.output import add_output, write_text
from benchmarks.smollm import smollm
from nanovllm.engine.layers import product_choice
from nanovllm.engine.layers.linear import has_panels, shortest, to_panels
from nanovllm.engine.layers.product_choice import Choice
from tests import amx

ROWS, OUTPUTS = 16, 96
WIDTHS = (576, 1024, 1536, 3072, 6144)
ROOT = Path(__file__).resolve().parent.parent


def drawn_inputs() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Names, inputs [rows, in] and weights [out, in]."""
    for width in WIDTHS:
        generator = torch.Generator().manual_seed(width)
        weight = (torch.randn(OUTPUTS, width, generator=generator) / width**0.5).bfloat16().float()
        normal = torch.randn(ROWS, width, generator=generator)
        outliers = normal.clone()
        outliers[:, :: width // 6] *= 300
        exponents = torch.randn(ROWS, width, generator=generator).mul(8).round()
        yield f"uniform, {width}", torch.rand(ROWS, width, generator=generator), weight
        yield f"normal, {width}", normal, weight
        yield f"six outliers of 300, {width}", outliers, weight
        yield f"exponents over 2^±24, {width}", normal * 2.0**exponents, weight


def real_inputs() -> Iterator[tuple[str, Tensor, Tensor]]:
    """As ``drawn_inputs``, of each kind of layer the one whose inputs have the largest number."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(smollm())((ROOT / "README.md").read_text(), return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(smollm(), dtype=torch.float32)
    found: dict[str, tuple[float, str, Tensor, Tensor]] = {}

    def keep(name: str, layer: torch.nn.Linear, x: Tensor) -> None:
        kind, largest = name.rsplit(".", 1)[-1], float(x.abs().max())
        if kind not in found or largest > found[kind][0]:
            rows = x[0, torch.cat([x[0].abs().amax(1).topk(ROWS // 2).indices, torch.arange(100, 100 + ROWS // 2)])]
            found[kind] = largest, name, rows.clone(), layer.weight[:OUTPUTS].detach().bfloat16().float()

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda layer, x, name=name: keep(name, layer, x[0]))
    with torch.inference_mode():
        model(tokens.input_ids[:, :512])
    for largest, name, rows, weight in found.values():
        yield f"SmolLM2, {name}, largest input {largest:.0f}, {rows.shape[1]}", rows, weight


def measure(x: Tensor, weight: Tensor) -> dict[str, float]:
    """Norms of errors over the norm of the product, and the largest error over the sum of the products' magnitudes."""
    panels, none = to_panels(shortest(weight)), (None, None, None)
    assert panels.dtype == torch.bfloat16
    exact, magnitudes = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    products = {
        "float32": product_choice.multiply(x, panels, len(weight), none),
        "three products": product_choice.multiply(x, panels, len(weight), none, Choice(tiles_from=1)),
        "bfloat16": x.bfloat16().double() @ weight.double().T,
    }
    figures = {}
    for name, product in products.items():
        error = product.double() - exact
        figures[name] = float(error.norm() / exact.norm())
        figures[f"{name}, largest"] = float((error.abs() / magnitudes).max())
    return figures


def main() -> None:
    """Measure all inputs, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser, "three-products.json")
    arguments = parser.parse_args()
    cases: dict[str, Any] = {}
    assert has_panels(torch.float32, torch.device("cpu")), "products with panels need AVX-512 and a compiler"
    with amx.emulated() as emulator, torch.inference_mode():
        for name, x, weight in (*drawn_inputs(), *real_inputs()):
            cases[name] = measure(x, weight)
            print(f"{name:70}", *(f"{kind} {value:.2e}" for kind, value in cases[name].items()), flush=True)
        is_emulated = emulator.executed()["bfloat16"] > 0
    figures = {**describe_machine("python -m benchmarks.three_products"), "emulated": is_emulated, "errors": cases}
    write_text(arguments.output, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
