"""The embedded object store: moto's S3 server as a process of its own, for the demo. It keeps everything in memory."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

from nanovllm.demo.child_process import LocalProcess, free_port
from nanovllm.errors import ConfigurationError, SystemicError

HOST = "127.0.0.1"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "demo",
    "AWS_SECRET_ACCESS_KEY": "demo",  # moto accepts any
    "AWS_DEFAULT_REGION": "us-east-1",
}

# Loopback is never reached through the proxy that the environment may name.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class EmbeddedObjectStore:
    """An S3 server on loopback for as long as the object is started; what it holds ends with it."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="nanovllm-s3-")
        self._port = 0
        self._process: LocalProcess | None = None

    @property
    def endpoint_url(self) -> str:
        """What ``NANOVLLM_S3__ENDPOINT_URL`` and boto3's ``endpoint_url`` take."""
        return f"http://{HOST}:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """The AWS SDK's variables for a client of this server."""
        return dict(CREDENTIALS)

    async def start(self, timeout_s: float = 60.0) -> None:
        """Start it and return when it answers.

        Raises:
            ConfigurationError: moto is not installed.
            SystemicError: it ended by itself, or does not answer within ``timeout_s``.
        """
        if importlib.util.find_spec("moto") is None:
            raise ConfigurationError("the embedded object store needs moto: pip install '.[demo]' in a clone")
        deadline = time.monotonic() + timeout_s
        for _ in range(3):
            self._port = free_port(HOST)
            command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(self._port)]
            self._process = LocalProcess("object store", command, Path(self._directory.name) / "s3.log")
            self._process.start()
            while self._process.is_running:
                if await asyncio.to_thread(self._answers):
                    return
                if time.monotonic() > deadline:
                    self.stop()
                    raise SystemicError(f"the embedded object store did not answer within {timeout_s:g} s")
                await asyncio.sleep(0.05)
        tail = self._process.tail() if self._process else ""
        raise SystemicError(f"the embedded object store ended while starting; its last words: {tail or 'none'}")

    def _answers(self) -> bool:
        try:
            with _OPENER.open(f"{self.endpoint_url}/moto-api/", timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def create_bucket(self, bucket: str) -> None:
        """Create a bucket."""
        self._put(bucket, b"")

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Store an object. It goes without the AWS SDK, whose settings of the caller's have no say here."""
        self._put(f"{bucket}/{quote(key)}", data)

    def _put(self, path: str, data: bytes) -> None:
        request = urllib.request.Request(f"{self.endpoint_url}/{path}", data=data, method="PUT")  # noqa: S310
        request.add_header("Content-Type", "application/octet-stream")
        with _OPENER.open(request, timeout=30):
            pass

    def stop(self) -> None:
        """End it. Does nothing when it is not running."""
        if self._process is not None:
            self._process.stop(grace_s=3.0)
        self._directory.cleanup()
