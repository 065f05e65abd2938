"""The S3 client of a process, and how it is made.

Only the answer to an operation on an object can be a job's fault. Everything before that (profile, region, endpoint,
the credential chain with STS, SSO and the metadata services) is systemic, whatever its error looks like: a role ARN or
a token that is too short is a ``ParamValidationError``, a missing token file a ``FileNotFoundError``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import botocore
import botocore.exceptions as sdk
import botocore.handlers
import botocore.session
from botocore.config import Config
from botocore.utils import parse_timestamp

from nanovllm.errors import (
    ConfigurationError,
    CredentialsRefused,
    NanoVLLMError,
    SystemicError,
)
from nanovllm.objects.errors import BAD_ENDPOINT, classify, reason_of
from nanovllm.settings.s3 import S3Settings

T = TypeVar("T")

READ_OF_AN_OBJECT = frozenset({"Body", "ContentLength", "ETag", "Metadata", "VersionId"})
"""What `make_reading_client` tells of a GetObject's answer."""


class S3Client:
    """A boto3 S3 client for many threads: made at its first use, and anew after a systemic failure.

    A replaced secret, profile or certificate is so found without a restart.
    """

    def __init__(self, settings: S3Settings, make: Callable[[S3Settings], Any] | None = None) -> None:
        self._settings = settings
        self._make = make or make_client
        self._lock = threading.Lock()
        self._client: Any = None

    def call(self, operation: Callable[[Any], T]) -> T:
        """What ``operation`` returns, given the client; it blocks.

        Raises:
            CredentialsRefused, StoreUnreachable: nothing can be asked now.
            NanoVLLMError: as ``classify`` says, or what ``operation`` itself raised of this kind.
        """
        client = None
        try:
            client = self._connected()
            return operation(client)
        except Exception as error:
            classed = error if isinstance(error, NanoVLLMError) else classify(error)
            if isinstance(classed, SystemicError):
                self._forget(client)
            if classed is error:
                raise
            raise classed from error

    def prepare(self) -> None:
        """Make the client now, as far as that can be done."""
        with suppress(CredentialsRefused):
            self._connected()

    def close(self) -> None:
        """Close idle connections; the next call makes another client."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                try:
                    self._client = self._make(self._settings)
                except Exception as error:
                    raise CredentialsRefused(
                        f"the AWS SDK makes no client for the object store: {reason_of(error)}"
                    ) from error
            return self._client

    def _forget(self, failed: Any) -> None:
        with self._lock:
            if self._client is failed:
                self._client = None


def make_client(settings: S3Settings, *, max_attempts: int = 1, config: Config | None = None) -> Any:
    """A botocore S3 client with the time-outs of ``settings``; credentials come from the SDK's own chain.

    It fetches credentials before each operation and apart from it. An operation raises CredentialsRefused where that
    fails. ``config`` adds to that of the session.

    Raises:
        BotoCoreError, ValueError, OSError: the environment or the SDK's files do not allow one.
    """
    # Not a shared session: it keeps credentials that were refused.
    session = make_session(settings, max_attempts=max_attempts)
    client = _client_of(session, settings, config)

    def fetch_credentials(**_: Any) -> None:
        check_credentials(session)

    def redirect_once(model: Any, context: dict[str, Any], **_: Any) -> None:
        if model.name == "HeadBucket":
            context.setdefault("s3_redirect", {})["redirected"] = True

    client.meta.events.register_first("provide-client-params.s3", fetch_credentials)
    # botocore 1.44 sends a HeadBucket for a redirect that names no region, and another one when that is redirected too,
    # up to the RecursionError: a proxy that moves http to https does so.
    client.meta.events.register_last("before-parameter-build.s3", redirect_once)
    return client


def make_reading_client(settings: S3Settings) -> Any:
    """As `make_client`, for one attempt at reading: it spends less CPU a request.

    What it asks for is validated already; the headers that number a request's attempts, which are signed too, say
    nothing where there is one; a user agent that is set is not composed anew; of an object's answer, it tells
    `READ_OF_AN_OBJECT` alone.
    """
    agent = f"nanovllm Botocore/{botocore.__version__}"
    client = make_client(settings, config=Config(parameter_validation=False, user_agent=agent))
    if (add_retry_headers := getattr(botocore.handlers, "add_retry_headers", None)) is not None:
        client.meta.events.unregister("request-created", add_retry_headers)
    # The parser looks for each of forty headers in every answer.
    answer = client.meta.service_model.operation_model("GetObject").output_shape.members
    for name in answer.keys() - READ_OF_AN_OBJECT:
        del answer[name]
    return client


def check_credentials(session: Any) -> None:
    """Fetch or renew the credentials of a botocore session.

    Raises:
        CredentialsRefused: it has none, or such as no request can be signed with.
    """
    try:
        credentials = session.get_credentials()
        if credentials is None:
            raise sdk.NoCredentialsError
        frozen = credentials.get_frozen_credentials()
    except Exception as error:
        raise CredentialsRefused(f"no usable credentials for the object store: {reason_of(error)}") from error
    # A secret that was stored with its line break. As a header it would look like a failure of the request.
    if not ((frozen.access_key or "").isprintable() and (frozen.token or "").isprintable()):
        raise CredentialsRefused("the access key or session token has a line break or another control character")


def check_settings(settings: S3Settings) -> None:
    """Find out what can be known without a request and without credentials.

    Raises:
        ConfigurationError: the SDK can make no client: profile, configuration file, region or endpoint are at fault.
    """
    try:
        client = unsigned_client(settings)
    except (sdk.BotoCoreError, ValueError, OSError) as error:
        raise ConfigurationError(f"the AWS SDK makes no client for the object store: {reason_of(error)}") from error
    if urlsplit(client.meta.endpoint_url).scheme not in ("http", "https"):
        raise ConfigurationError(BAD_ENDPOINT)


def unsigned_client(settings: S3Settings, session: Any = None) -> Any:
    """A client that tells endpoint and region and asks for nothing: it looks for no credentials. Raises as make_client.

    ``session``: a session of `make_session` that is used for nothing else; None: a new one.
    """
    session = session or make_session(settings)
    session.set_credentials("unused", "unused")
    return _client_of(session, settings)


def make_session(settings: S3Settings, *, max_attempts: int = 1) -> Any:
    """A botocore session whose clients have the time-outs of ``settings``.

    The clients of the credential chain (STS, SSO) are among them: with botocore's own time-outs and retries a job waits
    for minutes before the fault is known.
    """
    session = botocore.session.get_session()
    session.set_default_client_config(
        Config(
            connect_timeout=settings.connect_timeout_s,
            read_timeout=settings.read_timeout_s,
            max_pool_connections=settings.max_connections,
            retries={"total_max_attempts": max_attempts, "mode": "standard"},
            s3={"addressing_style": settings.addressing_style},
            # Only where the store sends checksums by itself: other S3 servers refuse or lack the newer header.
            response_checksum_validation="when_required",
            request_checksum_calculation="when_required",
        )
    )
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_time_of)
    return session


def _client_of(session: Any, settings: S3Settings, config: Config | None = None) -> Any:
    return session.create_client("s3", endpoint_url=settings.endpoint_url, region_name=settings.region, config=config)


def _time_of(value: Any) -> datetime:
    # Each answer has a Last-Modified, in one form; botocore's parser of all forms takes ten times as long.
    if isinstance(value, str) and value.endswith(" GMT"):
        with suppress(ValueError):
            return parsedate_to_datetime(value)
    return parse_timestamp(value)
