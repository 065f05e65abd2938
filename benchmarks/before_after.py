"""This checkout's engine beside another commit's, by turns in one run: is anything slower?

    python -m benchmarks.before_after --before 2a9ba20 --prepare          # once: checkpoints, kernels, the worktree
    python -m benchmarks.before_after --before 2a9ba20 --budget 230 --resume   # again until it no longer ends with 3

Both stay loaded, answer the same requests one after the other, and who goes first changes with every pair. A pair
during which others took more than ``--most-other-load`` of the CPUs is measured again. A workload holds when the
median ratio of its pairs is at least 0.97, or its bootstrap interval includes 1. Ends with 1 when one does not, with 3
when something is left for ``--resume``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer

from benchmarks.checkpoints import checkpoint
from benchmarks.compare import group_by_model
from benchmarks.machine import describe_machine, name_of_cpu
from benchmarks.output import add_output, write_text
from benchmarks.runners import SPINS, Launch, Runner, measure, started
from benchmarks.turn_statistics import median_interval
from benchmarks.workloads import Maker, make_decode, make_images, make_prompts, make_sampling, make_text

ROOT = Path(__file__).resolve().parent.parent
LEAST_RATIO = 0.97
PRECISIONS = ("fp32", "bf16", "int8")
# Sized so that all of it takes three quarters of an hour on two cores with SmolLM2.
WORKLOADS: dict[str, Maker] = {
    "text": partial(make_text, count=20),
    # In a turn of a second, what others took is lost in the clock's ticks.
    "decode-1": make_decode(1, prompt=16, answer=385),
    "decode-8": make_decode(8, prompt=16, answer=65),
    "decode-32": make_decode(32, prompt=16, answer=49),
    "prompts": partial(make_prompts, count=8),
    "images-distinct": make_images(repeating=False, count=12),
    "images-repeating": make_images(repeating=True, count=12),
    "sampling": partial(make_sampling, count=20),
}
SMOKE_WORKLOADS: dict[str, Maker] = {
    "text": partial(make_text, count=2),
    "decode-1": make_decode(1, prompt=4, answer=9),
    "decode-8": make_decode(8, prompt=4, answer=9),
    "decode-32": make_decode(32, prompt=4, answer=5),
    "prompts": partial(make_prompts, count=2, size=40, answer=4),
    "images-distinct": make_images(repeating=False, count=2, answer=4),
    "images-repeating": make_images(repeating=True, count=6, answer=4),
    "sampling": partial(make_sampling, count=2),
}


class OutOfTime(Exception):
    """The budget does not hold another pair."""


class Clock:
    """Seconds left of a budget; without one they never end."""

    def __init__(self, budget: float | None) -> None:
        self._end = None if budget is None else time.monotonic() + budget

    def require(self, seconds: float) -> None:
        """Raise OutOfTime where fewer than ``seconds`` are left."""
        if self._end is not None and time.monotonic() + seconds > self._end:
            raise OutOfTime


def main() -> int:
    """Measure what is missing, write after every pair, print the table."""
    args = read_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    trees = {"before": worktree_of(args.before, args.work), "after": ROOT}
    if args.prepare:
        prepare(args, trees)
        return 0
    report = read_or_begin(args, trees)
    clock = Clock(args.budget)
    try:
        for precision in args.precisions:
            for model, names in group_by_model(args.size, args.workloads).items():
                left = [name for name in names if len(pairs_of(report, name, precision)) < args.pairs]
                if left:
                    clock.require(args.longest_load)
                    measure_group(args, trees, report, clock, precision, model, left)
    except OutOfTime:
        print(f"the budget of {args.budget:.0f} s is spent; the same command with --resume goes on")
        return 3
    finally:
        write_text(args.output, json.dumps(report, indent=1) + "\n")
        print_table(report)
    print(f"written to {args.output}")
    return 0 if all(cell["holds"] for cell in report["cells"].values()) else 1


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="a commit, or the directory of a checkout")
    parser.add_argument("--size", choices=["small", "smollm", "0.6b"], default="smollm")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--pairs", type=int, default=5, help="measured pairs of a workload")
    parser.add_argument("--warm-ups", type=int, default=2, help="turns of each before those, after every start")
    parser.add_argument("--most-other-load", type=float, default=0.05, help="share of all CPUs; beyond it: once more")
    parser.add_argument("--most-repeats", type=int, default=10, help="of a workload in one run; beyond it: an error")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no pair that would end later")
    parser.add_argument("--longest-load", type=float, default=40, metavar="SECONDS", help="left to start two engines")
    parser.add_argument("--resume", action="store_true", help="go on with the file of --output")
    parser.add_argument("--prepare", action="store_true", help="make checkpoints and compile kernels, measure nothing")
    parser.add_argument("--smoke", action="store_true", help="in little: to see that it works")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=32, help="sequences at once")
    parser.add_argument(
        "--kv-cache-bytes",
        type=int,
        default=256 << 20,
        help="of both, whose defaults differ: so few are written all over by the warm-ups, and no page is new later",
    )
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "nanovllm-peers")
    add_output(parser, "before-after.json")
    return parser.parse_args()


def worktree_of(before: str, work: Path) -> Path:
    """The checkout that ``before`` names, or a worktree of that commit under ``work``, made if it is not there yet."""
    if Path(before).is_dir():
        return Path(before).resolve()
    commit = git(ROOT, "rev-parse", "--verify", f"{before}^{{commit}}")
    directory = work / f"worktree-{commit[:12]}"
    if not directory.is_dir():
        git(ROOT, "worktree", "prune")
        git(ROOT, "worktree", "add", "--detach", str(directory), commit)
    return directory.resolve()


def git(directory: Path, *words: str) -> str:
    """What git prints in ``directory``. Raises CalledProcessError."""
    done = subprocess.run(["git", "-C", str(directory), *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def describe_tree(tree: Path) -> dict[str, Any]:
    """The commit of a checkout, and whether its files are changed."""
    return {"commit": git(tree, "rev-parse", "HEAD"), "changed": bool(git(tree, "status", "--porcelain", "-uno"))}


def read_or_begin(args: argparse.Namespace, trees: dict[str, Path]) -> dict[str, Any]:
    """The report to go on with; one of other commits or settings is refused (SystemExit)."""
    recorded = ("size", "threads", "batch", "kv_cache_bytes", "warm_ups", "most_other_load", "smoke")
    begun = {
        "trees": {name: describe_tree(tree) for name, tree in trees.items()},
        "settings": {**{name: getattr(args, name) for name in recorded}, "spins": SPINS, "cpu": name_of_cpu()},
    }
    if args.resume and args.output.is_file():
        report: dict[str, Any] = json.loads(args.output.read_text())
        if (other := {name: report[name] for name in begun}) != begun:
            raise SystemExit(f"{args.output} is of {other}, this run of {begun}: --output names another file")
        return report
    machine = describe_machine("python -m benchmarks.before_after " + " ".join(sys.argv[1:]))
    return {"machine": machine, **begun, "cells": {}}


def launches(
    args: argparse.Namespace, trees: dict[str, Path], precision: str, model: str, names: list[str]
) -> list[Launch]:
    """Both engines, before and after."""
    directory, kinds = checkpoint(model, args.work), frozenset(name.split("-")[0] for name in names)
    return [
        Launch(
            name,
            sys.executable,
            "run_nanovllm.py",
            directory,
            precision,
            kinds,
            args.threads,
            args.batch,
            args.work,
            flags=("--kv-cache-bytes", str(args.kv_cache_bytes)),
            tree=tree,
        )
        for name, tree in trees.items()
    ]


def prepare(args: argparse.Namespace, trees: dict[str, Path]) -> None:
    """Load every checkpoint once in both trees and each precision, so that no later start has to make anything."""
    for precision in args.precisions:
        for model, names in group_by_model(args.size, args.workloads).items():
            for launch in launches(args, trees, precision, model, names):
                with started(launch):
                    pass


def measure_group(
    args: argparse.Namespace,
    trees: dict[str, Path],
    report: dict[str, Any],
    clock: Clock,
    precision: str,
    model: str,
    names: list[str],
) -> None:
    """The missing pairs of all workloads of one checkpoint in one precision. Raises OutOfTime, RunnerFailed."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(model, args.work))
    with ExitStack() as stack:
        runners = [stack.enter_context(started(launch)) for launch in launches(args, trees, precision, model, names)]
        for name in names:
            make = (SMOKE_WORKLOADS if args.smoke else WORKLOADS)[name]
            pairs = pairs_of(report, name, precision)
            cell = report["cells"].setdefault(f"{name}, {precision}", {"pairs": pairs, "model": model, "repeated": 0})
            for pair in good_pairs(args, partial(take_pair, runners, make, tokenizer), clock, cell):
                pairs.append(pair)
                cell.update(summarise(pairs))
                write_text(args.output, json.dumps(report, indent=1) + "\n")
            print_cell(f"{name}, {precision}", cell)


