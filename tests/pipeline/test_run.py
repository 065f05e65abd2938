"""``nanovllm run`` and ``ask``: a worker's stages between files, and runs that are stopped, killed and gone on with."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from parts import S3Part, eventually, png

from nanovllm.demo.child_process import LocalProcess
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import InvalidInput
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.result import Result, result_id_for
from nanovllm.metrics import Metrics
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.pipeline.build import Parts, build_decoders, build_worker
from nanovllm.pipeline.consuming.line_source import FinishedJobs, LineSource, read_lines
from nanovllm.pipeline.failure.backoff import Backoff
from nanovllm.pipeline.local_images import LocalImages
from nanovllm.pipeline.operations.health import Health
from nanovllm.pipeline.run import without_kafka
from nanovllm.pipeline.run_output import RunOutput
from nanovllm.settings.loading import load_settings
from nanovllm.sinks.jsonl import JsonLinesSink
from nanovllm.sinks.outcomes import OutcomeSink

PROGRAM = Path(__file__).with_name("run_program.py")


def write_lines(path: Path, *lines: Mapping[str, Any] | str) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def read_objects(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Run:
    """A run in this process, in a directory of its own, with an engine that echoes."""

    def __init__(self, directory: Path, local_images: LocalImages | None = None, **settings: Any) -> None:
        self.local_images = local_images
        self.input = directory / "jobs.jsonl"
        self.results, self.dead_letters = directory / "results.jsonl", directory / "dead-letters.jsonl"
        self.settings = without_kafka(load_settings(None, settings))

    async def __call__(self, *lines: Mapping[str, Any] | str, **engine: Any) -> None:
        if lines:
            write_lines(self.input, *lines)
        echo = EchoEngine(max_num_seqs=4, **engine)
        decoders = build_decoders(self.settings, echo)
        assert decoders is not None
        with RunOutput(self.results, self.dead_letters, self.local_images) as output:
            finished = FinishedJobs("jobs.jsonl", frozenset(output.finished))
            limit = self.settings.admission.max_job_bytes
            self.left = finished.left(read_lines(self.input, limit))
            source = LineSource(read_lines(self.input, limit), finished)
            worker = build_worker(
                self.settings,
                Parts(echo, decoders, ObjectFetcher(self.settings.s3, max_bytes=self.settings.images.max_bytes)),
                OutcomeSink(self.settings.topics, output.add_result, output.add_dead_letter),
                Metrics(),
                Health(),
                routes=None,
                backoff=Backoff(base_s=0.01, cap_s=0.05),
                decode=output.decode,
            )
            await decoders.start()
            try:
                await worker.run(source, exit_when_drained=True)
            finally:
                await decoders.close()
        assert await source.is_drained()

    def answers(self) -> dict[str, Result]:
        results = [Result.model_validate(fields) for fields in read_objects(self.results)]
        assert len({one.job_id for one in results}) == len(results)
        return {one.job_id: one for one in results}

    def letters(self) -> dict[str | None, DeadLetter]:
        return {letter.job_id: letter for letter in map(DeadLetter.model_validate, read_objects(self.dead_letters))}


async def test_each_line_becomes_a_result_or_a_dead_letter(tmp_path: Path) -> None:
    run = Run(tmp_path)
    await run(
        {"job_id": "a", "prompt": "first", "metadata": {"row": 1}},
        "",
        {"prompt": "without an id"},
        {"job_id": "c", "prompt": 3},
        "no JSON",
        {"job_id": "d", "prompt": "See <|image|>", "images": ["s3://bucket/a.png"]},
        {"job_id": "a", "prompt": "again"},
    )
    answers = run.answers()
    assert {job_id: one.text for job_id, one in answers.items()} == {"a": "first", "jobs.jsonl:0:2": "without an id"}
    assert answers["a"].metadata == {"row": 1}
    assert answers["a"].result_id == result_id_for("a")
    letters = run.letters()
    codes = {job_id: (letter.code, letter.source.offset) for job_id, letter in letters.items()}
    assert codes == {
        "c": ("invalid_job", 3),
        "jobs.jsonl:0:4": ("invalid_job", 4),
        "d": ("forbidden_uri", 5),
        "jobs.jsonl:0:6": ("invalid_job", 6),
    }
    assert "line 1" in letters["jobs.jsonl:0:6"].message


async def test_the_routes_of_a_worker_are_none_of_a_run_s(tmp_path: Path) -> None:
    run = Run(tmp_path, documents={"routes": str(tmp_path / "no-such-routes.yaml")})
    await run({"job_id": "a", "prompt": "p"})
    assert [line["job_id"] for line in read_objects(run.results)] == ["a"]


async def test_a_run_that_is_repeated_computes_nothing_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    lines: list[Mapping[str, Any] | str] = [{"job_id": "a", "prompt": "one"}, {"prompt": "two"}, "no JSON", {"x": 1}]
    await run(*lines)
    before = run.results.read_bytes(), run.dead_letters.read_bytes()
    await run(*lines)
    assert run.left == 0
    assert (run.results.read_bytes(), run.dead_letters.read_bytes()) == before
    await run(*lines, {"job_id": "b", "prompt": "new"})
    assert run.left == 1
    assert run.answers().keys() == {"a", "jobs.jsonl:0:1", "b"}


async def test_an_output_that_gets_results_of_another_model_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    await run({"job_id": "a", "prompt": "one"})
    (line,) = read_objects(run.results)
    line["model"]["id"] = "other"
    run.results.write_text(json.dumps(line) + "\n")
    await run({"job_id": "a", "prompt": "one"}, {"job_id": "b", "prompt": "two"}, {"job_id": "c", "prompt": "three"})
    said = [record.getMessage() for record in caplog.records if "results of" in record.getMessage()]
    assert said == [f"{run.results} has results of other, and gets those of echo"]


async def test_whatever_a_line_holds_it_has_one_outcome(tmp_path: Path) -> None:
    lines = [
        b"\x82\xa6prompt\xa1a",
        b'{"custom_id": "\xff", "body": {}}',
        b'{"custom_id": {}, "body": {}}',
        b'{"custom_id": "r-1", "body": []}',
        b'{"custom_id": "r-2", "custom_id": "r-3"}',
        b'{"custom_id": "r-4", "body": ' + b"[" * 5_000,
        b'{"job_id": 1, "prompt": "a"}',
        b'{"job_id": "", "prompt": "a"}',
        b'{"job_id": "\\ud800", "prompt": "a"}',
        b'{"prompt": 1' + b"0" * 5_000 + b"}",
        b"[" * 100_000,
        b"{}",
        b"null",
        "\u2028".encode(),
    ]
    run = Run(tmp_path)
    run.input.write_bytes(b"\n".join(lines))
    await run()
    outcomes = [*read_objects(run.dead_letters)]
    assert sorted(letter["source"]["offset"] for letter in outcomes) == list(range(len(lines)))
    await run()
    assert run.left == 0


async def test_half_a_line_that_a_killed_run_left_is_computed_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    await run({"job_id": "a", "prompt": "one"}, {"job_id": "b", "prompt": "two"})
    run.results.write_bytes(run.results.read_bytes()[:-20])
    await run({"job_id": "a", "prompt": "one"}, {"job_id": "b", "prompt": "two"})
    assert run.answers().keys() == {"a", "b"}


async def test_images_are_fetched_and_limited_as_in_a_worker(tmp_path: Path, s3: S3Part) -> None:
    bucket = s3.make_bucket()
    uri, secret = s3.put(bucket, "in/a.png", png((1, 2, 3))), s3.put(bucket, "out/b.png", png((1, 2, 3)))
    run = Run(
        tmp_path,
        s3={"endpoint_url": s3.endpoint_url, "addressing_style": "path", "allow": [f"s3://{bucket}/in/*"]},
        images={"max_bytes": 1_000},
    )
    inside = {"data": base64.b64encode(png((9, 9, 9))).decode()}
    too_large = {"data": base64.b64encode(bytes(2_000)).decode()}
    images = {"a": uri, "b": secret, "c": inside, "d": too_large, "e": f"s3://{bucket}/in/none.png"}
    await run(*({"job_id": name, "prompt": "See <|image|>", "images": [image]} for name, image in images.items()))
    answers = run.answers()
    assert answers.keys() == {"a", "c"}
    assert (answers["a"].inputs[0].uri, answers["a"].inputs[0].width) == (uri, 64)
    codes = {job_id: letter.code for job_id, letter in run.letters().items()}
    assert codes == {"b": "forbidden_uri", "d": "image_too_large", "e": "object_not_found"}


async def test_local_images_are_read_below_the_folder_that_is_named_and_nowhere_else(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "in").mkdir(parents=True)
    for file in (folder / "in" / "a b.png", tmp_path / "secret.png"):
        file.write_bytes(png((1, 2, 3)))
    (folder / "large.png").write_bytes(bytes(2_000))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "pipe.png")
    inside = f"file://{folder}/in/a%20b.png"
    images: dict[str, Any] = {
        "path": "in/a b.png",
        "absolute": str(folder / "in" / "a b.png"),
        "url": inside,
        "named": {"uri": inside, "name": "invoice 7"},
        "above": "../secret.png",
        "elsewhere": f"file://{tmp_path}/secret.png",
        "link": "link.png",
        "pipe": "pipe.png",
        "folder": "in",
        "none": "none.png",
        "odd": "a\0b.png",
        "host": "file://host/in/a.png",
        "web": "https://example.com/a.png",
        "large": "large.png",
        "two": {"uri": "in/a b.png", "data": "AAAA"},
    }
    lines = [{"job_id": name, "prompt": "See <|image|>", "images": [image]} for name, image in images.items()]
    part = {"type": "image_url", "image_url": {"url": inside}}
    talk = [{"role": "user", "content": [{"type": "text", "text": "What?"}, part]}]
    away = [{"role": "user", "content": [{**part, "image_url": {"url": "file:///etc/hostname"}}]}]
    lines += [{"job_id": "talk", "messages": talk}, {"job_id": "away", "messages": away}]
    requests = [request("r-1", messages=talk), request("r-2", messages=away)]
    run = Run(tmp_path, LocalImages(folder, max_bytes=1_000, max_job_bytes=5_000), images={"max_bytes": 1_000})
    await run(*lines, *requests)
    answered = {fields.get("job_id", fields.get("custom_id")): fields for fields in read_objects(run.results)}
    assert {name for name, one in answered.items() if not one.get("error")} == {
        "path", "absolute", "url", "named", "talk", "r-1"
    }  # fmt: skip
    names = {name: answered[name]["inputs"][0].get("name") for name in ("path", "url", "named")}
    assert names == {"path": "in/a b.png", "url": inside, "named": "invoice 7"}
    letters = run.letters()
    assert (letters["large"].code, letters["web"].code) == ("image_too_large", "forbidden_uri")
    assert {letter.code for name, letter in letters.items() if name not in ("large", "web")} == {"invalid_job"}
    for name in ("above", "elsewhere", "link", "away", "r-2"):
        assert "is not below the folder of local images" in letters[name].message
    for name in ("pipe", "folder", "none"):
        assert "there is no file" in letters[name].message
    assert answered["r-2"]["error"]["code"] == "invalid_job"

    (tmp_path / "bare").mkdir()
    bare = Run(tmp_path / "bare")
    await bare(lines[0], lines[2])
    assert {letter.code for letter in bare.letters().values()} == {"invalid_job"}


async def test_the_local_images_of_a_job_are_bounded_together(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png((1, 2, 3)))
    size = (tmp_path / "a.png").stat().st_size
    run = Run(tmp_path, LocalImages(tmp_path, max_bytes=10 * size, max_job_bytes=2 * size))
    for count in (2, 3):
        await run({"job_id": str(count), "prompt": "<|image|>" * count, "images": ["a.png"] * count})
    assert run.answers().keys() == {"2"}
    assert "images.2: the local images of a job have more than" in run.letters()["3"].message
    with pytest.raises(InvalidInput, match="no such directory"):
        LocalImages(tmp_path / "a.png", max_bytes=1, max_job_bytes=1)


def request(custom_id: str, **body: Any) -> dict[str, Any]:
    asked = {"model": "any", "messages": [{"role": "user", "content": f"question {custom_id}"}]} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": asked}


async def test_requests_of_openai_batch_files_are_answered_in_their_form(tmp_path: Path) -> None:
    run = Run(tmp_path)
    picture = f"data:image/png;base64,{base64.b64encode(png((1, 2, 3))).decode()}"
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": picture}}]
    lines = [
        request("r-1"),
        request("r-2", messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]),
        request("r-3", tools=[{"type": "function"}]),
        request("r-4") | {"url": "/v1/embeddings"},
        {"job_id": "own", "prompt": "a job", "metadata": {"custom_id": "r-9"}},
    ]
    await run(*lines)
    by_id = {fields.get("custom_id", fields.get("job_id")): fields for fields in read_objects(run.results)}
    assert by_id.keys() == {"r-1", "r-2", "r-3", "r-4", "own"}
    body = by_id["r-1"]["response"]["body"]
    assert (by_id["r-1"]["error"], by_id["r-1"]["response"]["status_code"]) == (None, 200)
    assert (body["object"], body["model"]) == ("chat.completion", "echo")
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert "question r-1" in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    for custom_id, said in (("r-3", "body.tools"), ("r-4", "/v1/chat/completions")):
        assert by_id[custom_id]["response"] is None
        assert by_id[custom_id]["error"]["code"] == "invalid_job"
        assert said in by_id[custom_id]["error"]["message"]
    assert "response" not in by_id["own"]
    assert run.letters().keys() == {"r-3", "r-4"}
    await run(*lines)
    assert run.left == 0


@pytest.mark.parametrize("custom_id", [5, None, "", {"a": 1}, "x" * 600, True])
async def test_a_request_with_an_id_that_is_none_has_its_error_line(tmp_path: Path, custom_id: Any) -> None:
    run = Run(tmp_path)
    lines = [request("r-1"), request("r-2") | {"custom_id": custom_id}]
    await run(*lines)
    first, refused = sorted(read_objects(run.results), key=lambda line: line["error"] is not None)
    assert (first["custom_id"], first["error"]) == ("r-1", None)
    assert refused["custom_id"] == custom_id
    assert refused["error"]["message"].startswith("custom_id: is not a text")
    await run(*lines)
    assert run.left == 0
    assert len([*read_objects(run.results)]) == 2


async def test_messages_of_a_request_that_are_no_list_are_named(tmp_path: Path) -> None:
    run = Run(tmp_path)
    await run(request("r-2", messages="hi"))
    (line,) = read_objects(run.results)
    assert (line["custom_id"], line["error"]["message"]) == ("r-2", "messages: Input should be a list")


async def test_a_request_with_the_id_of_an_earlier_one_has_its_error_in_the_output(tmp_path: Path) -> None:
    run = Run(tmp_path)
    lines = [request("r-1"), {"job_id": "a", "prompt": "b"}, request("r-1"), {"job_id": "a", "prompt": "c"}]
    await run(*lines)
    about = [fields for fields in read_objects(run.results) if fields.get("custom_id") == "r-1"]
    errors = [fields["error"] for fields in about if fields["error"]]
    assert len(about) == 2
    assert len(errors) == 1
    assert errors[0]["message"] == "line 3 has the id of line 1: their results could not be told apart"
    assert run.letters()["r-1"].source.offset == 2
    assert run.letters()["jobs.jsonl:0:3"].message.startswith("line 4 has the id of line 2")
    await run(*lines)
    assert run.left == 0


async def test_a_duplicate_of_a_job_that_an_earlier_run_has_finished_is_refused_too(tmp_path: Path) -> None:
    run = Run(tmp_path)
    await run(request("r-1"))
    await run(request("r-1"), request("r-1"))
    assert run.left == 1
    assert run.letters()["r-1"].source.offset == 1
    assert [fields["error"] is None for fields in read_objects(run.results)] == [True, False]


async def test_an_output_that_takes_no_more_keeps_no_part_of_a_line_and_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, refused = os.write, list[int]()

    def full(file: int, data: bytes) -> int:
        if b"result_id" not in data or len(refused) > 2:
            return write(file, data)
        refused.append(write(file, data[:7]))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    run = Run(tmp_path)
    await run({"job_id": "a", "prompt": "one"})
    assert len(refused) == 3
    assert run.answers().keys() == {"a"}


def test_a_line_is_read_whatever_ends_it_and_a_long_one_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf{1}\r\n\r\n  \n" + b"x" * 50 + b"\n{2}")
    assert list(read_lines(path, 10)) == [(0, b"{1}"), (3, b"x" * 11), (4, b"{2}")]
    with pytest.raises(InvalidInput, match=r"none\.jsonl"):
        list(read_lines(tmp_path / "none.jsonl", 10))


@pytest.mark.parametrize("line", ["no JSON", "[]", "{}", '{"job_id": 3}'])
def test_a_file_that_holds_no_outcomes_is_not_written(tmp_path: Path, line: str) -> None:
    results = write_lines(tmp_path / "results.jsonl", line)
    with pytest.raises(InvalidInput, match=r"results\.jsonl"), RunOutput(results, tmp_path / "dead.jsonl"):
        pass
    assert results.read_text() == f"{line}\n"
    with JsonLinesSink(results), pytest.raises(InvalidInput, match="another process"), JsonLinesSink(results):
        pass


class Command:
    """``nanovllm run`` as a process whose engine is slow and writes down what it computes."""

    def __init__(self, directory: Path, jobs: Iterable[Mapping[str, Any]], *, delay_s: float) -> None:
        self.results, self.log = directory / "results.jsonl", directory / "computed.log"
        input = write_lines(directory / "jobs.jsonl", *jobs)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("NANOVLLM_")}
        environment |= {"NANOVLLM_ENGINE__BACKEND": "echo", "NANOVLLM_ENGINE__MAX_NUM_SEQS": "4"}
        environment |= {"NANOVLLM_IMAGES__DECODERS": "1"}
        arguments = [str(self.log), str(delay_s), "run", "-i", str(input), "-o", str(self.results)]
        command = [sys.executable, str(PROGRAM), *arguments]
        self.process = LocalProcess("run", command, directory / "run.log", env=environment)

    @property
    def lines(self) -> int:
        return self.results.read_bytes().count(b"\n") if self.results.exists() else 0

    async def ended(self) -> int | None:
        await eventually(lambda: not self.process.is_running, within_s=120, why="the run goes on")
        return self.process.exit_code


async def test_a_run_killed_halfway_and_started_again_computes_nothing_twice_beyond_what_was_in_flight(
    tmp_path: Path,
) -> None:
    command = Command(tmp_path, [{"job_id": f"r-{n}", "prompt": f"p-{n}"} for n in range(500)], delay_s=0.01)
    command.process.start()
    await eventually(lambda: command.lines >= 200, within_s=120, why=command.process.tail())
    command.process.kill()
    begun, done = len(command.log.read_text().splitlines()), command.lines
    assert done < 500
    command.process.start()
    assert await command.ended() == 0, command.process.tail()
    results = [Result.model_validate(fields) for fields in read_objects(command.results)]
    assert sorted(one.job_id for one in results) == sorted(f"r-{n}" for n in range(500))
    assert len({one.result_id for one in results}) == 500
    computed = command.log.read_text().splitlines()
    assert len(set(computed)) == 500
    assert len(computed) - 500 <= begun - done <= 8, "only what was in the engine was computed twice"
    assert "500 results" in command.process.tail()


async def test_a_run_that_is_stopped_finishes_what_is_at_work_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = Command(tmp_path, [{"prompt": f"p-{n}"} for n in range(200)], delay_s=0.05)
    command.process.start()
    await eventually(lambda: command.lines >= 8, within_s=120, why=command.process.tail())
    assert command.process.pid is not None
    os.kill(command.process.pid, signal.SIGINT)
    assert await command.ended() == 1
    assert "the same command goes on" in command.process.tail()
    assert len(command.log.read_text().splitlines()) == command.lines < 200, "what was begun was finished"
    command.process.start()
    assert await command.ended() == 0, command.process.tail()
    assert len(command.log.read_text().splitlines()) == command.lines == 200


async def test_a_run_that_is_interrupted_before_its_engine_is_there_has_failed_and_begins_anew(tmp_path: Path) -> None:
    for delay_s, code in ((-1, 1), (0, 0)):
        command = Command(tmp_path, [{"prompt": "a"}], delay_s=delay_s)
        command.process.start()
        assert await command.ended() == code, command.process.tail()
    assert command.lines == 1


def nanovllm(*arguments: str | Path, **variables: str) -> tuple[int, str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NANOVLLM_")}

    async def run() -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "nanovllm.cli.main", *map(str, arguments)),
            env=environment | {"NANOVLLM_ENGINE__BACKEND": "echo"} | variables,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()

    return asyncio.run(run())


def test_one_picture_is_asked_about_at_once(tmp_path: Path) -> None:
    (tmp_path / "receipt.png").write_bytes(png((1, 2, 3)))
    code, out, err = nanovllm("ask", tmp_path / "receipt.png", "What is the total?")
    assert (code, out.startswith("What is the total?")) == (0, True), err
    code, out, _ = nanovllm("ask", "only text", "--json")
    assert (code, json.loads(out)["text"]) == (0, "only text")


def test_a_picture_that_is_none_is_one_line_and_misuse(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_bytes(b"no picture")
    code, out, err = nanovllm("ask", tmp_path / "notes.png", "What?")
    assert (code, out) == (2, "")
    assert "invalid_image" in err
    assert len(err.splitlines()) == 1
    for words in ((tmp_path / "none.png", "What?"), (tmp_path / "notes.png",), ("s3://bucket/notes.png",)):
        assert nanovllm("ask", *words)[0] == 2


def test_a_run_without_answers_to_all_ends_with_1_and_counts_in_json(tmp_path: Path) -> None:
    jobs = write_lines(tmp_path / "jobs.jsonl", {"prompt": "a"}, {"prompt": 1})
    code, out, _ = nanovllm("run", "-i", jobs, "-o", tmp_path / "out" / "results.jsonl", "--json")
    assert code == 1
    assert json.loads(out) == {"results": 1, "dead_letters": 1, "is_finished": True}
    assert (tmp_path / "out" / "results.dead-letters.jsonl").exists()
    for wrong in (("-i", tmp_path / "none", "-o", tmp_path / "x"), ("-i", jobs, "-o", jobs)):
        assert nanovllm("run", *wrong)[0] == 2


def test_settings_that_cannot_work_are_found_before_a_model_is_loaded(tmp_path: Path) -> None:
    jobs = write_lines(tmp_path / "jobs.jsonl", {"prompt": "a"})
    wrong = {"NANOVLLM_ENGINE__BACKEND": "native", "NANOVLLM_IMAGES__FORMATS": '["PNGG"]'}
    code, _, err = nanovllm("run", "-i", jobs, "-o", tmp_path / "r.jsonl", **wrong, NANOVLLM_ENGINE__MODEL="none")
    assert (code, "images.formats" in err, len(err.splitlines())) == (2, True, 1), err


def test_without_work_that_is_left_no_model_is_loaded(tmp_path: Path) -> None:
    jobs, results = write_lines(tmp_path / "jobs.jsonl", {"prompt": "a"}), tmp_path / "results.jsonl"
    run = ("run", "-i", jobs, "-o", results)
    without_model = {"NANOVLLM_ENGINE__BACKEND": "native", "NANOVLLM_ENGINE__MODEL": "no-such-model"}
    assert nanovllm(*run, **without_model)[0] == 2
    assert not (tmp_path / "results.dead-letters.jsonl").exists()
    assert nanovllm(*run)[0] == 0
    code, _, err = nanovllm(*run, **without_model)
    assert code == 0, err
    assert "1 done, 0 left" in err
