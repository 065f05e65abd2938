"""Producers of jobs; without torch and numpy.

async with JobProducer(bootstrap_servers="localhost:9092") as producer:
    job_id = await producer.send("What is the total? <|image|>", images=["s3://receipts/0001.png"])

With ``results=True`` it reads the results too: ``outcome = await producer.result(job_id)``.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal, Self, TypeVar
from uuid import uuid4

from aiokafka import AIOKafkaProducer
from pydantic import ValidationError

from nanovllm.client.connection import connected_producer
from nanovllm.client.outcomes import Outcomes
from nanovllm.client.results import Outcome, client_settings
from nanovllm.client.upload import ImageUploader
from nanovllm.errors import InvalidInput, InvalidJob, MessageTooLarge
from nanovllm.kafka.admin import message_limits
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.kafka.topic_presence import require_topics
from nanovllm.messages.codec import encode_job
from nanovllm.messages.encoding import CONTENT_TYPES, MessageFormat
from nanovllm.messages.job import ImageRef, Job, Reuse, derive_job_id, image_name
from nanovllm.messages.validation import describe_errors
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings.kafka import KafkaSettings
from nanovllm.settings.s3 import S3Settings
from nanovllm.settings.topics import TopicSettings
from nanovllm.sinks.kafka import send_record

T = TypeVar("T")
JobKey = Literal["image", "job_id", "none"]
JobImage = str | Path | bytes | bytearray | memoryview | IO[bytes] | ImageRef


class JobProducer:
    """Sends jobs to Kafka and says under which ``job_id`` their results will come. An async context manager.

    Args:
        kafka: brokers, TLS and login; ``bootstrap_servers`` alone will do where neither is needed.
        topic: where the jobs go.
        key: the record's key. ``image``: the first image's identity, so that equal images meet one worker's cache;
            ``job_id``; ``none``: spread evenly.
        fmt: ``json``, or ``msgpack`` (images inside the message take a third less).
        upload: ``s3://bucket/prefix`` for images that are too large for a message; None refuses them.
        s3: how ``upload`` is reached; credentials are the AWS SDK's own.
        results: read the results and dead letters of what is sent, for ``result``; topics where they are not the
            default ones. Each such producer reads both topics in full while it runs.
    """

    def __init__(
        self,
        kafka: KafkaSettings | None = None,
        *,
        bootstrap_servers: str | None = None,
        topic: str = "nanovllm.jobs",
        key: JobKey = "image",
        fmt: MessageFormat = "json",
        upload: str | None = None,
        s3: S3Settings | None = None,
        results: bool | TopicSettings = False,
    ) -> None:
        kafka = kafka or KafkaSettings()
        self._kafka = kafka.model_copy(update={"bootstrap_servers": bootstrap_servers}) if bootstrap_servers else kafka
        self.topic = topic
        self._key = key
        self._format: MessageFormat = fmt
        self._uploader = ImageUploader(upload, s3 or S3Settings()) if upload else None
        self._connection = AsyncExitStack()
        self._producer: AIOKafkaProducer | None = None
        self._max_bytes = 0
        topics = results if isinstance(results, TopicSettings) else None
        self._outcomes = Outcomes(client_settings(self._kafka, topics)) if results else None

    async def start(self) -> None:
        """Connect.

        Raises:
            BrokersUnavailable: the brokers cannot be reached, or refuse the login.
            MissingTopic: the brokers do not list the topic, and do not create it by themselves.
        """
        self._max_bytes = (await message_limits(self._kafka, [self.topic]))[self.topic]
        await require_topics(self._kafka, [self.topic])
        async with AsyncExitStack() as stack:
            # Before the first job is sent, so that no result can be missed.
            if self._outcomes is not None:
                await stack.enter_async_context(self._outcomes)
            self._producer = await stack.enter_async_context(connected_producer(self._kafka))
            self._connection = stack.pop_all()

    async def stop(self) -> None:
        """Send what is waiting and disconnect."""
        await self._connection.aclose()
        self._producer = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def send(
        self,
        prompt: str | None = None,
        *,
        images: JobImage | Sequence[JobImage] = (),
        messages: Sequence[Mapping[str, Any]] | None = None,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        job_id: str | None = None,
        deadline: datetime | str | None = None,
        priority: int = 0,
        metadata: Mapping[str, Any] | None = None,
        reply_to: str | None = None,
        reuse: Reuse | None = None,
    ) -> str:
        """Send one job and return its ``job_id`` when all replicas have it.

        Give a ``job_id`` of your own where the call may be repeated: the result's identity depends on it alone.

        Args:
            images: ``s3://`` or ``https://`` URIs, paths of local files, encoded bytes, open files, or ImageRef; one
                for each ``<|image|>``, and a single one may stand without a list. The result names each by its path or
                URI.
            sampling: only what is set is sent; the worker's defaults stand for the rest.

        Raises:
            InvalidJob: a field is wrong; named in the message.
            PlaceholderMismatch: more or fewer images than places for them.
            MessageTooLarge: the job does not fit a message, and there is no place to upload its images.
            TransientError, BrokersUnavailable: the brokers did not answer, or refuse.
        """
        explicit = sampling.model_dump(exclude_unset=True) if isinstance(sampling, SamplingParams) else sampling
        fields = {
            "job_id": job_id,
            "prompt": prompt,
            "messages": None if messages is None else list(messages),
            "images": [await _image_ref(image) for image in _as_list(images)],
            "sampling": _with_text_keys(explicit or {}),
            "deadline": deadline,
            "priority": priority,
            "metadata": dict(metadata or {}),
            "reply_to": reply_to,
            "reuse": reuse,
        }
        try:
            job = Job.model_validate(fields)
        except ValidationError as error:
            raise InvalidJob(describe_errors(error, "job")) from None
        return await self.send_job(job)

    async def send_job(self, job: Job) -> str:
        """Send ``job`` and return its ``job_id`` when all replicas have it. Raises as ``send`` does."""
        if self._producer is None:
            raise InvalidInput("the producer is not started: use it as an async context manager")
        if self._outcomes is not None:
            # An id that followed from the offset would be known after the result may have come.
            job = job if job.job_id else job.model_copy(update={"job_id": uuid4().hex})
        record = await self._record(job)
        if self._outcomes is not None:
            self._outcomes.expect(str(job.job_id))
        sent = await send_record(self._producer, record)
        return job.job_id or derive_job_id(sent.topic, sent.partition, sent.offset)

    async def result(self, job_id: str, *, timeout_s: float | None = None) -> Outcome:
        """The first result or dead letter of a job that this producer has sent; each is given out once.

        Raises:
            InvalidInput: the producer does not read results, or has not sent such a job.
            TimeoutError: nothing came within ``timeout_s``; the call may be repeated.
            BrokersUnavailable: the brokers refuse.
        """
        if self._outcomes is None:
            raise InvalidInput("this producer reads no results: JobProducer(…, results=True)")
        async with asyncio.timeout(timeout_s):
            return await self._outcomes.take(job_id)

    @staticmethod
    async def _uploaded(uploader: ImageUploader, image: ImageRef) -> ImageRef:
        if image.data is None:
            return image
        return (await uploader.upload(image.data, image.name)).model_copy(update={"name": image.name})

    async def _record(self, job: Job) -> OutgoingRecord:
        key = self._record_key(job)
        record = self._encode(job, key)
        if record.size_bytes > self._max_bytes and self._uploader is not None:
            images = [await self._uploaded(self._uploader, image) for image in job.images]
            job = job.model_copy(update={"images": tuple(images)})
            record = self._encode(job, key)
        if record.size_bytes > self._max_bytes:
            held = any(image.data is not None for image in job.images)
            hint = "; give large images a place by upload='s3://bucket/prefix' (in a shell --upload)" if held else ""
            raise MessageTooLarge(
                f"the job takes {record.size_bytes} bytes, topic {self.topic} takes {self._max_bytes}{hint}"
            )
        return record

    def _record_key(self, job: Job) -> bytes | None:
        # Also with other keys: a job whose images and places differ in number can only become a dead letter.
        image = job.image_key()
        key = {"image": image, "job_id": job.job_id, "none": None}[self._key]
        return None if key is None else key.encode()

    def _encode(self, job: Job, key: bytes | None) -> OutgoingRecord:
        headers = (("content-type", CONTENT_TYPES[self._format].encode()),)
        return OutgoingRecord(self.topic, key, encode_job(job, self._format), headers)


class SyncJobProducer:
    """JobProducer for services without an event loop: the same arguments, a plain context manager, thread-safe."""

    def __init__(self, kafka: KafkaSettings | None = None, **options: Any) -> None:
        self._producer = JobProducer(kafka, **options)
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> Self:
        thread = threading.Thread(target=self._loop.run_forever, name="nanovllm-producer", daemon=True)
        with ExitStack() as stack:
            stack.callback(self._loop.close)
            thread.start()
            stack.callback(thread.join)
            stack.callback(self._loop.call_soon_threadsafe, self._loop.stop)
            self._run(self._producer.start())
            stack.callback(lambda: self._run(self._producer.stop()))
            self._connection = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def send(self, prompt: str | None = None, **fields: Any) -> str:
        """As ``JobProducer.send``."""
        return self._run(self._producer.send(prompt, **fields))

    def send_job(self, job: Job) -> str:
        """As ``JobProducer.send_job``."""
        return self._run(self._producer.send_job(job))

    def result(self, job_id: str, *, timeout_s: float | None = None) -> Outcome:
        """As ``JobProducer.result``."""
        return self._run(self._producer.result(job_id, timeout_s=timeout_s))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _as_list(images: JobImage | Sequence[JobImage]) -> Sequence[JobImage]:
    is_one = isinstance(images, (str, Path, bytes, bytearray, memoryview, ImageRef)) or hasattr(images, "read")
    return [images] if is_one else images  # type: ignore[list-item,return-value]


async def _image_ref(image: JobImage) -> dict[str, Any] | ImageRef | str:
    if isinstance(image, ImageRef):
        return image
    if isinstance(image, (bytes, bytearray, memoryview)):
        return {"data": bytes(image)}
    if isinstance(image, str) and "://" in image:
        return image
    name = image if isinstance(image, (str, Path)) else getattr(image, "name", "")
    name = str(name) if isinstance(name, (str, Path)) else ""  # the name of a file that has none is a number
    try:
        data = await asyncio.to_thread(_read, image)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InvalidInput(f"the image {name} cannot be read: {reason}") from None
    return {"data": data, "name": image_name(name)}


def _read(image: str | Path | IO[bytes]) -> bytes:
    """The bytes of a file; one that is open is read from its beginning where it can be rewound."""
    if isinstance(image, (str, Path)):
        return Path(image).read_bytes()
    with suppress(OSError, AttributeError):
        image.seek(0)
    data = image.read()
    if not isinstance(data, bytes):
        raise OSError(0, "it is not open for reading bytes: open it with mode 'rb'")
    return data


def _with_text_keys(sampling: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(sampling)
    if isinstance(biases := values.get("logit_bias"), Mapping):
        # Token ids are numbers in Python and the keys of an object in JSON.
        values["logit_bias"] = {str(key) if type(key) is int else key: bias for key, bias in biases.items()}
    return values
