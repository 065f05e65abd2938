"""SQS queue: receiving, visibility and deletion, each call in a thread beside the event loop."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import botocore.exceptions as sdk
import botocore.session
from botocore.config import Config

from nanovllm.errors import ConfigurationError, CredentialsRefused, NanoVLLMError, TransientError

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BATCH = 10
"""Most messages of one call of SQS."""
WAIT_S = 5
"""Longest that SQS holds an answer back while the queue is empty: a stop waits for it."""
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20
_AWS_HOST = re.compile(r"(?:^|\.)sqs\.(?P<region>[a-z0-9-]+)\.(?:amazonaws|api\.aws|vpce)\b")
_NO_QUEUE = ("NonExistentQueue", "QueueDoesNotExist", "InvalidAddress")
_REFUSED = ("AccessDenied", "ExpiredToken", "InvalidClientTokenId", "SignatureDoesNotMatch", "UnrecognizedClient")


@dataclass(frozen=True)
class QueueMessage:
    """A received message; ``receipt`` stands for this delivery of it, ``receive_count`` for those so far."""

    message_id: str
    receipt: str
    body: bytes
    receive_count: int = 1
    sent_at_ms: int | None = None


class SqsQueue:
    """The queue at ``url``, which names region and endpoint too. Credentials are the AWS SDK's own.

    Args:
        visibility_s: how long a received message is hidden from other receivers; ``extend`` begins it anew.
        threads: most calls at once.

    Raises:
        ConfigurationError: ``url`` is no URL of a queue, or the SDK makes no client.
    """

    def __init__(self, url: str, *, visibility_s: int = 60, threads: int = 8) -> None:
        parts = urlsplit(url)
        self.url, self.name = url, parts.path.rpartition("/")[2]
        self.visibility_s = visibility_s
        if parts.scheme not in ("http", "https") or not parts.hostname or not self.name:
            raise ConfigurationError(
                "the queue is named by its URL, such as https://sqs.eu-central-1.amazonaws.com/123456789012/receipts"
            )
        session = botocore.session.get_session()
        aws = _AWS_HOST.search(parts.hostname)
        region = aws["region"] if aws else session.get_config_variable("region") or "us-east-1"
        try:
            self._client: Any = session.create_client(
                "sqs",
                endpoint_url=f"{parts.scheme}://{parts.netloc}",
                region_name=region,
                config=Config(
                    connect_timeout=CONNECT_TIMEOUT_S,
                    read_timeout=READ_TIMEOUT_S,
                    max_pool_connections=threads,
                    retries={"total_max_attempts": 2, "mode": "standard"},
                ),
            )
        except (sdk.BotoCoreError, ValueError, OSError) as error:
            raise ConfigurationError(f"the AWS SDK makes no client for SQS: {type(error).__name__}") from error
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="sqs")

    def close(self) -> None:
        """Close the connections once the calls under way have ended."""
        self._threads.shutdown()
        self._client.close()

    async def receive(self) -> list[QueueMessage]:
        """Up to ``MAX_BATCH`` messages, none after ``WAIT_S`` without one. Raises as ``sdk_error`` says."""
        answer = await self._call(
            self._client.receive_message,
            MaxNumberOfMessages=MAX_BATCH,
            WaitTimeSeconds=WAIT_S,
            VisibilityTimeout=self.visibility_s,
            AttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
        )
        return [_message(fields) for fields in answer.get("Messages", ())]

    async def extend(self, messages: Sequence[QueueMessage]) -> None:
        """Hide ``messages`` for another ``visibility_s``. Raises as ``sdk_error`` says."""
        await self._change_visibility(messages, self.visibility_s)

    async def release(self, messages: Sequence[QueueMessage]) -> None:
        """Show ``messages`` to other receivers at once. Raises as ``sdk_error`` says."""
        await self._change_visibility(messages, 0)

    async def delete(self, messages: Sequence[QueueMessage]) -> list[QueueMessage]:
        """Delete ``messages``; returns those that the queue still has. Raises as ``sdk_error`` says.

        A receipt that has run out counts as deleted: its message is delivered once more.
        """
        failed: set[str] = set()
        for batch in _batches(messages):
            entries = [{"Id": str(at), "ReceiptHandle": one.receipt} for at, one in enumerate(batch)]
            answer = await self._call(self._client.delete_message_batch, Entries=entries)
            for one in answer.get("Failed", ()):
                logger.warning("SQS does not delete a message: %s", one.get("Code"))
                if not one.get("SenderFault"):
                    failed.add(batch[int(one["Id"])].receipt)
        return [one for one in messages if one.receipt in failed]

    async def _change_visibility(self, messages: Sequence[QueueMessage], seconds: int) -> None:
        for batch in _batches(messages):
            entries = [
                {"Id": str(at), "ReceiptHandle": one.receipt, "VisibilityTimeout": seconds}
                for at, one in enumerate(batch)
            ]
            answer = await self._call(self._client.change_message_visibility_batch, Entries=entries)
            for one in answer.get("Failed", ()):
                logger.warning("SQS does not change the visibility of a message: %s", one.get("Code"))

    async def _call(self, operation: Callable[..., T], **fields: Any) -> T:
        def run() -> T:
            try:
                return operation(QueueUrl=self.url, **fields)
            except (sdk.BotoCoreError, sdk.ClientError) as error:
                raise sdk_error(error, self.name) from error

        return await asyncio.get_running_loop().run_in_executor(self._threads, run)


def sdk_error(error: Exception, queue: str) -> NanoVLLMError:
    """What botocore's ``error`` at a call for ``queue`` means.

    ConfigurationError: there is no such queue. CredentialsRefused: they are missing or refused. TransientError: all
    else.
    """
    if isinstance(error, sdk.ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        if any(name in code for name in _NO_QUEUE):
            return ConfigurationError(f"there is no queue {queue} at this URL ({code})")
        kind = CredentialsRefused if any(name in code for name in _REFUSED) else TransientError
        return kind(f"SQS refuses {error.operation_name} of queue {queue} ({code})")
    if isinstance(error, (sdk.NoCredentialsError, sdk.PartialCredentialsError, sdk.CredentialRetrievalError)):
        return CredentialsRefused(f"the AWS SDK has no credentials for queue {queue} ({type(error).__name__})")
    return TransientError(f"SQS does not answer for queue {queue} ({type(error).__name__})")


def _message(fields: dict[str, Any]) -> QueueMessage:
    attributes = fields.get("Attributes", {})
    sent = str(attributes.get("SentTimestamp", ""))
    return QueueMessage(
        message_id=fields["MessageId"],
        receipt=fields["ReceiptHandle"],
        body=fields.get("Body", "").encode(errors="surrogatepass"),
        receive_count=int(attributes.get("ApproximateReceiveCount", 1)),
        sent_at_ms=int(sent) if sent.isdigit() else None,
    )


def _batches(messages: Sequence[QueueMessage]) -> Iterable[Sequence[QueueMessage]]:
    return (messages[start : start + MAX_BATCH] for start in range(0, len(messages), MAX_BATCH))
