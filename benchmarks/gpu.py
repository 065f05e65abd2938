"""What only a GPU can prove: that the engine is right there, and how fast. One run, minutes, nothing from the net.

``python benchmarks/gpu.py`` (with ``PYTHONPATH=.`` where the package is not installed) runs, each in a process of its
own: the roofline of this machine; the tests of our Triton kernels without the interpreter, and attention against plain
torch; greedy answers against ``transformers`` in three precisions, in CUDA graphs and without, in chunks and from a
warm prefix cache, and of images; compute-sanitizer on a small engine; nano-vllm's own workload on random weights in the
shape of Qwen3-0.6B; decoding, prompts and images, each beside ``transformers``; a sweep of the attention kernel's
tiles; and decoding without one feature at a time. Figures go to a JSON file as they come, and a table is printed last.
It exits with 1 when a check fails, and with 3 when nothing failed but parts are unfinished.

A run that was cut goes on with ``--resume``: parts that the file has whole are not run again. ``--parts`` chooses some,
``--limit`` bounds all. ``--option NAME=JSON`` is passed to every engine. ``--smoke`` runs all of it on a CPU, in
little.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.output import add_output

if TYPE_CHECKING:
    from gpu_parts.report import Report

UNFINISHED = 3  # exit status


@dataclass(frozen=True)
class Part:
    """Where its function is, what else it takes, and the seconds after which it is cut."""

    function: str
    seconds: float
    arguments: tuple[Any, ...] = ()


# By worth: what a limit cuts off is the least of them.
PARTS: dict[str, Part] = {
    "roofline": Part("roofline.measure", 60),
    "tests": Part("kernels.tests", 150),
    "kernels": Part("kernels.check", 90),
    "parity-bfloat16": Part("parity.check", 120, ("bfloat16",)),
    "parity-float32": Part("parity.check", 120, ("float32",)),
    "sanitizer": Part("sanitizer.check", 140),
    "serve": Part("speed.serve", 150),
    "decode": Part("speed.decode", 90),
    "prefill": Part("speed.prefill", 60),
    "images": Part("speed.images", 90),
    "sweep": Part("sweep.measure", 120),
    "switches": Part("switches.measure", 120),
    "parity-float16": Part("parity.check", 120, ("float16",)),
}
LEAST_SECONDS = 15.0  # with less than this left, no part is begun


def main() -> int:
    """Run the parts, print the table; 1 when a check failed, 3 when a part is unfinished."""
    args = parse()
    started = time.perf_counter()
    from gpu_parts.report import Report

    report = Report.read(args.resume, into=args.output) if args.resume else Report(args.output)
    report.data["shape"] = report.data["shape"] or args.shape
    if report.data["shape"] != args.shape:
        sys.exit(f"{args.resume} was made with --shape {report.data['shape']}, and {args.shape} was asked for")
    report.write()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a part's process ends too
    with tempfile.TemporaryDirectory(prefix="nanovllm-gpu-") as directory:
        for name in args.parts:
            if report.is_finished(name):
                print(f"{name}: in {args.resume}")
                continue
            left = args.limit - (time.perf_counter() - started)
            if left < LEAST_SECONDS:
                report.begin(name)["unfinished"] = "not begun: no time left"
                report.write()
                continue
            print(f"== {name}", flush=True)
            if args.smoke and not args.processes:
                run_part(args, name, report, Path(directory))
            else:
                report = run_child(args, name, min(PARTS[name].seconds, left), Path(directory))
    return conclude(report, args, time.perf_counter() - started)


def parse() -> argparse.Namespace:
    """The command line; exits with 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="everything in little, on a CPU")
    parser.add_argument("--shape", help="of the random weights; 0.6b unless told otherwise")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), metavar="NAME,NAME")
    parser.add_argument("--limit", type=float, default=560.0, help="seconds of all parts; default 560")
    parser.add_argument(
        "--resume", type=Path, nargs="?", const=True, help="an earlier run's file; without a name that of --output"
    )
    parser.add_argument("--processes", action="store_true", help="a process for each part in a smoke test too")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON", help="of every engine")
    add_output(parser, "gpu.json")
    parser.add_argument("--child", nargs=2, metavar=("PART", "CHECKPOINTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such parts: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if args.resume not in (None, True) and not args.resume.exists():
        parser.error(f"there is no {args.resume} to resume")
    if args.resume is True:
        args.resume = args.output
    try:
        args.options = {name: json.loads(value) for name, _, value in (one.partition("=") for one in args.option)}
    except json.JSONDecodeError as error:
        parser.error(f"--option takes NAME=JSON: {error}")
    if not args.smoke:
        import torch

        if not torch.cuda.is_available():
            parser.error("there is no GPU; --smoke runs on a CPU")
    args.shape = args.shape or ("tiny" if args.smoke else "0.6b")
    if args.child:
        run_child_part(args)
        sys.exit(0)
    return args


def run_child(args: argparse.Namespace, name: str, seconds: float, directory: Path) -> Report:
    """A part in a process of its own: its end frees the GPU, a fault of it spoils no other part, and it can be cut."""
    from gpu_parts.report import Report

    options = [word for option in args.option for word in ("--option", option)] + ["--smoke"] * args.smoke
    command = [
        sys.executable, __file__, "--child", name, str(directory), "--shape", args.shape,
        "--output", str(args.output), *options,
    ]  # fmt: skip
    started = time.perf_counter()
    child = subprocess.Popen(command, start_new_session=True)
    try:
        status = child.wait(seconds)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)  # with what it started
            child.wait()
    report = Report.read(args.output)
    part = report.part(name) or report.begin(name)
    part["seconds"] = round(time.perf_counter() - started, 1)
    if status is None:
        part["unfinished"] = f"cut after {seconds:.0f} s"
    elif status:
        part["unfinished"] = f"its process ended with status {status}"
        part["checks"].append({"name": name, "passed": False, "error": part["unfinished"]})
    report.write()
    return report


def run_child_part(args: argparse.Namespace) -> None:
    """Inside of that process."""
    from gpu_parts.report import Report

    name, directory = args.child
    run_part(args, name, Report.read(args.output), Path(directory))


def run_part(args: argparse.Namespace, name: str, report: Report, directory: Path) -> None:
    """Run a part here; every check and figure is in the file as soon as it is known."""
    from importlib import import_module

    import torch
    from gpu_parts.bench import Bench
    from gpu_parts.scale import FULL, SMOKE
    from gpu_parts.table import check_line

    machine = describe(args)
    known = report.data["machine"] or machine
    if known["gpu"] != machine["gpu"]:
        sys.exit(f"{args.output} is of {known['gpu']}, and this is {machine['gpu']}")
    report.data["machine"] = known
    torch.backends.cuda.enable_cudnn_sdp(False)  # for transformers as well, each of whose steps has a new shape
    scale, device = (SMOKE, "cpu") if args.smoke else (FULL, "cuda")
    bench = Bench(scale, args.shape, device, directory, report, args.options)
    module, function = PARTS[name].function.split(".")
    find: Callable[..., Iterator[dict[str, Any]]] = getattr(import_module(f"gpu_parts.{module}"), function)
    part, started = report.begin(name), time.perf_counter()
    for found in chain(find(bench, *PARTS[name].arguments), bench.memory()):
        if "passed" in found:
            part["checks"].append(found)
            print(check_line(found), flush=True)
        else:
            part["figures"] |= found
        report.write()
    part["seconds"] = round(time.perf_counter() - started, 1)
    del part["unfinished"]
    report.write()


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The machine, its accelerator and the software."""
    from importlib import metadata

    import torch
    from machine import describe_machine

    described = describe_machine("benchmarks/gpu.py" + " --smoke" * args.smoke)
    if args.smoke:
        return {**described, "gpu": None}
    installed = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    properties = torch.cuda.get_device_properties(0)
    return {
        **described,
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "gpu_capability": [properties.major, properties.minor],
        "gpu_cores": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": installed.get("triton"),
        "flash_attn": installed.get("flash-attn") or installed.get("flash_attn"),
        "options": args.options,
    }


def conclude(report: Report, args: argparse.Namespace, seconds: float) -> int:
    """Print the table and the verdict."""
    from gpu_parts.table import table

    report.data["seconds"] = round(report.data.get("seconds", 0.0) + seconds, 1)
    failed = report.failed()
    unfinished = [name for name in args.parts if not report.is_finished(name)]
    report.write()
    print(f"\n{table(report)}\n")
    verdict = f"FAILED: {', '.join(failed)}" if failed else "all right" if not unfinished else "all right so far"
    rest = f"; --resume goes on with {', '.join(unfinished)}" if unfinished else ""
    print(f"{seconds:.0f} s, written to {args.output}; {verdict}{rest}")
    return 1 if failed else UNFINISHED if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
