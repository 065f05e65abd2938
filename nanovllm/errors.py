"""The one error tree. Every failure that a user or an operator can meet has a class here.

A class says its ``code`` (stable, machine-readable), its ``error_class`` (what the worker does about it), a ``remedy``
(for an operator) and whether it is ``retryable``: the same message can succeed when it is sent again, once the remedy
was applied. The message of an instance names the thing and the value; it never carries secrets, local paths of the
worker or object representations, because it travels into dead letters.

    NanoVLLMError
      InvalidInput                INVALID: a dead letter at once
        InvalidJob                  UnsupportedVersion, InvalidEvent
        InvalidImage                UnsupportedImageFormat, ImageTooLarge (TooManyPixels, TooManyFrames)
        UnsupportedConstraint, PlaceholderMismatch, PromptTooLong, ForbiddenUri (ForbiddenKey, ForbiddenHost)
        InvalidDocument             UnsupportedDocumentFormat, DocumentEncrypted, DocumentTooLarge, TooManyPages
                                    InvalidPage (PageTooLarge), InvalidPageRange
      PermanentError              PERMANENT: a dead letter at once
        ObjectNotFound, ObjectChanged, ObjectForbidden, ObjectArchived, SidecarTaken, DecoderFailed, CrashedWorker
        MessageTooLarge, AnswerWithheld, UrlRefused
      TransientError              TRANSIENT: attempts in place, a retry topic, then a dead letter
        FetchFailed, ObjectUnavailable, ObjectRefused, ObjectMissing, AnswerFailed
      DeadlineExceeded            EXPIRED: a dead letter
      SystemicError               SYSTEMIC: back to Kafka, no work is taken
        BrokersUnavailable, AnswersMissing, CredentialsRefused (ApiKeyRefused), StoreUnreachable
        EndpointsUnavailable, PoisonLimitReached, EngineDead, EngineFault
      ConfigurationError          the process ends with exit code 2
        ModelNotFound, UnsupportedModel, MissingTopic, TooFewBrokers, InvalidRoutes
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import ClassVar

_CORRECT_THE_INPUT = "Correct the input named in the message."
_CORRECT_THE_SETTING = "Correct the setting named in the message."
_SAYS_NO_MORE = (_CORRECT_THE_INPUT, _CORRECT_THE_SETTING)


class ErrorClass(StrEnum):
    """What a failure means for the delivery of a job."""

    INVALID = "invalid"  # the message itself is wrong: dead letter at once
    PERMANENT = "permanent"  # the job is well-formed but can never succeed: dead letter at once
    TRANSIENT = "transient"  # may succeed later: retry with backoff, then dead letter as retries_exhausted
    EXPIRED = "expired"  # its deadline passed: dead letter
    SYSTEMIC = "systemic"  # nothing can succeed now: stop taking work, drop nothing


def counted(number: int, noun: str) -> str:
    """``number`` and ``noun`` in words for a message: "1 image", "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


class NanoVLLMError(Exception):
    """Root of every error that this package raises on purpose."""

    code: ClassVar[str] = "internal"
    error_class: ClassVar[ErrorClass] = ErrorClass.PERMANENT
    remedy: ClassVar[str] = "Report this with the log around it."
    retryable: ClassVar[bool] = True
    position: int | None = None
    """Which of several things done together failed, from 1; None where that is not known."""

    @property
    def in_one_line(self) -> str:
        """The message, and the remedy where it says more than that the message is to be heeded."""
        message = " ".join(str(self).split("\n")).strip()
        return message if self.remedy in _SAYS_NO_MORE else f"{message.rstrip('.')}. {self.remedy}"


class InvalidInput(NanoVLLMError, ValueError):
    """Input that can never be accepted as it is."""

    code = "invalid_input"
    error_class = ErrorClass.INVALID
    remedy = _CORRECT_THE_INPUT
    retryable = False


class UnsupportedConstraint(InvalidInput):
    """A schema, expression, grammar or list of choices that cannot be enforced: it is refused, never ignored."""

    code = "unsupported_constraint"
    remedy = "Simplify the constraint named in the message."


class InvalidJob(InvalidInput):
    """A record that is not a valid job: broken encoding, wrong types, unknown names."""

    job_id: str | None = None
    """What the record itself says, where that much of it is valid."""
    code = "invalid_job"
    remedy = "Send a job that follows docs/schemas/job.v1.json."


class UnsupportedVersion(InvalidJob):
    """A job of a major version that this worker does not know: it may mean something else by the same names."""

    code = "unsupported_version"
    remedy = "Send version 1, or replay the job to workers that know its version."
    retryable = True


