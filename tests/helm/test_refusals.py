"""Values that no worker could use: each is refused before anything is installed, by its name and with a remedy."""

from __future__ import annotations

import re
from typing import Any

import pytest
from chart_release import merged
from helm_python.chart import Chart
from helm_python.errors import HelmError

from nanovllm.pipeline import worker
from nanovllm.pipeline.consuming import source, transactions
from tests.helm.test_chart import CHART, VALUE_FILES

SECRET = "hunter2"

TOPICS = {"enabled": True, "cluster": "c", "partitions": 12}
TOO_SMALL = "(4) is below the most workers (8): a partition has one worker, and the others would idle. Raise it"

# By what is wrong: the values, and what the message says of the value and of the remedy.
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "grace_period_of_the_drain": (
        {"terminationGracePeriodSeconds": 25},
        "terminationGracePeriodSeconds (25) must be above settings.admission.drain_timeout_s (25) and 15 more",
        "Raise it, or set it to null",
    ),
    "grace_period_without_the_commit": (
        {"settings": {"admission": {"drain_timeout_s": 60}}, "terminationGracePeriodSeconds": 75},
        "terminationGracePeriodSeconds (75) must be above settings.admission.drain_timeout_s (60)",
        "Raise it",
    ),
    "cooldown_below_a_start_of_the_backend": (
        {"settings": {"engine": {"backend": "native", "model": "/models/a"}}, "keda": {"cooldownPeriod": 60}},
        "keda.cooldownPeriod (60) is shorter than a start (probes.startup.seconds, 300 here)",
        "set probes.startup.seconds to what was measured",
    ),
    "cooldown_below_a_start_that_was_measured": (
        {"probes": {"startup": {"seconds": 900}}},
        "keda.cooldownPeriod (300) is shorter than a start (probes.startup.seconds, 900 here)",
        "Raise it",
    ),
    "fewer_partitions_than_workers": (
        {"kafkaTopics": TOPICS | {"partitions": 4}},
        f"kafkaTopics.partitions {TOO_SMALL}",
        "lower the most workers",
    ),
    "fewer_partitions_of_topics_made_elsewhere_than_workers": (
        {"kafkaTopics": {"partitions": 4}},
        f"kafkaTopics.partitions {TOO_SMALL}",
        "lower the most workers",
    ),
    "fewer_partitions_than_workers_without_keda": (
        {"kafkaTopics": TOPICS | {"partitions": 2}, "keda": {"enabled": False}, "replicaCount": 3},
        "kafkaTopics.partitions (2) is below the most workers (3)",
        "Raise it",
    ),
    "fewer_partitions_than_workers_of_an_autoscaler": (
        {
            "kafkaTopics": TOPICS | {"partitions": 2},
            "keda": {"enabled": False},
            "autoscaling": {"hpa": {"enabled": True, "maxReplicas": 3}},
        },
        "kafkaTopics.partitions (2) is below the most workers (3)",
        "Raise it",
    ),
    "topics_of_no_cluster": (
        {"kafkaTopics": {"enabled": True, "partitions": 12}},
        "kafkaTopics.enabled needs kafkaTopics.cluster",
        "the name of Strimzi's Kafka resource",
    ),
    "topics_without_partitions": (
        {"kafkaTopics": {"enabled": True, "cluster": "c"}},
        "kafkaTopics.enabled needs kafkaTopics.partitions",
        "the most workers that shall have work at once",
    ),
    "topics_that_nothing_could_be_written_to": (
        {"kafkaTopics": TOPICS | {"replicas": 1}},
        "kafkaTopics.replicas (1) is below min.insync.replicas (2) of kafkaTopics.config: nothing could be written",
        "Raise it, or lower the other",
    ),
    "one_group_instance_id": (
        {"settings": {"kafka": {"group_instance_id": "w"}}},
        "settings.kafka.group_instance_id is one for all pods of a Deployment, of which there may be 8",
        "Leave it out",
    ),
    "password_of_the_brokers": (
        {"settings": {"kafka": {"sasl_password": SECRET}}},
        "settings.kafka.sasl_password is a secret, and would stand in a ConfigMap",
        "take kafka.sasl.existingSecret",
    ),
    "password_of_a_private_key": (
        {"settings": {"kafka": {"ssl_key_password": SECRET}}},
        "settings.kafka.ssl_key_password is a secret",
        "take kafka.tls.existingSecret with keyPasswordKey",
    ),
    "api_keys": (
        {"settings": {"engine": {"backend": "openai"}, "remote": {"endpoints": ["http://a"], "api_keys": [SECRET]}}},
        "settings.remote.api_keys is a secret",
        "take remote.apiKeys.existingSecret",
    ),
    "secret_in_a_plain_variable": (
        {"extraEnv": [{"name": "NANOVLLM_KAFKA__SASL_PASSWORD", "value": SECRET}]},
        "extraEnv: NANOVLLM_KAFKA__SASL_PASSWORD is a secret, and its value would stand in the Deployment",
        "take valueFrom.secretKeyRef",
    ),
    "token_among_the_headers_of_traces": (
        {"extraEnv": [{"name": "OTEL_EXPORTER_OTLP_HEADERS", "value": f"authorization=Bearer%20{SECRET}"}]},
        "extraEnv: OTEL_EXPORTER_OTLP_HEADERS is a secret",
        "take valueFrom.secretKeyRef",
    ),
    "connection_string_in_a_plain_variable": (
        {"extraEnv": [{"name": "AZURE_STORAGE_CONNECTION_STRING", "value": f"AccountKey={SECRET}"}]},
        "extraEnv: AZURE_STORAGE_CONNECTION_STRING is a secret",
        "take valueFrom.secretKeyRef",
    ),
    "setting_in_a_variable": (
        {"extraEnv": [{"name": "NANOVLLM_TOPICS__JOBS", "value": "others"}]},
        "extraEnv: NANOVLLM_TOPICS__JOBS is a setting",
        "write it among settings",
    ),
    "section_of_settings_in_a_variable": (
        {"extraEnv": [{"name": "NANOVLLM_KAFKA", "value": f'{{"sasl_password": "{SECRET}"}}'}]},
        "extraEnv: NANOVLLM_KAFKA is a setting",
        "write it among settings",
    ),
    "login_in_the_url_of_a_variable": (
        {"extraEnv": [{"name": "HTTPS_PROXY", "value": f"http://me:{SECRET}@proxy:3128"}]},
        "extraEnv: HTTPS_PROXY is a URL with a user or a password",
        "take valueFrom.secretKeyRef",
    ),
    "login_in_the_url_of_a_setting": (
        {"settings": {"s3": {"endpoint_url": f"http://me:{SECRET}@minio:9000"}}},
        "settings.s3.endpoint_url is a URL with a user or a password",
        "give logins by a Secret",
    ),
    "model_named_twice": (
        {"settings": {"engine": {"model": "/models/a"}}, "model": {"s3": {"uri": "s3://models/a"}}},
        "settings.engine.model is set by model.s3.uri",
        "leave it out",
    ),
    "weights_for_a_backend_without": (
        {"settings": {"engine": {"backend": "echo"}}, "model": {"s3": {"uri": "s3://models/a"}}},
        "model.s3.uri is set, but settings.engine.backend is echo, which reads no weights",
        "leave it out",
    ),
    "cache_over_the_models": (
        {"cache": {"mountPath": "/models"}},
        "cache.mountPath and model.mountPath are both /models",
        "give the cache another path",
    ),
    "several_workers_in_a_pod": (
        {"settings": {"replicas": 2}},
        "settings.replicas is 2: a pod is one worker",
        "raise keda.maxReplicaCount or replicaCount",
    ),
    "probes_that_cannot_reach_the_worker": (
        {"settings": {"http": {"host": "127.0.0.1"}}},
        "settings.http.host is 127.0.0.1: probes and Prometheus come from outside of the pod",
        "Leave it out",
    ),
    "budget_that_stops_every_maintenance": (
        {"podDisruptionBudget": {"enabled": True, "maxUnavailable": 0}},
        "podDisruptionBudget.maxUnavailable is 0: no node that has a worker could be drained",
        "Set it to 1 or more",
    ),
    "root": (
        {"podSecurityContext": {"runAsUser": 0}},
        "has runAsUser 0: a worker needs no root",
        "Leave it out",
    ),
    "privileged": (
        {"securityContext": {"privileged": True}},
        "securityContext.privileged is true: a worker needs no such right",
        "Leave it out",
    ),
}

