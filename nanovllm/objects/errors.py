"""Classification of stores' answers and botocore's errors: the job's fault or the store's, transient or not.

Only what an operation on an object answered can be a job's fault; everything else concerns every job."""

from __future__ import annotations

import botocore.exceptions as sdk

from nanovllm.errors import (
    CredentialsRefused,
    FetchFailed,
    InvalidInput,
    NanoVLLMError,
    ObjectArchived,
    ObjectChanged,
    ObjectForbidden,
    ObjectNotFound,
    ObjectRefused,
    ObjectUnavailable,
    StoreUnreachable,
)

# CreateSession is what the SDK asks a directory bucket (S3 Express) before each operation on it.
_OBJECT_OPERATIONS = frozenset({"GetObject", "HeadObject", "PutObject", "CreateSession", "ListObjectsV2"})

# Codes of AWS S3, MinIO, Ceph and Versity, and of Google and Azure where they differ. Others are told by their status.
_BY_CODE: dict[str, type[NanoVLLMError]] = {
    "AccountProblem": CredentialsRefused,
    "AuthorizationHeaderMalformed": CredentialsRefused,  # the SDK has tried the region that it names
    "ExpiredToken": CredentialsRefused,
    "ExpiredTokenException": CredentialsRefused,
    "IncompleteSignature": CredentialsRefused,
    "InvalidAccessKeyId": CredentialsRefused,
    "InvalidClientTokenId": CredentialsRefused,
    "InvalidRegion": CredentialsRefused,
    "InvalidSecurity": CredentialsRefused,
    "InvalidToken": CredentialsRefused,
    "InvalidTokenId": CredentialsRefused,
    "MissingAuthenticationToken": CredentialsRefused,
    "MissingSecurityHeader": CredentialsRefused,
    "NotSignedUp": CredentialsRefused,
    "RequestExpired": CredentialsRefused,
    "RequestTimeTooSkewed": CredentialsRefused,
    "SignatureDoesNotMatch": CredentialsRefused,
    "TokenRefreshRequired": CredentialsRefused,
    "UnauthorizedAccess": CredentialsRefused,
    "UnrecognizedClientException": CredentialsRefused,
    "UnsupportedSignature": CredentialsRefused,
    "UserSuspended": CredentialsRefused,
    "NoSuchKey": ObjectNotFound,
    "NoSuchBucket": ObjectNotFound,
    "NoSuchVersion": ObjectNotFound,
    "NotFound": ObjectNotFound,
    "MethodNotAllowed": ObjectNotFound,  # the answer for a version that is a delete marker
    "InvalidObjectState": ObjectArchived,
    "InvalidArgument": InvalidInput,
    "InvalidBucketName": InvalidInput,
    "InvalidObjectName": InvalidInput,
    "InvalidURI": InvalidInput,
    "KeyTooLongError": InvalidInput,
    "XMinioInvalidObjectName": InvalidInput,
    "ConditionalRequestConflict": FetchFailed,  # another write of the key was under way
    "RequestTimeout": FetchFailed,
    "RequestThrottled": FetchFailed,
    "RequestThrottledException": FetchFailed,
    "Throttling": FetchFailed,
    "ThrottlingException": FetchFailed,
    "ThrottledException": FetchFailed,
    "RequestLimitExceeded": FetchFailed,
    "BandwidthLimitExceeded": FetchFailed,
    "SlowDown": FetchFailed,
    "TooManyRequests": FetchFailed,
    "TooManyRequestsException": FetchFailed,
    "AccountIsDisabled": CredentialsRefused,
    "AuthenticationFailed": CredentialsRefused,
    "AuthenticationRequired": CredentialsRefused,
    "InvalidAuthenticationInfo": CredentialsRefused,
    "BlobArchived": ObjectArchived,
    "InvalidRequest": ObjectUnavailable,  # encrypted with a customer-provided key (SSE-C), which GetObject has to name
    "PermanentRedirect": ObjectUnavailable,
    "Redirect": ObjectUnavailable,
    "TemporaryRedirect": ObjectUnavailable,
}

