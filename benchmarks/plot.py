"""Bars of a comparison as an SVG file: tokens per second of every engine, a group for each workload and precision."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

COLOURS = {
    "nanovllm": "#0b6e4f",
    "transformers": "#9aa5b1",
    "openvino": "#3b6fb6",
    "llama.cpp": "#c08a2d",
    "vllm": "#7d5ba6",
}
_LEFT, _WIDTH, _BAR, _GAP = 110, 520, 18, 34  # pixels


def draw_bars(report: dict[str, Any], path: Path) -> None:
    """Write the picture; each group has its own scale, because workloads differ by orders of magnitude."""
    parts: list[str] = []
    y = 28
    for row in report["results"]:
        parts.append(
            _text(10, y, f"{row['workload']}, {row['model']}, {row['precision']}: tokens per second", bold=True)
        )
        y += 8
        speeds = {
            name: engine.get("decode_tokens_per_second", engine.get("useful_tokens_per_second"))
            for name, engine in row["engines"].items()
        }
        highest = max(speeds.values())
        for name, speed in speeds.items():
            width = max(1, round(_WIDTH * speed / highest))
            parts.append(_text(10, y + 13, name))
            parts.append(f'<rect x="{_LEFT}" y="{y}" width="{width}" height="{_BAR - 3}" fill="{COLOURS[name]}"/>')
            parts.append(_text(_LEFT + width + 6, y + 13, f"{speed:.1f}"))
            y += _BAR
        y += _GAP - 8
    machine = report["machine"]
    load = machine["load_average_at_start"][0]
    note = f"{machine['cpu']}, {report['settings']['threads']} threads, load at start {load}"
    parts.append(_text(10, y, note))
    size = f'width="{_LEFT + _WIDTH + 90}" height="{y + 14}"'
    body = "\n".join(parts)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _text(x: int, y: int, words: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}"{weight}>{escape(words)}</text>'
