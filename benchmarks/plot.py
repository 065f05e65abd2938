"""Pictures of figures as SVG files: bars of engines beside each other, curves over a share.

``python benchmarks/plot.py REPORT`` draws the bars of a report of ``compare.py`` again, beside the report.
"""

from __future__ import annotations

import argparse
import itertools
import json
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
_SPEEDS = ("tokens_per_second", "decode_tokens_per_second", "useful_tokens_per_second")  # the last two: older reports
_LEFT, _WIDTH, _BAR, _GAP = 110, 520, 18, 34  # pixels


def draw_bars(report: dict[str, Any], path: Path) -> None:
    """Write the picture of a report of ``compare.py``; each row has its own scale: workloads differ by magnitudes."""
    machine = report["machine"]
    load = machine["load_average_at_start"][0]
    groups = {
        f"{row['workload']}, {row['model']}, {row['precision']}: tokens per second": {
            name: next(engine[field] for field in _SPEEDS if field in engine) for name, engine in row["engines"].items()
        }
        for row in report["results"]
    }
    draw_groups(groups, f"{machine['cpu']}, {report['settings']['threads']} threads, load at start {load}", path)


def draw_groups(groups: dict[str, dict[str, float]], note: str, path: Path) -> None:
    """Write bars as an SVG file: for each title a group of named values with a scale of its own; a note below."""
    parts: list[str] = []
    y = 28
    for title, values in groups.items():
        parts.append(_text(10, y, title, bold=True))
        y += 8
        highest = max(values.values())
        for (name, value), colour in zip(values.items(), itertools.cycle(COLOURS.values())):
            width = max(1, round(_WIDTH * value / highest))
            fill = COLOURS.get(name, colour)
            parts.append(_text(10, y + 13, name))
            parts.append(f'<rect x="{_LEFT}" y="{y}" width="{width}" height="{_BAR - 3}" fill="{fill}"/>')
            parts.append(_text(_LEFT + width + 6, y + 13, f"{value:.1f}"))
            y += _BAR
        y += _GAP - 8
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


def draw_curves(curves: dict[str, list[tuple[float, float]]], title: str, path: Path) -> None:
    """Write lines through points (share from 0 to 1, value) as an SVG file, one for each name, from zero upwards."""
    width, height, left, top = 520, 260, 60, 40
    highest = max(value for points in curves.values() for _, value in points) * 1.1
    parts = [_text(10, 20, title, bold=True)]
    for step in range(6):
        y, x = top + height - height * step // 5, left + width * step // 5
        parts.append(f'<line x1="{left}" y1="{y}" x2="{left + width}" y2="{y}" stroke="#dde3e8"/>')
        parts.append(_text(10, y + 4, f"{highest * step / 5:.0f}"))
        parts.append(_text(x - 10, top + height + 18, f"{step * 20} %"))
    for (name, points), colour in zip(curves.items(), COLOURS.values(), strict=False):
        places = [(left + width * share, top + height - height * value / highest) for share, value in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        x, y = places[-1]
        parts.append(_text(round(x) + 8, round(y) + 4, name))
    size = f'width="{left + width + 100}" height="{top + height + 30}"'
    body = "\n".join(parts)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def draw_steps(panels: dict[str, dict[str, list[tuple[float, float]]]], note: str, path: Path) -> None:
    """Write values that change in steps over time as an SVG file: a panel for each title, a line for each name."""
    width, height, left = 640, 130, 60
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colour = dict(zip(names, itertools.cycle(COLOURS.values()), strict=False))
    parts = []
    for number, name in enumerate(names):
        parts.append(_text(left + number * 160, 18, name))
        parts.append(f'<rect x="{left + number * 160 - 14}" y="8" width="10" height="10" fill="{colour[name]}"/>')
    y = 44
    for title, lines in panels.items():
        longest = max(points[-1][0] for points in lines.values())
        highest = max(1.0, *(value for points in lines.values() for _, value in points))
        parts.append(_text(10, y, title, bold=True))
        top = y + 10
        for share in (0, 0.5, 1):
            level = top + height - height * share
            parts.append(f'<line x1="{left}" y1="{level}" x2="{left + width}" y2="{level}" stroke="#dde3e8"/>')
            parts.append(_text(10, round(level) + 4, f"{highest * share:.0f}"))
        for share in (0, 0.5, 1):
            parts.append(_text(left + round(width * share) - 8, top + height + 16, f"{longest * share:.0f}"))
        for name, points in lines.items():
            drawn = _corners(points)
            path_of = " ".join(
                f"{left + width * at / longest:.1f},{top + height - height * value / highest:.1f}"
                for at, value in drawn
            )
            parts.append(f'<polyline points="{path_of}" fill="none" stroke="{colour[name]}" stroke-width="1.5"/>')
        y = top + height + 42
    parts.append(_text(10, y, note))
    body = "\n".join(parts)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 40}" height="{y + 14}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _corners(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points at which steps begin and end; what lies on a line between them is left out."""
    kept = points[:1]
    for before, after in itertools.pairwise(points):
        if after[1] != before[1]:
            kept += [(after[0], before[1]), after]
    return [*kept, points[-1]]


def main() -> None:
    """Draw the bars of one report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="a JSON file that compare.py has written")
    parser.add_argument("--output", type=Path, help="SVG file; default: the report's name with .svg")
    options = parser.parse_args()
    draw_bars(json.loads(options.report.read_text()), options.output or options.report.with_suffix(".svg"))


if __name__ == "__main__":
    main()
