"""The generated references: schemas of the messages, pages of settings, metrics and dead-letter codes, tables.

``PYTHONPATH=. .venv/bin/python tools/reference.py`` writes them into ``docs/``; a test fails while they differ.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel, SecretStr, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaMode

from nanovllm.checkpoints.profiles import shipped_profiles
from nanovllm.engine.backends.capabilities import ENGINE_FEATURES, GUIDED_KINDS, SAMPLING_NAMES
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.engine.backends.native import GENERIC, GENERIC_WITH_STATES, AsyncEngine
from nanovllm.engine.backends.openai.dialects import DIALECTS
from nanovllm.engine.backends.vllm.sampling import CAPABILITIES as VLLM_CAPABILITIES
from nanovllm.errors import NanoVLLMError, errors_of_dead_letters
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.messages.job import Job
from nanovllm.messages.job_metrics import JobMetrics
from nanovllm.messages.result import Result
from nanovllm.metrics import Metrics
from nanovllm.pipeline.stages.context import dead_letter_class
from nanovllm.settings.worker import ENV_PREFIX, Settings
from nanovllm.statistics import CacheStats, EndpointStats, EngineStats, TierStats

_METRIC_SUFFIXES = {"counter": "_total", "info": "_info"}

_MESSAGES: tuple[tuple[type[Job | Result | JobMetrics | DeadLetter | DocumentRecord], JsonSchemaMode], ...] = (
    (Job, "validation"),
    (Result, "serialization"),
    (JobMetrics, "serialization"),
    (DeadLetter, "serialization"),
    (DocumentRecord, "serialization"),
)

_SETTINGS_HEAD = """# Settings

Set them by environment (`NANOVLLM_KAFKA__GROUP_ID=receipts`) or in a YAML or TOML file (`nanovllm worker --config
worker.yaml`, or `NANOVLLM_CONFIG`), where the same names stand in sections:

```yaml
kafka:
  bootstrap_servers: broker:9092
  group_id: receipts
s3:
  allow: [s3://receipts/inbox]
```

The environment wins over the file. In a variable, lists and objects are JSON; lists of names may also be written `a,b`.
An unknown name is an error. `nanovllm worker --print-config` shows the effective values with secrets masked.
Credentials for S3 are the AWS SDK's own (`AWS_ACCESS_KEY_ID`, profiles, roles).

A deprecated setting goes with the next major version: its default is right, or follows from others.

This page is generated from the settings themselves (`PYTHONPATH=. .venv/bin/python tools/reference.py`).
"""


_CODES_HEAD = """# Dead-letter codes

