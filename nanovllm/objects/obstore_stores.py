"""The stores of obstore: S3 with what the AWS SDK finds in its surroundings, Google Cloud Storage, Azure."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ParamValidationError
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.store import AzureStore, GCSStore, S3Store

from nanovllm.errors import ConfigurationError, CredentialsRefused, NanoVLLMError
from nanovllm.messages.s3_uri import split_prefix
from nanovllm.objects.errors import classify, reason_of
from nanovllm.objects.obstore_reader import ObstoreReader, Stores
from nanovllm.objects.reader import ObjectReader
from nanovllm.objects.s3_client import check_credentials, make_session, unsigned_client
from nanovllm.settings.s3 import S3Settings

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Credential

CREDENTIALS_TTL = timedelta(minutes=1)
"""After it the AWS SDK is asked again, which renews temporary credentials minutes before they end."""
_ONE_ATTEMPT: RetryConfig = {"max_retries": 0}
_EXPRESS_SUFFIX = "--x-s3"


class S3Stores:
    """Stores of S3's buckets: credentials, endpoint, addressing and region are what boto3 would take."""

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings
        self._credentials = _Credentials(settings)

    def open(self, bucket: str) -> ObjectStore:
        """As `Stores.open`.

        Raises:
            InvalidInput: no bucket can have the name.
            CredentialsRefused: the environment or the SDK's files allow no client.
        """
        try:
            endpoint, region, authority = _surroundings(self._settings, bucket)
            options = _client_options(self._settings, allow_http=endpoint.startswith("http://"))
            if authority:
                options["root_certificate"] = Path(authority).read_bytes()
            return S3Store(
                bucket,
                endpoint=endpoint,
                region=region,
                # The endpoint has the bucket in it, in either style.
                virtual_hosted_style_request=True,
                skip_signature=False,
                client_options=options,
                retry_config=_ONE_ATTEMPT,
                credential_provider=self._credentials,
            )
        except ParamValidationError as error:
            raise classify(error) from error
        except Exception as error:
            raise CredentialsRefused(f"obstore makes no client for the object store: {reason_of(error)}") from error

    def failure(self) -> NanoVLLMError | None:
        """As `Stores.failure`."""
        return self._credentials.failure

    def can_read(self, bucket: str) -> bool:
        """As `Stores.can_read`: directory buckets (S3 Express) take sessions."""
        return not bucket.endswith(_EXPRESS_SUFFIX)

    def forget(self) -> None:
        """As `Stores.forget`."""
        self._credentials = _Credentials(self._settings)


class EnvironmentStores:
    """Stores that obstore makes of variables: Google Cloud Storage (``GOOGLE_…``) or Azure (``AZURE_…``).

    Where those name no credentials, it asks for the application's default ones, or for a managed identity.
    """

    def __init__(self, settings: S3Settings, make: Callable[..., ObjectStore], variables: str) -> None:
        self._settings = settings
        self._make = make
        self._variables = variables

    def open(self, bucket: str) -> ObjectStore:
        """As `Stores.open`. Raises CredentialsRefused: the variables allow none."""
        # Their endpoints are https, unless a variable names another.
        options = _client_options(self._settings, allow_http=True)
        try:
            return self._make(bucket, client_options=options, retry_config=_ONE_ATTEMPT)
        except Exception as error:
            raise CredentialsRefused(
                f"obstore makes no client of the variables {self._variables}: {type(error).__name__}"
            ) from error

    def failure(self) -> NanoVLLMError | None:
        """As `Stores.failure`: obstore's own errors tell it."""
        return None

    def can_read(self, bucket: str) -> bool:
        """As `Stores.can_read`."""
        return True

    def forget(self) -> None:
        """As `Stores.forget`: each store reads the variables anew."""


def obstore_readers(settings: S3Settings, boto3: ObjectReader) -> dict[str, ObjectReader]:
    """The readers of the schemes that obstore reads with ``settings``; ``boto3`` reads what it cannot of S3."""
    stores: dict[str, Stores] = {"s3": S3Stores(settings), **_of_environment(settings)}
    return {
        scheme: ObstoreReader(stores[scheme], boto3 if scheme == "s3" else None) for scheme in settings.obstore_schemes
    }


def check_stores(settings: S3Settings) -> None:
    """Find out what can be known without a request.

    Raises:
        ConfigurationError: the variables allow no client for a bucket or container of ``s3.allow``.
    """
    stores = _of_environment(settings)
    for entry in filter(None, map(split_prefix, settings.allow)):
        if entry.scheme not in stores:
            continue
        try:
            stores[entry.scheme].open(entry.bucket)
        except CredentialsRefused as error:
            raise ConfigurationError(f"s3.allow names {entry.store}, and {error}: set them, or leave it out") from error


def _of_environment(settings: S3Settings) -> dict[str, EnvironmentStores]:
    return {
        "gs": EnvironmentStores(settings, GCSStore, "GOOGLE_…"),
        "az": EnvironmentStores(settings, AzureStore, "AZURE_…"),
    }


class _Credentials:
    """The AWS SDK's credential chain for obstore; ``failure`` says why the last request for them failed."""

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._session: Any = None
        self.failure: CredentialsRefused | None = None

    def __call__(self) -> S3Credential:
        try:
            with self._lock:
                if self._session is None:
                    self._session = make_session(self._settings)
                check_credentials(self._session)
                credential = Boto3CredentialProvider(self._session, ttl=CREDENTIALS_TTL)()
        except CredentialsRefused as refused:
            self.failure = refused
            raise
        self.failure = None
        return credential


def _surroundings(settings: S3Settings, bucket: str) -> tuple[str, str, str | None]:
    """Where boto3 asks for the objects of ``bucket`` (a URL), its region, and the file of its certificate authorities.

    A URL that botocore presigns has all that settings, profile and variables say: endpoint, addressing style,
    partition, dual stack, FIPS.
    """
    session = make_session(settings)
    client = unsigned_client(settings, session)
    client.meta.events.register_first("choose-signer.s3.GetObject", lambda **_: "s3v4")
    url: str = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"})
    region = client.meta.region_name
    authority = session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    endpoint = url.partition("?")[0].removesuffix("/k")
    return endpoint, "us-east-1" if region in (None, "aws-global") else region, authority


def _client_options(settings: S3Settings, *, allow_http: bool) -> ClientConfig:
    return {
        "allow_http": allow_http,
        "connect_timeout": timedelta(seconds=settings.connect_timeout_s),
        "read_timeout": timedelta(seconds=settings.read_timeout_s),
        "timeout": timedelta(seconds=settings.object_timeout_s),
        "pool_max_idle_per_host": str(settings.max_connections),
        "user_agent": "nanovllm",
    }