# What the schema refuses: it says where, and what would be right.
OUT_OF_FORM: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown_value": ({"replicas": 3}, "''", "additional properties 'replicas' not allowed"),
    "text_for_a_number": ({"keda": {"maxReplicaCount": "8"}}, "/keda/maxReplicaCount", "got string, want integer"),
    "startup_of_no_time": ({"probes": {"startup": {"seconds": 0}}}, "/probes/startup/seconds", "got 0, want 1"),
    "startup_in_words": (
        {"probes": {"startup": {"seconds": "5m"}}},
        "/probes/startup/seconds",
        "got string, want null or integer",
    ),
    "glob_of_a_model": ({"model": {"s3": {"uri": "s3://models/*"}}}, "/model/s3/uri", "does not match pattern"),
    "model_from_the_web": ({"model": {"s3": {"uri": "https://a/b"}}}, "/model/s3/uri", "does not match pattern"),
    "cache_without_a_size": ({"cache": {"sizeLimit": "much"}}, "/cache/sizeLimit", "does not match pattern"),
    "cache_in_no_folder": ({"cache": {"mountPath": "cache"}}, "/cache/mountPath", "does not match pattern"),
    "no_replica_of_a_topic": ({"kafkaTopics": {"replicas": 0}}, "/kafkaTopics/replicas", "got 0, want 1"),
    "no_topic": ({"kafkaTopics": {"extraTopics": ["a b"]}}, "/kafkaTopics/extraTopics/0", "does not match pattern"),
    "object_that_is_none": ({"extraObjects": [1]}, "/extraObjects/0", "got number, want string or object"),
    "password_as_a_value": ({"kafka": {"sasl": {"password": SECRET}}}, "/kafka/sasl", "'password' not allowed"),
}


