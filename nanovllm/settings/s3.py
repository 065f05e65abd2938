"""Settings of the object store."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from nanovllm.messages.s3_uri import split_prefix, split_prefix_uri
from nanovllm.settings.base import Bytes, Seconds, SettingsModel, StrList


class S3Settings(SettingsModel):
    """The object store; credentials come from the AWS SDK's own variables, files and roles.

    Those of Google Cloud Storage and of Azure come from the variables of their SDKs.
    """

    client: Literal["boto3", "obstore"] = Field(
        "boto3",
        description="What reads the objects of jobs in S3: `obstore` (extra `obstore`) takes a fraction of the CPU. "
        "Writing, listing and sidecars are boto3's.",
    )
    endpoint_url: str | None = Field(None, description="Another S3 than AWS's, such as `http://minio:9000`.")
    region: str | None = Field(None, description="Region; unset: the AWS SDK's own settings.")
    addressing_style: Literal["auto", "path", "virtual"] = Field(
        "auto", description="`path` for most other S3 servers."
    )
    allow: StrList = Field(
        (),
        description="`s3://bucket/prefix` list that jobs may read, `s3://bucket/prefix/*` being the same; unset: "
        "nothing may be read. With the extra `obstore` also `gs://bucket/prefix` and `az://container/prefix`.",
    )
    connect_timeout_s: Seconds = Field(5.0, description="Longest wait for a connection.")
    read_timeout_s: Seconds = Field(20.0, description="Longest silence while an object is read.")
    object_timeout_s: Seconds = Field(120.0, description="Longest time in which one object is read.")
    max_attempts: int = Field(
        4, ge=1, le=20, description="Attempts at one object, or one image over HTTP, before the job is a dead letter."
    )
    max_connections: int = Field(16, ge=1, description="Objects that are read at the same time.")
    large_results: str | None = Field(
        None, description="`s3://bucket/prefix` for results too large for a message; unset: those are dead letters."
    )
    large_result_bytes: Bytes | None = Field(
        None, description="Larger results go there; unset: only those that their topic does not take."
    )

    @property
    def obstore_schemes(self) -> frozenset[str]:
        """The schemes whose objects obstore reads."""
        others = {address.scheme for address in map(split_prefix, self.allow) if address is not None} - {"s3"}
        return frozenset(others | ({"s3"} if self.client == "obstore" else set()))

    @model_validator(mode="after")
    def _check_allow(self) -> S3Settings:
        if self.large_result_bytes is not None and self.large_results is None:
            raise ValueError("large_result_bytes is set without large_results, the place where they go")
        is_wrong = self.large_results is not None and split_prefix_uri(self.large_results) is None
        if is_wrong or any(split_prefix(entry) is None for entry in self.allow):
            raise ValueError(
                "allow and large_results have the form s3://bucket, s3://bucket/prefix or s3://bucket/prefix/*; "
                "a prefix ends at a slash, and a wildcard elsewhere would match nothing (allow also takes gs:// and az://)"
            )
        return self
