"""This engine beside its peers, each in its own environment, on the same checkpoints and requests, taking turns.

    python -m benchmarks.compare --size small --peer openvino=/path/to/its/environment …

`peers/setup.sh PEER DIR` builds an environment; without ``--peer`` only ``transformers`` (of this environment, static
batches and its continuous batching) is compared with. ``--own-defaults`` adds a column for each peer as it runs where
nothing is set. Every engine is a runner process that stays loaded and sleeps while the others have their turn. Figures
are medians of turns, ratios those of turn by turn. With ``--budget`` it ends with 3 after the workload in which
the budget is spent, and ``--resume`` goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.checkpoints import checkpoint
from benchmarks.machine import describe_machine, has_amx, name_of_cpu
from benchmarks.output import DIRECTORY, write_text
from benchmarks.plot import draw_bars
from benchmarks.runners import Launch, Runner, RunnerFailed, measure, started
from benchmarks.turn_statistics import agreement
from benchmarks.workloads import (
    Maker,
    make_decode,
    make_images,
    make_prompts,
    make_sampling,
    make_schema,
    make_text,
)

ROOT = Path(__file__).resolve().parent.parent
RUNNERS = {
    "nanovllm": "run_nanovllm.py",
    "transformers": "run_transformers.py",
    "transformers-cb": "run_transformers_cb.py",
    "openvino": "run_openvino.py",
    "llama.cpp": "run_llama_cpp.py",
    "vllm": "run_vllm.py",
}
BUILT_IN = ("nanovllm", "transformers", "transformers-cb")
OWN_DEFAULTS = "-defaults"
CANNOT = {  # kinds of workload
    "transformers": {"schema"},
    "transformers-cb": {"schema", "images"},
    "llama.cpp": {"text", "images", "sampling", "schema"},
}
NO_DEFAULTS = {"nanovllm", "transformers-cb"}  # the latter's cache takes 60% of the memory, and others stay loaded
NO_INT8 = {"transformers", "transformers-cb", "vllm"}
WORKLOADS: dict[str, Maker] = {
    "text": make_text,
    "sampling": make_sampling,
    "prompts": make_prompts,
    **{f"decode-{batch}": make_decode(batch, prompt=16, answer=65) for batch in (1, 8, 32)},
    "images-distinct": make_images(repeating=False),
    "images-repeating": make_images(repeating=True),
    "schema": make_schema,
}


def main() -> int:
    """Compare what was asked for, print tables, write the JSON and the plot; 3 when the budget was spent before."""
    args = read_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    report = read_or_begin(args)
    end = None if args.budget is None else time.monotonic() + args.budget
    for precision, model, names in missing_groups(args, report):
        with closing(compare(args, precision, model, names)) as rows:
            for row in rows:
                report["results"].append(row)
                write_text(args.output, json.dumps(report, indent=1) + "\n")
                print_row(row)
                if end is not None and time.monotonic() >= end:
                    print(f"the budget of {args.budget:.0f} s is spent; the same command with --resume goes on")
                    return 3
    print(f"\n{table(report)}\n")
    draw_bars(report, args.output.with_suffix(".svg"))
    print(f"written to {args.output} and {args.output.with_suffix('.svg')}")
    return 0


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["small", "smollm", "0.6b"], default="small")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["text"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16", "int8"], default=["fp32"])
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help=f"a peer ({', '.join(list(RUNNERS)[1:])}) and the environment that peers/setup.sh built",
    )
    parser.add_argument("--without", nargs="+", choices=BUILT_IN[1:], default=[], help="leave out")
    parser.add_argument("--own-defaults", action="store_true", help="a column more for each peer, as it comes")
    parser.add_argument("--turns", type=int, default=3, help="measured turns of each engine")
    parser.add_argument("--warm-ups", type=int, default=2, help="turns before those: a KV cache is slow to write first")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=32, help="sequences at once")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no workload after these")
    parser.add_argument("--resume", action="store_true", help="go on with the file of --output")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "nanovllm-peers")
    parser.add_argument(
        "--output", type=Path, help=f"default: {DIRECTORY}/peers-SIZE.json; benchmarks/results/…: published"
    )
    args = parser.parse_args()
    args.peers = {name: sys.executable for name in BUILT_IN if name not in args.without}
    for peer in args.peer:
        name, _, directory = peer.partition("=")
        if name not in RUNNERS or not (Path(directory) / "bin" / "python").exists():
            parser.error(f"--peer {peer}: not one of {', '.join(RUNNERS)} with an environment; see peers/setup.sh")
        args.peers[name] = str(Path(directory).absolute() / "bin" / "python")
    if args.own_defaults:
        args.peers |= {name + OWN_DEFAULTS: python for name, python in args.peers.items() if name not in NO_DEFAULTS}
    args.output = args.output or DIRECTORY / f"peers-{args.size}.json"
    return args


def read_or_begin(args: argparse.Namespace) -> dict[str, Any]:
    """The report to go on with; one of another CPU or of other settings is refused (SystemExit)."""
    settings = {name: getattr(args, name) for name in ("size", "threads", "batch", "warm_ups", "turns")}
    machine = describe_machine("python -m benchmarks.compare " + " ".join(sys.argv[1:]))
    if args.resume and args.output.is_file():
        report: dict[str, Any] = json.loads(args.output.read_text())
        if (report["settings"], report["machine"]["cpu"]) != (settings, machine["cpu"]):
            raise SystemExit(f"{args.output} is of another CPU or other settings: --output names another file")
        return report
    return {"machine": machine, "settings": settings, "results": []}


def missing_groups(args: argparse.Namespace, report: dict[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """Precision, checkpoint and workloads that are still to be measured; a group has its engines loaded together."""
    done = {(row["precision"], row["workload"]) for row in report["results"]}
    for precision in args.precisions:
        for model, names in group_by_model(args.size, args.workloads).items():
            if left := [name for name in names if (precision, name) not in done]:
                yield precision, model, left


def group_by_model(size: str, workloads: list[str]) -> dict[str, list[str]]:
    """The checkpoints of a size and the workloads that run on each; made-up words spell no JSON."""
    special = {"images": f"{size}-vision", "schema": "smollm"}
    grouped: dict[str, list[str]] = {}
    for name in workloads:
        grouped.setdefault(special.get(name.split("-")[0], size), []).append(name)
    return grouped


def abilities(column: str) -> tuple[str, bool]:
    """The peer of a column, and whether the column is the peer at its own defaults."""
    return column.removesuffix(OWN_DEFAULTS), column.endswith(OWN_DEFAULTS)


def can_run(column: str, workload: str) -> bool:
    """Whether a column's engine has the kind of a workload."""
    return workload.split("-")[0] not in CANNOT.get(abilities(column)[0], set())