@pytest.mark.parametrize(("values", "says", "remedy"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_work_is_refused_with_the_value_and_the_remedy(
    render: Any, values: dict[str, Any], says: str, remedy: str
) -> None:
    with pytest.raises(HelmError) as refusal:
        render(values)
    message = str(refusal.value)
    assert says in message
    assert remedy in message.partition(says)[2]
    assert SECRET not in message


@pytest.mark.parametrize(("values", "where", "says"), OUT_OF_FORM.values(), ids=OUT_OF_FORM.keys())
def test_what_has_not_the_form_is_refused_by_its_place(
    render: Any, values: dict[str, Any], where: str, says: str
) -> None:
    with pytest.raises(HelmError) as refusal:
        render(values)
    assert re.search(rf"at '?{re.escape(where)}'?: .*{re.escape(says)}", str(refusal.value))
    assert SECRET not in str(refusal.value)


def test_a_worker_has_committed_and_left_within_what_is_added_to_the_drain() -> None:
    (seconds,) = re.findall(r'"nanovllm.commitSeconds" -}}(\d+)', (CHART / "templates" / "_helpers.tpl").read_text())
    gives_back, leaves = worker.LEAVE_TIMEOUT_S, worker.LEAVE_TIMEOUT_S
    assert max(source.LEAVE_TIMEOUT_S, transactions.CLOSE_TIMEOUT_S) <= leaves  # they are parts of it
    assert gives_back + leaves < int(seconds)


def test_stand_by_workers_may_be_more_than_partitions(render: Any) -> None:
    render({"kafkaTopics": TOPICS | {"partitions": 4}, "keda": {"allowIdleConsumers": True}})


def test_a_group_that_never_goes_to_zero_may_cool_down_sooner(render: Any) -> None:
    render({"probes": {"startup": {"seconds": 900}}, "keda": {"minReplicaCount": 1}})


@pytest.mark.parametrize("backend", ["native-cpu", "native-gpu", "generic", "vllm", "openai-vllm", "echo"])
def test_files_of_features_go_with_each_file_of_a_backend(render: Any, backend: str) -> None:
    chart = Chart.load(CHART)
    for name, values in VALUE_FILES.items():
        if "backend" in values.get("settings", {}).get("engine", {}):
            continue
        both = merged(VALUE_FILES[backend], values)
        chart.validate_schema(both)
        assert render(both), name