class InvalidEvent(InvalidJob):
    """A record that is not an S3 event notification in a known form."""

    code = "invalid_event"
    remedy = "Send S3's event notifications as the store writes them: docs/events.md lists the forms."


class InvalidImage(InvalidInput):
    """Bytes that are not a readable image."""

    code = "invalid_image"
    remedy = "Send a complete image in an allowed format."


class UnsupportedImageFormat(InvalidImage):
    """An image format that is not on the allow-list."""

    code = "unsupported_image_format"
    remedy = "Convert the image to PNG or JPEG, or allow its format in the settings."


class ImageTooLarge(InvalidImage):
    """An image beyond the limit in bytes; refused before it is decoded."""

    code = "image_too_large"
    remedy = "Send a smaller image, or raise the image limits in the settings."


class TooManyPixels(ImageTooLarge):
    """An image beyond the limit in pixels; refused before it is decoded."""

    code = "too_many_pixels"


class TooManyFrames(ImageTooLarge):
    """An image of more frames or pages than allowed; refused before it is decoded."""

    code = "too_many_frames"
    remedy = "Send one frame or page, or raise max_frames, which takes the first of them."


class InvalidDocument(InvalidInput):
    """Bytes that are not a readable document."""

    code = "invalid_document"
    remedy = "Send a complete PDF, TIFF or image; qpdf or a print to PDF repairs many broken files."


class UnsupportedDocumentFormat(InvalidDocument):
    """A document that is neither a PDF nor an image of an allowed format, by its bytes."""

    code = "unsupported_document_format"
    remedy = "Convert the document to PDF, or install the extra documents where the message asks for it."


class DocumentEncrypted(InvalidDocument):
    """A document that needs a password or a certificate."""

    code = "document_encrypted"
    remedy = "Send the document without encryption."


class DocumentTooLarge(InvalidDocument):
    """A document beyond the limit in bytes; refused before it is opened."""

    code = "document_too_large"
    remedy = "Split the document, or raise the limit."


class TooManyPages(InvalidDocument):
    """A document of more pages than allowed; refused before one is rendered."""

    code = "too_many_pages"
    remedy = "Split the document, or raise the limit."


class InvalidPage(InvalidDocument):
    """A page that cannot be read, in a document that can be."""

    code = "invalid_page"
    remedy = "Repair the page named in the message; the other pages can be read."


class PageTooLarge(InvalidPage):
    """A page too large to be legible within the pixels allowed, or with more text than allowed."""

    code = "page_too_large"
    remedy = "Split the page, or raise the limit of pixels or characters."


class InvalidPageRange(InvalidDocument):
    """A page range that is none, or that names no page of the document."""

    code = "invalid_page_range"
    remedy = "Write a range such as 1-3,7,-1, or all."


class PlaceholderMismatch(InvalidInput):
    """The number of ``<|image|>`` placeholders differs from the number of images."""

    code = "placeholder_mismatch"
    remedy = "Write one <|image|> for each image."


class PromptTooLong(InvalidInput):
    """A request that could never fit the context or the KV cache."""

    code = "prompt_too_long"
    remedy = "Shorten the prompt, lower max_tokens, or raise max_model_len or kv_cache_bytes."


class ForbiddenUri(InvalidInput):
    """A URI whose bucket or prefix is not allowed, or a ``reply_to`` whose topic is not."""

    code = "forbidden_uri"
    remedy = "Add the bucket and prefix to NANOVLLM_S3__ALLOW, or the topic of a reply_to to NANOVLLM_TOPICS__REPLY_TO."
    retryable = True


class ForbiddenKey(ForbiddenUri):
    """A key with a ``.`` or ``..`` segment: HTTP clients resolve it to another key, and no setting allows it."""

    remedy = "Copy the object to a key without such segments, and send a job that names that one."
    retryable = False


class ForbiddenHost(ForbiddenUri):
    """A URI over HTTP of a host that is not allowed, or that lies or redirects where images may not come from."""

    remedy = (
        "Add the host to NANOVLLM_HTTP_IMAGES__ALLOW, with its port where that is not 443, and its network to "
        "NANOVLLM_HTTP_IMAGES__ALLOW_NETWORKS where that is not public; or put the image into S3."
    )


class PermanentError(NanoVLLMError):
    """The job is well-formed and will never succeed."""

    code = "permanent"
    retryable = False


class ObjectNotFound(PermanentError):
    """The object or bucket is not there."""

    code = "object_not_found"
    remedy = "Upload the object before the job that names it."
    retryable = True


