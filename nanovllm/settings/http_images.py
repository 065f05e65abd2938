"""Settings of images that jobs name by URIs over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator

from nanovllm.messages.http_uri import HttpUri, parse_http_uri
from nanovllm.settings.base import Seconds, SettingsModel, StrList

MIN_WILDCARD_LABELS = 2


@dataclass(frozen=True)
class AllowedHost:
    """An entry of ``http_images.allow``: scheme, host and port that jobs may name."""

    uri: HttpUri
    is_wildcard: bool

    @classmethod
    def of(cls, entry: str) -> Self:
        """The entry that ``entry`` is: ``images.example.com``, ``*.example.com:8443``, ``http://gateway:9000``.

        Raises:
            ValueError: what is wrong with it.
        """
        whole = entry if "://" in entry else f"https://{entry}"
        scheme, _, rest = whole.partition("://")
        is_wildcard = rest.startswith("*.")
        uri = parse_http_uri(f"{scheme}://{rest.removeprefix('*.')}")
        if uri.target != "/":
            raise ValueError("has a path")
        if is_wildcard and (_is_address(uri.host) or uri.host.count(".") + 1 < MIN_WILDCARD_LABELS):
            raise ValueError("has a wildcard before less than a domain such as example.com")
        return cls(uri, is_wildcard)

    def allows(self, uri: HttpUri) -> bool:
        """Whether a job may name ``uri``: a wildcard stands for one label or more, never for none."""
        is_host = uri.host.endswith(f".{self.uri.host}") if self.is_wildcard else uri.host == self.uri.host
        return is_host and (uri.scheme, uri.port) == (self.uri.scheme, self.uri.port)


class HttpImageSettings(SettingsModel):
    """Images that jobs name by `https://` URIs. Proxies of the environment are not heeded."""

    allow: StrList = Field(
        (),
        description="Hosts that jobs may name: `images.example.com`, `*.example.com` (not `example.com` itself), with "
        "`:8443` for another port than 443, with `http://` for one without TLS; unset: none.",
    )
    allow_networks: StrList = Field(
        (),
        description="Networks such as `10.0.0.0/8` where these hosts may lie, besides public addresses. Link-local "
        "addresses, where clouds serve credentials, are refused in any case.",
    )
    ca_file: Path | None = Field(None, description="PEM file of the hosts' CA; unset: the system's CAs.")
    connect_timeout_s: Seconds = Field(5.0, description="Longest wait for a connection, and for its TLS handshake.")
    read_timeout_s: Seconds = Field(20.0, description="Longest silence of a host that answers.")
    image_timeout_s: Seconds = Field(60.0, description="Longest time in which one image is read, redirects included.")
    max_connections: int = Field(16, ge=1, description="Images that are read at the same time.")

    @field_validator("allow")
    @classmethod
    def _check_allow(cls, allow: tuple[str, ...]) -> tuple[str, ...]:
        for number, entry in enumerate(allow, 1):
            try:
                AllowedHost.of(entry)
            except ValueError as error:
                # Not shown: it may hold a password or a signature.
                raise ValueError(
                    f"number {number} {error}; an entry is a host such as images.example.com, with its port if not 443"
                ) from None
        return allow

    @field_validator("allow_networks")
    @classmethod
    def _check_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            try:
                ip_network(network)
            except ValueError as error:
                raise ValueError(f"{error}; a network has the form 10.0.0.0/8 or fd00::/8") from None
        return networks


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
