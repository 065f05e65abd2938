"""Workers in front of servers of OpenAI's protocol: real broker, S3, decoders and sockets."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bench import Bench, answered, eventually, png, reached
from openai_server import Fault, OpenAIServer, serving
from parts import Fault as ConnectionFault
from parts import FaultProxy, S3Part, worker_process
from PIL import Image
from pydantic import ValidationError

from nanovllm.cli.main import main
from nanovllm.engine.backends.base import Generation, Request
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import ConfigurationError
from nanovllm.pipeline.build import build_decoders, check_parts
from nanovllm.pipeline.build_remote import build_remote_engine, remote_findings
from nanovllm.settings.loading import load_settings
from nanovllm.settings.remote import RemoteSettings
from nanovllm.settings.worker import Settings


def settings_of(bench: Bench, *servers: OpenAIServer | str, **remote: Any) -> Settings:
    urls = tuple(one if isinstance(one, str) else one.url for one in servers)
    quick = {"breaker_wait_s": 0.05, "breaker_max_wait_s": 0.2, "read_timeout_s": 5.0}
    values = bench.settings.model_dump()
    values["engine"] |= {"backend": "openai", "max_num_seqs": 8, "model": "tiny"}
    values["remote"] |= {"endpoints": urls, **quick, **remote}
    return Settings.model_validate(values)


@asynccontextmanager
async def working(bench: Bench, settings: Settings) -> AsyncIterator[Bench]:
    async with build_remote_engine(settings) as engine:
        decoders = build_decoders(settings, engine)
        assert decoders is not None
        await decoders.start()
        try:
            bench = replace(bench, settings=settings, decoders=decoders)
            async with bench.working(engine):
                yield bench
        finally:
            await decoders.close()


async def test_a_server_dies_and_lives_again_and_no_job_is_lost_or_charged(
    bench: Bench, images: Callable[[str, bytes], str]
) -> None:
    uris = [images(f"{color}.png", png(color)) for color in ("red", "green", "blue")]
    jobs = [{"job_id": f"j{n}", "prompt": "see <|image|>", "images": [uris[n % 3]]} for n in range(60)]
    first, second = OpenAIServer(EchoEngine(delay_s=0.02)), OpenAIServer(EchoEngine(delay_s=0.02))
    async with serving(first, second), working(bench, settings_of(bench, first, second)) as worker:
        await bench.send(*jobs[:20])
        await eventually(lambda: len(first.asked) + len(second.asked) >= 5)
        await first.kill()
        await answered(bench, {job["job_id"] for job in jobs[:20]})
        # Now there is none: jobs wait, and no work is taken.
        await second.kill()
        await bench.send(*jobs[20:40])
        await eventually(lambda: "engine endpoints" in (worker.health.systemic or ""))
        assert bench.metrics.registry.get_sample_value("nanovllm_systemic") == 1
        await first.start()
        await second.start()
        await answered(bench, {job["job_id"] for job in jobs[:40]})
        seen = len(first.asked), len(second.asked)
        await bench.send(*jobs[40:])
        await answered(bench, {job["job_id"] for job in jobs})
        await eventually(lambda: reached(bench, len(jobs)))
        assert worker.health.systemic is None
        assert len(first.asked) + len(second.asked) > sum(seen)
    results = await bench.results(len(jobs))
    assert len(results) == len(jobs)
    assert await bench.ends() == len(jobs)
    assert bench.metrics.registry.get_sample_value("nanovllm_jobs_total", {"outcome": "dead_letter"}) is None


async def test_an_idle_worker_is_not_ready_while_its_servers_are_away_and_ready_when_they_are_back(
    bench: Bench,
) -> None:
    async with OpenAIServer() as server, working(bench, settings_of(bench, server)) as worker:
        await eventually(lambda: worker.health.has_joined)
        await server.kill()
        await eventually(lambda: "takes no connection" in (worker.health.systemic or ""))
        await server.start()
        await eventually(lambda: worker.health.systemic is None)
        await bench.send({"job_id": "j", "prompt": "hello"})
        assert (await bench.results(1))["j"]["text"] == "hello"


async def test_two_servers_behind_proxies_that_spoil_connections_lose_and_charge_no_job(
    bench: Bench, images: Callable[[str, bytes], str]
) -> None:
    uri = images("one.png", png())
    jobs = [{"job_id": f"j{n}", "prompt": f"{n} <|image|>", "images": [uri]} for n in range(40)]
    first, second = OpenAIServer(EchoEngine(delay_s=0.02)), OpenAIServer(EchoEngine(delay_s=0.02))
    spoilt: list[ConnectionFault] = ["cut", "refuse", "unavailable", "cut", "cut"] * 6
    async with (
        serving(first, second),
        FaultProxy(first.url, spoilt) as one,
        FaultProxy(second.url, spoilt[2:]) as two,
        working(bench, settings_of(bench, f"{one.url}/v1", f"{two.url}/v1")),
    ):
        await bench.send(*jobs)
        await answered(bench, {str(job["job_id"]) for job in jobs})
        await eventually(lambda: reached(bench, len(jobs)))
        assert one.faults_left + two.faults_left < 2 * len(spoilt) - 20
    assert len(await bench.results(len(jobs))) == len(jobs)
    assert bench.metrics.registry.get_sample_value("nanovllm_jobs_total", {"outcome": "dead_letter"}) is None


async def test_results_and_metrics_say_of_a_servers_answer_what_they_say_of_an_engine_here(
    bench: Bench, images: Callable[[str, bytes], str]
) -> None:
    uri = images("one.png", png())
    async with OpenAIServer() as server, working(bench, settings_of(bench, server, revision="2026-11")):
        await bench.send({"job_id": "j", "prompt": "what is <|image|>", "images": [uri]})
        result = (await bench.results(1))["j"]
        (record,) = await bench.read(bench.settings.topics.metrics, 1)
    assert result["text"].startswith("what is")
    assert (result["status"], result["finish_reason"]) == ("ok", "stop")
    assert result["usage"]["output_tokens"] == 3
    assert result["usage"]["input_tokens"] > 2
    assert result["model"] == {"id": "tiny", "revision": "2026-11", "parameter_digest": "unknown"}
    assert [(one["uri"], one["width"], one["height"]) for one in result["inputs"]] == [(uri, 8, 6)]
    assert 0 < result["timings_ms"]["time_to_first_token"] <= result["timings_ms"]["total"]
    assert json.loads(record.value)["num_generation_tokens"] == 3
    value = bench.metrics.registry.get_sample_value
    assert value("nanovllm_request_success_total", {"finished_reason": "stop"}) == 1
    assert value("nanovllm_time_to_first_token_seconds_count") == 1


@pytest.mark.parametrize("fault", ["hang", "reset", "busy", "error", "garbage", "die", "html", "unfinished"])
async def test_no_fault_of_a_server_becomes_a_dead_letter(bench: Bench, fault: Fault) -> None:
    async with serving(OpenAIServer(), OpenAIServer()) as servers:
        for server in servers:
            server.faults = [fault] * 3
            server.retry_after = "0.1"
        async with working(bench, settings_of(bench, *servers, read_timeout_s=0.3)):
            await bench.send(*({"job_id": f"j{n}", "prompt": f"{n} words"} for n in range(6)))
            await answered(bench, {f"j{n}" for n in range(6)})
            await eventually(lambda: reached(bench, 6))
    assert bench.metrics.registry.get_sample_value("nanovllm_jobs_total", {"outcome": "dead_letter"}) is None


async def test_what_a_server_refuses_and_what_the_dialect_lacks_are_dead_letters_of_their_jobs(bench: Bench) -> None:
    async with OpenAIServer(key="sk-hunter2") as server:
        server.faults = ["bad"]
        settings = settings_of(bench, server, api_keys=("sk-hunter2",))
        async with working(bench, settings):
            await bench.send({"job_id": "bad", "prompt": "p"})
            await eventually(lambda: len(server.asked) == 2)  # the job, and a request of the worker's own
            await bench.send(
                {"job_id": "lacks", "prompt": "p", "sampling": {"top_k": 3}}, {"job_id": "ok", "prompt": "p"}
            )
            letters = await bench.dead_letters(2)
            assert set(await bench.results(1)) == {"ok"}
    reasons = {headers["nanovllm_job_id"]: headers for headers, _ in letters}
    assert {job: (one["nanovllm_code"], one["nanovllm_stage"]) for job, one in reasons.items()} == {
        "bad": ("invalid_input", "infer"),
        "lacks": ("invalid_input", "infer"),
    }
    assert "top_k" in reasons["lacks"]["nanovllm_message"]
    assert "hunter2" not in json.dumps(reasons)


async def test_a_job_that_ends_its_only_server_each_time_is_given_up_after_the_allowed_attempts(bench: Bench) -> None:
    class Fragile(EchoEngine):
        def submit(self, request: Request) -> Generation:
            if "poison" in str(request.messages):
                deaths.append(asyncio.create_task(die()))
            return super().submit(request)

    async def die() -> None:
        await server.kill()
        await asyncio.sleep(0.3)
        await server.start()

    deaths: list[asyncio.Task[None]] = []
    server = OpenAIServer(Fragile(delay_s=0.2))
    async with server, working(bench, settings_of(bench, server, max_attempts=8)):
        await bench.send({"job_id": "p", "prompt": "poison"})
        (letter,) = await bench.read(bench.settings.topics.dead_letters, 1)
        await asyncio.gather(*deaths)
        await bench.send({"job_id": "good", "prompt": "a few words"})
        await answered(bench, {"good"})
    assert ("nanovllm_code", b"answer_failed") in letter.headers
    assert len(deaths) > 1


async def test_a_deadline_ends_the_wait_for_a_server(bench: Bench) -> None:
    async with OpenAIServer() as server, working(bench, settings_of(bench, server)):
        await server.kill()
        soon = (datetime.now(UTC) + timedelta(seconds=1.5)).isoformat()
        await bench.send({"job_id": "late", "prompt": "p", "deadline": soon}, {"job_id": "waits", "prompt": "p"})
        ((headers, _),) = await bench.dead_letters(1)
        assert (headers["nanovllm_job_id"], headers["nanovllm_code"]) == ("late", "deadline_exceeded")
        await server.start()
        await answered(bench, {"waits"})


async def test_a_rotated_key_stops_the_intake_and_the_right_one_goes_on(bench: Bench) -> None:
    async with (
        OpenAIServer(key="sk-one") as server,
        working(bench, settings_of(bench, server, api_keys=("sk-one",))) as worker,
    ):
        server.key = "sk-two"
        await bench.send({"job_id": "j", "prompt": "p"})
        await eventually(lambda: "refuses the API key" in (worker.health.systemic or ""))
        assert "sk-" not in (worker.health.systemic or "")
        server.key = "sk-one"
        await answered(bench, {"j"})


async def test_objects_with_a_version_go_as_presigned_urls_and_everything_else_inside(bench: Bench, s3: S3Part) -> None:
    versioned, plain = s3.make_bucket(versioned=True), s3.make_bucket()
    one, two = s3.put(versioned, "a/b c.png", png("red")), s3.put(plain, "two.png", png("green"))
    s3.client.put_object(Bucket=versioned, Key="alpha.png", Body=_transparent())
    settings = settings_of(bench, "http://unset/v1", image_transport="presigned", presigned_s=77)
    s3_settings = settings.s3.model_copy(update={"allow": (f"s3://{versioned}", f"s3://{plain}")})
    async with OpenAIServer() as server:
        remote = settings.remote.model_copy(update={"endpoints": (server.url,)})
        settings = settings.model_copy(update={"remote": remote, "s3": s3_settings})
        async with working(bench, settings):
            await bench.send(
                {"job_id": "versioned", "prompt": "<|image|>", "images": [one]},
                {"job_id": "plain", "prompt": "<|image|>", "images": [two]},
                {"job_id": "data", "prompt": "<|image|>", "images": [{"data": base64.b64encode(png("red")).decode()}]},
                {"job_id": "alpha", "prompt": "<|image|>", "images": [f"s3://{versioned}/alpha.png"]},
            )
            results = await bench.results(4)
    assert len(results) == 4
    urls = [url for asked in server.asked for url in asked.image_urls]
    presigned = [url for url in urls if url.startswith(s3.endpoint_url)]
    assert len(presigned) == 1
    assert f"{versioned}/a/b%20c.png" in presigned[0]
    for part in ("versionId=", "X-Amz-Algorithm=AWS4-HMAC-SHA256", "X-Amz-Expires=77"):
        assert part in presigned[0]
    assert sum(url.startswith("data:image/png;base64,") for url in urls) == 3
    # The server of the tests read the object by its URL, and saw the picture that the data image shows.
    assert results["versioned"]["text"] == results["data"]["text"]


def _transparent() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 6), (255, 0, 0, 128)).save(buffer, "PNG")
    return buffer.getvalue()


async def test_a_worker_process_in_front_of_servers_has_no_torch_and_logs_no_key(
    bench: Bench, images: Callable[[str, bytes], str], s3: S3Part, tmp_path: Path
) -> None:
    uri = images("one.png", png())
    topics = bench.settings.topics
    async with (
        OpenAIServer(EchoEngine(delay_s=0.05), key="sk-hunter2") as server,
        OpenAIServer(key="sk-hunter2") as dead,
        FaultProxy(server.url, ["cut", "refuse", "unavailable"] * 2) as proxy,
    ):
        await dead.kill()
        settings = {
            **bench.environment,
            **s3.environment,
            "NANOVLLM_LOG_LEVEL": "debug",
            "NANOVLLM_ENGINE__BACKEND": "openai",
            "NANOVLLM_ENGINE__MODEL": "tiny",
            "NANOVLLM_REMOTE__ENDPOINTS": f"{proxy.url}/v1,{dead.url}",
            "NANOVLLM_REMOTE__API_KEYS": "sk-hunter2",
            "NANOVLLM_REMOTE__BREAKER_WAIT_S": "0.1",
            "NANOVLLM_KAFKA__GROUP_ID": bench.settings.kafka.group_id,
            "NANOVLLM_S3__ENDPOINT_URL": s3.endpoint_url,
            "NANOVLLM_S3__ADDRESSING_STYLE": "path",
            "NANOVLLM_S3__ALLOW": "s3://images",
            "NANOVLLM_ADMISSION__IDLE_EXIT_S": "1",
            "NANOVLLM_TOPICS__DEAD_LETTERS": topics.dead_letters,
        }
        await bench.send(*({"job_id": f"j{n}", "prompt": "see <|image|>", "images": [uri]} for n in range(12)))
        worker = worker_process(tmp_path, "--exit-when-drained", settings=settings)
        worker.start()
        try:
            await eventually(lambda: bool(server.asked) or not worker.is_running, timeout_s=120)
            assert worker.is_running
            maps = await asyncio.to_thread(Path(f"/proc/{worker.pid}/maps").read_text)
            status = await asyncio.to_thread(Path(f"/proc/{worker.pid}/status").read_text)
            await eventually(lambda: not worker.is_running, timeout_s=120)
        finally:
            worker.kill()
        log = (tmp_path / "worker.log").read_text()
        assert worker.exit_code == 0, log[-2_000:]
        assert "libtorch" not in maps
        (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        assert int(peak) < 150 * 1024
        assert len(await bench.results(12)) == 12
        assert "hunter2" not in log
        assert "DEBUG" in log


def remote(**values: Any) -> RemoteSettings:
    return RemoteSettings.model_validate({"endpoints": "http://a/v1,http://b/v1/"} | values)


def test_endpoints_and_keys_are_checked_and_never_shown() -> None:
    assert remote().endpoints == ("http://a/v1", "http://b/v1")
    assert remote(api_keys="sk-a,sk-b").api_keys[1].get_secret_value() == "sk-b"
    for wrong in (
        "ftp://a",
        "http://",
        "a:8000",
        "http://user:hunter2@a/v1",
        "http://a/v1?key=hunter2",
        "http://a,http://a/",
    ):
        with pytest.raises(ValidationError) as caught:
            RemoteSettings.model_validate({"endpoints": wrong})
        assert "hunter2" not in "; ".join(error["msg"] for error in caught.value.errors())
    assert remote(proxy="http://proxy:3128").proxy == "http://proxy:3128"
    for wrong in ("socks5://proxy:1080", "proxy:3128", "http://user:hunter2@proxy:3128"):
        with pytest.raises(ValidationError, match="is no http://") as caught:
            remote(proxy=wrong)
        assert "hunter2" not in "; ".join(error["msg"] for error in caught.value.errors())
    with pytest.raises(ValidationError, match="3 api_keys for 2 endpoints"):
        remote(api_keys="a,b,c")
    with pytest.raises(ValidationError, match="no header takes"):
        remote(api_keys=["a\nb"])
    with pytest.raises(ValidationError, match=r"remote\.endpoints"):
        Settings.model_validate({"engine": {"backend": "openai"}})
    with pytest.raises(ValidationError, match=r"engine\.backend is auto, which asks none: set it to openai"):
        Settings.model_validate({"remote": {"endpoints": ("http://a/v1",)}})
    with pytest.raises(ValidationError, match=r"vllm\.\* is set, and engine\.backend is auto: set it to vllm"):
        Settings.model_validate({"vllm": {"tensor_parallel_size": 2}})
    shown = repr(remote(api_keys="sk-hunter2")) + str(remote(api_keys="sk-hunter2").model_dump(mode="json"))
    assert "hunter2" not in shown


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"engine": {"deterministic": True}}, r"engine\.deterministic is set"),
        ({"engine": {"quantization": "int8"}}, r"engine\.quantization is set"),
        ({"engine": {"max_model_len": 4096}}, r"engine\.max_model_len is set"),
        ({"sampling": {"top_k": 3}}, "sampling: the dialect openai of remote.dialect has no top_k"),
        ({"sampling": {"loop_tokens": 64}}, "has no loop_tokens"),
        ({"engine": {"chat_template_kwargs": {"enable_thinking": False}}}, "chat_template_kwargs"),
        ({"remote": {"ca_file": "/nowhere.pem"}}, r"remote\.ca_file"),
    ],
)
def test_settings_that_the_servers_cannot_heed_end_a_worker_before_its_first_job(
    values: dict[str, Any], why: str
) -> None:
    base: dict[str, Any] = {"engine": {"backend": "openai"}, "remote": {"endpoints": ("http://a/v1",)}}
    for section, fields in values.items():
        base[section] = base.get(section, {}) | fields
    with pytest.raises(ConfigurationError, match=why):
        check_parts(Settings.model_validate(base))


async def test_jobs_with_images_for_a_model_without_are_refused_by_name(bench: Bench) -> None:
    async with OpenAIServer() as server:
        settings = settings_of(bench, server, images=False)
        async with build_remote_engine(settings) as engine:
            assert build_decoders(settings, engine) is None
            async with replace(bench, settings=settings).working(engine):
                await bench.send({"job_id": "j", "prompt": "<|image|>", "images": ["s3://images/x.png"]})
                ((headers, _),) = await bench.dead_letters(1)
    assert "tiny takes no images" in headers["nanovllm_message"]


async def test_the_doctor_asks_each_server_and_says_what_the_dialect_lacks(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(OpenAIServer(key="sk-hunter2", context=4096), OpenAIServer()) as (server, dead):
        await dead.kill()
        variables = bench.environment | {
            "NANOVLLM_ENGINE__BACKEND": "openai",
            "NANOVLLM_REMOTE__ENDPOINTS": f"{server.url},{dead.url}",
            "NANOVLLM_REMOTE__API_KEYS": "sk-hunter2",
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert await asyncio.to_thread(main, ["doctor", "--json"]) == 0
        shown = capsys.readouterr().out
        await server.kill()
        loaded = load_settings()
        failing = {row.subject: row.fails for row in await remote_findings(build_remote_engine(loaded), loaded)}
    rows = {row["what"]: row for row in json.loads(shown)}
    assert rows[f"endpoint {server.url}"]["is"] == "answers, and lists tiny"
    assert "takes no connection" in rows[f"endpoint {dead.url}"]["why"]
    assert "top_k" in rows["sampling"]["why"]
    assert rows["guided output"]["is"] == "json_schema"
    assert rows["backend"]["is"] == "openai (engine.backend openai)"
    assert rows["dialect"]["is"] == "openai"
    assert rows["concurrency"]["is"] == "up to 64 requests at once"
    assert rows["context"]["is"] == "4,096 tokens, prompt and output"
    assert "hunter2" not in shown
    assert failing[f"endpoint {server.url}"]
    assert failing[f"endpoint {dead.url}"]


@pytest.mark.kafka
async def test_exactly_once_holds_over_a_drain_and_a_kill_while_servers_answer(
    kafka_bench: Bench, tmp_path: Path
) -> None:
    bench = kafka_bench
    jobs = [{"job_id": f"j{number}", "prompt": f"words {number}"} for number in range(30)]
    async with OpenAIServer() as server:
        settings = {
            **bench.environment,
            "NANOVLLM_DELIVERY": "exactly_once",
            "NANOVLLM_ENGINE__BACKEND": "openai",
            "NANOVLLM_ENGINE__MAX_NUM_SEQS": "4",
            "NANOVLLM_REMOTE__ENDPOINTS": server.url,
            "NANOVLLM_KAFKA__GROUP_ID": bench.settings.kafka.group_id,
            "NANOVLLM_KAFKA__SESSION_TIMEOUT_MS": "6000",
            "NANOVLLM_KAFKA__HEARTBEAT_INTERVAL_MS": "1000",
            "NANOVLLM_ADMISSION__IDLE_EXIT_S": "1",
        }
        await bench.send(*jobs)
        server.gate = asyncio.Event()
        drained = worker_process(tmp_path, settings=settings, name="drained")
        drained.start()
        await eventually(lambda: server.at_once == 4, timeout_s=60)
        drained.terminate()
        await asyncio.sleep(0.5)
        server.gate.set()
        await eventually(lambda: not drained.is_running, timeout_s=60)
        assert drained.exit_code == 0, drained.tail(30)
        server.gate = asyncio.Event()
        seen = len(server.asked)
        killed = worker_process(tmp_path, settings=settings, name="killed")
        killed.start()
        await eventually(lambda: len(server.asked) >= seen + 4, timeout_s=60)
        killed.kill()
        server.gate.set()
        last = worker_process(tmp_path, "--exit-when-drained", settings=settings, name="last")
        last.start()
        try:
            await eventually(lambda: not last.is_running, timeout_s=120)
        finally:
            last.kill()
        assert last.exit_code == 0, last.tail(30)
    records = await bench.read(bench.settings.topics.results, len(jobs))
    assert sorted(record.key.decode() for record in records) == sorted(str(job["job_id"]) for job in jobs)


async def test_questions_and_files_of_the_command_line_are_answered_by_servers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "jobs.jsonl").write_text('{"job_id": "one", "prompt": "from a file"}\n')
    async with OpenAIServer() as server:
        for name, value in {"ENGINE__BACKEND": "openai", "REMOTE__ENDPOINTS": server.url}.items():
            monkeypatch.setenv(f"NANOVLLM_{name}", value)
        assert await asyncio.to_thread(_main_in_process, "ask", str(tmp_path / "a.png"), "What is it?") == 0
        answers = tmp_path / "answers.jsonl"
        files = ("-i", str(tmp_path / "jobs.jsonl"), "-o", str(answers))
        assert await asyncio.to_thread(_main_in_process, "run", *files) == 0
    assert [len(asked.image_urls) for asked in server.asked] == [1, 0]
    assert json.loads(answers.read_text())["text"] == "from a file"


def _main_in_process(*arguments: str) -> int:
    """A process of its own: signals are a main thread's."""
    command = [sys.executable, "-m", "nanovllm.cli.main", *arguments]
    return subprocess.run(command, check=False, capture_output=True, timeout=120).returncode
