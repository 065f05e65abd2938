"""``nanovllm ask``: one question, about a picture or several, answered at once."""

from __future__ import annotations

import sys
from pathlib import Path, PurePath
from typing import Annotated

import typer

from nanovllm.cli.jobs import ConfigOption, JsonOption
from nanovllm.cli.run import ModelOption, engine_settings, require_engine
from nanovllm.cli.sources import IMAGE_SUFFIXES, check_file, check_http_uri, check_object_uri, hint_at_placeholder
from nanovllm.errors import InvalidInput, SystemicError
from nanovllm.messages.codec import encode_job
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.http_uri import is_http_uri
from nanovllm.messages.job import IMAGE_PLACEHOLDER, ImageRef, Job, image_name
from nanovllm.messages.result import Result
from nanovllm.messages.s3_uri import is_object_uri
from nanovllm.settings.http_images import HttpImageSettings
from nanovllm.terminal import long_work, plain, print_json


def ask(
    words: Annotated[
        list[str],
        typer.Argument(
            help="Pictures (files, s3:// or https:// URIs), then the question.", metavar="[IMAGE]… QUESTION"
        ),
    ],
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of the answer.")] = None,
    model: ModelOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Answer one question on this machine: nanovllm ask receipt.png 'What is the total?'"""
    *images, question = words
    if _is_picture(question):
        raise InvalidInput(f"the question is missing: nanovllm ask {plain(question).plain} 'What is the total?'")
    if IMAGE_PLACEHOLDER not in question:
        hint_at_placeholder(question)
        question = " ".join([question, *[IMAGE_PLACEHOLDER] * len(images)])
    settings = engine_settings(config, model)
    job = Job(
        job_id="ask",
        prompt=question,
        images=tuple(_image(image, settings.http_images) for image in images),
        sampling={} if max_tokens is None else {"max_tokens": max_tokens},
    )
    require_engine(settings)
    from nanovllm.pipeline.consuming.line_source import FinishedJobs, LineSource
    from nanovllm.pipeline.run import run_lines
    from nanovllm.sinks.outcomes import OutcomeSink

    line = encode_job(job)
    # The picture came from this machine, not in a message.
    admission = settings.admission.model_copy(update={"max_job_bytes": len(line)})
    results: list[bytes] = []
    refused: list[DeadLetter] = []
    with long_work("answering"):
        run_lines(
            settings.model_copy(update={"admission": admission}),
            LineSource([(0, line)], FinishedJobs("ask")),
            OutcomeSink(settings.topics, results.append, lambda letter, _: refused.append(letter)),
        )
    if refused:
        letter = refused[0]
        print(f"nanovllm: {letter.code}: {plain(letter.message).plain}", file=sys.stderr)
        raise typer.Exit(2 if letter.error_class == "invalid" else 1)
    if not results:
        raise SystemicError("stopped before the answer")
    result = Result.model_validate_json(results[0])
    if as_json:
        print_json(result.model_dump(mode="json", exclude_none=True))
        return
    for line_of_text in result.text.split("\n"):
        print(plain(line_of_text).plain)


def _is_picture(word: str) -> bool:
    has_suffix = PurePath(word).suffix.lower() in IMAGE_SUFFIXES
    return is_object_uri(word) or is_http_uri(word) or (has_suffix and (len(word.split()) == 1 or Path(word).exists()))


def _image(source: str, http: HttpImageSettings) -> ImageRef:
    if is_http_uri(source):
        check_http_uri(source, http)
        return ImageRef(uri=source)
    if "://" in source:
        check_object_uri(source)
        return ImageRef(uri=source)
    try:
        check_file(Path(source))
        return ImageRef(data=Path(source).read_bytes(), name=image_name(source))
    except OSError as error:
        raise InvalidInput(f"the picture {source} cannot be read: {error.strerror or type(error).__name__}") from None