A dead letter is the original message; why it failed stands in its headers
([schema](schemas/dead-letter.v1.json)). Codes are stable: scripts may rely on them. *Retryable*
means that the same message can succeed once the remedy was applied; where a code has two rows, each
dead letter says which. `nanovllm dlq list --count` shows what there is, `nanovllm dlq replay --code …`
sends it again, each once ([replays](retries.md#replays)).

This page is generated from the errors themselves (`PYTHONPATH=. .venv/bin/python tools/reference.py`).

| code | class | retryable | what it means | remedy |
|---|---|---|---|---|
"""


_METRICS_HEAD = """# Metrics

`GET /metrics` of a worker (port `http.port`) answers in the text format of Prometheus. Names follow vLLM's under
`nanovllm_` where there are any. They are promised: a name, its kind and its labels change with a major version alone.
A histogram has `_bucket`, `_sum` and `_count`. A process serves one model, which `nanovllm_worker_info` names:
`… * on (instance) group_left (model) nanovllm_worker_info` gives a metric its `model`. A `route` is the name of a route
of documents: the first 100, and `other` for further ones and for what no route takes. `GET /healthz` says whether the
process should be restarted (its event loop and its engine, never the brokers), `/startupz` whether its model is loaded,
`/readyz` whether it takes work.

This page is generated from the registry itself (`PYTHONPATH=. .venv/bin/python tools/reference.py`).

| metric | kind | labels | meaning |
|---|---|---|---|
"""


_CAPABILITIES = ("<!-- capabilities, by tools/reference.py -->", "<!-- end of capabilities -->")
_PROFILES = ("<!-- profiles, by tools/reference.py -->", "<!-- end of profiles -->")


def schemas() -> dict[str, str]:
    """JSON Schema texts by file name, one for each message and version."""
    texts = {}
    for model, mode in _MESSAGES:
        schema = model.model_json_schema(mode=mode)
        head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"nanovllm:{model.schema_name}"}
        texts[f"{model.schema_name}.json"] = json.dumps(head | schema, indent=2) + "\n"
    return texts


def settings_page() -> str:
    """Markdown of every setting: its variable, type, default and meaning."""
    top: list[str] = []
    sections: list[str] = []
    for name, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows = [_row(f"{name}__{inner}", info) for inner, info in field.annotation.model_fields.items()]
            sections += ["", f"## {name}", "", field.annotation.__doc__ or "", "", *_table(rows)]
        else:
            top.append(_row(name, field))
    return "\n".join([_SETTINGS_HEAD, "## Everywhere", "", *_table(top), *sections]) + "\n"


def codes_page() -> str:
    """Markdown of every code that a dead letter can have."""
    # A code has a row for each error that says something else about it.
    rows = [
        (
            f"`{error.code}`",
            dead_letter_class(error),
            "yes" if error.retryable else "no",
            " ".join((error.__doc__ or "").replace("``", "`").split())
            if error is not NanoVLLMError
            else "The worker itself is at fault.",
            error.remedy,
        )
        for error in sorted(errors_of_dead_letters(), key=lambda error: error.code)
    ]
    return _CODES_HEAD + "".join(_cells(row) + "\n" for row in rows)


def metrics_page() -> str:
    """Markdown of every metric of a worker."""
    metrics = Metrics()
    endpoints = (EndpointStats("http://server", is_up=True, faults=(("timeout", 1),)),)
    cache = CacheStats(tiers=(TierStats("host", 0, 0, 0, 0),))
    metrics.watch_engine(lambda: EngineStats(embedding_cache=cache, endpoints=endpoints))
    metrics.watch_page_store(lambda: {"hit": 0})
    rows = []
    for collector in list(metrics.registry._collector_to_names):
        if isinstance(collector, MetricWrapperBase):
            rows.append((collector.describe()[0], collector._labelnames))
        else:
            rows += [(family, tuple(family.samples[0].labels)) for family in collector.collect()]
    cells = [
        (
            f"`{family.name}{_METRIC_SUFFIXES.get(family.type, '')}`",
            family.type,
            ", ".join(f"`{label}`" for label in labels),
            family.documentation,
        )
        for family, labels in rows
    ]
    return _METRICS_HEAD + "".join(_cells(row) + "\n" for row in cells)


def capabilities_table() -> str:
    """Markdown of what each backend can do, by the capabilities that it declares."""
    backends = {
        "`native`": AsyncEngine.capabilities,
        "`generic`": GENERIC,
        "`generic`, layers with states": GENERIC_WITH_STATES,
    }
    backends |= {f"`openai`, `{name}`": dialect.capabilities for name, dialect in DIALECTS.items()}
    backends["`vllm`"] = VLLM_CAPABILITIES
    backends["`echo`"] = EchoEngine.capabilities
    able = backends.values()
    rows = [
        ("images", *(_yes(one.images) for one in able)),
        *((kind, *(_yes(kind in one.guided) for one in able)) for kind in GUIDED_KINDS),
        ("most `logprobs`", *("no" if one.logprobs is None else str(one.logprobs) for one in able)),
        ("`prompt_logprobs`", *(_yes(one.prompt_logprobs) for one in able)),
        ("`n` above 1", *(_yes(one.n) for one in able)),
        ("`deterministic`", *(_yes(one.deterministic) for one in able)),
        ("chunks while it runs", *(_yes(one.streaming) for one in able)),
        ("token ids", *(_yes(one.token_ids) for one in able)),
        ("most strings in `stop`", *(str(one.max_stops or 16) for one in able)),
        *((f"`{name}`", *(_yes(name in one.sampling) for one in able)) for name in sorted(SAMPLING_NAMES)),
        *((f"`engine.{name}`", *(_yes(name in one.settings) for one in able)) for name in sorted(ENGINE_FEATURES)),
    ]
    head = [_cells(("", *backends)), "|" + "---|" * (len(backends) + 1)]
    return "\n".join([*head, *(_cells(row) for row in rows)]) + "\n"


def with_capabilities(page: str) -> str:
    """``page`` with its table of capabilities made anew."""
    return _with_table(page, _CAPABILITIES, capabilities_table())


def profiles_table() -> str:
    """Markdown of the shipped profiles."""
    rows = [
        (
            f"`{one.name}`",
            f"{one.title}{'. *Regions*' if one.reads_regions else ''}",
            ", ".join(f"`{task}`" for task in one.tasks) or "none",
            _yes(one.free_instructions),
            _yes(one.several_pages),
        )
        for one in shipped_profiles().values()
    ]
    head = [_cells(("profile", "of", "tasks", "prompts of one's own", "several pages")), "|---|---|---|---|---|"]
    return "\n".join([*head, *(_cells(row) for row in rows)]) + "\n"


def with_profiles(page: str) -> str:
    """``page`` with its table of profiles made anew."""
    return _with_table(page, _PROFILES, profiles_table())


def _with_table(page: str, marks: tuple[str, str], table: str) -> str:
    begin, end = marks
    before, _, rest = page.partition(begin)
    _, _, behind = rest.partition(end)
    return f"{before}{begin}\n\n{table}\n{end}{behind}"


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def write(docs: Path) -> None:
    """Write all of it below ``docs``."""
    (docs / "schemas").mkdir(parents=True, exist_ok=True)
    for name, text in schemas().items():
        (docs / "schemas" / name).write_text(text, encoding="utf-8")
    (docs / "settings.md").write_text(settings_page(), encoding="utf-8")
    (docs / "metrics.md").write_text(metrics_page(), encoding="utf-8")
    (docs / "dead-letters.md").write_text(codes_page(), encoding="utf-8")
    for name, renew in (("backends.md", with_capabilities), ("profiles.md", with_profiles)):
        page = docs / name
        page.write_text(renew(page.read_text(encoding="utf-8")), encoding="utf-8")


def _table(rows: list[str]) -> Iterator[str]:
    yield "| variable | type | default | meaning |"
    yield "|---|---|---|---|"
    yield from rows


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{ENV_PREFIX}{name.upper()}`", _type_name(field), _default(field), field.description or "")
    return _cells(cells)


def _cells(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type_name(field: FieldInfo) -> str:
    schema = _schema_of(field)
    kinds = schema.get("anyOf", [schema])
    return " or ".join(text for kind in kinds if (text := _kind(kind)) != "null")


def _schema_of(field: FieldInfo) -> dict[str, Any]:
    annotation: Any = field.annotation
    return TypeAdapter(annotation).json_schema()


def _kind(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    names = {"array": "list", "string": {"password": "secret", "path": "path"}.get(schema.get("format", ""), "text")}
    return names.get(schema["type"], schema["type"])


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "" if field.annotation is str else "empty"
    value = field.default
    if value is None or isinstance(value, SecretStr):
        return "unset"
    if isinstance(value, tuple):
        return f"`{','.join(str(item) for item in value)}`" if value else "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("docs", type=Path, nargs="?", default=Path("docs"), help="where to; default: docs")
    write(parser.parse_args().docs)