def compare(
    args: argparse.Namespace, precision: str, model: str, names: list[str]
) -> Generator[dict[str, Any], None, None]:
    """The rows of all workloads of one checkpoint in one precision; every engine is started once for all of them."""
    directory = checkpoint(model, args.work)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    cpu = {"cpu": name_of_cpu(), "amx": has_amx()}
    with ExitStack() as stack:
        runners = []
        for name in args.peers:
            able = [workload for workload in names if can_run(name, workload)]
            if not able or (precision == "int8" and name in NO_INT8):
                continue
            try:
                runners.append(stack.enter_context(started(launch_of(args, name, directory, precision, able))))
            except RunnerFailed as error:
                print(error, file=sys.stderr)
        for name in names:
            began, able = time.monotonic(), [runner for runner in runners if can_run(runner.name, name)]
            row = take_turns(args, WORKLOADS[name], tokenizer, able)
            taken = {"seconds": round(time.monotonic() - began)}
            yield {"workload": name, "model": model, "precision": precision, **cpu, **taken, **row}


def launch_of(args: argparse.Namespace, column: str, directory: Path, precision: str, workloads: list[str]) -> Launch:
    """How a column's engine is started."""
    peer, own_defaults = abilities(column)
    flags = {"nanovllm": ("--clocks",)}.get(peer, ("--own-defaults",) if own_defaults else ())
    return Launch(
        name=column,
        python=args.peers[column],
        script=RUNNERS[peer],
        model=directory,
        precision=precision,
        kinds=frozenset(name.split("-")[0] for name in workloads),
        threads=args.threads,
        batch=args.batch,
        work=args.work,
        flags=flags,
        tree=ROOT if peer == "nanovllm" else None,
    )


