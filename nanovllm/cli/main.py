"""The command line. Exit codes: 0 done, 1 failed, 2 misuse. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import os
import signal
import sys
import threading

# A KeyboardInterrupt while modules are imported would end as a traceback, or as another exception of an extension.
if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"nanovllm: interrupted\n"), os._exit(1)))
# Before the imports below, which take seconds: PID 1 of a container ignores signals without a handler, and nothing was
# taken that would have to be drained. The worker's own handlers (stop_signals.py) replace these.
if sys.argv[1:2] in (["worker"], ["bridge"]):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))

import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from nanovllm.cli.ask import ask
from nanovllm.cli.bridge import bridge_app
from nanovllm.cli.diagnostics import doctor
from nanovllm.cli.dlq import dlq_app
from nanovllm.cli.evaluate import evaluate
from nanovllm.cli.extract import extract
from nanovllm.cli.extras import require
from nanovllm.cli.fetch_model import fetch_model
from nanovllm.cli.flags import Application
from nanovllm.cli.jobs import ConfigOption, results, submit
from nanovllm.cli.reconcile import reconcile
from nanovllm.cli.routes import routes_app
from nanovllm.cli.run import require_engine, run
from nanovllm.cli.smoke import smoke
from nanovllm.cli.status import status
from nanovllm.cli.topics import topics_app
from nanovllm.errors import ConfigurationError, InvalidInput, InvalidRoutes, NanoVLLMError
from nanovllm.messages.validation import describe_errors
from nanovllm.pipeline.operations.log import log_to_stderr
from nanovllm.pipeline.operations.replicas import Replicas, end_with_parent
from nanovllm.pipeline.operations.stop_signals import DONE, FAILED
from nanovllm.settings.loading import load_settings
from nanovllm.settings.worker import Settings
from nanovllm.terminal import long_work, plain

# aiokafka logs each attempt at a broker, which without a handler would stand before the error's own line.
logging.getLogger("aiokafka").addHandler(logging.NullHandler())

MISUSE = 2
_OF_SIGINT = 130  # what Typer 0.26 and newer make of a KeyboardInterrupt
# Typer's own, which newer releases bring with them and older ones take from click.
_USAGE_ERROR: Any = typer.BadParameter.__base__

app = Application(
    name="nanovllm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("submit")(submit)
app.command("status")(status)
app.command("smoke")(smoke)
app.command("doctor")(doctor)
app.command("results")(results)
app.command("run")(run)
app.command("ask")(ask)
app.command("extract")(extract)
app.command("evaluate")(evaluate)
app.command("reconcile")(reconcile)
app.command("fetch-model")(fetch_model)
app.add_typer(topics_app, name="topics")
app.add_typer(dlq_app, name="dlq")
app.add_typer(bridge_app, name="bridge")
app.add_typer(routes_app, name="routes")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"nanovllm {version('nanovllm')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Images and prompts from Kafka and S3 in, text out."""


@app.command()
def worker(
    config: ConfigOption = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show the effective settings, secrets masked, and leave.")
    ] = False,
    exit_when_drained: Annotated[
        bool, typer.Option("--exit-when-drained", help="Leave when every job has been answered: for batches.")
    ] = False,
    replicas: Annotated[
        int | None,
        typer.Option(
            "--replicas",
            min=1,
            help="Worker processes on this machine, each on its share of the cores (setting `replicas`): they share "
            "packed weights; the i-th listens on http.port + i. One that ends is started again.",
        ),
    ] = None,
    replica: Annotated[
        int | None, typer.Option("--replica", hidden=True, help="Of a process that others follow.")
    ] = None,
) -> None:
    """Answer jobs until told to stop (SIGTERM finishes what is at work)."""
    settings = load_settings(config, None if replicas is None else {"replicas": replicas})
    if print_config:
        print(settings.masked_yaml(), end="")
        return
    require_engine(settings)
    if settings.replicas > 1:
        raise typer.Exit(_run_replicas(settings, config, exit_when_drained))
    from nanovllm.pipeline.app import run_worker

    if replica is not None:
        end_with_parent()
    raise typer.Exit(run_worker(settings, exit_when_drained=exit_when_drained))