class ObjectChanged(PermanentError):
    """The object's content is not what the job's sha256 or etag promised."""

    code = "object_changed"
    remedy = "Name a version_id, or produce the job again with the new sha256 or etag."


class ObjectForbidden(PermanentError):
    """The worker's credentials may not read this object, though they work elsewhere; or a host refuses its URL."""

    code = "object_forbidden"
    remedy = (
        "Grant the worker's role s3:GetObject on the object, and kms:Decrypt on its key where it has one; for an "
        "https:// URL that has expired, send the job with a new one."
    )
    retryable = True


class UrlRefused(PermanentError):
    """The host of an image answers its URL with what is no image: a code of 4xx, a compressed body, a redirect more."""

    code = "url_refused"
    remedy = "Name a URL that answers a plain GET with the file itself: no login, three redirects at most."
    retryable = True


class ObjectArchived(PermanentError):
    """The object lies in an archive (S3 Glacier, or an archive tier) and cannot be read from there."""

    code = "object_archived"
    remedy = "Restore the object (s3:RestoreObject), wait until that is done, and replay the job."
    retryable = True


class SidecarTaken(PermanentError):
    """An object that is no record of ours, or that of another source, lies where the record shall go."""

    code = "sidecar_taken"
    remedy = "Move that object, or give the route's sidecar another place, then replay the job."
    retryable = True


class DecoderFailed(PermanentError):
    """A decoder process died or ran out of time or memory on this image."""

    code = "decoder_failed"
    remedy = "Re-encode the image; it exhausts or crashes the decoder."


class PagesFailed(PermanentError):
    """More pages of a document failed than the route's error budget allows."""

    code = "pages_failed"
    remedy = "The message says the pages' codes; raise max_failed_pages of the route where some pages may fail."


class CrashedWorker(PermanentError):
    """Worker processes died each time this job was alone in their engine."""

    code = "crashed_worker"
    remedy = "Look into the workers' last logs; the job crashes the engine or exhausts its memory."


class MessageTooLarge(PermanentError):
    """A message above the limit of its topic or of the producer."""

    code = "message_too_large"
    remedy = "Send less in one message, or raise the topic's max.message.bytes and NANOVLLM_KAFKA__MAX_REQUEST_BYTES."
    retryable = True


class TransientError(NanoVLLMError):
    """May succeed when tried again."""

    code = "transient"
    error_class = ErrorClass.TRANSIENT
    remedy = "Wait; it is retried with backoff."
    retry_after_s: float = 0.0
    """Least seconds until another attempt, where the other side has asked for some."""


class AnswerFailed(TransientError):
    """Servers of ``remote.endpoints``, or vLLM's engine, failed with this request as often as is allowed, or would."""

    code = "answer_failed"
    remedy = "See what the message says of the servers' failures, repair it, then replay the job."


class AnswerWithheld(PermanentError):
    """A filter of the server stopped the answer, or its model refuses one."""

    code = "answer_withheld"
    remedy = "Change the prompt or the image, or the filter of the server."


class FetchFailed(TransientError):
    """The store or a host broke off, or answered a server error or, for other objects too, an unknown 4xx code."""

    code = "fetch_failed"


class ObjectUnavailable(TransientError):
    """The store answers for this object or bucket, and cannot give it now: its encryption key or its region."""

    code = "object_unavailable"
    remedy = (
        "Repair what the store's code names (KMS.…: the state of the key; InvalidRequest: encryption with a "
        "customer-provided key; …Redirect: the bucket's region, or NANOVLLM_S3__REGION), then replay the job."
    )


class ObjectRefused(TransientError):
    """The store answers requests for other objects, and this one as no S3 server does, or with an unknown 4xx code."""

    code = "object_refused"
    remedy = (
        "See what the store's answer means for this object (a key or version too long for a URL, a proxy's rule, a "
        "redirect, a missing entity tag), repair that or name another object, then replay the job."
    )


class ObjectMissing(TransientError):
    """The object of an event is not there, and its route waits for it (`on_missing: retry`)."""

    code = "object_missing"
    remedy = "Upload the object again, or let the route drop such events (on_missing: drop), then replay the event."


class DeadlineExceeded(NanoVLLMError):
    """The job's deadline passed before it was done."""

    code = "deadline_exceeded"
    error_class = ErrorClass.EXPIRED
    remedy = "Give the job a later deadline, or add workers."
    retryable = False


class SystemicError(NanoVLLMError):
    """Nothing can succeed until an operator or the platform acts."""

    code = "systemic"
    error_class = ErrorClass.SYSTEMIC
    remedy = "Repair what the message names and try again; nothing was dropped."


