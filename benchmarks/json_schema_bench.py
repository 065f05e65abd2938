"""Guided output on the real schemas of JSONSchemaBench, by SmolLM2-135M-Instruct.

The schemas are not in this repository. Get them with
    git clone --depth 1 https://github.com/guidance-ai/jsonschemabench
and run
    python -m benchmarks.json_schema_bench jsonschemabench/data

An equal number of schemas of each of the ten collections is drawn. Every one is refused with a clear error, or answered
under its constraint; a finished answer is then checked by the package jsonschema, formats too. The run fails when a
finished answer is invalid, when more than 15% are refused or fewer than 40% finish.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import numpy as np
import torch
from pydantic import ValidationError

from benchmarks.machine import describe_machine
from benchmarks.output import add_output, write_text
from benchmarks.smollm import smollm
from nanovllm import LLM, SamplingParams
from nanovllm.engine.outputs import RequestOutput
from nanovllm.errors import UnsupportedConstraint

MAX_REFUSED, MIN_FINISHED = 0.15, 0.40

# Share of a collection that an engine takes, and that it takes and answers validly (with Llama-3.2-1B): table 4 of
# "Generating Structured Outputs from Language Models: Benchmark and Studies", arXiv 2501.10868. The smallest and the
# largest collection are not in it, nor is XGrammar on Snowplow.
PUBLISHED: dict[str, dict[str, tuple[float, float] | None]] = {
    "Glaiveai2K": {"Guidance": (0.98, 0.96), "XGrammar": (1.00, 0.93)},
    "Github_easy": {"Guidance": (0.90, 0.86), "XGrammar": (0.91, 0.79)},
    "Snowplow": {"Guidance": (0.87, 0.82), "XGrammar": None},
    "Github_medium": {"Guidance": (0.79, 0.69), "XGrammar": (0.79, 0.52)},
    "Kubernetes": {"Guidance": (0.98, 0.91), "XGrammar": (0.12, 0.07)},
    "WashingtonPost": {"Guidance": (0.86, 0.86), "XGrammar": (0.85, 0.64)},
    "Github_hard": {"Guidance": (0.60, 0.41), "XGrammar": (0.69, 0.28)},
    "JsonSchemaStore": {"Guidance": (0.35, 0.30), "XGrammar": (0.76, 0.33)},
}
COLLECTIONS = (*PUBLISHED, "Github_trivial", "Github_ultra")

PROMPT = "Write a realistic JSON document that conforms to this JSON schema. Answer with the document alone.\n\n"
SHOWN_CHARS = 500  # of a schema in its prompt: the constraint knows the rest
# Without the penalty a model of this size repeats a value until it is cut, on every second schema.
SAMPLING: dict[str, Any] = {"temperature": 0.0, "frequency_penalty": 0.3}
LOOP_TOKENS = 64


@dataclass
class Case:
    """A schema, and what became of it."""

    collection: str
    name: str
    schema: dict[str, Any]
    refusal: str | None = None
    output: RequestOutput | None = None
    invalid: str | None = None

    @property
    def prompt(self) -> list[dict[str, str]]:
        """One user turn."""
        text = json.dumps(self.schema, separators=(",", ":"))
        return [{"role": "user", "content": PROMPT + text[:SHOWN_CHARS]}]

    @property
    def is_finished(self) -> bool:
        """Whether the answer is whole."""
        return self.output is not None and self.output.finish_reason == "stop"


def main() -> int:
    """Run, print, write the JSON file; 0 when every bound holds."""
    args = read_arguments()
    cases = draw(args.schemas, args.per_collection)
    with LLM(str(smollm()), max_num_seqs=args.batch, max_model_len=4096, dtype=args.dtype) as llm:
        seconds = answer(llm, cases, args.max_tokens)
        check(cases)
        masks_us = time_masks(llm, cases)
        speed = compare_speed(llm, cases, args)
    report = {
        "machine": {
            **describe_machine(command(args.schemas)),
            "llguidance": llguidance.__version__,
        },
        "settings": {
            "model": "SmolLM2-135M-Instruct",
            "dtype": args.dtype,
            **SAMPLING,
            "loop_tokens": LOOP_TOKENS,
            "max_tokens": args.max_tokens,
            "max_num_seqs": args.batch,
        },
        "all": sum_up(cases),
        "seconds": round(seconds, 1),
        "mask_microseconds": {
            "count": len(masks_us),
            "p50": round(float(np.percentile(masks_us, 50)), 1),
            "p99": round(float(np.percentile(masks_us, 99)), 1),
            "max": round(float(max(masks_us)), 1),
        },
        "speed": speed,
        "collections": {
            name: {**sum_up(one for one in cases if one.collection == name), "published": published(name)}
            for name in COLLECTIONS
        },
        "refusals": dict(Counter(kind_of(one.refusal) for one in cases if one.refusal).most_common()),
        "invalid": [f"{one.collection}/{one.name}: {one.invalid}" for one in cases if one.invalid],
    }
    print_report(report)
    write_text(args.output, json.dumps(report, indent=2) + "\n")
    print(f"written to {args.output}")
    figures = report["all"]
    return int(
        bool(figures["invalid"]) or figures["refused_share"] > MAX_REFUSED or figures["finished_share"] < MIN_FINISHED
    )


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemas", type=Path, help="the folder with the ten collections")
    parser.add_argument("--per-collection", type=int, default=60)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32, help="max_num_seqs")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--speed-requests", type=int, default=48, help="requests of the comparison with unguided ones")
    parser.add_argument("--speed-repeats", type=int, default=3)
    add_output(parser, "json-schema-bench.json")
    return parser.parse_args()


def command(schemas: Path) -> str:
    """What was run, without the path of this machine."""
    words = ["DIRECTORY" if word == str(schemas) else word for word in sys.argv[1:]]
    return " ".join(["python -m benchmarks.json_schema_bench", *words])


def draw(folder: Path, per_collection: int) -> list[Case]:
    """The same schemas each time, equally many of each collection."""
    cases: list[Case] = []
    for collection in COLLECTIONS:
        files = sorted((folder / collection).glob("*.json"))
        if not files:
            sys.exit(f"{folder / collection} holds no schemas.\n{__doc__}")
        random.Random(0).shuffle(files)
        cases += [Case(collection, file.stem, json.loads(file.read_text())) for file in files[:per_collection]]
    random.Random(0).shuffle(cases)  # so that long answers of one collection do not end up alone
    return cases


def answer(llm: LLM, cases: list[Case], max_tokens: int) -> float:
    """Put every schema to the engine; returns the seconds that the answers took."""
    waiting: dict[str, Case] = {}
    for case in cases:
        try:
            waiting[llm.add_request(case.prompt, guided(case, max_tokens))] = case
        except (UnsupportedConstraint, ValidationError) as error:  # anything else is a fault of the engine
            case.refusal = reason_of(error)
    started = time.perf_counter()
    done = 0
    while llm.has_unfinished():
        for step in llm.step():
            if step.failure is not None:
                waiting[step.request_id].refusal = reason_of(step.failure)
            elif step.finished is not None:
                waiting[step.request_id].output = step.finished
                done += 1
                if done % 25 == 0:
                    print(f"{done} of {len(waiting)} after {time.perf_counter() - started:.0f} s", flush=True)
    return time.perf_counter() - started


def guided(case: Case, max_tokens: int) -> SamplingParams:
    """An answer under the constraint."""
    return SamplingParams(**SAMPLING, max_tokens=max_tokens, loop_tokens=LOOP_TOKENS, json_schema=case.schema)


def reason_of(error: Exception) -> str:
    """The message alone."""
    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"])
    return str(error)


def kind_of(refusal: str) -> str:
    """What refusals have in common: the keyword, not the place."""
    return refusal.removeprefix("Value error, ").removeprefix("json_schema: ").split(": json-schema:")[0][:70]


def check(cases: list[Case]) -> None:
    """Note which finished answers are invalid under their schemas."""
    for case in cases:
        if case.output is None or not case.is_finished:
            continue
        kind = jsonschema.validators.validator_for(case.schema, default=jsonschema.Draft202012Validator)
        try:
            kind(case.schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(case.output.text))
        except ValueError as error:
            case.invalid = f"no JSON: {error}"
        except jsonschema.ValidationError as error:
            case.invalid = f"{error.message[:120]} at {error.json_path}"


def time_masks(llm: LLM, cases: list[Case]) -> list[float]:
    """Microseconds of the mask before each token of the answers, forced or not, computed with nothing beside it."""
    words = -(-llm.model_runner.model.config.vocab_size // 32)
    mask = torch.zeros(words, dtype=torch.int32)
    times: list[float] = []
    for case in cases:
        if case.output is None:
            continue
        constraint = SamplingParams(json_schema=case.schema).constraint
        assert constraint is not None
        matcher = llm.input_processor.grammars.matcher(constraint)
        for token in case.output.token_ids:
            if matcher.is_stopped():
                break
            started = time.perf_counter()
            matcher.unsafe_compute_mask_ptr(mask.data_ptr(), 4 * words)
            times.append((time.perf_counter() - started) * 1e6)
            matcher.consume_token(token)
    return times


def compare_speed(llm: LLM, cases: list[Case], args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second with the constraint and without, for equally many tokens of the same prompts, in turns."""
    chosen = [one for one in cases if one.is_finished][: args.speed_requests]
    bound = [guided(one, args.max_tokens) for one in chosen]
    free = [SamplingParams(**SAMPLING, max_tokens=len(one.output.token_ids), ignore_eos=True) for one in chosen]
    rates: dict[str, list[float]] = {"guided": [], "unguided": []}
    steps: dict[str, int] = {}
    for _ in range(args.speed_repeats):
        for name, params in (("guided", bound), ("unguided", free)):
            before, started = llm.stats().steps, time.perf_counter()
            outputs = llm.generate([one.prompt for one in chosen], params, use_tqdm=False)
            seconds = time.perf_counter() - started
            steps[name] = llm.stats().steps - before
            rates[name].append(sum(len(output.token_ids) for output in outputs) / seconds)
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    return {
        "requests": len(chosen),
        "tokens_per_second": medians,
        "of_each_repeat": {name: [round(value, 1) for value in values] for name, values in rates.items()},
        "steps": steps,
        "guided_over_unguided": round(medians["guided"] / medians["unguided"], 2) if medians["unguided"] else None,
    }


