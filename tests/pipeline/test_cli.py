from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import NewTopic
from parts import create_topic
from pydantic import ValidationError
from sample_messages import dead_letter, result

from nanovllm.cli.main import main
from nanovllm.cli.sources import plan_submissions
from nanovllm.demo import jobs as demo_jobs
from nanovllm.errors import InvalidInput, InvalidJob
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.objects.listing import ListedObject
from nanovllm.settings.http_images import HttpImageSettings
from nanovllm.sinks.cloud_events import event_record
from nanovllm.sinks.dead_letter_record import dead_letter_record
from nanovllm.terminal import long_work, plain

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def topics(embedded_broker: str, unique: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Topics of this test's own, named to the command line by its environment."""
    for name in list(os.environ):
        if name.startswith("NANOVLLM_"):
            monkeypatch.delenv(name)
    names = {name: unique(name) for name in ("jobs", "results", "metrics", "dead_letters", "events", "replayed")}
    for name, topic in names.items():
        monkeypatch.setenv(f"NANOVLLM_TOPICS__{name.upper()}", topic)
    monkeypatch.setenv("NANOVLLM_KAFKA__BOOTSTRAP_SERVERS", embedded_broker)
    monkeypatch.setenv("NANOVLLM_S3__ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("COLUMNS", "140")
    return names


def publish(broker: str, *records: OutgoingRecord) -> None:
    async def send() -> None:
        producer = AIOKafkaProducer(bootstrap_servers=broker)
        await producer.start()
        try:
            for record in records:
                await producer.send_and_wait(record.topic, record.value, key=record.key, headers=list(record.headers))
        finally:
            await producer.stop()

    asyncio.run(send())


def test_topics_are_created_once_and_shown(topics: dict[str, str], capsys: Capture) -> None:
    assert main(["topics", "create", "--partitions", "2", "--json"]) == 0
    assert {row["topic"]: row["state"] for row in json.loads(capsys.readouterr().out)} == dict.fromkeys(
        topics.values(), "created"
    )
    assert main(["topics", "create"]) == 0
    assert capsys.readouterr().out.count("exists") == 6


def test_more_copies_than_brokers_are_refused_by_the_options_name(
    topics: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    class OneBroker:
        async def create_topics(self, new: list[NewTopic]) -> SimpleNamespace:
            return SimpleNamespace(topic_errors=[(one.name, 38, "larger than available brokers: 1") for one in new])

    monkeypatch.setattr("nanovllm.kafka.admin.connected_admin", lambda kafka: contextlib.nullcontext(OneBroker()))
    assert main(["topics", "create", "--replication", "3"]) == 2
    assert "--replication" in capsys.readouterr().err


def test_submit_says_how_many_and_which(topics: dict[str, str], tmp_path: Path, capsys: Capture) -> None:
    for name in ("a.png", "b.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"bytes")
    assert main(["submit", str(tmp_path), "s3://bucket/c.png", "-p", "Total?", "--max-tokens", "8"]) == 0
    shown = capsys.readouterr()
    assert "3 jobs sent" in shown.err
    assert len(shown.out.splitlines()) == 3
    assert main(["submit", "--prompt", "only text", "--json", "--key", "none", "--format", "msgpack"]) == 0
    assert json.loads(capsys.readouterr().out)["jobs"] == 1


def test_submit_sends_whole_jobs_from_a_file(topics: dict[str, str], tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"job_id": "r-1", "prompt": "a"}\n\n{"job_id": "r-2", "prompt": "b"}\n')
    assert main(["submit", str(file)]) == 0
    assert capsys.readouterr().out.split() == ["r-1", "r-2"]


def test_submit_waits_for_the_answers_and_fails_when_one_is_a_dead_letter(
    topics: dict[str, str], embedded_broker: str, tmp_path: Path, capsys: Capture
) -> None:
    from threading import Thread

    assert main(["topics", "create"]) == 0
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"job_id": "r-1", "prompt": "a"}\n{"job_id": "r-2", "prompt": "b"}\n')
    old = event_record(result(job_id="r-1", text="an older answer"), topics["results"], "json")
    publish(embedded_broker, old)
    codes: list[int] = []
    command = Thread(target=lambda: codes.append(main(["submit", str(file), "--wait", "--timeout", "60"])))
    command.start()
    answers = (
        event_record(result(job_id="r-1", text="the answer"), topics["results"], "msgpack"),
        dead_letter_record(dead_letter(job_id="r-2"), topics["dead_letters"], key=None, value=b"x"),
    )
    while command.is_alive():
        publish(embedded_broker, *answers)
        command.join(1)
    shown = capsys.readouterr()
    assert codes == [1]
    assert "the answer" in shown.out, shown.err
    assert "an older answer" not in shown.out
    assert "invalid_image" in shown.out


def test_answers_that_do_not_come_name_where_to_look(topics: dict[str, str], capsys: Capture) -> None:
    assert main(["topics", "create"]) == 0
    assert main(["submit", "--prompt", "a", "--wait", "--timeout", "0"]) == 1
    said = capsys.readouterr().err
    assert "1 answer did not come within 0 s" in said
    for what in ("worker", "group nanovllm", topics["jobs"], topics["results"], "need not be sent again"):
        assert what in said


def test_results_are_shown_from_the_beginning_and_counted(
    topics: dict[str, str], embedded_broker: str, capsys: Capture
) -> None:
    assert main(["topics", "create"]) == 0
    capsys.readouterr()
    hostile = "[red]12.50[/red] \x1b[2J\x07 [link=x]y"
    records = [event_record(result(job_id=f"r-{n}", text=hostile), topics["results"], "json") for n in range(3)]
    publish(embedded_broker, OutgoingRecord(topics["results"], None, b"not ours"), *records)
    assert main(["results", "--from-beginning", "--count", "3"]) == 0
    table = capsys.readouterr().out
    assert "\x1b[2J" not in table
    assert "\x07" not in table
    assert "[red]12.50[/red]" in table, "model text is text, not markup"
    assert main(["results", "--from-beginning", "-n", "2", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == [hostile, hostile]


def test_results_without_a_topic_say_what_to_do(
    topics: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("NANOVLLM_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    assert main(["results"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["worker", "--help"], 0),
        (["nosuch"], 2),
        (["submit", "--key", "nope"], 2),
        (["submit"], 2),
        (["submit", "/nope.png", "-p", "x"], 2),
        (["submit", "x.png", "-p", "x", "--prompt-file", "y"], 2),
        (["submit", "-p", "x", "--upload", "http://bucket"], 2),
        (["worker", "--config", "/nope.yaml"], 2),
        (["topics", "create", "--partitions", "0"], 2),
        (["topics", "create", "-b", "127.0.0.1:1"], 1),
    ],
)
def test_exit_codes_are_done_failed_misuse(topics: dict[str, str], arguments: list[str], code: int) -> None:
    assert main(arguments) == code


def test_a_signal_while_modules_are_imported_is_one_line_and_exit_code_1() -> None:
    program = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background begins with it ignored

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "nanovllm.cli.topics":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
from nanovllm.cli.main import main
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (1, "nanovllm: interrupted\n")


def test_a_signal_while_a_command_starts_is_one_line_and_exit_code_1(
    topics: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("nanovllm.cli.jobs.load_settings", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert main(["topics", "check"]) == 1
    assert capsys.readouterr().err.strip() == "nanovllm: interrupted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "no handler of the imports is left"


@pytest.mark.parametrize("command", [[], ["submit"], ["dlq"], ["dlq", "list"], ["topics", "create"]])
def test_help_shows_flags_without_a_type(command: list[str], capsys: Capture) -> None:
    assert main([*command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--help" in shown
    assert "bool" not in shown.lower()


def test_the_effective_configuration_is_printed_with_secrets_masked(
    topics: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for name, value in {
        "SECURITY_PROTOCOL": "SASL_SSL",
        "SASL_MECHANISM": "PLAIN",
        "SASL_USERNAME": "u",
        "SASL_PASSWORD": "hunter2",
    }.items():
        monkeypatch.setenv(f"NANOVLLM_KAFKA__{name}", value)
    assert main(["worker", "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert topics["jobs"] in shown
    assert "hunter2" not in shown
    assert "'**********'" in shown


def test_a_light_installation_says_what_the_worker_needs(
    topics: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    extras = {"worker": "worker", "demo": "demo", "align": "worker", "doctor": "worker", "convert a b": "convert"}
    for command, extra in extras.items():
        assert main(command.split()) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(f"pip install '.[{extra}]' in a clone")


def test_the_version_is_told(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nanovllm {importlib.metadata.version('nanovllm')}\n"


def test_long_work_off_a_terminal_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("nanovllm.terminal.LINE_S", 0.001)
    said = ""
    with long_work("converting it", 8) as show_done:
        show_done(3)
        while "3 of 8" not in said:
            said += capsys.readouterr().err
    assert said.startswith("converting it: 0 s")
    assert "\x1b" not in said


def test_commands_that_work_long_show_it(
    topics: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    shown: list[str] = []

    @contextlib.contextmanager
    def recorded(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        shown.append(what)
        with long_work(what, total) as show:
            yield show

    monkeypatch.setattr("nanovllm.terminal.long_work", recorded)
    for module in ("main", "sending", "dlq", "run", "diagnostics"):
        monkeypatch.setattr(f"nanovllm.cli.{module}.long_work", recorded)
    monkeypatch.setenv("NANOVLLM_ENGINE__BACKEND", "native")
    monkeypatch.setenv("NANOVLLM_ENGINE__MODEL", str(tmp_path / "none"))
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a"}\n')
    asyncio.run(create_topic(os.environ["NANOVLLM_KAFKA__BOOTSTRAP_SERVERS"], *topics.values()))
    for command in (
        f"convert {tmp_path / 'none.gguf'} {tmp_path / 'out'}",
        f"submit {tmp_path / 'jobs.jsonl'}",
        "submit s3://bucket/in/ -p x",
        "submit s3://bucket/a.png -p x",
        "dlq replay --all",
        f"run -i {tmp_path / 'jobs.jsonl'} -o {tmp_path / 'results.jsonl'}",
        "ask what",
        "doctor",
    ):
        before = len(shown)
        main(command.split())
        assert len(shown) > before, command
    assert "listing s3://bucket/in/" in shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands(shell: str) -> None:
    def ask(instruction: str, **words: str) -> str:
        environment = {**os.environ, "_NANOVLLM_COMPLETE": f"{instruction}_{shell}", **words}
        command = [sys.executable, "-m", "nanovllm.cli.main"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert "_NANOVLLM_COMPLETE" in ask("source")
    typed = {"COMP_WORDS": "nanovllm sub", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "nanovllm sub"}
    found = ask("complete", **typed, _TYPER_COMPLETE_FISH_ACTION="get-args")
    assert "submit" in found
    assert "results" not in found


def test_the_demos_help_says_its_real_bounds(capsys: Capture) -> None:
    assert main(["demo", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"at least {demo_jobs.MIN_JOBS}; unset: {demo_jobs.DEFAULT_JOBS}" in shown


def test_an_unknown_setting_stops_the_worker(
    topics: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("NANOVLLM_KAFKA__GROUPID", "x")
    assert main(["worker", "--print-config"]) == 2
    assert "NANOVLLM_KAFKA__GROUPID" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\r\n", "two↵lines↵"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("[bold]x[/bold]", "[bold]x[/bold]"),
        ("Grüße 日本 🧾", "Grüße 日本 🧾"),
    ],
)
def test_text_of_others_is_shown_and_never_obeyed(text: str, shown: str) -> None:
    assert plain(text).plain == shown
    assert not plain(text).spans


def test_a_prompt_takes_as_many_images_as_it_has_places(tmp_path: Path) -> None:
    for name in ("a.png", "b.PNG", "c.tiff", "d.webp"):
        (tmp_path / name).write_bytes(b"x")
    pairs = plan_submissions([str(tmp_path)], "Compare <|image|> and <|image|>", {})
    assert [[Path(image).name for image in pair.images] for pair in pairs] == [["a.png", "b.PNG"], ["c.tiff", "d.webp"]]
    single = plan_submissions([str(tmp_path / "*.png"), "s3://bucket/k"], "Total?", {"max_tokens": 3})
    assert [job.prompt for job in single] == ["Total? <|image|>"] * 2
    with pytest.raises(InvalidInput, match="3"):
        plan_submissions([str(tmp_path)], "<|image|>" * 3, {})


@pytest.mark.parametrize(
    ("name", "head", "is_image"),
    [
        ("scan", b"\x89PNG\r\n\x1a\n", True),
        ("scan.jpe", b"\xff\xd8\xff\xe0", True),
        ("photo.avif", b"\0\0\0\x20ftypavif", True),
        ("config.py", b"KEY = 'secret'", False),
        ("empty", b"", False),
        ("report.pdf", b"%PDF-1.7", False),
    ],
)
def test_a_file_that_is_no_image_is_not_sent(tmp_path: Path, name: str, head: bytes, is_image: bool) -> None:
    (tmp_path / name).write_bytes(head)
    if is_image:
        assert len(plan_submissions([str(tmp_path / name)], "Total?", {})) == 1
        return
    with pytest.raises(InvalidInput, match=f"{name} is no image"):
        plan_submissions([str(tmp_path / name)], "Total?", {})


def test_a_line_that_is_no_job_is_named(tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"prompt": "a\u2028b"}\n{"prompt": 1}\n')
    with pytest.raises(InvalidJob, match=r"line 2: prompt.*; nothing was sent"):
        plan_submissions([str(file)], None, {})


@pytest.mark.parametrize("source", ["https://example.com/a.png", "https://images.test:8443/a.png", "ftp://x/y"])
def test_only_uris_of_objects_and_of_allowed_hosts_are_sent(source: str) -> None:
    def find(uris: Sequence[str]) -> dict[str, ListedObject]:
        raise AssertionError(f"the store was asked for {uris}")

    http = HttpImageSettings(allow=("images.test",))
    with pytest.raises(InvalidInput, match=r"http_images\.allow|s3://"):
        plan_submissions([source], "x", {}, None, find, http)
    signed = "https://images.test/a.png?sig=1"
    (sent,) = plan_submissions([signed], "x", {}, None, find, http)
    assert (sent.images, sent.job_id) == ((signed,), None)


@pytest.mark.parametrize("source", ["s3://", "s3://b", "s3://x/y.png", "s3://bucket/" + "k" * 1025])
def test_a_uri_of_no_object_is_refused_before_anything_is_sent(source: str) -> None:
    with pytest.raises(InvalidInput, match=r"names no object"):
        plan_submissions([source], "x", {})


@pytest.mark.parametrize("place", ["a.png", "", "*.png"])
def test_an_empty_file_is_refused_before_anything_is_sent(tmp_path: Path, place: str) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(InvalidInput, match=r"a\.png is no image: the file is empty"):
        plan_submissions([str(tmp_path / place)], "x", {})


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        ("{}/empty.png", "empty.png is no image: the file is empty"),
        ("s3://bucket/", "s3://bucket/ names no object"),
        ("s3://x/y.png", "s3://x/y.png names no object"),
        ("ftp://example.com/a.png", "only s3:// and https:// URIs"),
        ("https://example.com/a.png", "http_images.allow of these settings does not list https://example.com"),
        ("https://user:hunter2@example.com/a.png", "a URI that begins with http has a user or a password"),
        ("{}/none.png", "none.png cannot be read"),
    ],
)
def test_a_picture_that_cannot_be_asked_about_is_one_line(
    tmp_path: Path, capsys: Capture, picture: str, said: str
) -> None:
    (tmp_path / "empty.png").touch()
    assert main(["ask", picture.format(tmp_path), "What?"]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("command", ["submit --prompt x", "topics check", "dlq list", "results"])
@pytest.mark.parametrize("servers", ["foo:bar", "http://foo:9092", "[::1]:x", "foo:"])
def test_a_broker_without_a_number_for_a_port_is_one_line(capsys: Capture, command: str, servers: str) -> None:
    assert main([*command.split(), "-b", servers]) == 2
    assert "bootstrap_servers: a broker is host:port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device", "out.jsonl"), 1),
        (MemoryError(), 1),
        (ValidationError.from_exception_data("Job", [{"type": "missing", "loc": ("prompt",), "input": {}}]), 2),
    ],
)
def test_what_the_system_or_a_job_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, error: Exception, code: int
) -> None:
    def refuse(**_: object) -> None:
        raise error

    monkeypatch.setattr("nanovllm.cli.main.app", refuse)
    assert main([]) == code
    shown = capsys.readouterr().err
    assert shown.startswith("nanovllm: ")
    assert shown.count("\n") == 1
