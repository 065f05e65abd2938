"""Tokens for SASL OAUTHBEARER. Connections end when their token expires, and each new one asks here for the next."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import SaslAuthenticationFailed

from nanovllm.errors import ConfigurationError

REFRESH_S = 60.0


class TokenFile(AbstractTokenProvider):
    """The token that stands in a file, read anew for every connection; the platform renews the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def token(self) -> str:
        """The token.

        Raises:
            SaslAuthenticationFailed: the file cannot be read or is empty.
        """
        try:
            token = (await asyncio.to_thread(self._path.read_text, encoding="ascii")).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SaslAuthenticationFailed(
                f"kafka.sasl_oauth_token_file cannot be read: {type(error).__name__}"
            ) from None
        if not token:
            raise SaslAuthenticationFailed("kafka.sasl_oauth_token_file is empty")
        return token


class MskIamToken(AbstractTokenProvider):
    """A token of Amazon MSK's IAM login, signed with the AWS SDK's own credentials; renewed before it expires.

    ``sign`` returns a token and its end in milliseconds since 1970.
    """

    def __init__(self, sign: Callable[[], tuple[str, float]], clock: Callable[[], float] = time.time) -> None:
        self._sign = sign
        self._clock = clock
        self._token = ""
        self._expires_s = 0.0
        # Of several connections that open at once, one signs.
        self._lock = asyncio.Lock()

    @classmethod
    def in_region(cls, region: str) -> MskIamToken:
        """For the clusters of ``region``.

        Raises:
            ConfigurationError: the extra is not installed.
        """
        if importlib.util.find_spec("aws_msk_iam_sasl_signer") is None:
            raise ConfigurationError("kafka.sasl_oauth_aws_region needs the signer: pip install '.[msk]' in a clone")
        from aws_msk_iam_sasl_signer import MSKAuthTokenProvider

        return cls(lambda: MSKAuthTokenProvider.generate_auth_token(region))

    async def token(self) -> str:
        """The token.

        Raises:
            SaslAuthenticationFailed: there are no usable AWS credentials now.
        """
        async with self._lock:
            if self._clock() > self._expires_s - REFRESH_S:
                try:
                    self._token, expires_ms = await asyncio.to_thread(self._sign)
                except Exception as error:
                    # Whatever the SDK raises: its text may hold what it read.
                    raise SaslAuthenticationFailed(f"no token for MSK: {type(error).__name__}") from None
                self._expires_s = expires_ms / 1000
            return self._token
