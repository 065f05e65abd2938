"""Alerts, dashboard and runbook: checked by promtool, and against the metrics that a worker has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanovllm.metrics import Metrics
from tools import dashboard

REPOSITORY = Path(__file__).resolve().parents[2]
RULES = REPOSITORY / "helm" / "nanovllm" / "rules" / "nanovllm.rules.yaml"
RUNBOOK = REPOSITORY / "docs" / "operations.md"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool on this machine (apt install prometheus)")


def promtool(*command: str, text: str | None = None) -> str:
    assert PROMTOOL is not None
    ended = subprocess.run([PROMTOOL, *command], input=text, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return list(group["rules"])


def known_metrics() -> set[str]:
    """The names that a scrape can have, by docs/metrics.md, which a test compares with the registry."""
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)` \| (\w+)", page, re.MULTILINE)
    suffixes = {"histogram": ("_bucket", "_sum", "_count")}
    return {f"{name}{suffix}" for name, kind in named for suffix in suffixes.get(kind, ("",))}


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\bnanovllm_\w+", expression))


@needs_promtool
def test_promtool_finds_the_rules_right() -> None:
    assert f"{len(rules())} rules found" in promtool("check", "rules", "--lint-fatal", str(RULES))


@needs_promtool
def test_each_alert_fires_when_it_should_and_not_before() -> None:
    tests = REPOSITORY / "tests" / "helm" / "rules_test.yaml"
    promtool("test", "rules", str(tests))
    tried = {
        case["alertname"]
        for test in yaml.safe_load(tests.read_text(encoding="utf-8"))["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert tried == {rule["alert"] for rule in rules()}


@needs_promtool
def test_a_scrape_has_the_form_that_prometheus_reads() -> None:
    metrics = Metrics()
    metrics.worker.info({"version": "0", "model": "m", "revision": "r", "backend": "echo"})
    metrics.stage_seconds.labels("fetch").observe(0.1)
    metrics.engine_idle_seconds.labels("empty").inc(2)
    promtool("check", "metrics", "--extended", text=metrics.exposition().decode())


def test_every_metric_of_an_alert_or_a_panel_exists() -> None:
    known = known_metrics()
    used = {rule["alert"]: metrics_in(rule["expr"]) for rule in rules()}
    used |= {
        panel.title: {name for _, query in panel.queries for name in metrics_in(query)} for panel in dashboard.PANELS
    }
    assert all(used.values())
    assert {where: names - known for where, names in used.items() if names - known} == {}


def test_alerts_and_the_entries_of_the_runbook_name_each_other() -> None:
    page = RUNBOOK.read_text(encoding="utf-8").split("## Alerts")[1]
    entries = re.findall(r"^### (\w+)$", page, re.MULTILINE)
    assert sorted(entries) == sorted(rule["alert"] for rule in rules())
    for rule in rules():
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_the_dashboard_is_the_one_that_is_generated() -> None:
    assert json.loads(dashboard.DASHBOARD.read_text(encoding="utf-8")) == dashboard.dashboard(), (
        "run: python tools/dashboard.py"
    )


def test_the_chart_has_rules_and_dashboard_where_they_are_asked_for(render: Any) -> None:
    assert "PrometheusRule" not in render()
    objects = render({"metrics": {"rules": {"enabled": True, "labels": {"release": "prom"}}}})
    rule = objects["PrometheusRule"]
    assert rule["metadata"]["labels"]["release"] == "prom"
    assert rule["spec"] == yaml.safe_load(RULES.read_text(encoding="utf-8"))


def test_the_dashboard_of_the_chart_is_found_by_its_label(chart_path: Path) -> None:
    from helm_python.chart import Chart

    texts = Chart.load(chart_path).render({"metrics": {"dashboard": {"enabled": True}}}, name="demo", namespace="ns")
    (found,) = [
        document
        for name, text in texts.items()
        if name.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document and document["metadata"]["name"].endswith("-dashboard")
    ]
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(found["data"]["nanovllm.json"]) == dashboard.dashboard()