def take_turns(args: argparse.Namespace, make: Maker, tokenizer: Any, runners: list[Runner]) -> dict[str, Any]:
    """Warm up, then turn by turn every engine on the same requests; its figures, ratios and agreement."""
    runners = list(runners)
    turns: dict[str, list[dict[str, Any]]] = {runner.name: [] for runner in runners}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="nanovllm-peers-") as scratch:
        path = Path(scratch) / "workload.json"
        for turn in range(args.warm_ups + args.turns):
            workload, other = (make(seed + turn, tokenizer, Path(scratch)) for seed in (1000, 5000))
            # Who goes first changes, so that nobody always follows the same neighbour.
            for runner in runners[turn % len(runners) :] + runners[: turn % len(runners)]:
                try:
                    reply = measure(runner, workload, other, path)
                except RunnerFailed as error:
                    print(error, file=sys.stderr)
                    failures[runner.name] = str(error)
                    runners = [other for other in runners if other is not runner]
                    turns.pop(runner.name)
                    continue
                if turn >= args.warm_ups:
                    turns[runner.name].append(reply)
    if "nanovllm" in failures:
        raise RunnerFailed(failures["nanovllm"])
    answers = {name: [turn.pop("answers") for turn in of_engine] for name, of_engine in turns.items()}
    ours = turns["nanovllm"]
    engines = {}
    for runner in runners:
        name, taken = runner.name, turns[runner.name]
        pairs = zip(ours, taken, strict=True)
        engines[name] = {
            "versions": runner.versions,
            "tokens_per_second": round(statistics.median(turn["tokens_per_second"] for turn in taken), 2),
            "ours_is_faster_by": round(
                statistics.median(mine["tokens_per_second"] / theirs["tokens_per_second"] for mine, theirs in pairs), 3
            ),
            "turns": taken,
            # Everyone draws random numbers of its own.
            **(agreement(answers["nanovllm"], answers[name]) if workload.sampling is None else {}),
        }
    engines["nanovllm"]["linear_share"] = statistics.median(turn["linear_share"] for turn in ours)
    return {"engines": engines, "failures": failures}


def print_row(row: dict[str, Any]) -> None:
    """One workload for people."""
    print(f"\n{row['workload']}, {row['model']}, {row['precision']}; {row['cpu']}, AMX {'yes' if row['amx'] else 'no'}")
    for name, engine in row["engines"].items():
        share = max(turn["others_cpu_share"] for turn in engine["turns"])
        equal = f"{engine['answers_equal']}/{engine['answers']}" if "answers" in engine else "not told"
        print(
            f"  {name:<30}{engine['tokens_per_second']:>9.1f} tokens/s   ours is {engine['ours_is_faster_by']:>6.2f} "
            f"times as fast   answers equal {equal}   others took up to {share:.0%} of the CPUs",
            flush=True,
        )
    print(f"  the linear layers take {row['engines']['nanovllm']['linear_share']:.0%} of our time", flush=True)


def table(report: dict[str, Any]) -> str:
    """All rows as Markdown: tokens a second of every column, in parentheses how many times as fast ours is."""
    columns = list(dict.fromkeys(name for row in report["results"] for name in row["engines"]))
    lines = ["| | CPU | AMX | " + " | ".join(columns) + " | linear |", "|---" * (len(columns) + 4) + "|"]
    for row in report["results"]:
        cells = [f"{row['workload']}, {row['precision']}", row["cpu"], "yes" if row["amx"] else "no"]
        for name in columns:
            engine = row["engines"].get(name)
            ratio = "" if name == "nanovllm" or engine is None else f" ({engine['ours_is_faster_by']:.2f})"
            cells.append("–" if engine is None else f"{engine['tokens_per_second']:,.1f}{ratio}")
        cells.append(f"{row['engines']['nanovllm']['linear_share']:.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
