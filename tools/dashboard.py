"""Writes the chart's Grafana dashboard: ``python tools/dashboard.py``; a test compares.

Dashboards of Grafana are JSON with much that repeats; here a panel is its title, unit and queries.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).resolve().parent.parent / "helm" / "nanovllm" / "dashboards" / "nanovllm.json"
WIDTH, HEIGHT, COLUMNS = 8, 8, 3
SELECTED = '{namespace=~"$namespace", job=~"$job"}'


@dataclass(frozen=True)
class Panel:
    """Lines over time: ``queries`` are legend and PromQL, in which ``$s`` is the selection of workers."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    is_stacked: bool = False
    text: str = ""


def _quantile(share: float, metric: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket$s[$__rate_interval])))"


def _rate(metric: str, by: str = "") -> str:
    return f"sum by ({by}) (rate({metric}$s[$__rate_interval]))" if by else f"sum(rate({metric}$s[$__rate_interval]))"


def _share(hits: str, *all_of_them: str) -> str:
    return f"{_rate(hits)} / ({' + '.join(map(_rate, all_of_them))})"


PANELS = (
    Panel("Records not finished", "short", (("{{topic}}", "sum by (topic) (nanovllm_consumer_lag_records$s)"),)),
    Panel("Jobs a second by outcome", "ops", (("{{outcome}}", _rate("nanovllm_jobs_total", "outcome")),)),
    Panel(
        "Workers and jobs at work",
        "short",
        (("workers", "count(nanovllm_worker_info$s)"), ("jobs at work", "sum(nanovllm_jobs_in_flight$s)")),
    ),
    Panel(
        "Why the engines waited",
        "percentunit",
        (
            (
                "{{reason}}",
                f"{_rate('nanovllm_engine_idle_seconds_total', 'reason')} / scalar(count(nanovllm_worker_info$s))",
            ),
        ),
        is_stacked=True,
        text="Share of the engines' time; what is left of 100% is text. See docs/deploy.md.",
    ),
    Panel("Seconds of a job by stage, 95%", "s", (("{{stage}}", _quantile(0.95, "nanovllm_stage_seconds", "stage")),)),
    Panel(
        "First token, and between tokens",
        "s",
        (
            ("first token, median", _quantile(0.5, "nanovllm_time_to_first_token_seconds")),
            ("first token, 95%", _quantile(0.95, "nanovllm_time_to_first_token_seconds")),
            ("between tokens, median", _quantile(0.5, "nanovllm_inter_token_latency_seconds")),
        ),
    ),
    Panel(
        "Tokens a second",
        "short",
        (("in", _rate("nanovllm_prompt_tokens_total")), ("out", _rate("nanovllm_generation_tokens_total"))),
    ),
    Panel(
        "Requests in the engines",
        "short",
        (("running", "sum(nanovllm_num_requests_running$s)"), ("waiting", "sum(nanovllm_num_requests_waiting$s)")),
    ),
    Panel("KV cache in use", "percentunit", (("{{pod}}", "max by (pod) (nanovllm_kv_cache_usage_perc$s)"),)),
    Panel(
        "Found in caches",
        "percentunit",
        (
            (
                "embeddings of images",
                _share(
                    "nanovllm_embedding_cache_hits_total",
                    "nanovllm_embedding_cache_hits_total",
                    "nanovllm_embedding_cache_misses_total",
                ),
            ),
            ("prefix tokens", _share("nanovllm_prefix_cache_hits_total", "nanovllm_prefix_cache_queries_total")),
        ),
    ),
    Panel("Dead letters a second by code", "ops", (("{{code}}", _rate("nanovllm_dead_letters_total", "code")),)),
    Panel(
        "Documents a second by route",
        "ops",
        (("{{route}}, {{outcome}}", _rate("nanovllm_documents_total", "route, outcome")),),
    ),
    Panel("Pages a second by route", "ops", (("{{route}}", _rate("nanovllm_document_pages_total", "route")),)),
    Panel(
        "Seconds of a document at the engines, by route",
        "s",
        (
            (
                "{{route}}",
                f"{_rate('nanovllm_document_infer_seconds_total', 'route')}"
                f" / {_rate('nanovllm_documents_total', 'route')}",
            ),
        ),
    ),
    Panel(
        "Faults",
        "short",
        (
            ("retries in place a second, {{stage}}", _rate("nanovllm_retries_total", "stage")),
            ("workers that take no work", "sum(nanovllm_systemic$s)"),
            ("event loop late, s", "max(nanovllm_event_loop_lag_seconds$s)"),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    return {
        "uid": "nanovllm",
        "title": "nanovllm",
        "tags": ["nanovllm"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_datasource(), _variable("namespace"), _variable("job")]},
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _variable(label: str) -> dict[str, Any]:
    return {
        "name": label,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": f"label_values(nanovllm_worker_info, {label})", "refId": label},
        "includeAll": True,
        "multi": True,
        "refresh": 2,
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, COLUMNS)
    custom = {"fillOpacity": 30 if panel.is_stacked else 0}
    custom |= {"stacking": {"mode": "normal"}} if panel.is_stacked else {}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + place), "legendFormat": legend, "expr": query.replace("$s", SELECTED)}
            for place, (legend, query) in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    DASHBOARD.write_text(json.dumps(dashboard(), indent=2) + "\n", encoding="utf-8")
