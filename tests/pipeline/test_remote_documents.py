"""Documents in front of servers of OpenAI's protocol: records, faults, estimates; without torch."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml
from bench import eventually
from document_bench import Documents
from document_files import drawn, receipts_pdf, receipts_route
from openai_server import OpenAIServer, serving
from parts import worker_process
from pdf_files import text_pdf

from nanovllm.engine.backends.base import EngineBackend
from nanovllm.errors import ConfigurationError, InvalidRoutes, ModelNotFound
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.pipeline import build
from nanovllm.pipeline.listed_model import ListedModel, listed_model
from nanovllm.pipeline.route_checks import check_routes
from nanovllm.pipeline.routing.routes import load_routes
from nanovllm.settings.engine import EngineSettings
from nanovllm.settings.loading import load_settings
from nanovllm.settings.remote import RemoteSettings
from nanovllm.settings.worker import Settings

WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'transformers', 'tokenizers', 'safetensors', 'llguidance', 'jinja2'):
            raise ModuleNotFoundError(f'{name} is not installed here', name=name)
sys.meta_path.insert(0, Refuse())
from nanovllm.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest_asyncio.fixture
async def model() -> AsyncIterator[EngineBackend]:
    """The shipped model, for servers."""
    engine = await build.load_engine(Settings.model_validate({"engine": {"max_num_seqs": 8}}))
    yield engine
    await engine.close()


def in_front_of(*servers: OpenAIServer, **remote: Any) -> dict[str, Any]:
    """Settings of a worker in front of ``servers``; waits are short."""
    quick: dict[str, Any] = {"breaker_wait_s": 0.05, "breaker_max_wait_s": 0.2, "read_timeout_s": 20.0}
    return {
        "engine": EngineSettings(backend="openai", model="tiny", max_num_seqs=8),
        "remote": RemoteSettings(endpoints=tuple(one.url for one in servers), **(quick | remote)),
    }


def told(record: DocumentRecord) -> dict[str, Any]:
    """What a record says of its document, and not of who made it and when."""
    fields = record.model_dump(mode="json", exclude={"model", "timings_ms", "created_at", "source", "worker", "usage"})
    for page in fields["pages"]:
        del page["tokens"]
    for one in fields["fields"].values():
        for name in ("logprob_min", "logprob_mean"):
            one[name] = one[name] and round(one[name], 3)
    return fields


async def test_records_by_servers_are_those_of_the_model_in_the_worker(
    documents: Documents, model: EngineBackend
) -> None:
    body = receipts_pdf([one.image for one in drawn(3)])
    sent = {"Records": [documents.put(f"{key}/a.pdf", body) for key in ("pages", "whole")]}
    pages = receipts_route(documents.bucket, "pages/**", sidecar=None)
    whole = receipts_route(
        documents.bucket,
        "whole/**",
        name="whole",
        merge="per_document",
        pages={"dpi": 72, "request": "document"},
        sidecar=None,
    )
    settings = documents.settings(pages, whole)
    await documents.send(sent)
    async with documents.working(**settings):
        await documents.ended(2)
    async with serving(OpenAIServer(model, tells_token_ids=True, context=2_048)) as (server,):
        await documents.send(sent)
        async with documents.working(**settings | in_front_of(server, dialect="vllm", revision="r7")):
            await documents.ended(4)
        assert sorted(len(asked.image_urls) for asked in server.asked) == [1, 1, 1, 3]
    found = await documents.records(4)
    for route in ("receipts", "whole"):
        native, by_server = (one for one in found if one.route.name == route)
        assert by_server.constrained
        assert any(one.logprob_min is not None for one in by_server.fields.values())
        assert told(by_server) == told(native)
        assert (by_server.model.id, by_server.model.revision) == ("tiny", "r7")
        assert by_server.usage.output_tokens == native.usage.output_tokens


async def test_servers_that_die_in_mid_document_cost_no_document_and_leave_no_half_record(
    documents: Documents, model: EngineBackend
) -> None:
    event = documents.put("in/a.pdf", receipts_pdf([one.image for one in drawn(6)]))
    first, second = OpenAIServer(model), OpenAIServer()  # the second one answers nothing
    async with serving(first, second):
        first.faults = ["die", "unfinished"]
        settings = documents.settings(receipts_route(documents.bucket)) | in_front_of(first, second, affinity_slack=0)
        async with documents.working(**settings) as (worker, _):
            second.gate = asyncio.Event()
            await documents.send(event)
            await eventually(lambda: bool(first.asked) and bool(second.asked))
            await second.kill()
            await eventually(lambda: not first.faults)
            # Now there is none: the document waits, and no work is taken.
            await first.kill()
            await eventually(lambda: "engine endpoints" in (worker.health.systemic or ""))
            assert documents.counted().total() == 0
            await first.start()
            await documents.ended(1)
            assert worker.health.systemic is None
    assert documents.counted() == {"result": 1}
    (record,) = await documents.records(1)
    assert record.status == "complete"
    assert [page.number for page in record.pages] == [1, 2, 3, 4, 5, 6]
    assert {page.attempts for page in record.pages} == {1}, "a fault of a server is no step of the ladder"
    assert all(one.logprob_min is not None for one in record.fields.values()), "servers need not tell ids of tokens"


async def test_outcomes_that_wait_for_the_other_events_of_their_record_are_counted(documents: Documents) -> None:
    blank, asked = documents.put("in/blank.pdf", text_pdf(())), documents.put("in/b.pdf", text_pdf(["words"]))
    settings = documents.settings(receipts_route(documents.bucket, sidecar=None))
    held = []
    for events in ([asked], [blank, asked]):
        async with serving(OpenAIServer()) as (server,):
            server.gate = asyncio.Event()
            async with documents.working(**settings | in_front_of(server)) as (worker, _):
                ended = documents.counted().total()
                await documents.send({"Records": events})
                await eventually(lambda server=server: bool(server.asked))  # type: ignore[misc]
                held.append(worker.admission.bytes - len(json.dumps({"Records": events})))
                server.gate.set()
                await documents.ended(ended + len(events))
                await eventually(lambda worker=worker: worker.admission.bytes == 0)  # type: ignore[misc]
    found = await documents.bench.read(documents.bench.settings.topics.results, 3)
    (record,) = [one for one in found if b"blank.pdf" in one.value]
    assert held[1] - held[0] >= len(record.value)


def variables(*servers: OpenAIServer, **settings: str) -> dict[str, str]:
    own = {"ENGINE__BACKEND": "openai", "ENGINE__MODEL": "tiny", "REMOTE__ENDPOINTS": ",".join(s.url for s in servers)}
    return {f"NANOVLLM_{name}": value for name, value in (own | settings).items()}


async def without_torch(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process where torch, and what comes with it, is not installed."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    return await asyncio.to_thread(
        subprocess.run,
        command,
        env=os.environ | environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


def route_file(folder: Path, *routes: Mapping[str, Any], **more: Any) -> Path:
    file = folder / "routes.yaml"
    file.write_text(yaml.safe_dump({"version": 1, **more, "routes": [dict(one) for one in routes]}, sort_keys=False))
    return file


async def test_extract_and_routes_check_ask_servers_without_torch_installed(
    tmp_path: Path, model: EngineBackend
) -> None:
    (tmp_path / "a.pdf").write_bytes(receipts_pdf([one.image for one in drawn(2)]))
    output = tmp_path / "records.jsonl"
    group = receipts_route("inbox", "group/*.pdf", name="group", merge="per_document", pages={"request": "document"})
    routes = route_file(tmp_path, receipts_route("inbox"), group, page_store="s3://inbox/kept")
    async with serving(OpenAIServer(model, context=2_048)) as (server,):
        environment = variables(server)
        checked = await without_torch(environment, "routes", "check", str(routes), "--json")
        assert checked.returncode == 0, checked.stderr
        routes = route_file(tmp_path, receipts_route("inbox", sidecar=None))
        command = ("extract", str(tmp_path / "a.pdf"), "-r", str(routes), "--route", "receipts", "-o", str(output))
        server.faults = ["error", "busy"]
        extracted = await without_torch(environment | variables(server, REMOTE__LOGPROBS="false"), *command)
        assert extracted.returncode == 0, extracted.stderr
    rows = {(row["route"], row["what"]): row["is"] for row in json.loads(checked.stdout)}
    assert rows["", "tokens"].startswith("estimated")
    assert "not set" in rows["", "remote.revision"]
    assert rows["receipts", "constraint"] == "json_schema, compiled by the servers"
    assert rows["receipts", "tokens"].startswith("about ")
    assert rows["receipts", "tokens"].endswith(" of 2,048")
    assert ("receipts", "fit") not in rows
    assert rows["group", "fit"].startswith("may be too long")
    record = DocumentRecord.model_validate_json(output.read_text())
    assert record.status == "complete"
    assert [page.status for page in record.pages] == ["ok", "ok"]
    assert not any("logprobs" in asked.body for asked in server.asked)
    assert all(one.logprob_min is None for one in record.fields.values())


@pytest.mark.parametrize(
    ("remote", "fields", "said"),
    [
        (
            {},
            {"sampling": {"top_k": 3}},
            "sampling.top_k is set, and the dialect openai of remote.dialect has no top_k",
        ),
        ({}, {"sampling": {"stop": list("abcde")}}, "sampling.stop is set"),
        ({"REMOTE__DIALECT": "llamacpp"}, {"response_schema": None, "sampling": {"regex": "a+"}}, "has no regex"),
        ({}, {"response_schema": {"type": 7}}, "response_schema: "),
        ({"REMOTE__LOGPROBS": "false"}, {"sampling": {"logprobs": 1}}, "has no logprobs"),
        ({"REMOTE__IMAGES": "false"}, {}, "the model takes no images"),
        ({}, {"sampling": {"max_tokens": 2_048}}, "2048 tokens of answer leave no room in the 2048 that the servers"),
    ],
)
async def test_routes_that_servers_cannot_heed_are_refused_with_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: dict[str, str], fields: dict[str, Any], said: str
) -> None:
    routes = load_routes(route_file(tmp_path, receipts_route("inbox", **fields)))
    async with serving(OpenAIServer(context=2_048)) as (server,):
        for name, value in variables(server, **remote).items():
            monkeypatch.setenv(name, value)
        settings = load_settings(None)
        context = (await listed_model(settings)).context
    with pytest.raises(InvalidRoutes) as caught:
        check_routes(routes, settings, context=context)
    (refusal,) = caught.value.refusals
    assert said in refusal
    assert f"{tmp_path}/routes.yaml:" in refusal


async def test_routes_check_says_which_servers_have_not_the_model_and_what_is_unchecked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}/v1"
    other = OpenAIServer(model="other", context=64)
    async with serving(OpenAIServer(context=2_048), other) as (server, other):
        down = other.url

        async def listed(*servers: OpenAIServer, **more: str) -> ListedModel:
            for name, value in variables(*servers, REMOTE__CONNECT_TIMEOUT_S="0.5", **more).items():
                monkeypatch.setenv(name, value)
            return await listed_model(load_settings(None))

        assert await listed(server) == ListedModel(2_048, {}, is_served=True)
        found = await listed(server, other, REMOTE__ENDPOINTS=f"{server.url},{down},{address}")
        assert (found.context, found.is_served) == (2_048, True)
        assert found.lacking == {
            address: "does not answer in time",
            down: "does not serve tiny; it lists other",
        }
        with pytest.raises(ModelNotFound, match="does not serve tiny; it lists other: `NANOVLLM_ENGINE__MODEL` names"):
            await listed(other)
        with pytest.raises(ConfigurationError, match="leaves no prompt any room"):
            await listed(server, SAMPLING__MAX_TOKENS="2048")
    silent.close()
    routes = route_file(tmp_path, receipts_route("inbox"))
    environment = {**variables(), "NANOVLLM_REMOTE__ENDPOINTS": down}
    checked = await without_torch(environment, "routes", "check", str(routes), "--json")
    assert checked.returncode == 0, checked.stderr
    rows = {row["what"]: row["is"] for row in json.loads(checked.stdout)}
    assert rows[f"endpoint {down}"].startswith("takes no connection")
    assert rows["servers"].startswith("none has the model now: its name and context are not checked")


def worker_variables(documents: Documents, server: OpenAIServer, routes: Path) -> dict[str, str]:
    return {
        **documents.bench.environment,
        **documents.s3.environment,
        **variables(server),
        "NANOVLLM_TOPICS__EVENTS": documents.events,
        "NANOVLLM_DOCUMENTS__ROUTES": str(routes),
        "NANOVLLM_KAFKA__GROUP_ID": documents.bench.settings.kafka.group_id,
        "NANOVLLM_S3__ENDPOINT_URL": documents.s3.endpoint_url,
        "NANOVLLM_S3__ADDRESSING_STYLE": "path",
        "NANOVLLM_ADMISSION__IDLE_EXIT_S": "1",
    }


async def test_a_worker_ends_before_its_first_document_where_an_answer_leaves_no_prompt_any_room(
    documents: Documents, tmp_path: Path
) -> None:
    route = receipts_route(documents.bucket, sampling={"max_tokens": 64})
    routes = documents.settings(route)["documents"].routes
    async with serving(OpenAIServer(context=64)) as (server,):
        settings = worker_variables(documents, server, routes) | {"NANOVLLM_SAMPLING__MAX_TOKENS": "8"}
        worker = worker_process(tmp_path, "--exit-when-drained", settings=settings)
        worker.start()
        try:
            await eventually(lambda: not worker.is_running, timeout_s=120)
        finally:
            worker.kill()
    assert worker.exit_code == 2, worker.tail(30)
    assert "64 tokens of answer leave no room in the 64 that the servers have" in worker.tail(30)


async def test_a_worker_process_makes_records_without_torch_and_reads_its_routes_once(
    documents: Documents, model: EngineBackend, tmp_path: Path
) -> None:
    route = receipts_route(documents.bucket)
    written = documents.settings(route)["documents"].routes
    routes = tmp_path / "pipe.yaml"
    os.mkfifo(routes)  # whoever reads it a second time waits for ever
    writing = asyncio.create_task(asyncio.to_thread(routes.write_bytes, written.read_bytes()))
    await documents.send(documents.put("in/a.pdf", receipts_pdf([one.image for one in drawn(2)])))
    async with serving(OpenAIServer(model)) as (server,):
        server.gate = asyncio.Event()
        settings = worker_variables(documents, server, routes)
        worker = worker_process(tmp_path, "--exit-when-drained", settings=settings)
        worker.start()
        try:
            await eventually(lambda: bool(server.asked) or not worker.is_running, timeout_s=120)
            assert worker.is_running, worker.tail(30)
            maps = await asyncio.to_thread(Path(f"/proc/{worker.pid}/maps").read_text)
            server.gate.set()
            await eventually(lambda: not worker.is_running, timeout_s=120)
        finally:
            worker.kill()
    await writing
    assert worker.exit_code == 0, worker.tail(30)
    assert "libtorch" not in maps
    (record,) = await documents.records(1)
    assert record.status == "complete"
