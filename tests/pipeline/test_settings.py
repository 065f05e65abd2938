from __future__ import annotations

import datetime
import os
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nanovllm.engine.config import EngineConfig
from nanovllm.errors import ConfigurationError, ForbiddenUri
from nanovllm.kafka.client import client_kwargs, consumer_kwargs, producer_kwargs, ssl_context, transactional_kwargs
from nanovllm.pipeline.build import WORKER_OPTIONS
from nanovllm.settings.engine import EngineSettings
from nanovllm.settings.kafka import KafkaSettings
from nanovllm.settings.loading import load_settings, unknown_variables
from nanovllm.settings.topics import TopicSettings
from nanovllm.settings.worker import Settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("NANOVLLM_"):
            monkeypatch.delenv(name)


def write_certificate(directory: Path, password: str | None = None) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    protection = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    certificate_file, key_file = directory / "tls.crt", directory / "tls.key"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection))
    return certificate_file, key_file


def test_the_promised_names_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": "b:1,c:2",
        "NANOVLLM_KAFKA__GROUP_ID": "g",
        "NANOVLLM_TOPICS__DEAD_LETTERS": "d",
        "NANOVLLM_TOPICS__IN_FLIGHT": "i",
        "NANOVLLM_HTTP__PORT": "9",
        "NANOVLLM_DELIVERY": "at_least_once",
        "NANOVLLM_S3__ENDPOINT_URL": "http://minio:9000",
        "NANOVLLM_S3__ADDRESSING_STYLE": "path",
        "NANOVLLM_S3__ALLOW": "s3://abc/in, s3://def",
        "NANOVLLM_ENGINE__MODEL": "m",
        "NANOVLLM_ENGINE__BACKEND": "echo",
        "NANOVLLM_ENGINE__MAX_MODEL_LEN": "128",
        "NANOVLLM_ENGINE__MODEL_ALIASES": '{"Small": "/models/small"}',
        "NANOVLLM_SAMPLING__STOP": '["a,b"]',
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert settings.kafka.bootstrap_servers == "b:1,c:2"
    assert settings.http.port == 9
    assert settings.s3.allow == ("s3://abc/in", "s3://def")
    assert settings.engine.model_aliases == {"Small": "/models/small"}
    assert settings.sampling.stop == ("a,b",)
    assert settings.sampling.temperature == 0.0
    assert settings.sampling.max_tokens == 256


def test_a_list_may_also_be_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_S3__ALLOW", '["s3://abc/with,comma"]')
    assert load_settings().s3.allow == ("s3://abc/with,comma",)


def test_an_allowed_prefix_may_end_in_a_wildcard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_S3__ALLOW", "s3://abc/in/*, s3://def/*")
    assert load_settings().s3.allow == ("s3://abc/in/*", "s3://def/*")


@pytest.mark.parametrize(
    "entry", ["s3://abc/in*", "s3://abc/*.png", "s3://abc/*/in", "s3://abc/in/?", "s3://*", "s3://a*c/in"]
)
@pytest.mark.parametrize("name", ["ALLOW", "LARGE_RESULTS"])
def test_a_wildcard_that_would_match_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, entry: str) -> None:
    monkeypatch.setenv(f"NANOVLLM_S3__{name}", entry)
    with pytest.raises(ConfigurationError, match="wildcard"):
        load_settings()


@pytest.mark.parametrize("name", ["RETRIES__DELAYS_S", "S3__ALLOW", "TOPICS__REPLY_TO"])
def test_a_list_that_does_not_end_is_a_configuration_error_and_not_quoted(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(f"NANOVLLM_{name}", "[5,60")
    with pytest.raises(ConfigurationError, match="neither a,b nor a list in brackets") as caught:
        load_settings()
    assert "[5,60" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("w.yaml", "kafka: {group_id: file, client_id: file}\ns3: {allow: [s3://abc]}\n"),
        ("w.toml", '[kafka]\ngroup_id = "file"\nclient_id = "file"\n[s3]\nallow = ["s3://abc"]\n'),
    ],
)
def test_the_environment_wins_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    monkeypatch.setenv("NANOVLLM_KAFKA__GROUP_ID", "environment")
    settings = load_settings(tmp_path / name)
    assert settings.kafka.group_id == "environment"
    assert settings.kafka.client_id == "file"
    assert settings.s3.allow == ("s3://abc",)


