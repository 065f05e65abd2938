"""The parser of HTTP URIs, strict: a form that two programs could read as two hosts is refused."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

MAX_HTTP_URI_CHARS = 8_192
"""Longest URI over HTTP: a presigned one holds a signature and often a session token."""

_SCHEME = re.compile(r"https?://", re.IGNORECASE)
_CHARACTERS = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]*")
_PARTS = re.compile(r"(https?)://([^/?#]*)((?:/[^?#]*)?(?:\?[^#]*)?)(#.*)?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]+)(?::([0-9]{1,5}))?")
_IPV6 = re.compile(r"\[([0-9A-Fa-f:.]+)\]")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_BEFORE_QUERY = re.compile(r"(\s*https?:/*)(?:[^/?#]*@)?([^?#]*).*", re.IGNORECASE | re.DOTALL)
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class HttpUri:
    """Where a request goes: ``host`` in lower case, without a trailing dot, or an address as `ipaddress` writes it."""

    scheme: str
    host: str
    port: int
    target: str = field(repr=False)
    """Path and query, as they are sent; a query can be a secret."""

    @property
    def authority(self) -> str:
        """Host and port, without the port that the scheme implies: what the ``Host`` header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return f"{self.scheme}://{self.authority}"


def is_http_uri(uri: str) -> bool:
    """Whether ``uri`` has the scheme http or https, whatever follows."""
    return _SCHEME.match(uri) is not None


def parse_http_uri(uri: str) -> HttpUri:
    """The parts of an ``http://`` or ``https://`` URI of a resource.

    Raises:
        ValueError: what is wrong with it, without a part of it: "has a user or a password".
    """
    if len(uri) > MAX_HTTP_URI_CHARS:
        raise ValueError(f"has more than {MAX_HTTP_URI_CHARS} characters")
    if not _CHARACTERS.fullmatch(uri):
        raise ValueError("has characters that no URI has: percent-encode them, and write a host's name as xn--…")
    parts = _PARTS.fullmatch(uri)
    if parts is None:
        raise ValueError("is no http:// or https:// URI")
    scheme, target = parts[1].lower(), parts[3]
    if "@" in parts[2]:
        raise ValueError("has a user or a password")
    if parts[4]:
        raise ValueError("has a fragment")
    authority = _AUTHORITY.fullmatch(parts[2])
    if authority is None:
        raise ValueError("has no host, or no number for a port")
    port = int(authority[2] or DEFAULT_PORTS[scheme])
    if not 0 < port < 2**16:
        raise ValueError("has a port beyond 1 to 65535")
    return HttpUri(scheme, _host(authority[1]), port, target if target.startswith("/") else f"/{target}")


def without_secrets(uri: str) -> str:
    """``uri`` without user, query and fragment where it is one over HTTP, however wrong; another one unchanged."""
    parts = _BEFORE_QUERY.fullmatch(uri)
    return parts[1] + parts[2] if parts else uri


def digested(uri: str) -> str:
    """``uri`` as ``without_secrets``, with a digest in place of what was left out."""
    shown = without_secrets(uri)
    return shown if shown == uri else f"{shown}#{hashlib.sha256(uri.encode()).hexdigest()[:16]}"


def _host(text: str) -> str:
    if text.startswith("["):
        literal = _IPV6.fullmatch(text)  # without a zone, which `IPv6Address` takes
        try:
            return str(IPv6Address(literal[1] if literal else ""))
        except ValueError:
            raise ValueError("has no IPv6 address in its brackets") from None
    host = text.lower().removesuffix(".")
    labels = host.split(".")
    if len(host) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError("has no host's name")
    if not _NUMBER.fullmatch(labels[-1]):
        return host
    try:
        return str(IPv4Address(host))
    except ValueError:
        # getaddrinfo reads 2130706433, 0x7f.1, 0177.0.0.1 and 127.1 as 127.0.0.1.
        raise ValueError("has an IPv4 address that is not four decimal numbers") from None
