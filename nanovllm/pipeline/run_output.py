"""The output of a run: results and dead letters as files of JSON lines, and which jobs are in them already."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from nanovllm.errors import InvalidInput, InvalidJob, SystemicError
from nanovllm.messages.codec import decode_fields, decode_job, job_of_fields
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.encoding import encode
from nanovllm.messages.job import Job, derive_job_id
from nanovllm.messages.openai_batch import answer_line, error_line, is_request, job_of_request, request_id_in
from nanovllm.messages.result import Result
from nanovllm.messages.sent_job_id import valid_job_id
from nanovllm.pipeline.local_images import LocalImages
from nanovllm.sinks.jsonl import JsonLinesSink

logger = logging.getLogger(__name__)


class RunOutput:
    """Appends results to ``results`` and dead letters to ``dead_letters``. A context manager.

    Requests of OpenAI's batch files (``decode`` has seen them) are answered in that form; one without an answer has a
    line in both files. ``local_images`` reads those that a line names. ``finished``: the ids of the jobs that
    have ended, in earlier runs too. The first result of a model that no earlier run's are of is warned of.

    Raises:
        InvalidInput: a file cannot be written, another run writes it, or it has lines that are no outcomes.
    """

    def __init__(self, results: Path, dead_letters: Path, local_images: LocalImages | None = None) -> None:
        self._local_images = local_images
        self._results, self._dead_letters = JsonLinesSink(results), JsonLinesSink(dead_letters)
        self._request_ids: set[str] = set()
        self._models: set[str] = set()
        self.finished: set[str] = set()
        self.results = 0
        self.dead_letters = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._results)
            # A run without dead letters makes no file of them.
            if self._dead_letters.path.exists():
                stack.enter_context(self._dead_letters)
            for fields in _objects(self._results):
                if fields.get("error") is None:
                    self.results += 1
                    self.finished.add(_id_in(fields, self._results.path))
                    self._models |= _model_in(fields)
            for fields in _objects(self._dead_letters) if self._dead_letters.is_open else ():
                self.dead_letters += 1
                self.finished.add(_finished_by(fields, self._dead_letters.path))
            self._files = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def decode(self, line: bytes, *, max_bytes: int | None = None) -> Job:
        """The job of a line, which is a job or a request. Raises InvalidJob where it is neither."""
        may_be_more = b'"custom_id"' in line or self._local_images is not None
        if not may_be_more or (max_bytes is not None and len(line) > max_bytes):
            return decode_job(line, max_bytes=max_bytes)
        try:
            fields = decode_fields(line)
        except InvalidJob:
            return decode_job(line)  # it says whose line it is
        if not is_request(fields):
            return job_of_fields(self._with_images(fields, valid_job_id(fields.get("job_id"))))
        if (request_id := request_id_in(fields)) is not None:
            self._request_ids.add(request_id)
        if isinstance(fields.get("body"), dict):
            fields = fields | {"body": self._with_images(fields["body"], request_id)}
        return job_of_request(fields)

    def _with_images(self, fields: dict[str, Any], job_id: str | None) -> dict[str, Any]:
        if self._local_images is None:
            return fields
        try:
            return self._local_images.insert(fields)
        except InvalidJob as error:
            error.job_id = job_id
            raise

    def add_result(self, value: bytes) -> None:
        """Append an encoded result. Raises SystemicError where the file takes no more."""
        result = Result.model_validate_json(value)
        if self._models and result.model.id not in self._models:
            others = ", ".join(sorted(self._models))
            logger.warning("%s has results of %s, and gets those of %s", self._results.path, others, result.model.id)
        self._models.add(result.model.id)
        is_answer = result.job_id in self._request_ids
        _append(self._results, _encoded(answer_line(result)) if is_answer else value)
        self.results += 1

    def add_dead_letter(self, letter: DeadLetter, line: bytes) -> None:
        """Append the dead letter of a line. Raises SystemicError where the file takes no more."""
        if (request := _request_in(line)) is not None:
            _append(self._results, _encoded(error_line(letter, request)))
        if not self._dead_letters.is_open:
            self._files.enter_context(self._dead_letters)
        _append(self._dead_letters, encode(letter, "json"))
        self.dead_letters += 1


def _request_in(line: bytes) -> dict[str, Any] | None:
    """The fields of a line that is a request, however wrong; None for a job, and what is no object."""
    try:
        fields = decode_fields(line) if b'"custom_id"' in line else {}
    except InvalidJob:
        return None
    return fields if is_request(fields) else None


def _objects(sink: JsonLinesSink) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(sink.lines(), start=1):
        try:
            fields = json.loads(line)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise InvalidInput(f"{sink.path}, line {number}: is no outcome of a job; name another file")
        yield fields


def _id_in(fields: dict[str, Any], path: Path) -> str:
    found = fields.get("custom_id", fields.get("job_id"))
    if not isinstance(found, str):
        raise InvalidInput(f"{path} has lines that are no outcomes of jobs; name another file")
    return found


def _model_in(fields: dict[str, Any]) -> set[str]:
    """The id of the model that gave a result or the answer to a request; empty where the line names none."""
    match fields:
        case {"model": {"id": str(name)}} | {"response": {"body": {"model": str(name)}}}:
            return {name}
    return set()


def _finished_by(letter: dict[str, Any], path: Path) -> str:
    """The id of a dead letter's job; of a line that was no job its position, whatever id it gave itself."""
    source = letter.get("source")
    if letter.get("stage") == "receive" and isinstance(source, dict):
        return derive_job_id(source.get("topic", ""), source.get("partition", 0), source.get("offset", 0))
    return _id_in(letter, path)


def _append(sink: JsonLinesSink, line: bytes) -> None:
    try:
        sink.append(line)
    except OSError as error:
        raise SystemicError(f"{sink.path} cannot be written: {error.strerror}") from error


def _encoded(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()
