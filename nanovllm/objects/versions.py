"""Versions of objects: which of them stay what they are."""

from __future__ import annotations

NULL_VERSION = "null"
"""S3's own, of what was written while versioning was not on: it is overwritten."""


def lasting_version(version_id: str | None) -> str | None:
    """The version, where it is one that is never overwritten."""
    return None if version_id == NULL_VERSION else version_id