def good_pairs(
    args: argparse.Namespace, take: Callable[[int], dict[str, Any]], clock: Clock, cell: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Pairs of turns until the cell has enough, but for warm-ups and those beside too much other load.

    Raises OutOfTime, and RuntimeError where too many have to be repeated.
    """
    seconds = repeats = 0
    turn = len(cell["pairs"])  # a process is new in every run, and no cache knows an earlier run's prompts
    for warm_up in range(args.warm_ups):
        clock.require(seconds)
        began = time.monotonic()
        take(warm_up)
        seconds = time.monotonic() - began
    while len(cell["pairs"]) < args.pairs:
        clock.require(seconds)
        began = time.monotonic()
        pair = take(100 + turn)
        seconds, turn = time.monotonic() - began, turn + 1
        if max(pair["others_cpu_share"]) <= args.most_other_load:
            yield pair
            continue
        cell["repeated"] += 1
        repeats += 1
        if repeats > args.most_repeats:
            raise RuntimeError(
                f"others took {max(pair['others_cpu_share']):.0%} of the CPUs, and {repeats} pairs were repeated: "
                "let the machine be quiet, or raise --most-other-load"
            )


def take_pair(runners: list[Runner], make: Maker, tokenizer: Any, turn: int) -> dict[str, Any]:
    """One turn of each on the same requests; tokens a second, and ``ratio``: how many times as fast the second is."""
    replies = {}
    with tempfile.TemporaryDirectory(prefix="nanovllm-turn-") as scratch:
        path = Path(scratch) / "workload.json"
        workload, other = (make(seed + turn, tokenizer, Path(scratch)) for seed in (1000, 5000))
        for runner in runners if turn % 2 else reversed(runners):
            replies[runner.name] = measure(runner, workload, other, path)
    before, after = (replies[runner.name] for runner in runners)
    return {
        "before": round(before["tokens_per_second"], 3),
        "after": round(after["tokens_per_second"], 3),
        "ratio": round(after["tokens_per_second"] / before["tokens_per_second"], 4),
        "answers_equal": sum(one == two for one, two in zip(before["answers"], after["answers"], strict=True)),
        "answers": len(after["answers"]),
        "others_cpu_share": [before["others_cpu_share"], after["others_cpu_share"]],
    }


def pairs_of(report: dict[str, Any], name: str, precision: str) -> list[dict[str, Any]]:
    """What is measured already."""
    cell: dict[str, Any] = report["cells"].get(f"{name}, {precision}", {"pairs": []})
    pairs: list[dict[str, Any]] = cell["pairs"]
    return pairs


def summarise(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, the interval of the ratio's, and whether the workload holds: see the module."""
    ratios = [pair["ratio"] for pair in pairs]
    low, high = median_interval(ratios)
    ratio = median(ratios)
    return {
        "before": round(median(pair["before"] for pair in pairs), 2),
        "after": round(median(pair["after"] for pair in pairs), 2),
        "ratio": round(ratio, 3),
        "interval": [round(low, 3), round(high, 3)],
        "holds": ratio >= LEAST_RATIO or low <= 1 <= high,
    }


def print_cell(title: str, cell: dict[str, Any]) -> None:
    """One line of the table."""
    low, high = cell["interval"]
    print(
        f"{title:<24}{cell['before']:>10.1f}{cell['after']:>10.1f}{cell['ratio']:>8.3f}   {low:.3f} to {high:.3f}"
        f"{len(cell['pairs']):>6} pairs{cell['repeated']:>4} repeated   {'' if cell['holds'] else 'SLOWER'}",
        flush=True,
    )


def print_table(report: dict[str, Any]) -> None:
    """All cells, for people."""
    machine = report["machine"]
    print(f"\n{machine['cpu']}, AMX {'yes' if machine['amx'] else 'no'}, {report['settings']['threads']} threads")
    print(f"{'tokens a second':<24}{'before':>10}{'after':>10}{'ratio':>8}   95% interval")
    for title, cell in report["cells"].items():
        if cell["pairs"]:
            print_cell(title, cell)


if __name__ == "__main__":
    sys.exit(main())
