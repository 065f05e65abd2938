"""``nanovllm dlq``: dead letters, listed, shown with their reasons, and replayed."""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from typing import Annotated, TypeVar, get_args

import typer

from nanovllm.cli.flags import Application
from nanovllm.cli.jobs import BrokersOption, ConfigOption, JsonOption, client_settings
from nanovllm.client.dead_letters import DeadLetterRecord, LetterFilter, read_dead_letters
from nanovllm.client.replay import Replay, replay
from nanovllm.errors import InvalidInput, errors_of_dead_letters
from nanovllm.messages.dead_letter import DeadLetterClass, Stage
from nanovllm.settings.worker import Settings
from nanovllm.terminal import Cell, long_work, plain, print_json, print_table

dlq_app = Application(no_args_is_help=True, help="Dead letters: list, show and replay them.")

T = TypeVar("T")
COLUMNS = (
    *("place", "failed_at", "class", "code", "stage", "retryable", "attempts", "replays"),
    *("job_id", "inputs", "message"),
)
"""What `dlq list --json` tells of each dead letter; a table for people has ``SHORT_COLUMNS``."""
SHORT_COLUMNS = ("which", "code", "when", "why")
_CLASSES, _STAGES = get_args(DeadLetterClass), get_args(Stage)
_AGO = re.compile(r"(\d+)([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

CodeOption = Annotated[list[str] | None, typer.Option("--code", help="With this code; may be repeated.")]
ClassOption = Annotated[list[str] | None, typer.Option("--class", help=f"Of this class: {', '.join(_CLASSES)}.")]
StageOption = Annotated[list[str] | None, typer.Option("--stage", help=f"Failed in: {', '.join(_STAGES)}.")]
JobIdOption = Annotated[list[str] | None, typer.Option("--job-id", help="Of this job.")]
SinceOption = Annotated[
    str | None, typer.Option(help="Failed at this time or later: RFC 3339, or how long ago (90s, 15m, 2h, 1d).")
]
UntilOption = Annotated[str | None, typer.Option(help="Failed before this time.")]
RetryableOption = Annotated[bool, typer.Option("--retryable", help="Only what can succeed when sent again.")]


@dlq_app.command("list")
def dlq_list(
    code: CodeOption = None,
    error_class: ClassOption = None,
    stage: StageOption = None,
    job_id: JobIdOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    retryable: RetryableOption = False,
    count: Annotated[bool, typer.Option("--count", help="How many of each class, code and stage.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    bootstrap_servers: BrokersOption = None,
) -> None:
    """List dead letters, the oldest first: which job, the code, when it failed, and why.

    `dlq show` tells the rest of one, and takes what stands under `which`; --json tells more of all.
    """
    wanted = _filter(code, error_class, stage, job_id, since, until, retryable)
    letters = _collect(client_settings(config, bootstrap_servers), wanted)
    _tell_if_none(letters)
    if count:
        kinds = Counter((one.letter.error_class, one.letter.code, one.letter.stage) for one in letters)
        rows = [(*kind, number) for kind, number in kinds.most_common()]
        print_table(("class", "code", "stage", "count"), rows, as_json=as_json)
        return
    if as_json:
        print_table(COLUMNS, map(_row, letters), as_json=True)
    else:
        print_table(SHORT_COLUMNS, map(_short_row, letters), as_json=False)


@dlq_app.command("show")
def dlq_show(
    which: Annotated[str, typer.Argument(help="A job's id, or a place (partition:offset) from the list.")],
    value: Annotated[bool, typer.Option("--value", help="Write the original message itself, byte for byte.")] = False,
    config: ConfigOption = None,
    bootstrap_servers: BrokersOption = None,
) -> None:
    """Show all that is known of one job's dead letters, as JSON; of the message its size, until --value asks for it."""
    settings = client_settings(config, bootstrap_servers)
    letters = _collect(settings, LetterFilter(job_ids=frozenset({which})))
    letters = letters or _collect(settings, LetterFilter(positions=frozenset({which})))
    if not letters:
        raise InvalidInput(f"no dead letter has the job id or the place {plain(which).plain}")
    if value:
        sys.stdout.buffer.write(letters[-1].value or b"")
        return
    for record in letters:
        print_json(_details(record))


@dlq_app.command("replay")
def dlq_replay(
    code: CodeOption = None,
    error_class: ClassOption = None,
    stage: StageOption = None,
    job_id: JobIdOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    retryable: RetryableOption = False,
    everything: Annotated[bool, typer.Option("--all", help="Without a filter: really all of them.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also what was replayed before.")] = False,
    rate: Annotated[float, typer.Option(min=0.001, help="Most messages a second.")] = 50.0,
    topic: Annotated[
        list[str] | None,
        typer.Option("--topic", help="Topics that may be sent to; those that workers of these settings read if unset."),
    ] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    bootstrap_servers: BrokersOption = None,
) -> None:
    """Send the original messages, each once, to the topic that they came from: the same bytes, key and headers."""
    wanted = _filter(code, error_class, stage, job_id, since, until, retryable)
    if wanted == LetterFilter() and not everything:
        raise InvalidInput("name what is to be sent again (--code, --since, --retryable, …), or --all")
    settings = client_settings(config, bootstrap_servers)
    topics = topic or settings.consumed_topics
    letters = read_dead_letters(settings, wanted)
    with long_work("replaying dead letters"):
        replays = asyncio.run(_all(replay(settings, topics, letters, per_second=rate, send=not dry_run, again=again)))
    _tell_if_none(replays)
    rows = [_replay_row(one) for one in replays]
    print_table(("place", "job_id", "inputs", "state", "reason"), rows, as_json=as_json)


def _tell_if_none(found: Sequence[object]) -> None:
    if not found:
        print("nanovllm: no dead letter is such a one", file=sys.stderr)


def _collect(settings: Settings, wanted: LetterFilter) -> list[DeadLetterRecord]:
    letters = asyncio.run(_all(read_dead_letters(settings, wanted)))
    return sorted(letters, key=lambda record: record.letter.failed_at)


async def _all(items: AsyncIterator[T]) -> list[T]:
    return [item async for item in items]


def _filter(
    codes: list[str] | None,
    classes: list[str] | None,
    stages: list[str] | None,
    job_ids: list[str] | None,
    since: str | None,
    until: str | None,
    only_retryable: bool,
) -> LetterFilter:
    for option, given, known in (("--class", classes, _CLASSES), ("--stage", stages, _STAGES)):
        if unknown := set(given or ()) - set(known):
            raise InvalidInput(f"{option} {plain(min(unknown)).plain} is none of {', '.join(known)}")
    known_codes = {error.code for error in errors_of_dead_letters()}
    if unknown := set(codes or ()) - known_codes:
        code = min(unknown)
        near = ", ".join(get_close_matches(code, known_codes, cutoff=0.0))
        raise InvalidInput(f"--code {plain(code).plain} is none of the codes in docs/dead-letters.md; nearest: {near}")
    return LetterFilter(
        codes=frozenset(codes or ()),
        classes=frozenset(classes or ()),
        stages=frozenset(stages or ()),
        job_ids=frozenset(job_ids or ()),
        since=_time("--since", since),
        until=_time("--until", until),
        only_retryable=only_retryable,
    )


def _time(option: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    if ago := _AGO.fullmatch(text):
        return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
    try:
        time = datetime.fromisoformat(text.upper())
    except ValueError:
        raise InvalidInput(f"{option} {plain(text).plain} is neither an RFC 3339 time nor a span like 15m") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _short_row(record: DeadLetterRecord) -> tuple[Cell, ...]:
    letter = record.letter
    when = letter.failed_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return letter.job_id or record.position, letter.code, when, letter.message


def _row(record: DeadLetterRecord) -> tuple[Cell, ...]:
    letter = record.letter
    return (
        record.position,
        letter.failed_at.isoformat(timespec="seconds"),
        letter.error_class,
        letter.code,
        letter.stage,
        letter.retryable,
        letter.attempts,
        letter.replays or 0,
        letter.job_id or "",
        list(record.inputs),
        letter.message,
    )


def _replay_row(one: Replay) -> tuple[str, ...]:
    from nanovllm.cli.tables import few

    letter = one.entry.letter
    return one.entry.position, letter.job_id or "", few(one.entry.inputs), one.state, one.reason


def _details(record: DeadLetterRecord) -> dict[str, object]:
    envelope = record.letter.model_dump(mode="json", exclude_none=True)
    return envelope | {
        "place": record.position,
        "inputs": record.inputs,
        "key": None if record.key is None else record.key.decode(errors="backslashreplace"),
        # Their values may be secrets that an operator has chosen to keep.
        "headers": [name for name, _ in record.headers],
        "value_bytes": None if record.value is None else len(record.value),
        "value_is_cut": record.cut_sha256 is not None,
    }
