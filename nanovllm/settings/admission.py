"""Settings of the admission window."""

from __future__ import annotations

from pydantic import Field, model_validator

from nanovllm.settings.base import Bytes, Seconds, SettingsModel


class AdmissionSettings(SettingsModel):
    """How much work the worker takes at once, and how long it goes on when told to stop."""

    max_jobs: int | None = Field(
        None, ge=1, description="Most jobs between Kafka and result; unset: twice what the engine runs at once."
    )
    max_bytes: Bytes = Field(512 * 2**20, description="Most bytes of messages and images held by those jobs.")
    max_job_bytes: Bytes = Field(8 * 2**20, description="Largest message that is read as a job.")
    max_out_of_order: int = Field(
        1_000, ge=1, description="Most offsets of a partition finished above its oldest unfinished one."
    )
    per_key_order: bool = Field(
        False, description="Jobs of a partition with equal record keys run one after another, in the topic's order."
    )
    min_priority: int = Field(
        -10, description="Most urgent `priority` that a job may have; a lower one counts as this."
    )
    max_priority: int = Field(
        10, description="Least urgent `priority` that a job may have; a higher one counts as this."
    )
    max_tokens: int = Field(4_096, ge=1, description="Largest `max_tokens` that a job may ask for.")
    ttl_s: Seconds | None = Field(
        None,
        description="A job whose record is older has expired, as one behind its `deadline` has; unset: none.",
    )
    drain_timeout_s: Seconds = Field(
        25.0, description="After SIGTERM, or when partitions leave, jobs at work get this long."
    )
    idle_exit_s: Seconds = Field(
        5.0,
        description="With --exit-when-drained: leave when every partition is read and this long was idle. Deprecated.",
    )

    @model_validator(mode="after")
    def _check(self) -> AdmissionSettings:
        if self.min_priority > self.max_priority:
            raise ValueError("min_priority is at most max_priority")
        return self

    def clamped_priority(self, priority: int) -> int:
        """``priority`` within ``min_priority`` and ``max_priority``."""
        return min(max(priority, self.min_priority), self.max_priority)
