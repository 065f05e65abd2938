"""The command line. Exit codes: 0 done, 1 failed, 2 misuse. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import os
import signal
import sys

# Before the imports below, which take seconds: PID 1 of a container ignores signals without a handler, and nothing was
# taken that would have to be drained. The worker's own handlers (stop_signals.py) replace these.
if sys.argv[1:2] == ["worker"]:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from nanovllm.cli.ask import ask
from nanovllm.cli.dlq import dlq_app
from nanovllm.cli.jobs import ConfigOption, results, submit
from nanovllm.cli.run import run
from nanovllm.cli.topics import topics_app
from nanovllm.errors import ConfigurationError, InvalidInput, NanoVLLMError
from nanovllm.pipeline.operations.stop_signals import DONE, FAILED
from nanovllm.settings.loading import load_settings
from nanovllm.terminal import plain, print_table

MISUSE = 2

app = typer.Typer(
    name="nanovllm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Images and prompts from Kafka and S3 in, text out.",
)
app.command("submit")(submit)
app.command("results")(results)
app.command("run")(run)
app.command("ask")(ask)
app.add_typer(topics_app, name="topics")
app.add_typer(dlq_app, name="dlq")


@app.command()
def worker(
    config: ConfigOption = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show the effective settings, secrets masked, and leave.")
    ] = False,
    exit_when_drained: Annotated[
        bool, typer.Option("--exit-when-drained", help="Leave when every job has been answered: for batches.")
    ] = False,
) -> None:
    """Answer jobs until told to stop (SIGTERM finishes what is at work)."""
    settings = load_settings(config)
    if print_config:
        print(settings.masked_yaml(), end="")
        return
    _require("worker", "numpy", "PIL", *(("torch", "transformers") if settings.engine.backend == "native" else ()))
    from nanovllm.pipeline.app import run_worker

    raise typer.Exit(run_worker(settings, exit_when_drained=exit_when_drained))


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave broker, store and worker running until Ctrl-C.")] = False,
    output: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("build/demo"),
    jobs: Annotated[int | None, typer.Option(help="How many jobs, at least 24; unset: 48.")] = None,
) -> None:
    """Show the whole way on this machine: generated images in, text out, with a report."""
    _require("demo", "torch", "transformers", "moto", "noida_db")
    from nanovllm.demo.run import DEFAULT_JOBS, run_demo

    raise typer.Exit(run_demo(keep=keep, output=output, jobs=DEFAULT_JOBS if jobs is None else jobs))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def align(context: typer.Context) -> None:
    """Train a projector between a vision tower and a language model (`nanovllm align --help`)."""
    _require("worker", "torch", "transformers")
    from nanovllm.training import align as tool

    raise typer.Exit(tool.main(context.args))


@app.command()
def doctor(
    config: ConfigOption = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to measure; 0: only say what was chosen.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array instead of a table.")] = False,
) -> None:
    """Say what this machine and checkpoint get, and why: device, attention, weights, memory; and measure it."""
    settings = load_settings(config)
    _require("worker", "torch", "transformers")
    from nanovllm.pipeline.app import prepare_threads

    prepare_threads()
    from nanovllm.engine.diagnostics import describe, measure
    from nanovllm.pipeline.build import build_engine

    with build_engine(settings.engine) as engine:
        findings = [*describe(engine), *(measure(engine, seconds) if seconds else ())]
    rows = [(finding.subject, finding.value, finding.note) for finding in findings]
    print_table(("what", "is", "why"), rows, as_json=as_json)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(help="A directory with pytorch_model.bin (or its shards), a GGUF file, or a cached hub name."),
    ],
    output: Annotated[Path, typer.Argument(help="The directory to make; it must not exist.")],
) -> None:
    """Turn a .bin or GGUF checkpoint into the directory of safetensors that the engine loads."""
    _require("worker", "torch", "transformers")
    from nanovllm.engine.convert import convert, how_to_use

    difference = convert(source, output)
    if difference is not None:
        print(f"compared with its source: logits differ by {difference:.1g} of the largest at most")
    print(f"{output} is ready: {how_to_use(output.resolve())}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on ``argv`` (None: the process's own arguments) and return the exit code."""
    try:
        app(args=None if argv is None else list(argv), prog_name="nanovllm")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else DONE
    except (ConfigurationError, InvalidInput) as error:
        _print_error(error)
        return MISUSE
    except NanoVLLMError as error:
        _print_error(error)
        return FAILED
    except KeyboardInterrupt:
        return FAILED
    return DONE


def _require(extra: str, *modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigurationError(f"this command needs {', '.join(missing)}: pip install '.[{extra}]' in a clone")


def _print_error(error: NanoVLLMError) -> None:
    print(f"nanovllm: {plain(str(error)).plain}", file=sys.stderr)
    print(f"          {error.remedy}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
