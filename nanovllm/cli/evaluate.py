"""``nanovllm evaluate``: records of documents beside what they should be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nanovllm.cli.jobs import JsonOption
from nanovllm.errors import InvalidInput
from nanovllm.terminal import plain, print_json


def evaluate(
    truth_file: Annotated[
        Path, typer.Argument(metavar="TRUTH", help='JSON lines: {"uri": …, "value": …}, and "pages" if they are known.')
    ],
    results_file: Annotated[
        Path, typer.Argument(metavar="RESULTS", help="Records of `nanovllm extract`; failures beside it are read too.")
    ],
    baseline: Annotated[
        Path | None, typer.Option(help="Records of another run: say what changed, with McNemar's test.")
    ] = None,
    route: Annotated[str | None, typer.Option("--route", help="Only the records of this route.")] = None,
    output: Annotated[
        list[Path] | None, typer.Option("--output", "-o", help="Write the report to a .md or .json file (repeatable).")
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            help="METRIC=LEAST, such as field_f1=0.97 or field_f1:/total=0.99 (repeatable): else exit code 1."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare records with their truths: coverage, fields, lists, evidence, with 95% intervals.

    A document without a record counts as wrong. Exit code 1: a metric is below --fail-under, or has no value.
    """
    least = dict(_threshold(one) for one in fail_under or [])
    for path in output or []:
        if path.suffix not in (".md", ".json"):
            raise InvalidInput(f"--output {plain(str(path)).plain}: its name must end in .md or .json")
    from nanovllm.pipeline.documents.evaluation import evaluate as evaluation
    from nanovllm.pipeline.documents.evaluation import report
    from nanovllm.pipeline.documents.evaluation.inputs import read_results, read_truths

    truths = read_truths(truth_file)
    now = evaluation.evaluate(truths, read_results(results_file, route))
    ratios = {name: now.metric(name) for name in least}  # before anything is written: a name may be none
    tests = None
    if baseline is not None:
        tests = evaluation.compare_runs(evaluation.evaluate(truths, read_results(baseline, route)), now)
    made = report.as_json(now, tests)
    for path in output or []:
        is_json = path.suffix == ".json"
        text = json.dumps(made, indent=1) + "\n" if is_json else report.as_markdown(made)
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InvalidInput(f"--output {plain(str(path)).plain}: {error.strerror or error}") from None
    if as_json:
        print_json(made)
    elif not output:
        print(report.as_markdown(made))
    is_below = False
    for name, ratio in ratios.items():
        if ratio.value is None or ratio.value < least[name]:
            is_below = True
            value = "has no value: nothing was counted" if ratio.value is None else f"is {ratio.value:.4f}"
            print(f"nanovllm: {plain(name).plain} {value}, and --fail-under asks for {least[name]}", file=sys.stderr)
    raise typer.Exit(1 if is_below else 0)


def _threshold(text: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    try:
        least = float(number)
    except ValueError:
        least = -1.0
    if not name or not 0 <= least <= 1:
        raise InvalidInput(f"--fail-under {plain(text).plain}: give METRIC=LEAST with a number from 0 to 1")
    return name, least
