"""The embedded object store: moto's S3 server as a process of its own, for the demo. It keeps everything in memory."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import urllib.error
import urllib.request
from urllib.parse import quote

from nanovllm.demo.child_process import HOST, LocalServer
from nanovllm.errors import ConfigurationError

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "demo",
    "AWS_SECRET_ACCESS_KEY": "demo",  # moto accepts any
    "AWS_DEFAULT_REGION": "us-east-1",
}
"""The AWS SDK's variables for a client of this server."""

# Loopback is never reached through the proxy that the environment may name.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class EmbeddedObjectStore(LocalServer):
    """An S3 server on loopback; what it holds ends with it."""

    def __init__(self) -> None:
        super().__init__("embedded object store")

    @property
    def endpoint_url(self) -> str:
        """What ``NANOVLLM_S3__ENDPOINT_URL`` and boto3's ``endpoint_url`` take."""
        return f"http://{HOST}:{self._port}"

    def command(self) -> list[str]:
        """The command line of moto's server."""
        if importlib.util.find_spec("moto") is None:
            raise ConfigurationError("the embedded object store needs moto: pip install '.[demo]' in a clone")
        return [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(self._port)]

    async def answers(self) -> bool:
        """Whether it answers over HTTP now, with an error too."""
        try:
            (await asyncio.to_thread(_OPENER.open, f"{self.endpoint_url}/moto-api/", timeout=5)).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    def create_bucket(self, bucket: str) -> None:
        """Create a bucket."""
        self._put(bucket, b"")

    def put(self, bucket: str, key: str, data: bytes) -> str:
        """Store an object, and return its entity tag; without the AWS SDK, whose settings have no effect here."""
        return self._put(f"{bucket}/{quote(key)}", data)

    def get(self, bucket: str, key: str) -> bytes | None:
        """The object's content, None where there is none."""
        request = urllib.request.Request(f"{self.endpoint_url}/{bucket}/{quote(key)}")  # noqa: S310
        request.add_header("Authorization", "AWS demo:demo")  # moto refuses reads without one, and verifies none
        try:
            with _OPENER.open(request, timeout=30) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def _put(self, path: str, data: bytes) -> str:
        request = urllib.request.Request(f"{self.endpoint_url}/{path}", data=data, method="PUT")  # noqa: S310
        request.add_header("Content-Type", "application/octet-stream")
        with _OPENER.open(request, timeout=30) as answer:
            return str(answer.headers.get("ETag", "")).strip('"')