@pytest.mark.parametrize(
    "name", ["NANOVLLM_KAFKA__GROUP", "NANOVLLM_KAFAK__GROUP_ID", "NANOVLLM_HTTP_PROT", "NANOVLLM_HTTP__PORT__X"]
)
def test_an_unknown_variable_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "secret-value")
    with pytest.raises(ConfigurationError, match=name) as caught:
        load_settings()
    assert "secret-value" not in str(caught.value)


def test_what_kubernetes_injects_for_a_service_of_our_name_is_no_setting() -> None:
    injected = [
        "NANOVLLM_SERVICE_HOST",
        "NANOVLLM_SERVICE_PORT",
        "NANOVLLM_SERVICE_PORT_HTTP_METRICS",
        "NANOVLLM_PORT",
        "NANOVLLM_PORT_8080_TCP",
        "NANOVLLM_PORT_8080_TCP_PROTO",
        "NANOVLLM_PORT_8080_TCP_PORT",
        "NANOVLLM_PORT_8080_TCP_ADDR",
        "NANOVLLM_METRICS_SERVICE_HOST",
        "NANOVLLM_METRICS_PORT_9090_TCP_ADDR",
    ]
    assert list(unknown_variables(injected)) == []
    assert list(unknown_variables(["NANOVLLM_KAFKA__SERVICE_HOST"])) == ["NANOVLLM_KAFKA__SERVICE_HOST"]


@pytest.mark.parametrize("text", ["kafka: {nope: 1}", "nope: 1", "[1]", "kafka: [", "kafka: {group_id: }", "1: 2"])
def test_a_wrong_file_is_a_configuration_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "w.yaml").write_text(text)
    with pytest.raises(ConfigurationError):
        load_settings(tmp_path / "w.yaml")


def test_a_broken_file_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text("kafka:\n  sasl_password: 'hunter2\n")
    with pytest.raises(ConfigurationError, match="line") as caught:
        load_settings(tmp_path / "w.yaml")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NANOVLLM_ENGINE__MAX_NUM_SEQS": "hunter2"}, "(NANOVLLM_ENGINE__MAX_NUM_SEQS)"),
        ({"nanovllm_engine__max_num_seqs": "hunter2"}, "(nanovllm_engine__max_num_seqs)"),
        ({"NANOVLLM_S3__ALLOW": "hunter2"}, "(NANOVLLM_S3__ALLOW)"),
        ({"NANOVLLM_S3": '{"allow": "hunter2"}'}, "(NANOVLLM_S3)"),
        ({"NANOVLLM_LOG_LEVEL": "hunter2"}, "(NANOVLLM_LOG_LEVEL)"),
    ],
)
def test_a_wrong_value_of_the_environment_is_named_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as refused:
        load_settings()
    assert said in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_a_wrong_value_of_an_option_is_not_blamed_on_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_ENGINE__MAX_NUM_SEQS", "3")
    with pytest.raises(ConfigurationError) as refused:
        load_settings(None, {"engine": {"max_num_seqs": "many"}})
    assert "NANOVLLM" not in str(refused.value)


