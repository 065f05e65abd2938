"""Scaling of the chart: seconds of work, an HPA without KEDA, and the idle pod first."""

from __future__ import annotations

import json
import lzma
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helm_python.errors import HelmError

Render = Callable[..., dict[str, dict[str, Any]]]
REPOSITORY = Path(__file__).resolve().parents[2]
KEDA_CRDS = REPOSITORY.parent / "shared" / "k8s" / "keda-crds.json.xz"
RULES = REPOSITORY / "helm" / "nanovllm" / "rules" / "nanovllm.scaling.rules.yaml"
LANES = {"topics": {"lanes": {"urgent": -10}}, "retries": {"delays_s": [60]}}
MEASURED = {"keda": {"prometheus": {"serverAddress": "http://prometheus.monitoring.svc:9090"}}}
COST = {"podDeletionCost": {"enabled": True}}


def spec_of(render: Render, values: dict[str, Any]) -> dict[str, Any]:
    return render(values)["ScaledObject"]["spec"]


def modifiers(render: Render, values: dict[str, Any]) -> dict[str, str]:
    return spec_of(render, values)["advanced"]["scalingModifiers"]


def test_every_topic_counts_in_seconds_of_work(render: Render) -> None:
    found = modifiers(render, {"settings": LANES, "keda": {"secondsPerJob": 2.5}})
    assert found == {
        "formula": "lag * 2.5 + lag_1 * 2.5 + lag_2 * 2.5 + lag_3 * 2.5",
        "target": "60",
        "activationTarget": "0",
        "metricType": "AverageValue",
    }
    names = [one["name"] for one in spec_of(render, {"settings": LANES})["triggers"]]
    assert names == ["lag", "lag_1", "lag_2", "lag_3"]


def test_events_have_seconds_of_their_own(render: Render) -> None:
    values = {"routes": {"existingConfigMap": "routes"}, "keda": {"secondsPerJob": 0.5, "secondsPerEvent": 12}}
    assert modifiers(render, values)["formula"] == "lag * 0.5 + lag_1 * 12"
    thresholds = [one["metadata"]["lagThreshold"] for one in spec_of(render, values)["triggers"]]
    assert thresholds == ["120", "5"]


def test_a_threshold_in_messages_is_taken_as_seconds(render: Render) -> None:
    found = spec_of(render, {"keda": {"lagThreshold": 10}})
    assert found["advanced"]["scalingModifiers"]["formula"] == "lag * 6"
    assert found["triggers"][0]["metadata"]["lagThreshold"] == "10"


def test_what_a_job_takes_is_measured_where_there_is_a_prometheus(render: Render) -> None:
    found = spec_of(render, MEASURED)
    assert found["advanced"]["scalingModifiers"]["formula"] == "(lag) * seconds_per_job"
    lag, measured = found["triggers"]
    # KEDA would bound the lag by messages, of which it knows not what one takes.
    assert lag["metadata"]["allowIdleConsumers"] == "true"
    assert (measured["type"], measured["name"]) == ("prometheus", "seconds_per_job")
    assert 'namespace="ns",pod=~"demo-nanovllm-.+"' in measured["metadata"]["query"]
    assert measured["metadata"]["query"].endswith(" or vector(0.6)")


def test_with_extra_triggers_keda_decides_by_the_most(render: Render) -> None:
    cron = {
        "type": "cron",
        "metadata": {"timezone": "UTC", "start": "0 6 * * *", "end": "0 7 * * *", "desiredReplicas": "1"},
    }
    assert "scalingModifiers" not in spec_of(render, {"keda": {"extraTriggers": [cron]}})["advanced"]
    own = {"formula": "max(lag * 0.6, morning)", "target": "60"}
    values = {"keda": {"extraTriggers": [cron | {"name": "morning"}], "advanced": {"scalingModifiers": own}}}
    assert modifiers(render, values) == own


def test_workers_go_slowly_and_stay_while_the_lag_cannot_be_read(render: Render) -> None:
    found = spec_of(render, {})
    down = found["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    assert down["stabilizationWindowSeconds"] >= 300
    assert found["fallback"] == {"failureThreshold": 3, "replicas": 1, "behavior": "currentReplicasIfHigher"}
    assert "fallback" not in spec_of(render, {"keda": {"fallback": None}})
    assert found["triggers"][0]["metadata"]["excludePersistentLag"] == "false"


def test_an_hpa_takes_kedas_place(render: Render) -> None:
    objects = render({"keda": {"enabled": False}, "autoscaling": {"hpa": {"enabled": True, "maxReplicas": 3}}})
    assert "ScaledObject" not in objects
    assert "replicas" not in objects["Deployment"]["spec"]
    hpa = objects["HorizontalPodAutoscaler"]
    for version in ("1.27", "1.35"):
        kubernetes_validate.validate(hpa, version, strict=True)
    (metric,) = hpa["spec"]["metrics"]
    assert metric["external"] == {
        "metric": {"name": "nanovllm_seconds_of_work", "selector": {"matchLabels": {"release": "demo-nanovllm"}}},
        "target": {"type": "AverageValue", "averageValue": "60"},
    }
    assert (hpa["spec"]["minReplicas"], hpa["spec"]["maxReplicas"]) == (1, 3)


def test_the_rules_of_the_hpas_metric_come_with_the_alerts(render: Render) -> None:
    rules = {"metrics": {"rules": {"enabled": True}}}
    (alerts,) = render(rules)["PrometheusRule"]["spec"]["groups"]
    hpa = {"keda": {"enabled": False}, "autoscaling": {"hpa": {"enabled": True}}}
    groups = render(rules | hpa)["PrometheusRule"]["spec"]["groups"]
    assert groups == [alerts, *yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]]


