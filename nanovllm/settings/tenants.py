"""Settings of tenants: a tenant is the job's topic or one header, never what a job itself claims."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field, model_validator

from nanovllm.settings.base import SettingsModel

MAX_NAME_BYTES = 256


class TenantSettings(SettingsModel):
    """Whose job it is, and what each tenant gets. Unset, all jobs belong to one."""

    header: str | None = Field(
        None,
        min_length=1,
        description="Header that names a job's tenant; set where producers cannot forge it. Dead letters keep it.",
    )
    by_topic: bool = Field(False, description="The topic that a job came in is its tenant; excludes `header`.")
    weights: dict[str, float] = Field(
        default_factory=dict,
        description="Shares of the engine, by tenant (JSON object); any other tenant has 1.",
    )
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Most tokens a minute of each tenant, on each worker; unset: no limit."
    )
    limits: dict[str, int] = Field(default_factory=dict, description="Other limits than that, by tenant (JSON object).")
    share_caches: bool = Field(
        False, description="Let tenants hit what others have cached: faster, and each can tell what another has asked."
    )

    @model_validator(mode="after")
    def _check(self) -> TenantSettings:
        if self.by_topic and self.header:
            raise ValueError("by_topic and header exclude each other")
        if self.header and self.header.lower().startswith("nanovllm_"):
            raise ValueError("header begins with nanovllm_, as the worker's own do: no job keeps such a one")
        if any(weight <= 0 for weight in self.weights.values()) or any(limit < 1 for limit in self.limits.values()):
            raise ValueError("weights are above 0, limits at least 1")
        return self

    @property
    def are_configured(self) -> bool:
        """Whether jobs are told apart by tenant."""
        return self.by_topic or self.header is not None

    def tenant_of(self, topic: str, headers: Iterable[tuple[str, bytes | None]]) -> str:
        """The tenant of a job that came in ``topic`` with ``headers``; the empty one where nothing names it."""
        if self.by_topic:
            return topic
        header = self.header_of(headers)
        return "" if header is None else header[1].decode(errors="replace")

    def header_of(self, headers: Iterable[tuple[str, bytes | None]]) -> tuple[str, bytes] | None:
        """The header that names a job's tenant, up to ``MAX_NAME_BYTES``: the first of its name; None without one."""
        if self.header is not None:
            for name, value in headers:
                if name.lower() == self.header.lower():
                    return name, (value or b"")[:MAX_NAME_BYTES]  # a header may have no value
        return None

    def salt_of(self, tenant: str) -> bytes:
        """What keeps the tenant's cache entries apart from others'."""
        return b"" if self.share_caches else tenant.encode()