def test_a_wrong_value_is_named_but_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_KAFKA__SECURITY_PROTOCOL", "hunter2")
    with pytest.raises(ConfigurationError, match=r"kafka\.security_protocol") as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"NANOVLLM_HTTP__PORT": "70000"},
            "http.port: Input should be less than or equal to 65535 (NANOVLLM_HTTP__PORT=70000)",
        ),
        ({"NANOVLLM_REPLICAS": "-1"}, "(NANOVLLM_REPLICAS=-1)"),
        ({"NANOVLLM_ENGINE__MAX_NUM_SEQS": "1.5"}, "(NANOVLLM_ENGINE__MAX_NUM_SEQS=1.5)"),
        ({"NANOVLLM_HTTP": '{"port": 70000}'}, "(NANOVLLM_HTTP=70000)"),
    ],
)
def test_a_number_out_of_its_range_is_repeated(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as refused:
        load_settings()
    assert said in str(refused.value)


def test_a_number_of_a_file_is_repeated_and_a_password_that_is_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text("http: {port: 70000}\nkafka: {sasl_password: 12345}\n")
    with pytest.raises(ConfigurationError) as refused:
        load_settings(tmp_path / "w.yaml")
    assert "(it is 70000)" in str(refused.value)
    assert "kafka.sasl_password" in str(refused.value)
    assert "12345" not in str(refused.value)


def test_secrets_are_masked_wherever_settings_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_S3__ENDPOINT_URL", "https://user:hunter2@s3.example:9000/x")
    kafka = KafkaSettings(
        security_protocol="SASL_SSL", sasl_mechanism="PLAIN", sasl_username="u", sasl_password="hunter2"
    )
    settings = Settings(kafka=kafka)
    assert "hunter2" not in settings.masked_yaml()
    assert "s3.example:9000/x" in settings.masked_yaml()
    assert "hunter2" not in repr(settings.kafka)


def test_the_printed_configuration_can_be_read_back(tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text(Settings().masked_yaml())
    assert load_settings(file) == Settings()


def test_the_engines_own_defaults_are_those_of_the_settings() -> None:
    options = EngineSettings().model_dump(exclude=WORKER_OPTIONS)
    config = EngineConfig("m")
    differing = {name: value for name, value in options.items() if value != getattr(config, name)}
    # The engine takes None for `auto` as well. A job without sampling is greedy, whatever the checkpoint says.
    assert differing == {"dtype": "auto", "generation_config": "vllm"}


def test_each_input_partition_has_a_transactional_id_of_its_own() -> None:
    ids = {
        transactional_kwargs(KafkaSettings(group_id=group), topic, partition)["transactional_id"]
        for group in ("a", "a.b")
        for topic in ("b.c", "c")
        for partition in range(2)
    }
    assert len(ids) == 8


def test_the_groups_timeouts_follow_the_drains_budget() -> None:
    kwargs = consumer_kwargs(KafkaSettings(), drain_timeout_s=100)
    assert kwargs["rebalance_timeout_ms"] > 100_000
    assert kwargs["request_timeout_ms"] > kwargs["rebalance_timeout_ms"], "JoinGroup answers after the longest drain"
    assert consumer_kwargs(KafkaSettings(rebalance_timeout_ms=70_000))["rebalance_timeout_ms"] == 70_000


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"kafka": {"rebalance_timeout_ms": 60_000}, "admission": {"drain_timeout_s": 60}}, "rebalance_timeout_ms"),
        ({"admission": {"drain_timeout_s": 300}}, "max_poll_interval_ms"),
        ({"kafka": {"heartbeat_interval_ms": 6_000}}, "session_timeout_ms"),
    ],
)
def test_timeouts_that_would_evict_a_healthy_worker_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Settings(**values)


def test_membership_is_static_only_on_request() -> None:
    assert consumer_kwargs(KafkaSettings())["group_instance_id"] is None
    assert consumer_kwargs(KafkaSettings(group_instance_id="w-0"))["group_instance_id"] == "w-0"


def test_plaintext_carries_no_login_and_no_tls() -> None:
    kwargs = client_kwargs(KafkaSettings())
    assert kwargs["security_protocol"] == "PLAINTEXT"
    assert kwargs["ssl_context"] is None
    assert not [name for name in kwargs if name.startswith("sasl")]


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_tls_and_login_reach_aiokafka(tmp_path: Path, mechanism: str) -> None:
    ca, _ = write_certificate(tmp_path)
    kafka = KafkaSettings.model_validate(
        {
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": mechanism,
            "sasl_username": "worker",
            "sasl_password": "hunter2",
            "ssl_cafile": str(ca),
        }
    )
    for kwargs in (client_kwargs(kafka), consumer_kwargs(kafka), producer_kwargs(kafka)):
        assert kwargs["security_protocol"] == "SASL_SSL"
        assert kwargs["sasl_mechanism"] == mechanism
        assert kwargs["sasl_plain_username"] == "worker"
        assert kwargs["sasl_plain_password"] == "hunter2"
        context = kwargs["ssl_context"]
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert context.check_hostname
        assert len(context.get_ca_certs()) <= 1, "only the named CA is trusted"


def test_a_client_certificate_is_loaded_with_its_encrypted_key(tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path, password="hunter2")
    settings = {"security_protocol": "SSL", "ssl_cafile": certificate, "ssl_certfile": certificate, "ssl_keyfile": key}
    assert ssl_context(KafkaSettings.model_validate(settings | {"ssl_key_password": "hunter2"})) is not None
    for wrong in ({}, {"ssl_key_password": "wrong"}):
        with pytest.raises(ConfigurationError, match="ssl_"):
            ssl_context(KafkaSettings.model_validate(settings | wrong))


