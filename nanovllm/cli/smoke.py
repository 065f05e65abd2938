"""``nanovllm smoke``: one job with a known picture through the workers, as `helm test` sends it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated
from uuid import uuid4

import typer

from nanovllm.cli.jobs import BrokersOption, ConfigOption, JsonOption, client_settings
from nanovllm.client.producer import JobImage, JobProducer
from nanovllm.client.results import Outcome
from nanovllm.errors import AnswersMissing
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.result import Result
from nanovllm.settings.worker import Settings
from nanovllm.terminal import long_work, plain, print_json

PICTURE = Path(__file__).with_name("golden_receipt.png")
"""A drawn receipt with the total 61.85."""
PROMPT = "What is the total? <|image|>"


def smoke(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text; <|image|> marks the picture's place.")] = PROMPT,
    image: Annotated[
        str | None, typer.Option(help="A file or s3:// URI; unset: a drawn receipt with the total 61.85.")
    ] = None,
    expect: Annotated[
        str | None, typer.Option(help="Text that the answer must contain; unset: any answer will do.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds to wait: the start of a worker too, where none runs.")
    ] = 300.0,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    bootstrap_servers: BrokersOption = None,
) -> None:
    """Send one job under an id of its own, wait for its result, and say what came; exit code 1 without an answer.

    The job, its result and its figures stay in their topics like any other's.
    """
    settings = client_settings(config, bootstrap_servers)
    job_id, began = f"smoke-{uuid4().hex}", time.monotonic()
    with long_work(f"waiting for the result of {job_id}"):
        outcome = asyncio.run(_answer(settings, job_id, prompt, image or PICTURE, timeout))
    is_right = isinstance(outcome, Result) and (expect is None or expect in outcome.text)
    if as_json:
        print_json({"passed": is_right, "outcome": outcome.model_dump(mode="json", exclude_none=True)})
    else:
        topics = settings.topics
        print(f"job {job_id} went to {topics.jobs} and was answered after {time.monotonic() - began:.1f} s")
        print(_described(outcome))
        if isinstance(outcome, Result) and not is_right:
            print(plain(f"it does not contain {expect!r}").plain)
        where = topics.results if isinstance(outcome, Result) else topics.dead_letters
        print(f"left behind: the job in {topics.jobs}, its outcome in {where}; nothing is removed")
    raise typer.Exit(0 if is_right else 1)


def _described(outcome: Outcome) -> str:
    if isinstance(outcome, DeadLetter):
        return plain(f"dead letter {outcome.code}: {outcome.message}").plain
    assert isinstance(outcome, Result)  # records of documents are not read here
    return plain(f"result of {outcome.worker}, model {outcome.model.id}: {outcome.text}").plain


async def _answer(settings: Settings, job_id: str, prompt: str, image: JobImage, timeout_s: float) -> Outcome:
    async with JobProducer(settings.kafka, topic=settings.topics.jobs, results=settings.topics) as producer:
        await producer.send(prompt, images=image, job_id=job_id, metadata={"sent_by": "nanovllm smoke"})
        try:
            return await producer.result(job_id, timeout_s=timeout_s)
        except TimeoutError:
            raise AnswersMissing(
                f"job {job_id} in {settings.topics.jobs} has no result in {settings.topics.results} after "
                f"{timeout_s:g} s. Look whether a worker of group {settings.kafka.group_id} runs and is ready: "
                "`nanovllm status`, and its /readyz says what it waits for"
            ) from None
