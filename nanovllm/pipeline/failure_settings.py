"""Settings of what happens to jobs that fail."""

from __future__ import annotations

from pydantic import Field

from nanovllm.pipeline.section import Section, StrList


class DeadLetterSettings(Section):
    """What dead letters keep, and how many in a row are too many."""

    keep_headers: StrList = Field(
        (),
        description="Headers of a job that its dead letter keeps for a replay, beside the trace's and `content-type`; "
        "others may hold secrets and stay out.",
    )
    poison_limit: int | None = Field(
        None,
        ge=1,
        description="So many dead letters without an answer between them end the worker with exit code 1, before the "
        "next one; unset: no limit.",
    )
