"""Settings of traces; where spans go, and how many wait, is said by OpenTelemetry's own variables."""

from __future__ import annotations

from pydantic import Field

from nanovllm.settings.base import SettingsModel


class TracingSettings(SettingsModel):
    """OpenTelemetry traces of jobs (extra `otel`); the exporter has OpenTelemetry's own variables, `OTEL_*`."""

    enabled: bool = Field(
        False, description="Whether jobs have spans, and what is sent for them continues their trace."
    )
    sample_ratio: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the jobs without a trace of their own that are traced; others follow the decision in "
        "their headers. Unset: what `OTEL_TRACES_SAMPLER` says, by default all.",
    )
