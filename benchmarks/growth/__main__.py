"""What grows with what, in this checkout and in another commit's.

    python -m benchmarks.growth --before 2a9ba20

Measures topic by topic in both trees, each in a process of its own, writes ``growth.json`` after every topic, and
prints the table of docs/engine.md. ``--topics`` chooses; ``--resume`` keeps the other topics of the file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.before_after import ROOT, describe_tree, worktree_of
from benchmarks.checkpoints import checkpoint
from benchmarks.growth.starting import CHECKPOINTS
from benchmarks.machine import describe_machine
from benchmarks.output import add_output, write_text

TOPICS = ("waiting", "prefixes", "contexts", "sampling", "outputs", "steps", "encoding", "books", "starting")
_PARAMETERS = {"small": 9_000_000, "smollm": 135_000_000}


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="a commit, or the directory of a checkout")
    parser.add_argument("--topics", nargs="+", choices=TOPICS, default=list(TOPICS))
    parser.add_argument("--tiny", action="store_true", help="in little: to see that it works")
    parser.add_argument("--resume", action="store_true", help="keep the topics of --output that are not measured now")
    parser.add_argument("--table", action="store_true", help="print the table of --output, measure nothing")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "nanovllm-peers")
    add_output(parser, "growth.json")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.output.read_text())))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    trees = {"before": worktree_of(args.before, args.work), "after": ROOT}
    report: dict[str, Any] = {"topics": {}}
    if args.resume and args.output.is_file():
        report = json.loads(args.output.read_text())
    report |= {
        "machine": describe_machine("python -m benchmarks.growth " + " ".join(sys.argv[1:])),
        "trees": {name: describe_tree(tree) for name, tree in trees.items()},
    }
    checkpoints = {}
    if "starting" in args.topics:
        names = ["small"] if args.tiny else list(_PARAMETERS)
        checkpoints = {str(_PARAMETERS[name]): str(checkpoint(name, args.work)) for name in names}
    with ExitStack() as stack:
        children = {name: stack.enter_context(start(tree, checkpoints, args.tiny)) for name, tree in trees.items()}
        for topic in args.topics:
            print(f"{topic} …", flush=True)
            report["topics"][topic] = {name: ask(child, topic) for name, child in children.items()}
            write_text(args.output, json.dumps(report, indent=1) + "\n")
    print(table(report))


def start(tree: Path, checkpoints: dict[str, str], is_tiny: bool) -> subprocess.Popen[str]:
    """A process that measures topics in the nanovllm of ``tree``."""
    command = [sys.executable, "-m", "benchmarks.growth.child", *(["--tiny"] if is_tiny else [])]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tree}{os.pathsep}{ROOT}",
        "HF_HUB_OFFLINE": "1",
        CHECKPOINTS: json.dumps(checkpoints),
    }
    return subprocess.Popen(
        command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(child: subprocess.Popen[str], topic: str) -> list[dict[str, Any]]:
    """The rows of a topic. Raises RuntimeError where the process has ended."""
    assert child.stdin is not None
    assert child.stdout is not None
    print(topic, file=child.stdin, flush=True)
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(f"the process that measures {topic} ended with {child.wait()}: see its output above")
    rows: list[dict[str, Any]] = json.loads(line)
    return rows


def table(report: dict[str, Any]) -> str:
    """Markdown: a row for each cost, its values by size in both trees."""
    lines = ["| what | grows with | before | now |", "|---|---|---|---|"]
    for topic in report["topics"].values():
        before = {row["what"] + row["grows_with"]: row for row in topic["before"]}
        for row in topic["after"]:
            old = before.get(row["what"] + row["grows_with"])
            values = " / ".join(_short(value) for value in row["values"].values())
            earlier = " / ".join(_short(value) for value in old["values"].values()) if old else "–"
            sizes = ", ".join(_size(int(size)) for size in row["values"])
            lines.append(f"| {row['what']}, {row['unit']} | {row['grows_with']}: {sizes} | {earlier} | {values} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(size: int) -> str:
    return f"{size // 1_000_000}M" if size >= 1_000_000 else f"{size:,}"


if __name__ == "__main__":
    main()
