"""Settings of the topics."""

from __future__ import annotations

from pydantic import Field

from nanovllm.errors import ForbiddenUri
from nanovllm.settings.base import SettingsModel, TopicList, TopicName


class TopicSettings(SettingsModel):
    """Names of the topics."""

    jobs: TopicName = Field("nanovllm.jobs", description="Jobs come from here.")
    results: TopicName = Field("nanovllm.results", description="Results go here, keyed by `job_id`.")
    metrics: TopicName = Field("nanovllm.metrics", description="One record of figures for each job goes here.")
    dead_letters: TopicName = Field("nanovllm.dead-letters", description="Jobs that failed for good go here.")
    events: TopicName = Field(
        "nanovllm.events", description="Event notifications of object stores; `bridge sqs` sends them here."
    )
    in_flight: TopicName = Field("nanovllm.in-flight", description="Record of the jobs in the engines.")
    replayed: TopicName = Field(
        "nanovllm.replayed",
        description="Record of the dead letters that `dlq replay` has sent again; workers never use it.",
    )
    lanes: dict[TopicName, int] = Field(
        default_factory=dict,
        description="More topics of jobs, each with a priority (JSON object): lower goes first, `topics.jobs` has 0. "
        "Each lane has a share of the worker's window and its own retry topics.",
    )
    reply_to: TopicList = Field((), description="Topics that a job's `reply_to` may name; any other is refused.")

    @property
    def job_topics(self) -> dict[str, int]:
        """Every topic of jobs and its priority, the most urgent one first."""
        return dict(sorted({self.jobs: 0, **self.lanes}.items(), key=lambda item: item[1]))

    def result_topic(self, reply_to: str | None) -> str:
        """The topic of a job's result.

        Raises:
            ForbiddenUri: ``reply_to`` names a topic that is not allowed: a job must not write wherever the worker may.
        """
        if reply_to is None or reply_to == self.results:
            return self.results
        if reply_to not in self.reply_to:
            raise ForbiddenUri("reply_to: this topic is not listed in topics.reply_to")
        return reply_to
