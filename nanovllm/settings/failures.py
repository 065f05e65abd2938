"""Settings of retries, circuit breaker and dead letters."""

from __future__ import annotations

from pydantic import Field, field_validator

from nanovllm.settings.base import IntList, Seconds, SettingsModel, StrList


def retry_topic(jobs: str, delay_s: int) -> str:
    """The topic in which records of the topic ``jobs`` wait for ``delay_s`` seconds."""
    return f"{jobs}.retry-{delay_s}s"


class RetrySettings(SettingsModel):
    """What is tried again later, and when everything has to wait. Attempts in place are `s3.max_attempts`."""

    delays_s: IntList = Field(
        (),
        description="Seconds that a job waits after its attempts in place have failed, one retry topic for each: "
        "`60,600` uses `<jobs>.retry-60s` and `<jobs>.retry-600s`; unset: it becomes a dead letter at once.",
    )
    breaker_objects: int = Field(
        10,
        ge=1,
        description="So many different objects that could not be read, and none that could, stop the intake: the store "
        "is asked by one job at a time until it answers. Deprecated.",
    )
    breaker_wait_s: Seconds = Field(
        2.0, description="First wait of a stopped intake; it doubles from there. Deprecated."
    )
    breaker_max_wait_s: Seconds = Field(30.0, description="Longest wait of a stopped intake. Deprecated.")

    @field_validator("delays_s")
    @classmethod
    def _check_delays(cls, delays_s: tuple[int, ...]) -> tuple[int, ...]:
        if any(delay < 1 for delay in delays_s) or list(delays_s) != sorted(set(delays_s)):
            raise ValueError("delays are whole seconds above 0, each longer than the one before")
        return delays_s


class DeadLetterSettings(SettingsModel):
    """What dead letters keep, and how many in a row are too many."""

    keep_headers: StrList = Field(
        (),
        description="Headers of a job that its dead letter keeps for a replay, beside the trace's, `content-type` "
        "and the one that `tenants.header` names; others may hold secrets and stay out.",
    )
    poison_limit: int | None = Field(
        None,
        ge=1,
        description="So many dead letters without an answer between them end the worker with exit code 1, before the "
        "next one; unset: no limit.",
    )
    tombstones: bool = Field(
        False,
        description="A record without a value (a tombstone) in a topic of jobs is a dead letter; unset: it is counted, "
        "logged and passed over.",
    )
    crash_limit: int | None = Field(
        None,
        ge=1,
        description="What the engine is about to start is recorded in `topics.in_flight`; after a worker died, what it "
        "had at work runs alone, what it may have taken is decoded alone, and a job that was alone at so many deaths "
        "is a dead letter (`crashed_worker`); unset: nothing is recorded.",
    )