def _run_replicas(settings: Settings, config: Path | None, exit_when_drained: bool) -> int:
    log_to_stderr(settings.log_level, settings.log_format, settings.worker_id)
    command = [sys.executable, "-m", "nanovllm.cli.main", "worker"]
    command += [] if config is None else ["--config", str(config)]
    command += ["--exit-when-drained"] * exit_when_drained
    return Replicas(settings, command).run(until_all_end=exit_when_drained)


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave broker, store and worker running until Ctrl-C.")] = False,
    output: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("build/demo"),
    jobs: Annotated[int | None, typer.Option(help="How many jobs, at least 24; unset: 48.")] = None,
) -> None:
    """Show the whole way on this machine: generated images in, text out, with a report."""
    require("demo", "torch", "transformers", "moto", "noida_db")
    from nanovllm.demo.run import DEFAULT_JOBS, run_demo

    raise typer.Exit(run_demo(keep=keep, output=output, jobs=DEFAULT_JOBS if jobs is None else jobs))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def align(context: typer.Context) -> None:
    """Train a projector between a vision tower and a language model (`nanovllm align --help`)."""
    require("worker", "torch", "transformers")
    from nanovllm.training import align as tool

    raise typer.Exit(tool.main(context.args))


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(help="A directory with pytorch_model.bin (or its shards), a GGUF file, or a cached hub name."),
    ],
    output: Annotated[Path, typer.Argument(help="The directory to make; it must not exist.")],
) -> None:
    """Turn a .bin or GGUF checkpoint into the directory of safetensors that the engine loads."""
    require("convert", "torch", "transformers")
    from nanovllm.engine.convert import convert, how_to_use

    with long_work(f"converting {source}"):
        difference = convert(source, output)
    print(f"compared with its source: logits (of a tower: features) differ by {difference:.1g} of the largest at most")
    print(f"{output} is ready: {how_to_use(output.resolve())}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on ``argv`` (None: the process's own arguments) and return the exit code.

    A user's mistake is one line on stderr.
    """
    try:
        code = app(args=None if argv is None else list(argv), prog_name="nanovllm", standalone_mode=False)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else DONE
    except typer.Abort:
        code = _OF_SIGINT
    except _USAGE_ERROR as error:
        if str(error).startswith("Usage:") or not error.format_message():  # a command that cannot stand alone
            error.show()
        else:
            command = error.ctx.command_path if error.ctx else "nanovllm"
            _print_error(f"{error.format_message().rstrip('.')} (see `{command} --help`)")
        return MISUSE
    except InvalidRoutes as error:
        for refusal in error.refusals:
            _print_error(refusal)
        return MISUSE
    except (ConfigurationError, InvalidInput) as error:
        _print_error(error.in_one_line)
        return MISUSE
    except ValidationError as error:  # of a job, made of what the command line says
        _print_error(describe_errors(error, error.title.lower()))
        return MISUSE
    except NanoVLLMError as error:
        _print_error(error.in_one_line)
        return FAILED
    except BrokenPipeError:
        return FAILED
    except KeyboardInterrupt:
        code = _OF_SIGINT
    except (OSError, MemoryError) as error:  # a full disk, a file or address that is refused
        _print_error(str(error) or "this machine has not enough memory for it")
        return FAILED
    if code == _OF_SIGINT:
        _print_error("interrupted")
        return FAILED
    return code if isinstance(code, int) else DONE


def _print_error(line: str) -> None:
    print(f"nanovllm: {plain(line).plain}", file=sys.stderr)


# The modules are there: commands may see a KeyboardInterrupt. A worker's handler stays.
if getattr(signal.getsignal(signal.SIGINT), "__module__", "") == __name__ and sys.argv[1:2] != ["worker"]:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if __name__ == "__main__":
    sys.exit(main())
