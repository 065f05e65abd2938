"""Base URLs of servers: what is likely wrong with one under which nothing is found."""

from __future__ import annotations

PATHS = ("/chat/completions", "/completions", "/models")
"""What this backend asks for below a base URL."""


def advice(url: str) -> str:
    """What to try in place of ``url``, under which a server has found nothing."""
    rule = "base URLs end in /v1 as a rule"
    for path in PATHS:
        if url.endswith(path):
            return f"{rule}, without {path}: try {url.removesuffix(path)}"
    return f"{rule}: check the URL and engine.model" if url.endswith("/v1") else f"{rule}: try {url}/v1"
