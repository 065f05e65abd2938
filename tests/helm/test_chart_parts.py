"""Weights, cache, topics, the smoke test and objects of the user's own, as the chart renders them."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from helm_python.chart import Chart

from nanovllm.cli.main import app
from nanovllm.pipeline.routing.routes import load_routes
from nanovllm.pipeline.topic_checks import topic_needs
from nanovllm.settings.worker import Settings
from tests.helm.test_chart import CHART, REPOSITORY, VALUE_FILES, VALUES, container_of, every_value_set, pod_of

MODEL = {"model": {"s3": {"uri": "s3://models/qwen/vl-2b/"}}}


def variables_of(container: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}


def volumes_of(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {one["name"]: one for one in pod_of(objects)["volumes"]}


def mounts_of(container: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one for one in container["volumeMounts"]}


def containers_of(objects: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """All containers of all pods, those that come first among them."""
    specs = [pod_of(objects)] + [one["spec"] for one in objects.values() if one["kind"] == "Pod"]
    return [container for spec in specs for container in [*spec.get("initContainers", ()), *spec["containers"]]]


# Every container


@every_value_set
def test_no_container_has_a_secret_in_plain_text(render: Any, values: dict[str, Any]) -> None:
    for container in containers_of(render(values)):
        for name, value in variables_of(container).items():
            if re.search("(KEYS?|KEY_ID|PASSWORD|SECRET|TOKEN)$", name):
                assert "secretKeyRef" in value, (container["name"], name)
            elif isinstance(value, str):
                assert "@" not in value, (container["name"], name)


@every_value_set
def test_every_container_runs_without_root_and_rights_on_a_read_only_root(render: Any, values: dict[str, Any]) -> None:
    objects = render(values)
    for container in containers_of(objects):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    for spec in [pod_of(objects), objects["Pod"]["spec"]]:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False


@every_value_set
def test_a_pod_has_longer_than_its_drain_and_its_probes_ask_for_what_they_decide(
    render: Any, values: dict[str, Any]
) -> None:
    objects = render(values)
    drain_s = float(objects["ConfigMap"]["data"]["NANOVLLM_ADMISSION__DRAIN_TIMEOUT_S"])
    assert pod_of(objects)["terminationGracePeriodSeconds"] > drain_s + 15
    worker = container_of(objects)
    asked = {name: worker[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked == {"startupProbe": "/startupz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}


# The startup probe


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ({}, 180),
        ({"settings": {"engine": {"backend": "echo"}}}, 60),
        ({"settings": {"engine": {"backend": "native", "model": "/models/a"}}}, 900),
        (MODEL, 900),
        ({"settings": {"engine": {"backend": "generic"}}, "keda": {"cooldownPeriod": 600}}, 1800),
        ({"probes": {"startup": {"seconds": 100}}}, 300),
        ({"probes": {"startup": {"seconds": 100, "periodSeconds": 7}}}, 301),
    ],
)
def test_the_startup_probe_waits_three_times_as_long_as_a_start_takes(
    render: Any, values: dict[str, Any], seconds: int
) -> None:
    probe = container_of(render(values))["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == seconds


# The model


def test_an_init_container_copies_the_model_to_where_the_worker_reads_it(render: Any) -> None:
    objects = render(MODEL)
    (init,) = pod_of(objects)["initContainers"]
    worker = container_of(objects)
    assert init["args"] == ["fetch-model", "s3://models/qwen/vl-2b/", "/models/vl-2b"]
    assert variables_of(worker)["NANOVLLM_ENGINE__MODEL"] == "/models/vl-2b"
    assert mounts_of(init)["model"] == {"name": "model", "mountPath": "/models"}
    assert mounts_of(worker)["model"] == {"name": "model", "mountPath": "/models", "readOnly": True}
    assert volumes_of(objects)["model"]["emptyDir"] == {"sizeLimit": "32Gi"}
    assert init["image"] == worker["image"]
    assert init["securityContext"] == worker["securityContext"]
    assert init["envFrom"] == worker["envFrom"]


@pytest.mark.parametrize("name", ["scram_tls", "everything_optional"])
def test_the_init_container_has_the_workers_logins_and_settings(render: Any, name: str) -> None:
    values = VALUES[name] | {"model": MODEL["model"]}
    objects = render(values)
    (init,) = pod_of(objects)["initContainers"]
    worker = container_of(objects)
    assert variables_of(init).items() <= variables_of(worker).items()
    logins = {key for key in variables_of(worker) if key.startswith(("AWS_", "NANOVLLM_KAFKA"))}
    assert logins <= variables_of(init).keys()
    assert mounts_of(init).keys() <= volumes_of(objects).keys()


@pytest.mark.parametrize(
    ("volume", "source"),
    [
        ({"existingClaim": "models"}, {"persistentVolumeClaim": {"claimName": "models", "readOnly": False}}),
        ({"volume": {"hostPath": {"path": "/srv"}}}, {"hostPath": {"path": "/srv"}}),
    ],
)
def test_a_volume_keeps_the_copy_where_there_is_one(render: Any, volume: dict[str, Any], source: Any) -> None:
    objects = render({"model": MODEL["model"] | volume})
    assert volumes_of(objects)["model"] == {"name": "model", **source}
    assert mounts_of(container_of(objects))["model"]["readOnly"] is True


def test_without_a_prefix_nothing_is_copied_and_a_claim_is_read_only(render: Any) -> None:
    objects = render({"model": {"existingClaim": "models"}})
    assert "initContainers" not in pod_of(objects)
    claim = volumes_of(objects)["model"]["persistentVolumeClaim"]
    assert claim == {"claimName": "models", "readOnly": True}
    assert "NANOVLLM_ENGINE__MODEL" not in variables_of(container_of(objects))


# The cache


@pytest.mark.parametrize(("limit", "packed"), [("16Gi", 8 << 30), ("10G", 5_000_000_000), ("1.5Gi", 3 << 28)])
def test_packed_weights_leave_half_of_an_empty_dir_to_the_file_that_replaces_them(
    render: Any, limit: str, packed: int
) -> None:
    objects = render({"cache": {"sizeLimit": limit}})
    assert volumes_of(objects)["cache"]["emptyDir"] == {"sizeLimit": limit}
    assert objects["ConfigMap"]["data"]["NANOVLLM_ENGINE__PACKED_WEIGHTS_BYTES"] == str(packed)


def test_a_claim_keeps_the_cache_under_the_workers_own_limit(render: Any) -> None:
    objects = render({"cache": {"existingClaim": "cache"}})
    assert volumes_of(objects)["cache"]["persistentVolumeClaim"] == {"claimName": "cache"}
    assert "NANOVLLM_ENGINE__PACKED_WEIGHTS_BYTES" not in objects["ConfigMap"]["data"]


def test_a_limit_of_the_users_own_stands(render: Any) -> None:
    objects = render({"settings": {"engine": {"packed_weights_bytes": 0}}})
    assert objects["ConfigMap"]["data"]["NANOVLLM_ENGINE__PACKED_WEIGHTS_BYTES"] == "0"


def test_whatever_a_start_compiles_and_packs_goes_to_the_cache(render: Any) -> None:
    gpu = container_of(render(VALUES["gpu"]))
    place = mounts_of(gpu)["cache"]["mountPath"]
    assert "readOnly" not in mounts_of(gpu)["cache"]
    assert variables_of(gpu)["XDG_CACHE_HOME"] == place
    assert variables_of(gpu)["TRITON_CACHE_DIR"] == f"{place}/triton"
    assert variables_of(container_of(render(VALUE_FILES["vllm"])))["VLLM_CACHE_ROOT"] == f"{place}/vllm"
    for name in ("echo", "openai-vllm"):
        objects = render(VALUE_FILES[name])
        assert "cache" not in volumes_of(objects)
        assert "XDG_CACHE_HOME" not in variables_of(container_of(objects))


# Topics


@pytest.mark.parametrize("name", ["strimzi", "documents", "lanes", "exactly-once"])
def test_the_topics_are_those_that_topics_create_makes(render: Any, name: str, tmp_path: Path) -> None:
    values = VALUE_FILES[name]
    topics = {"enabled": True, "cluster": "c", "partitions": 24, "config": {"min.insync.replicas": None}}
    objects = render(values | {"kafkaTopics": topics})
    made = {one["spec"]["topicName"]: one["spec"] for one in objects.values() if one["kind"] == "KafkaTopic"}
    settings = Settings.model_validate(values["settings"])
    if "routes" in values:
        write_routes(values, tmp_path)
        documents = settings.documents.model_copy(update={"routes": tmp_path / "routes.yaml"})
        settings = settings.model_copy(update={"documents": documents})
    needs = {need.name: need for need in topic_needs(settings)}
    if "routes" not in values:
        del needs[settings.topics.events]  # no worker reads it
    assert made.keys() == needs.keys()
    for topic, need in needs.items():
        assert made[topic]["config"] == dict(need.configs), topic
        assert made[topic]["partitions"] == (1 if need.purpose == "replayed" else 24)


def test_topics_belong_to_the_operators_cluster_and_outlive_the_release(render: Any) -> None:
    objects = render(VALUE_FILES["strimzi"])
    jobs = objects["KafkaTopic nanovllm.jobs"]
    assert jobs["metadata"]["namespace"] == "streaming"
    assert jobs["metadata"]["labels"]["strimzi.io/cluster"] == "streaming"
    assert jobs["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert jobs["spec"]["config"]["min.insync.replicas"] == "2"


def test_a_topic_whose_name_kubernetes_refuses_gets_an_object_of_its_own(render: Any) -> None:
    lanes = {"Jobs_urgent": -1, "jobs.urgent": -2, "jobs_urgent": -3}
    topics = {"enabled": True, "cluster": "c", "partitions": 12, "extraTopics": ["records"]}
    objects = render({"settings": {"topics": {"lanes": lanes}}, "kafkaTopics": topics})
    names = {topic: objects[f"KafkaTopic {topic}"]["metadata"]["name"] for topic in [*lanes, "records"]}
    assert names["jobs.urgent"] == "jobs.urgent"
    assert len(set(names.values())) == len(names)
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", name) for name in names.values())


def write_routes(values: dict[str, Any], folder: Path) -> None:
    (folder / "routes.yaml").write_text(values["routes"]["file"], encoding="utf-8")
    for name, text in values["routes"]["files"].items():
        (folder / name).write_text(text, encoding="utf-8")


def test_the_routes_of_the_example_are_routes(tmp_path: Path) -> None:
    write_routes(VALUE_FILES["documents"], tmp_path)
    (entry,) = load_routes(tmp_path / "routes.yaml").entries
    assert entry.route.name == "receipts"


# The smoke test


def test_the_pod_of_helm_test_sends_a_job_with_the_workers_logins(render: Any) -> None:
    objects = render(VALUES["scram_tls"])
    pod, worker = objects["Pod"], container_of(objects)
    (container,) = pod["spec"]["containers"]
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert container["image"] == worker["image"]
    assert container["envFrom"] == worker["envFrom"]
    kafka = {name for name in variables_of(worker) if name.startswith("NANOVLLM_KAFKA__")}
    assert kafka <= variables_of(container).keys()
    assert "kafka-tls" in mounts_of(container)
    assert pod["spec"]["restartPolicy"] == "Never"


def test_the_pod_of_helm_test_is_confined_and_no_worker(render: Any) -> None:
    objects = render({})
    pod = objects["Pod"]
    assert pod["spec"]["securityContext"] == pod_of(objects)["securityContext"]
    assert pod["spec"]["containers"][0]["securityContext"] == container_of(objects)["securityContext"]
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["enableServiceLinks"] is False
    assert not objects["Deployment"]["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_the_smoke_test_waits_for_a_start_and_the_pod_longer(render: Any) -> None:
    pod = render(MODEL)["Pod"]
    assert pod["spec"]["containers"][0]["args"] == ["smoke", "--timeout=1020"]
    assert pod["spec"]["activeDeadlineSeconds"] > 1020
    mine = {"prompt": "total? <|image|>", "image": "s3://a/b c.png", "expect": "6", "timeoutSeconds": 9}
    asked = render({"smokeTest": mine})["Pod"]["spec"]["containers"][0]["args"]
    assert asked[:2] == ["smoke", "--timeout=9"]
    assert set(asked[2:]) == {"--prompt=total? <|image|>", "--image=s3://a/b c.png", "--expect=6"}
    assert "Pod" not in render({"smokeTest": {"enabled": False}})


def test_the_commands_of_the_pods_exist() -> None:
    assert {"worker", "smoke", "fetch-model"} <= {one.name for one in app.registered_commands} | {"worker"}


# Objects of the user's own


def test_objects_of_the_users_own_are_rendered_with_the_charts_templates(render: Any) -> None:
    as_map = {
        "apiVersion": "v1",
        "kind": "LimitRange",
        "metadata": {"name": '{{ include "nanovllm.fullname" . }}-limits'},
        "spec": {"limits": [{"type": "Pod", "max": {"memory": "8Gi"}}]},
    }
    as_text = "{{ if .Values.keda.enabled }}apiVersion: v1\nkind: ResourceQuota\nmetadata: {name: quota}\n{{ end }}"
    objects = render({"extraObjects": [as_map, as_text]})
    assert objects["LimitRange"]["metadata"]["name"] == "demo-nanovllm-limits"
    assert objects["ResourceQuota"]["metadata"]["name"] == "quota"
    kubernetes_validate.validate(objects["LimitRange"], "1.35", strict=True)
    assert "ResourceQuota" not in render({"extraObjects": [as_text], "keda": {"enabled": False}})


def test_a_strategy_of_recreation_has_no_rolling_update(render: Any) -> None:
    assert render({"strategy": {"type": "Recreate"}})["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}


# The files of values


def test_there_are_values_for_what_users_run_and_each_file_says_how() -> None:
    assert len(VALUE_FILES) >= 12
    page = (REPOSITORY / "docs" / "deploy.md").read_text(encoding="utf-8")
    for name in VALUE_FILES:
        assert f"-f helm/nanovllm/examples/{name}.yaml" in (CHART / "examples" / f"{name}.yaml").read_text()
        assert f"| `{name}.yaml` |" in page


def test_every_value_is_described_where_it_stands() -> None:
    """By a comment above it, or above the map that it is in."""
    described: dict[int, bool] = {}
    lines = (CHART / "values.yaml").read_text(encoding="utf-8").splitlines()
    for above, line in pairwise(lines):
        if (found := re.match(r"( *)[\w.-]+:(.*)", line)) is None:
            continue
        depth = len(found[1])
        described = {other: is_told for other, is_told in described.items() if other < depth}
        described[depth] = above.strip().startswith("#")
        if found[2].strip():
            assert any(described.values()), line


def test_notes_name_the_smoke_test(chart_path: Path) -> None:
    notes = Chart.load(chart_path).render({}, name="demo", namespace="ns")["nanovllm/templates/NOTES.txt"]
    assert "helm test demo -n ns --logs" in notes
