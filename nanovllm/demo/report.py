"""The demo's report: one HTML file that needs nothing else. Every text in it is escaped; no script, no reference."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Iterable
from html import escape
from os import cpu_count

from PIL import Image

from nanovllm.demo.jobs import DemoJob
from nanovllm.demo.outcome import Outcome, stage_times
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.result import Result

THUMBNAIL_PX = 128
_COLOURS = {
    "admit": "#94a3b8",
    "fetch": "#0ea5e9",
    "prepare": "#14b8a6",
    "queue": "#cbd5e1",
    "encode": "#8b5cf6",
    "prefill": "#f59e0b",
    "generate": "#ef4444",
}
_CACHE_COLOURS = {"miss": "#8b5cf6", "joined": "#22c55e", "hit": "#16a34a", "prefix": "#65a30d"}
_CACHE_WORDS = {
    "miss": "encoder runs",
    "joined": "joined to a run for another job",
    "hit": "found in the embedding cache",
    "prefix": "covered by the prefix cache",
}
_STYLE = """
:root { color-scheme: light dark; --ink: #1e293b; --soft: #64748b; --line: #e2e8f0; --paper: #fff; --card: #f8fafc }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e2e8f0; --soft: #94a3b8; --line: #334155; --paper: #0f172a; --card: #1e293b } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1060px;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p.lead, caption, .soft { color: var(--soft) }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0 }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem }
.figures b { display: block; font-size: 1.5rem }
table { border-collapse: collapse; width: 100% }
th { text-align: left; font-weight: 600; color: var(--soft) }
td, th { border-bottom: 1px solid var(--line); padding: .45rem .6rem; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
pre { margin: 0; font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
img { border-radius: 4px; border: 1px solid var(--line); margin-right: 4px }
.yes { color: #16a34a; font-weight: 700 } .no { color: #dc2626; font-weight: 700 }
svg { max-width: 100%; height: auto } svg text { fill: var(--soft); font: 12px system-ui, sans-serif }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 1em }
"""


def render_report(outcome: Outcome) -> str:
    """The report as one HTML document."""
    summary = outcome.summary
    verdict = (
        f"<p>Not as it should be: {escape('; '.join(outcome.complaints))}.</p>"
        if outcome.complaints
        else "<p>Every job has its answer, and both bad messages are in the dead letters with their reasons.</p>"
    )
    figures = (
        ("jobs answered", f"{summary.answered} / {summary.jobs}"),
        ("exactly right", f"{summary.exact} / {summary.jobs}"),
        ("images in answered jobs", str(summary.images)),
        ("encoder runs", str(summary.encoder_runs)),
        ("answered from caches", str(summary.cache_hits)),
        ("dead letters", str(summary.dead_letters)),
        ("seconds in all", f"{summary.seconds:.1f}"),
    )
    sections = (
        "<h1>nanovllm demo</h1>",
        '<p class="lead">Images and prompts into Kafka, text out of it: one worker process, on this machine.</p>',
        verdict,
        '<div class="figures">'
        + "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in figures)
        + "</div>",
        "<h2>Answers</h2>",
        _answers(outcome),
        "<h2>Where the time of each job went</h2>",
        _legend(_COLOURS.items()),
        _latency_plot(outcome),
        _latency_table(outcome),
        "<h2>Images and caches</h2>",
        _caches(outcome),
        "<h2>Dead letters</h2>",
        _dead_letters(outcome.dead_letters),
        "<h2>What answered</h2>",
        _machine(outcome),
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>nanovllm demo</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _answers(outcome: Outcome) -> str:
    keys = {key for job in outcome.demo.jobs for key in job.keys}
    thumbnails = {key: _thumbnail(outcome.demo.objects[key]) for key in keys}
    rows = []
    for job in sorted(outcome.demo.jobs, key=lambda job: job.job_id):
        pictures = "".join(
            f'<img src="{thumbnails[key]}" width="96" height="96" alt="{escape(key)}" title="{escape(key)}">'
            for key in job.keys
        )
        rows.append(
            f"<tr><td>{pictures}</td><td><pre>{escape(job.prompt)}</pre></td>"
            f"<td>{_answer(job, outcome.results.get(job.job_id))}</td>{_verdict(outcome.is_exact(job))}"
            f"{_details(outcome.results.get(job.job_id))}</tr>"
        )
    head = "<tr><th>image</th><th>prompt</th><th>text</th><th></th><th>ms</th><th>cache</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _answer(job: DemoJob, result: Result | None) -> str:
    if result is None:
        return '<span class="no">no result</span>'
    text = f"<pre>{escape(result.text)}</pre>"
    return text if result.text == job.truth else f'{text}<pre class="soft">truth: {escape(job.truth)}</pre>'


def _verdict(is_exact: bool) -> str:
    return '<td class="yes">✓</td>' if is_exact else '<td class="no">✗</td>'


def _details(result: Result | None) -> str:
    if result is None:
        return "<td></td><td></td>"
    outcomes = ", ".join(use.cache for use in result.inputs)
    return f'<td class="number">{result.timings_ms.total:,.0f}</td><td>{escape(outcomes)}</td>'


def _thumbnail(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _latency_plot(outcome: Outcome) -> str:
    """One bar for each answered job, the fastest on top, its stages stacked in the order of time."""
    results = sorted(outcome.results.values(), key=lambda result: result.timings_ms.total)
    if not results:
        return "<p>No job was answered.</p>"
    left, width, pitch, bar = 150, 780, 13, 10
    longest = max(sum(stage_times(result).values()) for result in results) or 1.0
    height = pitch * len(results) + 24
    marks = [
        f'<line x1="{left + width * part:.1f}" y1="0" x2="{left + width * part:.1f}" y2="{height - 18}" '
        f'stroke="currentColor" stroke-opacity=".15"/>'
        f'<text x="{left + width * part:.1f}" y="{height - 4}" text-anchor="middle">{longest * part:,.0f} ms</text>'
        for part in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    for row, result in enumerate(results):
        y, x = row * pitch, float(left)
        marks.append(f'<text x="{left - 6}" y="{y + bar}" text-anchor="end">{escape(result.job_id[:22])}</text>')
        for stage, spent in stage_times(result).items():
            span = width * spent / longest
            marks.append(
                f'<rect x="{x:.1f}" y="{y}" width="{span:.1f}" height="{bar}" fill="{_COLOURS[stage]}">'
                f"<title>{escape(result.job_id)}: {stage} {spent:,.1f} ms</title></rect>"
            )
            x += span
    box = f"0 0 {left + width + 40} {height}"
    return f'<svg viewBox="{box}" role="img" aria-label="Milliseconds of each job by stage">{"".join(marks)}</svg>'


def _latency_table(outcome: Outcome) -> str:
    rows = "".join(
        f'<tr><td>{escape(latency.stage)}</td><td class="number">{latency.p50_ms:,.1f}</td>'
        f'<td class="number">{latency.p95_ms:,.1f}</td></tr>'
        for latency in outcome.latencies
    )
    return (
        "<table><caption>All jobs are sent at once, so most of a job's time is waiting for its turn.</caption>"
        f"<thead><tr><th>stage</th><th>p50 ms</th><th>p95 ms</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _caches(outcome: Outcome) -> str:
    """One bar: every image of every answered job, by what the caches did for it."""
    summary, outcomes = outcome.summary, outcome.cache_outcomes
    marks, x = [], 0.0
    for name, colour in _CACHE_COLOURS.items():
        span = 930 * outcomes[name] / max(1, outcomes.total())
        marks.append(f'<rect x="{x:.1f}" y="0" width="{span:.1f}" height="22" fill="{colour}"/>')
        x += span
    named = [(f"{outcomes[name]} {words}", _CACHE_COLOURS[name]) for name, words in _CACHE_WORDS.items()]
    return (
        f"<p>{summary.images} images in the answered jobs, {summary.distinct_images} different pictures, "
        f"{summary.encoder_runs} runs of the vision tower. Some pictures were uploaded twice, as PNG and as WebP: "
        "what counts is their pixels.</p>"
        f'<svg viewBox="0 0 930 22" role="img" aria-label="Images by cache outcome">{"".join(marks)}</svg>'
        f"{_legend(named)}"
    )


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    keys = "".join(f'<span class="key" style="background:{colour}"></span>{escape(name)}' for name, colour in entries)
    return f'<p class="soft">{keys}</p>'


def _dead_letters(letters: Iterable[DeadLetter]) -> str:
    rows = "".join(
        f"<tr><td>{escape(letter.job_id or '–')}</td><td>{escape(letter.code)}</td>"
        f"<td>{escape(letter.error_class)}</td><td>{escape(letter.stage)}</td><td>{escape(letter.message)}</td>"
        f"<td>{escape(letter.source.topic)} [{letter.source.partition}] @ {letter.source.offset}</td></tr>"
        for letter in letters
    )
    head = "<tr><th>job</th><th>code</th><th>class</th><th>stage</th><th>reason</th><th>source</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _machine(outcome: Outcome) -> str:
    facts = [f"Python {platform.python_version()} on {platform.machine()}, {cpu_count()} cores"]
    for model in {result.model for result in outcome.results.values()}:
        facts.append(f"model {model.id}, revision {model.revision[:16]}, parameters {model.parameter_digest[:16]}")
    facts += [f"worker {worker}" for worker in sorted({result.worker for result in outcome.results.values()})]
    return "<ul>" + "".join(f"<li>{escape(fact)}</li>" for fact in facts) + "</ul>"
