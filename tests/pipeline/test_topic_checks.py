"""The topics that the settings imply: created so that they pass their own check, and what the check finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.admin import CreateAclsRequest
from bench import Bench
from parts import KafkaNode

from nanovllm.cli.main import main
from nanovllm.client.dead_letters import LetterFilter, read_dead_letters
from nanovllm.client.replay import replay
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import BrokersUnavailable, InvalidRoutes
from nanovllm.kafka.admin import create_topics, message_limits, topic_states
from nanovllm.kafka.client import client_kwargs, producer_kwargs
from nanovllm.pipeline.topic_checks import DAY_MS, TopicState, findings, implied_acls, topic_needs
from nanovllm.settings.documents import DocumentSettings
from nanovllm.settings.kafka import KafkaSettings
from nanovllm.settings.topics import TopicSettings
from nanovllm.settings.worker import Settings

SETTINGS = Settings.model_validate(
    {"retries": {"delays_s": [60, 7 * 24 * 3600]}, "topics": {"reply_to": ["replies"]}, "admission": {"ttl_s": 3600}}
)
RETRY = "nanovllm.jobs.retry-604800s"
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "routes.yaml"
WITH_ROUTES = SETTINGS.model_copy(update={"documents": DocumentSettings(routes=EXAMPLE)})


def healthy(settings: Settings = SETTINGS) -> dict[str, TopicState]:
    return {
        need.name: TopicState(8, 3, {"min.insync.replicas": "2", "cleanup.policy": "delete", **need.configs})
        for need in topic_needs(settings)
    }


def found(
    changes: dict[str, dict[str, str] | None], settings: Settings = SETTINGS, **more: int
) -> set[tuple[str, str]]:
    states = healthy(settings)
    for name, configs in changes.items():
        state = states.pop(name)
        if configs is not None:
            states[name] = TopicState(state.partitions, state.replication, {**state.configs, **configs})
    settings = settings.model_copy(update={"kafka": settings.kafka.model_copy(update={"max_request_bytes": 2 * 2**20})})
    return {(one.topic, one.level) for one in findings(settings, states, **more)}


def test_what_would_lose_jobs_is_an_error_and_what_may_a_warning() -> None:
    assert found({}) == set()
    assert found({"nanovllm.results": None}) == {("nanovllm.results", "error")}
    assert found({"replies": None}) == {("replies", "error")}
    assert found({"nanovllm.jobs": {"cleanup.policy": "compact,delete"}}) == {("nanovllm.jobs", "error")}
    assert found({RETRY: {"retention.ms": str(7 * DAY_MS)}}) == {(RETRY, "error")}
    assert found({RETRY: {"retention.ms": "-1"}}) == set()
    assert found({"nanovllm.jobs": {"retention.ms": "60000"}}) == {("nanovllm.jobs", "warning")}
    assert found({"nanovllm.dead-letters": {"retention.ms": "60000"}}) == {("nanovllm.dead-letters", "warning")}
    assert found({"nanovllm.dead-letters": {"max.message.bytes": "8192"}}) == {("nanovllm.dead-letters", "warning")}
    assert found({"nanovllm.dead-letters": {"max.message.bytes": "8191"}}) == {("nanovllm.dead-letters", "error")}
    assert found({"nanovllm.metrics": {"min.insync.replicas": "4"}}) == {("nanovllm.metrics", "error")}
    assert found({"nanovllm.metrics": {"min.insync.replicas": "1"}}) == {("nanovllm.metrics", "warning")}
    assert found({"nanovllm.replayed": None}) == set()
    assert "nanovllm.replayed" not in {name for _, name, _, _ in implied_acls(SETTINGS)}
    # Without routes no worker reads it; a bridge says that it is missing.
    assert found({"nanovllm.events": None}) == set()
    assert found({"nanovllm.events": {"cleanup.policy": "compact"}}) == {("nanovllm.events", "error")}
    assert found({"nanovllm.replayed": {"cleanup.policy": "delete"}}) == {("nanovllm.replayed", "warning")}
    assert found({}, workers=9) == {("nanovllm.jobs", "error")}


def test_with_routes_events_are_checked_as_jobs_are() -> None:
    events, retry = "nanovllm.events", "nanovllm.events.retry-604800s"
    assert found({}, WITH_ROUTES) == set()
    assert found({events: None}, WITH_ROUTES) == {(events, "error")}
    assert found({retry: None}, WITH_ROUTES) == {(retry, "error")}
    assert found({events: {"cleanup.policy": "compact"}}, WITH_ROUTES) == {(events, "error")}
    assert found({events: {"compression.type": "producer"}}, WITH_ROUTES) == {(events, "warning")}
    assert found({events: {"retention.ms": "60000"}}, WITH_ROUTES) == {(events, "warning")}
    assert found({events: {"retention.ms": str(90 * DAY_MS)}}, WITH_ROUTES) == {("nanovllm.dead-letters", "warning")}
    assert found({}, WITH_ROUTES, workers=9) == {("nanovllm.jobs", "error"), (events, "error")}
    # What a bridge fills for others is as these want it.
    assert found({events: {"compression.type": "producer", "retention.ms": "60000"}}) == set()


def test_with_routes_a_worker_reads_events_and_writes_the_topics_of_records() -> None:
    def rights(settings: Settings) -> set[tuple[str, str]]:
        return {(name, right) for kind, name, _, right in implied_acls(settings) if kind == "TOPIC"}

    more = rights(WITH_ROUTES) - rights(SETTINGS)
    assert {name for name, right in more if right == "READ"} == {
        "nanovllm.events",
        "nanovllm.events.retry-60s",
        "nanovllm.events.retry-604800s",
    }
    assert ("nanovllm.events", "DESCRIBE") in more
    assert ("nanovllm.events", "WRITE") not in more
    records = {"totals", "totals.review"}
    assert {name for name, right in more if right == "WRITE"} - records == {
        "nanovllm.events.retry-60s",
        "nanovllm.events.retry-604800s",
    }
    assert {right for name, right in more if name in records} == {"WRITE", "DESCRIBE", "DESCRIBE_CONFIGS"}


def test_a_topic_of_records_that_the_settings_name_is_needed_once() -> None:
    replies = WITH_ROUTES.topics.model_copy(update={"reply_to": ("totals",), "results": "totals.review"})
    needs = topic_needs(WITH_ROUTES.model_copy(update={"topics": replies}))
    assert [need.purpose for need in needs if need.name in ("totals", "totals.review")] == ["results", "reply"]


def test_routes_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"documents": DocumentSettings(routes=tmp_path / "none.yaml")})
    with pytest.raises(InvalidRoutes, match=r"none\.yaml"):
        implied_acls(settings)


def test_a_finding_recommends_only_what_does_it() -> None:
    def said(states: dict[str, TopicState], **more: int) -> dict[str, str]:
        return {one.topic: one.what for one in findings(SETTINGS, states, **more)}

    states = healthy()
    del states["replies"], states[RETRY]
    assert said(states)["replies"] == "does not exist; the service that reads it makes it"
    assert said(states)[RETRY] == "does not exist; nanovllm topics create makes it"
    # `topics create` changes no topic that is there.
    few = said(healthy(), workers=9)["nanovllm.jobs"]
    assert few.startswith("has 8 partitions: of 9 workers some stay idle; kafka-topics.sh")
    assert "--alter --topic nanovllm.jobs --partitions 9" in few


@pytest.mark.kafka
def test_what_is_created_passes_the_check_on_apache_kafka(
    kafka_broker: str, unique: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOVLLM_KAFKA__BOOTSTRAP_SERVERS", kafka_broker)
    for name in ("jobs", "results", "metrics", "dead_letters", "events", "replayed"):
        monkeypatch.setenv(f"NANOVLLM_TOPICS__{name.upper()}", unique(name))
    monkeypatch.setenv("NANOVLLM_RETRIES__DELAYS_S", "1209600")
    assert main(["topics", "check", "--json"]) == 1
    missing = json.loads(capsys.readouterr().out)
    assert {row["finding"] for row in missing} == {"does not exist; nanovllm topics create makes it"}
    assert main(["topics", "create", "--partitions", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 7
    assert main(["topics", "check", "--workers", "3", "--json"]) == 0
    # One broker holds one replica: said, and no error.
    assert {row["finding"] for row in json.loads(capsys.readouterr().out)} == {
        "has one replica: a lost broker loses it"
    }
    assert main(["topics", "check", "--workers", "4"]) == 1
    capsys.readouterr()
    monkeypatch.setenv("NANOVLLM_DELIVERY", "exactly_once")
    assert main(["topics", "check", "--json"]) == 0
    told = [row for row in json.loads(capsys.readouterr().out) if "may show outputs twice" in row["finding"]]
    # All that a worker writes, and not the jobs.
    assert len(told) == 4


@pytest.mark.kafka
def test_topics_of_events_and_records_are_created_checked_and_granted(
    kafka_broker: str,
    tmp_path: Path,
    unique: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def rows(*words: str) -> list[dict[str, str]]:
        main(["topics", *words, "--json"])
        return json.loads(capsys.readouterr().out)

    monkeypatch.setenv("NANOVLLM_KAFKA__BOOTSTRAP_SERVERS", kafka_broker)
    for name in ("jobs", "results", "metrics", "dead_letters", "events", "replayed"):
        monkeypatch.setenv(f"NANOVLLM_TOPICS__{name.upper()}", unique(name))
    records = [unique("totals"), unique("review")]
    route = {
        "name": "totals",
        "match": {"bucket": "inbox", "key": "**/*.pdf"},
        "prompt": "Total?",
        "result_topic": records[0],
        "review_topic": records[1],
    }
    routes = tmp_path / "routes.yaml"
    routes.write_text(json.dumps({"routes": [route]}))
    monkeypatch.setenv("NANOVLLM_DOCUMENTS__ROUTES", str(routes))
    missing = {row["topic"] for row in rows("check")}
    assert {row["topic"] for row in rows("create") if row["state"] == "created"} >= missing >= set(records)
    assert all(row["level"] == "warning" for row in rows("check"))
    assert {row["name"] for row in rows("acls") if row["operation"] == "WRITE"} >= set(records)


@pytest.mark.kafka
async def test_a_worker_needs_the_rights_that_are_listed_and_no_others(
    tmp_path: Path, unique: Callable[[str], str], bench: Bench
) -> None:
    login = "org.apache.kafka.common.security.scram.ScramLoginModule required"
    broker = {
        "listeners": "SASL_PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": "SASL_PLAINTEXT://127.0.0.1:{port}",
        "listener.security.protocol.map": "SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "SASL_PLAINTEXT",
        "sasl.mechanism.inter.broker.protocol": "SCRAM-SHA-512",
        "sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.sasl_plaintext.scram-sha-512.sasl.jaas.config": f'{login} username="admin" password="admin";',
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:admin;User:ANONYMOUS",
    }
    scram = {"admin": "admin", "worker": "secret", "operator": "secret"}
    async with KafkaNode(tmp_path, settings=broker, scram=scram, probe=False) as node:

        def login_as(user: str, password: str) -> KafkaSettings:
            return KafkaSettings.model_validate(
                {
                    "bootstrap_servers": node.bootstrap_servers,
                    "security_protocol": "SASL_PLAINTEXT",
                    "sasl_mechanism": "SCRAM-SHA-512",
                    "sasl_username": user,
                    "sasl_password": password,
                    "group_id": "workers",
                }
            )

        admin, worker, operator = (login_as("admin", "admin"), *(login_as(u, "secret") for u in ("worker", "operator")))
        settings = bench.settings.model_copy(update={"kafka": worker})
        names = [need.name for need in topic_needs(settings) if need.operations]
        await create_topics(admin, [*names, settings.topics.replayed, "others"], partitions=2)
        await grant(admin, "User:worker", implied_acls(settings))
        assert set(await topic_states(worker, [*names, settings.topics.replayed, "others"])) == set(names)
        limits = await message_limits(worker, names)
        assert len(limits) == len(names)
        producer = AIOKafkaProducer(**producer_kwargs(admin))
        await producer.start()
        own = AIOKafkaProducer(**producer_kwargs(worker))
        await own.start()
        try:
            there = Bench(node.bootstrap_servers, settings, own, bench.decoders)
            jobs = settings.topics.jobs
            await producer.send_and_wait(jobs, b'{"job_id": "a", "prompt": "p"}', partition=0)
            await producer.send_and_wait(jobs, b"broken", partition=0)
            async with there.working(EchoEngine()):
                await read_as(admin, settings.topics.results, 1)
                await read_as(admin, settings.topics.dead_letters, 1)
            await grant(admin, "User:operator", [("TOPIC", *right) for right in replay_rights(settings.topics)])
            replaying = settings.model_copy(update={"kafka": operator})
            for state in ("replayed", "skipped"):
                letters = read_dead_letters(replaying, LetterFilter())
                replays = replay(replaying, [jobs], letters, per_second=100, send=True)
                assert [one.state async for one in replays] == [state]
            with pytest.raises(Exception, match="Authorization"):
                await own.send_and_wait(jobs, b"a worker need not write jobs")
        finally:
            await producer.stop()
            await own.stop()


def replay_rights(topics: TopicSettings) -> list[tuple[str, str, str]]:
    """As docs/retries.md lists them, for topics that are there."""
    rights = {topics.jobs: ("READ", "WRITE"), topics.dead_letters: ("READ",), topics.replayed: ("READ", "WRITE")}
    return [(topic, "LITERAL", right) for topic, some in rights.items() for right in some]


async def grant(kafka: KafkaSettings, principal: str, acls: list[tuple[str, str, str, str]]) -> None:
    """By the wire protocol: aiokafka's admin client has no method for it."""
    resources = {"TOPIC": 2, "GROUP": 3, "TRANSACTIONAL_ID": 5}
    operations = {"READ": 3, "WRITE": 4, "DESCRIBE": 8, "DESCRIBE_CONFIGS": 10}
    patterns = {"LITERAL": 3, "PREFIXED": 4}
    client = AIOKafkaAdminClient(**client_kwargs(kafka))
    await client.start()
    try:
        for resource, name, pattern, operation in acls:
            kind, right = resources[resource], operations[operation]
            request = CreateAclsRequest(kind, name, patterns[pattern], principal, "*", right, 3)
            response = await client._send_request(request)
            assert response.creation_responses[0][0] == 0
    finally:
        await client.close()


async def read_as(kafka: KafkaSettings, topic: str, count: int) -> None:
    from aiokafka import AIOKafkaConsumer

    consumer = AIOKafkaConsumer(topic, **client_kwargs(kafka), auto_offset_reset="earliest")
    await consumer.start()
    try:
        for _ in range(count):
            await consumer.getone()
    finally:
        await consumer.stop()


async def test_a_broker_that_does_not_answer_is_named() -> None:
    nowhere = KafkaSettings(bootstrap_servers="127.0.0.1:1", request_timeout_ms=500)
    with pytest.raises(BrokersUnavailable, match=r"127\.0\.0\.1:1"):
        await topic_states(nowhere, ["a"])
