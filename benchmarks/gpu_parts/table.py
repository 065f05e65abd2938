"""Checks and figures as lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu_parts.report import Report

Row = tuple[str, Any, Any, Any, Any]
HEAD: Row = ("", "nanovllm", "transformers", "times", "of the roofline")


def check_line(check: dict[str, Any]) -> str:
    """What a check found."""
    verdict = f"{'ok' if check['passed'] else 'FAILED':6} {check['name']:28}"
    if "error" in check:
        return f"{verdict} {check['error'][-1500:]}"
    if "worst_error" in check:
        return f"{verdict} off by {check['worst_error']:.2g} at worst; {check['attention']}"
    if "told" in check:
        return f"{verdict} {check['told'].strip()[-300:]}"
    told = (
        f"{check['read_exactly']:.1%} read exactly"
        if "read_exactly" in check
        else f"log probabilities off by {check['mean_logprob_error']:.2g} (transformers' "
        f"{check['mean_logprob_error_of_transformers']:.2g}), {check['best_tokens']:.1%} best tokens"
    )
    return f"{verdict} {told}; {check['graph_replays']} of {check['steps']} steps in graphs; {check['attention']}"


def table(report: Report) -> str:
    """All figures that stand beside transformers' or the roofline, then what of the run is missing."""
    rows = [HEAD, *_rows(report)]
    texts = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in texts) for column in range(len(HEAD))]
    lines = ["  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in
             enumerate(zip(row, widths, strict=True))) for row in texts]  # fmt: skip
    lines += [f"{name}: {part['unfinished']}" for name, part in report.data["parts"].items() if "unfinished" in part]
    lines += [
        f"{name}: {figure}"
        for name, part in report.data["parts"].items()
        for figure in part["figures"].values()
        if isinstance(figure, str) and figure.startswith("left out")
    ]
    return "\n".join(lines)


def _rows(report: Report) -> Iterator[Row]:
    roofline = report.figures("roofline")
    if roofline:
        yield "memory, GB/s copied", None, None, None, roofline["copied_gb_per_second"]
        yield "products, TFLOP/s", None, None, None, roofline["tflop_per_second"]
    serve = report.figures("serve")
    if serve:
        baseline = serve.get("transformers", {})
        yield (
            "nano-vllm's workload, tokens/s", serve["tokens_per_second"], baseline.get("tokens_per_second"),
            serve.get("against_transformers"), serve["of_the_roofline"],
        )  # fmt: skip
    decode = report.figures("decode")
    for batch, rate in decode.get("tokens_per_second", {}).items():
        baseline, ratios = decode.get("transformers", {}), decode.get("against_transformers", {})
        shares = decode["of_the_roofline"]
        yield f"decode at {batch}, tokens/s", rate, baseline.get(batch), ratios.get(batch), shares[batch]
    prefill = report.figures("prefill")
    if prefill:
        yield (
            "prefill, tokens/s", prefill["tokens_per_second"], prefill["transformers"],
            prefill["against_transformers"], prefill["of_the_roofline"],
        )  # fmt: skip
    images = report.figures("images")
    for name, rate in images.get("requests_per_second", {}).items():
        baseline, ratios = images.get("transformers", {}), images.get("against_transformers", {})
        yield f"images, {name}, requests/s", rate, baseline.get(name), ratios.get(name), None
    for name, rates in report.figures("switches").items():
        for batch, rate in rates.items():
            yield f"decode {name} at {batch}, tokens/s", rate, None, None, None


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float) and cell < 100:
        return f"{cell:.3g}"
    return cell if isinstance(cell, str) else f"{cell:,.0f}"
