"""CPU of reading an object of 50 kB from S3: boto3, obstore, and the path of an earlier commit, by turns.

    python -m benchmarks.object_fetch --before 2a9ba20 [--objects 2000] [--turns 7] [--smoke]

Each is the worker's own fetcher in a process that stays, with 16 of 500 objects at once from a real S3 server
(``S3_NODE``, or the one beside the repository). Counted are the CPU seconds of that process alone (user and system, all
threads), not those of the server. ``--before`` is a commit or another checkout. Exits with 1 where obstore takes more
than 0.25 of the earlier path's CPU, or boto3 more than 0.8, unless ``--smoke``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OBJECT_BYTES = 50_000
STORED = 500
"""Different objects in the bucket."""
CONNECTIONS = 16
MOST_OF_BEFORE = {"obstore": 0.25, "boto3": 0.8}


def read_objects() -> None:
    """The child process: reads a line with a number of objects, reads as many, and answers with its CPU seconds."""
    try:
        from nanovllm.messages.job import ImageRef
        from nanovllm.objects.fetch import ObjectFetcher
        from nanovllm.settings.s3 import S3Settings
    except ImportError:  # the early commits
        from nanovllm.pipeline.fetch import ObjectFetcher
        from nanovllm.pipeline.job import ImageRef
        from nanovllm.pipeline.settings import S3Settings

    told = json.loads(sys.argv[2])
    settings = S3Settings.model_validate(told["settings"])

    async def run() -> None:
        fetcher = ObjectFetcher(settings, max_bytes=10 * OBJECT_BYTES)
        refs = [ImageRef(uri=uri) for uri in told["uris"]]

        async def read(numbers: Iterator[int]) -> None:
            for number in numbers:
                image = await fetcher.fetch(refs[number % len(refs)])
                assert len(image.data) == OBJECT_BYTES

        loop = asyncio.get_running_loop()
        print("ready", flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            numbers, before = iter(range(int(line))), cpu_seconds()
            await asyncio.gather(*(read(numbers) for _ in range(CONNECTIONS)))
            print(cpu_seconds() - before, flush=True)

    asyncio.run(run())


def cpu_seconds() -> float:
    """CPU that this process has used, in its threads and in the system for it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Child:
    """A process that reads objects with the package of ``tree``."""

    def __init__(self, tree: Path, environment: dict[str, str], settings: dict[str, Any], uris: list[str]) -> None:
        told = json.dumps({"settings": settings, "uris": uris})
        self.process = subprocess.Popen(
            # -P: without the working directory, which is a checkout too, before PYTHONPATH.
            [sys.executable, "-P", __file__, "--child", told],
            env={**os.environ, **environment, "PYTHONPATH": str(tree)},
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._line()

    def milliseconds(self, objects: int) -> float:
        """CPU milliseconds an object."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{objects}\n")
        self.process.stdin.flush()
        return 1000 * float(self._line()) / objects

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of {self.process.args!r} ended")
        return line


@contextmanager
def stored_objects() -> Iterator[tuple[dict[str, str], dict[str, Any], list[str]]]:
    """The environment and settings of a client, and the URIs of objects on a real S3 server."""
    sys.path.insert(0, str(ROOT / "tests"))
    from parts import VersityNode, s3_node_program

    if s3_node_program() is None:
        raise SystemExit("no S3 server: set S3_NODE")
    with tempfile.TemporaryDirectory() as folder:
        node = VersityNode(Path(folder))
        part = node.start()
        try:
            bucket = part.make_bucket()
            uris = [part.put(bucket, f"receipts/{number:05}", os.urandom(OBJECT_BYTES)) for number in range(STORED)]
            settings = {
                "endpoint_url": part.endpoint_url,
                "region": part.region,
                "addressing_style": "path",
                "allow": [f"s3://{bucket}"],
                "max_connections": CONNECTIONS,
            }
            yield part.environment, settings, uris
        finally:
            node.stop()


def measure(before: Path | None, objects: int, turns: int) -> dict[str, list[float]]:
    """CPU milliseconds an object of each contender, turn by turn; the first turn of each is not counted."""
    found: dict[str, list[float]] = {}
    with stored_objects() as (environment, settings, uris), ExitStack() as stack:
        children: dict[str, Child] = {}
        for client in ("boto3", "obstore"):
            children[client] = Child(ROOT, environment, settings | {"client": client}, uris)
        if before is not None:
            children["before"] = Child(before, environment, settings, uris)
        for child in children.values():
            stack.callback(child.close)
        for turn in range(turns + 1):
            # Who goes first changes.
            names = list(children) if turn % 2 else list(reversed(children))
            for name in names:
                milliseconds = children[name].milliseconds(objects)
                if turn:
                    found.setdefault(name, []).append(round(milliseconds, 4))
                    print(f"{name}: {milliseconds:.3f} ms", file=sys.stderr)
    return found


def summary(found: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and turns, and the median ratio to the earlier path, turn by turn."""
    written: dict[str, Any] = {
        name: {"cpu_ms_per_object": statistics.median(turns), "turns": turns} for name, turns in found.items()
    }
    for name in MOST_OF_BEFORE if "before" in found else ():
        ratios = [mine / theirs for mine, theirs in zip(found[name], found["before"], strict=True)]
        written[name]["of_before"] = round(statistics.median(ratios), 3)
    return written


def main() -> None:
    from benchmarks.before_after import worktree_of
    from benchmarks.machine import describe_machine
    from benchmarks.output import add_output, write_text

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="a commit, or another checkout")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "nanovllm-peers")
    parser.add_argument("--objects", type=int, default=2_000)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--smoke", action="store_true", help="a few objects, to see that it runs")
    add_output(parser, "object-fetch.json")
    options = parser.parse_args()
    if options.smoke:
        options.objects, options.turns = 100, 2
    before = worktree_of(options.before, options.work) if options.before else None
    told = " ".join([f"--objects {options.objects}", f"--turns {options.turns}"])
    named = f"--before {options.before} " if options.before else ""
    machine = describe_machine(f"python -m benchmarks.object_fetch {named}{told}")
    shape = {"object_bytes": OBJECT_BYTES, "connections": CONNECTIONS, "different_objects": STORED}
    written = summary(measure(before, options.objects, options.turns))
    write_text(options.output, json.dumps({"machine": machine, **shape, **written}, indent=2) + "\n")
    missed = [
        f"{name} takes {written[name]['of_before']} of the earlier path's CPU, above {most}"
        for name, most in MOST_OF_BEFORE.items()
        if before is not None and written[name]["of_before"] > most
    ]
    if missed and not options.smoke:
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        read_objects()
    else:
        main()
