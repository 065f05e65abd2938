"""``nanovllm run``: jobs of a file, answered into a file, without Kafka."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nanovllm.cli.extras import require
from nanovllm.cli.jobs import ConfigOption, JsonOption
from nanovllm.errors import InvalidInput, counted
from nanovllm.settings.loading import load_settings
from nanovllm.settings.worker import Settings
from nanovllm.terminal import long_work, print_json

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Checkpoint directory, alias or cached hub name, over engine.model.")
]


def run(
    input: Annotated[
        Path,
        typer.Option(
            "--input",
            "--input-file",
            "-i",
            help="JSON lines: jobs, or requests of OpenAI's batch files (chat completions).",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "--output-file", "-o", help="Where the results go, in the order in which they are ready."
        ),
    ],
    dead_letters: Annotated[
        Path | None,
        typer.Option(help="Where the jobs without an answer go; unset: beside the output, as NAME.dead-letters.jsonl."),
    ] = None,
    local_images: Annotated[
        Path | None,
        typer.Option(
            "--allowed-local-media-path",
            help="Folder below which the jobs may name images by path or file:// URL; unset: none.",
        ),
    ] = None,
    model: ModelOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Answer the jobs of a file without Kafka, with the engine, fetching and limits of a worker.

    What is in the output is not computed again: the same command goes on where it was stopped or killed. Exit code 1:
    it was stopped, or a job has no answer.
    """
    settings = engine_settings(config, model)
    dead_letters = dead_letters or output.with_name(f"{output.stem}.dead-letters.jsonl")
    _check_paths(input, output, dead_letters)
    require_engine(settings)
    from nanovllm.pipeline.consuming.line_source import FinishedJobs, LineSource, read_lines
    from nanovllm.pipeline.local_images import LocalImages
    from nanovllm.pipeline.run import run_lines
    from nanovllm.pipeline.run_output import RunOutput
    from nanovllm.sinks.outcomes import OutcomeSink

    max_bytes = settings.admission.max_job_bytes
    images = None
    if local_images is not None:
        limits = {"max_bytes": settings.images.max_bytes, "max_job_bytes": settings.admission.max_bytes}
        images = LocalImages(local_images, **limits)
    with RunOutput(output, dead_letters, images) as outcomes:
        before = outcomes.results + outcomes.dead_letters
        finished = FinishedJobs(input.name, frozenset(outcomes.finished))
        left = finished.left(read_lines(input, max_bytes))
        if before:
            print(f"{output} goes on: {before:,} done, {left:,} left", file=sys.stderr)
        is_finished = not left
        if left:
            with long_work(f"answering {input}", left) as show:
                is_finished = run_lines(
                    settings,
                    LineSource(read_lines(input, max_bytes), finished),
                    OutcomeSink(settings.topics, outcomes.add_result, outcomes.add_dead_letter),
                    decode=outcomes.decode,
                    on_tick=lambda: show(outcomes.results + outcomes.dead_letters - before),
                )
    summary = {"results": outcomes.results, "dead_letters": outcomes.dead_letters, "is_finished": is_finished}
    _show_summary(summary, output, dead_letters, as_json)
    raise typer.Exit(0 if is_finished and not outcomes.dead_letters else 1)


def require_engine(settings: Settings) -> None:
    """Raise ConfigurationError where what the stages or the engine of ``settings`` need is not installed."""
    if settings.engine.backend == "openai":
        require("remote", "httpx", "numpy", "PIL")
        return
    if settings.engine.backend == "vllm":
        require("vllm", "vllm", "numpy", "PIL", "torch", "transformers")
        return
    require("worker", "numpy", "PIL", *(("torch", "transformers") if settings.engine.loads_model else ()))


def engine_settings(config: Path | None, model: str | None) -> Settings:
    """The settings, with ``model`` over them."""
    return load_settings(config, {"engine": {"model": model}} if model else {})


def _check_paths(input: Path, output: Path, dead_letters: Path) -> None:
    if not input.exists():
        raise InvalidInput(f"{input}: no such file")
    paths = [os.path.realpath(path) for path in (input, output, dead_letters)]
    if len(set(paths)) < len(paths):
        raise InvalidInput("input, output and dead letters are different files")


def _show_summary(summary: dict[str, Any], output: Path, dead_letters: Path, as_json: bool) -> None:
    if as_json:
        print_json(summary)
        return
    print(f"{counted(summary['results'], 'result')} in {output}", file=sys.stderr)
    if summary["dead_letters"]:
        print(f"{counted(summary['dead_letters'], 'dead letter')} in {dead_letters}", file=sys.stderr)
    if not summary["is_finished"]:
        print("stopped before the end: the same command goes on from here", file=sys.stderr)