# Request Timeout, Too Early and Too Many Requests: about the moment, and not about the object.
_TRANSIENT_STATUSES = frozenset({408, 425, 429})

BAD_ENDPOINT = (
    "the endpoint of the object store (NANOVLLM_S3__ENDPOINT_URL, or the AWS SDK's own setting) is no URL such as "
    "http://minio:9000"
)


def classify(error: Exception) -> NanoVLLMError:
    """What a failure of an S3 operation means for the job. The message never repeats URLs, paths or credentials."""
    if isinstance(error, sdk.ClientError):
        if error.operation_name in _OBJECT_OPERATIONS:
            return classify_answer(_code(error), status_of(error))
        return CredentialsRefused(f"no usable credentials for the object store: {reason_of(error)}")
    if isinstance(error, sdk.ParamValidationError):
        return InvalidInput("the object store's SDK refuses the bucket, key or version of the image")
    if isinstance(error, (sdk.HTTPClientError, sdk.IncompleteReadError, sdk.ChecksumError, sdk.FlexibleChecksumError)):
        return FetchFailed(f"the object store broke off: {type(error).__name__}")
    if isinstance(error, sdk.ConnectionError):
        # A job cannot cause this, so it must not pay for it: an outage would make a dead letter of every job.
        return StoreUnreachable(f"the object store cannot be reached: {type(error).__name__}")
    if isinstance(error, sdk.BotoCoreError):
        # Signing, endpoint rules, a missing dependency: the SDK does not get as far as to ask.
        return CredentialsRefused(f"the AWS SDK cannot ask the object store: {reason_of(error)}")
    # urllib3 and http.client raise their own errors while the body is read.
    return FetchFailed(f"reading the object broke off: {type(error).__name__}")


def classify_answer(code: str, status: int) -> NanoVLLMError:
    """What the answer to an operation on an object means: its error ``code`` ("": none) and HTTP ``status``."""
    said = f"the object store answered {status} {code}".rstrip()
    if code in _BY_CODE:
        return _BY_CODE[code](said)
    if code.startswith("KMS."):
        return ObjectUnavailable(said)
    if status == 404:
        return ObjectNotFound(said)
    if status == 412:
        return ObjectChanged(f"{said}: the object has another entity tag than the job names")
    if status in (401, 403):
        return ObjectForbidden(said)
    if 300 <= status < 400:
        # S3 says in a code why it redirects; a proxy does not.
        return StoreUnreachable(f"{said}: no S3 server, or not by this scheme")
    if (400 <= status < 500 or status == 501) and status not in _TRANSIENT_STATUSES:
        return ObjectRefused(said)
    return FetchFailed(said)


def no_entity_tag() -> StoreUnreachable:
    """An answer 200 without an entity tag: by a console, a proxy or a captive portal, which say so to anything."""
    return StoreUnreachable("what answers at the endpoint of the object store is no S3 server: no ETag")


def reason_of(error: Exception) -> str:
    """An error of the SDK by its name: its text may hold a URL, a path or what a service said about the caller."""
    if isinstance(error, sdk.ClientError):
        return f"{error.operation_name} {_answer(error)}"
    if isinstance(error, sdk.ProfileNotFound):
        return f"there is no AWS profile {error.kwargs['profile']!r}"
    if isinstance(error, sdk.InvalidRegionError):
        return f"{error.kwargs['region_name']!r} is no region"
    if type(error) is ValueError and str(error).startswith("Invalid endpoint"):
        return BAD_ENDPOINT
    return type(error).__name__


def _answer(error: sdk.ClientError) -> str:
    return f"answered {status_of(error)} {_code(error)}".rstrip()


def _code(error: sdk.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: sdk.ClientError) -> int:
    """The HTTP status of the answer; 0 where there is none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