def test_a_missing_certificate_is_a_configuration_error(tmp_path: Path) -> None:
    kafka = KafkaSettings(security_protocol="SSL", ssl_cafile=tmp_path / "nope.pem")
    with pytest.raises(ConfigurationError, match="ssl_cafile"):
        client_kwargs(kafka)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"security_protocol": "SASL_SSL"}, "sasl_mechanism"),
        ({"security_protocol": "SASL_SSL", "sasl_mechanism": "PLAIN"}, "sasl_username"),
        ({"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"}, "OAUTHBEARER"),
        ({"sasl_username": "u", "sasl_password": "p"}, "PLAINTEXT"),
        ({"ssl_cafile": "/ca.pem"}, "PLAINTEXT"),
        ({"security_protocol": "SSL", "ssl_keyfile": "/k.pem"}, "ssl_certfile"),
    ],
)
def test_settings_that_would_quietly_weaken_the_connection_are_refused(values: dict[str, str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        KafkaSettings.model_validate(values)


def test_the_consumer_never_commits_behind_the_workers_back() -> None:
    kwargs = consumer_kwargs(KafkaSettings())
    assert kwargs["enable_auto_commit"] is False
    assert kwargs["auto_offset_reset"] == "none", "a reset behind its back would hide lost jobs"


def test_a_reply_topic_must_be_allowed() -> None:
    topics = TopicSettings(reply_to=("answers.a",))
    assert topics.result_topic(None) == "nanovllm.results"
    assert topics.result_topic("answers.a") == "answers.a"
    with pytest.raises(ForbiddenUri):
        topics.result_topic("nanovllm.jobs")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"topics": {"dead_letters": "nanovllm.jobs"}}, "topics.jobs and topics.dead_letters name the same topic"),
        ({"topics": {"results": "same", "metrics": "same"}}, "topics.results and topics.metrics name the same topic"),
        ({"topics": {"lanes": {"nanovllm.results": -1}}}, "topics.lanes and topics.results name the same topic"),
        ({"topics": {"lanes": {"nanovllm.jobs": -1}}}, "topics.jobs and topics.lanes name the same topic"),
        ({"topics": {"reply_to": ["nanovllm.jobs"]}}, "topics.jobs and topics.reply_to name the same topic"),
        ({"topics": {"in_flight": "nanovllm.metrics"}}, "topics.metrics and topics.in_flight name the same topic"),
        (
            {"retries": {"delays_s": [60]}, "topics": {"results": "nanovllm.jobs.retry-60s"}},
            "retries.delays_s and topics.results name the same topic",
        ),
        ({"retries": {"delays_s": [60]}, "topics": {"jobs": "j" * 245}}, "more than 249 characters"),
        ({"topics": {"jobs": "jobs/new"}}, "topics.jobs: is no name of a topic"),
        ({"topics": {"results": ".."}}, "topics.results: is no name of a topic"),
        ({"topics": {"metrics": ""}}, "topics.metrics: is no name of a topic"),
        ({"topics": {"dead_letters": "é"}}, "topics.dead_letters: is no name of a topic"),
        ({"topics": {"replayed": "nanovllm.jobs"}}, "topics.jobs and topics.replayed name the same topic"),
        ({"topics": {"in_flight": "n" * 250}}, "topics.in_flight: is no name of a topic"),
        ({"topics": {"lanes": {"a b": 1}}}, "is no name of a topic"),
        ({"topics": {"reply_to": ["ok", "not\nok"]}}, "is no name of a topic"),
    ],
)
def test_topics_that_coincide_or_that_kafka_refuses_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        load_settings(overrides=values)


def test_a_reply_topic_may_be_the_results_topic_and_be_named_twice() -> None:
    reply_to = ("nanovllm.results", "other", "other")
    assert load_settings(overrides={"topics": {"reply_to": reply_to}}).topics.reply_to == reply_to


@pytest.mark.parametrize("servers", ["a", "a:9092, b:1", "::1", "[::1]", "[fe80::1]:9092", "10.0.0.1:9092,"])
def test_brokers_are_read_as_aiokafka_reads_them(servers: str) -> None:
    assert load_settings(overrides={"kafka": {"bootstrap_servers": servers}}).kafka.bootstrap_servers == servers


@pytest.mark.parametrize("servers", ["broker:99999", "a:9092,b:65536", "[::1]:70000"])
def test_a_port_that_cannot_be_is_refused(servers: str) -> None:
    with pytest.raises(ConfigurationError, match=r"kafka.bootstrap_servers: a port is above 65535"):
        load_settings(overrides={"kafka": {"bootstrap_servers": servers}})