def test_a_pod_may_change_its_status_alone_and_has_a_token_for_it(render: Render) -> None:
    objects = render(COST)
    for kind in ("Role", "RoleBinding", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding", "Deployment"):
        kubernetes_validate.validate(objects[kind], "1.35", strict=True)
    assert objects["Role"]["rules"] == [{"apiGroups": [""], "resources": ["pods/status"], "verbs": ["patch"]}]
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    (volume,) = (one for one in pod["volumes"] if one["name"] == "kubernetes")
    assert [next(iter(source)) for source in volume["projected"]["sources"]] == [
        "serviceAccountToken",
        "configMap",
        "downwardAPI",
    ]
    without = render({})
    assert not {"Role", "RoleBinding", "ValidatingAdmissionPolicy"} & without.keys()
    assert not any(one["name"] == "kubernetes" for one in without["Deployment"]["spec"]["template"]["spec"]["volumes"])
    assert "ValidatingAdmissionPolicy" not in render({"podDeletionCost": {"enabled": True, "admissionPolicy": False}})


@pytest.mark.parametrize("values", [{}, {"settings": LANES}, MEASURED, {"keda": {"advanced": {}}}], ids=str)
def test_the_formula_fits_kedas_own_schema(render: Render, values: dict[str, Any]) -> None:
    if not KEDA_CRDS.exists():
        pytest.skip("KEDA's CRDs: no ../shared/k8s/keda-crds.json.xz")
    crds = json.loads(lzma.decompress(KEDA_CRDS.read_bytes()))
    (crd,) = (one for one in crds if one["spec"]["names"]["kind"] == "ScaledObject")
    jsonschema.validate(render(values)["ScaledObject"], crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"autoscaling": {"hpa": {"enabled": True}}}, "Set keda.enabled to false"),
        (
            {"keda": {"enabled": False}, "autoscaling": {"hpa": {"enabled": True, "minReplicas": 9}}},
            "minReplicas is above",
        ),
        ({"keda": MEASURED["keda"] | {"lagThreshold": 5}}, "5 messages, but keda.prometheus measures"),
        ({"keda": MEASURED["keda"] | {"limitToPartitionsWithLag": True}}, "leave one of them out"),
        ({"keda": MEASURED["keda"] | {"extraTriggers": [{"type": "cron"}]}}, "write keda.advanced.scalingModifiers"),
        ({"keda": {"excludePersistentLag": True}}, "none would ever start"),
        (COST | {"serviceAccount": {"create": False}}, "every pod of the namespace"),
        (COST | {"settings": {"kubernetes": {"pod_deletion_cost": True}}}, "is set by podDeletionCost.enabled"),
        ({"keda": {"secondsPerWorker": 1.5}}, "secondsPerWorker"),
        ({"keda": {"secondsPerJob": 0}}, "secondsPerJob"),
        ({"keda": {"prometheus": {"serverAddress": "http://user:hunter2@prometheus"}}}, "take keda.prometheus.auth"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_of_scaling_that_cannot_work_are_refused(render: Render, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(HelmError, match=reason) as refusal:
        render(values)
    assert "hunter2" not in str(refusal.value)


# Two workers, of which one idles for half of its time; together they end three jobs a second.
OURS = 'namespace="ns",job="ns/demo-nanovllm",pod="demo-nanovllm-'
SERIES = {
    f'nanovllm_engine_idle_seconds_total{{{OURS}a",reason="empty"}}': 0,
    f'nanovllm_engine_idle_seconds_total{{{OURS}b",reason="empty"}}': 30,
    f'nanovllm_engine_idle_seconds_total{{{OURS}b",reason="fetch"}}': 9,
    'nanovllm_engine_idle_seconds_total{namespace="ns",job="ns/other",pod="other-c",reason="empty"}': 60,
    f'nanovllm_jobs_total{{{OURS}a",outcome="result"}}': 60,
    f'nanovllm_jobs_total{{{OURS}b",outcome="result"}}': 120,
    f'nanovllm_jobs_total{{{OURS}b",outcome="returned"}}': 600,
}
"""Growth a minute of each series."""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool on this machine (apt install prometheus)")
def test_prometheus_reads_the_seconds_of_a_job_and_all_work(render: Render, tmp_path: Path) -> None:
    query = spec_of(render, MEASURED)["triggers"][1]["metadata"]["query"]
    lag = 'nanovllm_consumer_lag_records{namespace="ns",job="ns/demo-nanovllm",topic="jobs",partition="0"}'
    work = 'nanovllm:seconds_of_work{job="ns/demo-nanovllm",namespace="ns",release="demo-nanovllm"}'
    measured = {
        "interval": "1m",
        "input_series": [
            *({"series": series, "values": f"0+{per_minute}x30"} for series, per_minute in SERIES.items()),
            {"series": lag, "values": "40x30"},
        ],
        "promql_expr_test": [
            {"expr": query, "eval_time": "20m", "exp_samples": [{"labels": "{}", "value": 0.5}]},
            {"expr": "nanovllm:seconds_of_work", "eval_time": "20m", "exp_samples": [{"labels": work, "value": 20}]},
        ],
    }
    nothing_ended = {
        "interval": "1m",
        "input_series": [{"series": lag, "values": "40x30"}],
        "promql_expr_test": [
            {"expr": query, "eval_time": "20m", "exp_samples": [{"labels": "{}", "value": 0.6}]},
            {"expr": "nanovllm:seconds_of_work", "eval_time": "20m", "exp_samples": [{"labels": work, "value": 40}]},
        ],
    }
    tests = tmp_path / "tests.yaml"
    tests.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": [measured, nothing_ended]}))
    checked = subprocess.run(["promtool", "check", "rules", "--lint-fatal", str(RULES)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    ended = subprocess.run(["promtool", "test", "rules", str(tests)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
