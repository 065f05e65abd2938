"""This engine beside its peers, each in its own environment, on the same checkpoints and requests, taking turns.

    python benchmarks/compare.py --size small --peer openvino=/path/to/its/environment …

`peers/setup.sh PEER DIR` builds an environment; without ``--peer`` only ``transformers`` (of this environment) is
compared with. Every engine is a runner process that stays loaded and sleeps while the others have their turn. Figures
are medians of turns, ratios those of turn by turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from checkpoints import checkpoint
from machine import busy_seconds, describe_machine
from output import DIRECTORY, write_text
from plot import draw_bars
from transformers import AutoTokenizer
from workloads import Maker, Workload, make_decode, make_images, make_schema, make_text

from nanovllm.checkpoints.resolve import resolve_checkpoint

HERE = Path(__file__).resolve().parent
RUNNERS = {
    "nanovllm": "run_nanovllm.py",
    "transformers": "run_transformers.py",
    "openvino": "run_openvino.py",
    "llama.cpp": "run_llama_cpp.py",
    "vllm": "run_vllm.py",
}
CANNOT = {  # kinds of workload
    "transformers": {"schema"},
    "llama.cpp": {"text", "images", "schema"},
}
SPINS = "20000"
NO_INT8 = {"transformers", "vllm"}
# Which checkpoint a size takes for text and schemas, and which for pictures; None: the size has no such workload.
CHECKPOINTS = {
    "small": {"text": "small", "decode": "small", "images": "tiny-receipts", "schema": "tiny-receipts"},
    "smollm": {"text": "smollm", "decode": "smollm", "images": "smollm-vision", "schema": "smollm"},
    "0.6b": {"text": "0.6b", "decode": "0.6b"},
}
WORKLOADS: dict[str, Maker] = {
    "text": make_text,
    **{f"decode-{batch}": make_decode(batch, prompt=16, answer=65) for batch in (1, 8, 32)},
    "images-distinct": make_images(repeating=False),
    "images-repeating": make_images(repeating=True),
    "schema": make_schema,
}


class PeerFailed(Exception):
    """A runner ended or answered with an error; says where its log is."""


@dataclass
class Runner:
    """A peer's process."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    versions: dict[str, Any] = field(default_factory=dict)

    def ask(self, workload: Workload, path: Path) -> dict[str, Any]:
        """Let it answer a workload; adds the share of all CPUs that others used meanwhile. Raises PeerFailed."""
        assert self.process.stdin is not None
        started, busy = time.perf_counter(), busy_seconds()
        try:
            print(workload.write(path), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise PeerFailed(f"{self.name} has ended; see {self.log}") from None
        reply = self.read()
        others = busy_seconds() - busy - reply["cpu_seconds"]
        reply["others_cpu_share"] = round(max(0.0, others) / (time.perf_counter() - started) / (os.cpu_count() or 1), 3)
        return reply

    def read(self) -> dict[str, Any]:
        """Its next line. Raises PeerFailed."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        reply: dict[str, Any] = json.loads(line) if line else {"error": f"it ended with {self.process.wait()}"}
        if "error" in reply:
            raise PeerFailed(f"{self.name}: {reply['error']}; its log is {self.log}")
        return reply


def main() -> int:
    """Compare what was asked for, print tables, write the JSON and the plot; 1 when answers disagree."""
    args = read_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "machine": describe_machine("benchmarks/compare.py " + " ".join(sys.argv[1:])),
        "settings": {name: getattr(args, name) for name in ("size", "threads", "batch", "warm_ups", "turns")},
        "results": [],
    }
    for precision in args.precisions:
        for model, names in group_by_model(args.size, args.workloads).items():
            report["results"] += compare(args, precision, model, names)
    write_text(args.output, json.dumps(report, indent=1) + "\n")
    draw_bars(report, args.output.with_suffix(".svg"))
    print(f"written to {args.output} and {args.output.with_suffix('.svg')}")
    return 1 if any(row.get("different") for row in report["results"]) else 0


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=list(CHECKPOINTS), default="small")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["text"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16", "int8"], default=["fp32"])
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help=f"a peer ({', '.join(list(RUNNERS)[1:])}) and the environment that peers/setup.sh built",
    )
    parser.add_argument("--without", nargs="+", choices=["transformers"], default=[], help="leave out")
    parser.add_argument("--turns", type=int, default=3, help="measured turns of each engine")
    parser.add_argument("--warm-ups", type=int, default=2, help="turns before those: a KV cache is slow to write first")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=32, help="sequences at once")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "nanovllm-peers")
    parser.add_argument(
        "--output", type=Path, help=f"default: {DIRECTORY}/peers-SIZE.json; benchmarks/results/…: published"
    )
    args = parser.parse_args()
    args.peers = {name: sys.executable for name in ("nanovllm", "transformers") if name not in args.without}
    for peer in args.peer:
        name, _, directory = peer.partition("=")
        if name not in RUNNERS or not (Path(directory) / "bin" / "python").exists():
            parser.error(f"--peer {peer}: not one of {', '.join(RUNNERS)} with an environment; see peers/setup.sh")
        args.peers[name] = str(Path(directory).absolute() / "bin" / "python")
    args.output = args.output or DIRECTORY / f"peers-{args.size}.json"
    return args


def group_by_model(size: str, workloads: list[str]) -> dict[str, list[str]]:
    """The checkpoints of a size and the workloads that run on each."""
    grouped: dict[str, list[str]] = {}
    for name in workloads:
        model = CHECKPOINTS[size].get(name.split("-")[0])
        if model is None:
            print(f"size {size} has no workload {name}")
        else:
            grouped.setdefault(model, []).append(name)
    return grouped


def compare(args: argparse.Namespace, precision: str, model: str, names: list[str]) -> list[dict[str, Any]]:
    """All workloads of one checkpoint in one precision: start every engine once, then let them take turns."""
    directory = resolve_checkpoint(model) if model == "tiny-receipts" else checkpoint(model, args.work)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = []
    with ExitStack() as stack:
        runners = []
        for name in args.peers:
            kinds = {workload.split("-")[0] for workload in names} - CANNOT.get(name, set())
            if not kinds or (precision == "int8" and name in NO_INT8):
                continue
            try:
                runners.append(stack.enter_context(started(args, name, directory, precision, kinds)))
            except PeerFailed as error:
                print(error, file=sys.stderr)
        for name in names:
            able = [runner for runner in runners if name.split("-")[0] not in CANNOT.get(runner.name, set())]
            row = take_turns(args, WORKLOADS[name], tokenizer, able)
            rows.append({"workload": name, "model": model, "precision": precision, **row})
            print_row(rows[-1])
    return rows


@contextmanager
def started(args: argparse.Namespace, name: str, directory: Path, precision: str, kinds: set[str]) -> Iterator[Runner]:
    """A runner that has loaded the checkpoint; it ends with the block. Raises PeerFailed."""
    log = args.work / f"{name}-{directory.name}-{precision}.log"
    command = [args.peers[name], str(HERE / "peers" / RUNNERS[name]), "--model", str(directory)]
    command += ["--precision", precision, "--threads", str(args.threads), "--batch", str(args.batch)]
    command += ["--kinds", ",".join(sorted(kinds)), "--work", str(args.work)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    # For all who use OpenMP: threads that wait spin for some microseconds and then sleep, as the worker sets it.
    environment |= {"GOMP_SPINCOUNT": SPINS, "OMP_WAIT_POLICY": "PASSIVE"}
    if name == "nanovllm":
        environment["PYTHONPATH"] = str(HERE.parent)
    with log.open("w") as stderr:
        print(shlex.join(command), file=stderr, flush=True)
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        )
    try:
        runner = Runner(name, process, log)
        runner.versions = runner.read()
        print(f"{name} loaded in {runner.versions['load_seconds']:.0f} s", flush=True)
        yield runner
    finally:
        process.kill()
        process.wait()


def take_turns(args: argparse.Namespace, make: Maker, tokenizer: Any, runners: list[Runner]) -> dict[str, Any]:
    """Warm up, then turn by turn every engine on the same requests; its figures, ratios and agreement."""
    runners = list(runners)
    turns: dict[str, list[dict[str, Any]]] = {runner.name: [] for runner in runners}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="nanovllm-peers-") as scratch:
        path = Path(scratch) / "workload.json"
        for turn in range(args.warm_ups + args.turns):
            workload = make(1000 + turn, tokenizer, Path(scratch))
            # Who goes first changes, so that nobody always follows the same neighbour.
            for runner in runners[turn % len(runners) :] + runners[: turn % len(runners)]:
                try:
                    reply = measure(runner, workload, make(5000 + turn, tokenizer, Path(scratch)), path)
                except PeerFailed as error:
                    print(error, file=sys.stderr)
                    failures[runner.name] = str(error)
                    runners = [other for other in runners if other is not runner]
                    turns.pop(runner.name)
                    continue
                if turn >= args.warm_ups:
                    turns[runner.name].append(reply)
    answers = {name: [turn.pop("answers") for turn in of_engine] for name, of_engine in turns.items()}
    ours = turns["nanovllm"]
    engines = {}
    for runner in runners:
        name, taken = runner.name, turns[runner.name]
        speed = "decode_tokens_per_second" if workload.kind == "decode" else "useful_tokens_per_second"
        engines[name] = {
            "versions": runner.versions,
            speed: round(statistics.median(turn[speed] for turn in taken), 2),
            "ours_is_faster_by": round(
                statistics.median(mine[speed] / theirs[speed] for mine, theirs in zip(ours, taken, strict=True)), 3
            ),
            "turns": taken,
            **agreement(answers["nanovllm"], answers[name]),
        }
    engines["nanovllm"]["linear_share"] = statistics.median(turn["linear_share"] for turn in ours)
    return {"engines": engines, "failures": failures}


def measure(runner: Runner, workload: Workload, other: Workload, path: Path) -> dict[str, Any]:
    """One turn. Decoding alone is what the same batch costs beyond its twin of one token, on prompts of its own."""
    reply = runner.ask(workload, path)
    tokens = sum(request.max_tokens for request in workload.requests)
    if reply["answers"] is not None:
        tokens = sum(len(answer) for answer in reply["answers"])
    reply["useful_tokens"] = tokens
    reply["useful_tokens_per_second"] = tokens / reply["seconds"]
    if workload.kind == "decode" and "decode_tokens_per_second" not in reply:
        short = replace(other, requests=tuple(replace(request, max_tokens=1) for request in other.requests))
        first = runner.ask(short, path)["seconds"]
        reply["decode_tokens_per_second"] = (tokens - len(workload.requests)) / (reply["seconds"] - first)
        reply["prefill_seconds"] = first
    return reply


def agreement(ours: list[Any], theirs: list[Any]) -> dict[str, Any]:
    """How many answers of all turns are equal to ours, and the share of tokens before the first difference."""
    pairs = [
        pair
        for mine, other in zip(ours, theirs, strict=True)
        if mine is not None and other is not None
        for pair in zip(mine, other, strict=True)
    ]
    if not pairs:
        return {}
    equal = sum(mine == other for mine, other in pairs)
    shared = sum(
        next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), len(pair[0])) for pair in pairs
    )
    return {
        "answers_equal": equal,
        "answers": len(pairs),
        "tokens_before_difference": round(shared / max(1, sum(len(mine) for mine, _ in pairs)), 4),
    }


def print_row(row: dict[str, Any]) -> None:
    """One workload for people."""
    print(f"\n{row['workload']}, {row['model']}, {row['precision']}")
    for name, engine in row["engines"].items():
        speed = engine.get("decode_tokens_per_second", engine.get("useful_tokens_per_second"))
        share = max(turn["others_cpu_share"] for turn in engine["turns"])
        equal = f"{engine['answers_equal']}/{engine['answers']}" if "answers" in engine else "not told"
        print(
            f"  {name:<13}{speed:>9.1f} tokens/s   ours is {engine['ours_is_faster_by']:>6.2f} times as fast   "
            f"answers equal {equal}   others took up to {share:.0%} of the CPUs",
            flush=True,
        )
    print(f"  the linear layers take {row['engines']['nanovllm']['linear_share']:.0%} of our time", flush=True)


if __name__ == "__main__":
    sys.exit(main())
