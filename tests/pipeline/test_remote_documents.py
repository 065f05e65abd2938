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

from nanovllm.engine.backends.base import EngineBackend
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.pipeline import build
from nanovllm.settings.engine import EngineSettings
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


@pytest.mark.parametrize("request_pages", ["page", "document"])
async def test_records_by_servers_are_those_of_the_model_in_the_worker(
    documents: Documents, model: EngineBackend, request_pages: str
) -> None:
    sent = documents.put("in/a.pdf", receipts_pdf([one.image for one in drawn(3)]))
    merge = "per_page" if request_pages == "page" else "per_document"
    route = receipts_route(
        documents.bucket, pages={"dpi": 72, "request": request_pages}, merge=merge, sidecar=None
    )
    await documents.send(sent)
    async with documents.working(**documents.settings(route)):
        await documents.ended(1)
    async with serving(OpenAIServer(model, tells_token_ids=True, context=2_048)) as (server,):
        remote = in_front_of(server, dialect="vllm", revision="r7")
        await documents.send(sent)
        async with documents.working(**documents.settings(route) | remote):
            await documents.ended(2)
        assert len(server.asked) == (3 if request_pages == "page" else 1)
    native, by_server = await documents.records(2)
    assert by_server.constrained
    assert any(one.logprob_min is not None for one in by_server.fields.values())
    assert told(by_server) == told(native)
    assert (by_server.model.id, by_server.model.revision) == ("tiny", "r7")
    assert by_server.usage.output_tokens == native.usage.output_tokens