def sum_up(cases: Iterable[Case]) -> dict[str, Any]:
    """Counts and shares of some cases."""
    some = list(cases)
    refused = sum(one.refusal is not None for one in some)
    finished = sum(one.is_finished for one in some)
    return {
        "schemas": len(some),
        "refused": refused,
        "refused_share": round(refused / len(some), 3),
        "finished": finished,
        "finished_share": round(finished / len(some), 3),
        "cut": dict(Counter(one.output.finish_reason for one in some if one.output and not one.is_finished)),
        "invalid": sum(one.invalid is not None for one in some),
    }


def published(collection: str) -> dict[str, Any] | None:
    """What the paper says of the collection: refused share, and share answered validly."""
    figures = PUBLISHED.get(collection)
    if figures is None:
        return None
    return {
        name: {"refused_share": round(1 - pair[0], 2), "valid_share": pair[1]} if pair else None
        for name, pair in figures.items()
    }


def print_report(report: dict[str, Any]) -> None:
    """The figures for people."""
    print(f"\n{'':<18}{'schemas':>8}{'refused':>9}{'finished':>10}{'invalid':>9}   refused by Guidance / XGrammar")
    for name, one in {**report["collections"], "all": report["all"]}.items():
        paper = one.get("published") or {}
        theirs = " / ".join(
            f"{paper[engine]['refused_share']:.0%}" if paper.get(engine) else "–" for engine in ("Guidance", "XGrammar")
        )
        print(
            f"{name:<18}{one['schemas']:>8}{one['refused_share']:>9.1%}{one['finished_share']:>10.1%}"
            f"{one['invalid']:>9}   {theirs}"
        )
    masks, speed = report["mask_microseconds"], report["speed"]
    print(f"mask: p50 {masks['p50']} µs, p99 {masks['p99']} µs, longest {masks['max']} µs, of {masks['count']}")
    print(f"tokens a second: {speed['tokens_per_second']}, ratio {speed['guided_over_unguided']}")
    for line in report["invalid"]:
        print(f"invalid: {line}")


if __name__ == "__main__":
    sys.exit(main())