class BrokersUnavailable(SystemicError):
    """The Kafka brokers do not answer, or refuse this client."""

    code = "brokers_unavailable"
    remedy = "Check NANOVLLM_KAFKA__BOOTSTRAP_SERVERS, the TLS and SASL settings, and the user's rights."


class AnswersMissing(SystemicError):
    """Jobs that were sent have neither a result nor a dead letter yet."""

    code = "answers_missing"
    remedy = "The jobs are sent, and need not be sent again: `nanovllm results --from-beginning` shows what comes."


class GroupInstanceFenced(SystemicError):
    """Another member of the consumer group has this worker's ``group_instance_id``, and has taken its place."""

    code = "group_instance_fenced"
    remedy = "Give every worker a NANOVLLM_KAFKA__GROUP_INSTANCE_ID of its own, or none."


class CredentialsRefused(SystemicError):
    """The object store refuses the process's credentials altogether, or the AWS SDK cannot get any."""

    code = "credentials_refused"
    remedy = "Give this process valid AWS credentials: check its AWS_ variables, profile, token file and clock."


class ApiKeyRefused(CredentialsRefused):
    """The servers of ``remote.endpoints`` refuse the worker's API key, or its lack."""

    remedy = "Set NANOVLLM_REMOTE__API_KEYS to keys that the servers take: one for all, or one for each endpoint."


class EndpointsUnavailable(SystemicError):
    """None of ``remote.endpoints`` answers as a server of OpenAI's protocol does."""

    request_failures = 0  # how often servers have failed with the request that learns of it
    code = "endpoints_unavailable"
    remedy = "Check NANOVLLM_REMOTE__ENDPOINTS, the servers themselves, and the network between."


class StoreUnreachable(SystemicError):
    """No object store answers at the endpoint, or it proves no trusted identity; no job can be the cause of that."""

    code = "store_unreachable"
    remedy = "Check NANOVLLM_S3__ENDPOINT_URL, the network between this process and the store, and the store itself."


class PoisonLimitReached(SystemicError):
    """Too many jobs in a row became dead letters: something before the worker is broken, or the worker is."""

    code = "poison_limit_reached"
    remedy = "See what the dead letters have in common (nanovllm dlq list), repair it, start the worker, replay them."


class EngineDead(SystemicError):
    """The engine thread stopped: an error in a step, or a step that never ended."""

    code = "engine_dead"
    remedy = "Make another engine, or restart the worker: the offsets of what it had not answered are not committed."


class EngineFault(SystemicError):
    """The engine broke one of its own rules: no request's mistake, and nothing that a retry would mend."""

    code = "engine_fault"


class ConfigurationError(NanoVLLMError, ValueError):
    """Settings or arguments that contradict one another or name what does not exist."""

    code = "configuration"
    remedy = _CORRECT_THE_SETTING


class ModelNotFound(ConfigurationError):
    """A model name that no directory, alias or local hub cache knows."""

    code = "model_not_found"
    remedy = "Give a local directory, or download the checkpoint into the hub cache first."

    @property
    def in_one_line(self) -> str:
        """The message, and the remedy where the message names no command of its own."""
        return str(self) if "`" in str(self) else super().in_one_line


class UnsupportedModel(ConfigurationError):
    """A checkpoint whose architecture or option this engine does not implement."""

    code = "unsupported_model"
    remedy = (
        "Use a checkpoint of a supported architecture and options (docs/models.md), or another engine.backend for "
        "this one: vllm, or openai with a server that runs it."
    )


class MissingTopic(ConfigurationError):
    """A topic that the brokers do not list. A worker that starts lets them create none, other than clients do."""

    code = "missing_topic"
    remedy = "`nanovllm topics create` makes every topic of a worker but those of reply_to."


class TooFewBrokers(ConfigurationError):
    """A new topic is to have more copies than there are brokers."""

    remedy = "Ask for no more copies than there are brokers: nanovllm topics create --replication."


def errors_of_dead_letters(root: type[NanoVLLMError] = NanoVLLMError) -> Iterator[type[NanoVLLMError]]:
    """The errors that a dead letter can name.

    Configuration ends a worker before it takes a job, and what is systemic goes back to Kafka.
    """
    if not issubclass(root, (ConfigurationError, SystemicError)):
        yield root
        for child in root.__subclasses__():
            yield from errors_of_dead_letters(child)


class InvalidRoutes(ConfigurationError):
    """Routes that are malformed, take one object twice, read what they write, or do not fit the model.

    Each of ``refusals`` is one line with file and line number.
    """

    def __init__(self, refusals: Iterable[str]) -> None:
        self.refusals = tuple(refusals)
        super().__init__("; ".join(self.refusals))
