"""Sources of ``nanovllm submit``: images, globs, URIs, listed objects and job files, as jobs."""

from __future__ import annotations

import glob
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from nanovllm.client.upload import IMAGE_HEAD_BYTES, image_type
from nanovllm.errors import InvalidInput, InvalidJob, counted
from nanovllm.messages.codec import decode_job
from nanovllm.messages.http_uri import is_http_uri, parse_http_uri
from nanovllm.messages.job import IMAGE_PLACEHOLDER, Job
from nanovllm.messages.s3_uri import is_object_uri, split_object, split_object_uri
from nanovllm.messages.validation import printable
from nanovllm.objects.listing import ListedObject, ObjectPattern
from nanovllm.settings.http_images import AllowedHost, HttpImageSettings

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
# Those of LLaVA and Qwen, and of vLLM's and llama.cpp's examples.
_FOREIGN_PLACEHOLDER = re.compile(
    r"<(image|img|image_\d+|\|image_pad\||\|image_\d+\||__media__)>|\[IMG\]", re.IGNORECASE
)
JOB_SUFFIXES = frozenset({".jsonl", ".ndjson"})
Image = str | Path | ListedObject
ListObjects = Callable[[ObjectPattern], Iterable[ListedObject]]
FindObjects = Callable[[Sequence[str]], Mapping[str, ListedObject]]


@dataclass(frozen=True)
class Submission:
    """One job that is to be sent; local images are still paths, read when their turn comes."""

    job: Job | None = None
    prompt: str = ""
    images: tuple[Image, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def job_id(self) -> str | None:
        """The job's own id, or one that derives from its objects, their versions, the prompt and the sampling.

        Objects without a known version give none: another version would be taken for the same work.
        Two commands that ask different things of one object are different jobs; one that is repeated is the same.
        """
        if self.job is not None:
            return self.job.job_id
        objects = [image for image in self.images if isinstance(image, ListedObject)]
        if not objects or len(objects) < len(self.images):
            return None
        return f"{printable(PurePosixPath(objects[0].uri).name)}-{self.fingerprint[:20]}"

    @property
    def fingerprint(self) -> str:
        """A digest of all that the job is made of; of local files by path, size and time of change."""
        if self.job is not None:
            asked: Any = self.job.model_dump_json(exclude_none=True)
        else:
            asked = [self.prompt, self.sampling, *map(_identity, self.images)]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    @property
    def image_bytes(self) -> int | None:
        """Bytes of the encoded images; None where one is an object that was not listed, or has no size."""
        if self.job is not None:
            sizes = [None if image.data is None else len(image.data) for image in self.job.images]
        else:
            sizes = [_size(image) for image in self.images]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None


def plan_submissions(
    sources: Sequence[str],
    prompt: str | None,
    sampling: dict[str, Any],
    list_objects: ListObjects | None = None,
    find_objects: FindObjects | None = None,
    http: HttpImageSettings | None = None,
) -> list[Submission]:
    """The jobs that ``sources`` and ``prompt`` ask for.

    A source is an image, a directory of images, a glob, an ``s3://`` URI of an object, of a prefix (with a slash at
    its end) or with wildcards, an ``https://`` URI of a host that ``http`` allows, or a file of JSON lines (``-``:
    standard input) whose lines are whole jobs. Each image
    becomes a job with ``prompt``; a prompt with several ``<|image|>`` takes as many images a job, one without any gets
    one at its end. No source at all: one job of text. Prefixes are listed by ``list_objects``; ``find_objects`` tells
    the versions of single objects, as far as they can be known.

    Raises:
        InvalidInput: a source that is not there, images without a prompt, a number of images that does not go up.
        InvalidJob: a line that is no job, named by its file and number.
    """
    jobs = [Submission(job=job) for source in sources if _is_job_file(source) for job in _read_jobs(source)]
    images = [image for source in sources if not _is_job_file(source) for image in _expand(source, list_objects, http)]
    if not sources:
        if not prompt:
            raise InvalidInput("nothing to send: name images, a .jsonl file of jobs, or a --prompt")
        return [Submission(prompt=prompt, sampling=sampling)]
    if not images:
        return jobs
    if not prompt:
        raise InvalidInput("images need a --prompt or a --prompt-file")
    if IMAGE_PLACEHOLDER not in prompt:
        hint_at_placeholder(prompt)
        prompt = f"{prompt} {IMAGE_PLACEHOLDER}"
    places = prompt.count(IMAGE_PLACEHOLDER)
    if len(images) % places:
        raise InvalidInput(
            f"the prompt has {counted(places, 'image placeholder')}; "
            f"{counted(len(images), 'image')} cannot be dealt out evenly"
        )
    uris = [image for image in images if isinstance(image, str) and split_object_uri(image) is not None]
    known = find_objects(uris) if uris and find_objects is not None else {}
    images = [known.get(image, image) if isinstance(image, str) else image for image in images]
    groups = (tuple(images[start : start + places]) for start in range(0, len(images), places))
    return jobs + [Submission(prompt=prompt, images=group, sampling=sampling) for group in groups]


def hint_at_placeholder(prompt: str) -> None:
    """Say on stderr that a placeholder of other programs is text here."""
    if found := _FOREIGN_PLACEHOLDER.search(prompt):
        where = f"{IMAGE_PLACEHOLDER} marks an image's place, and is added at the prompt's end without one"
        print(f"{found[0]} in the prompt is sent as text: {where}", file=sys.stderr)


def _is_job_file(source: str) -> bool:
    return source == "-" or Path(source).suffix.lower() in JOB_SUFFIXES


def _read_jobs(source: str) -> Iterator[Job]:
    try:
        lines = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise InvalidInput(f"{source} cannot be read: {error.strerror or type(error).__name__}") from None
    # Only \n ends a line of JSON; splitlines() would also cut at characters that may stand inside a string.
    for number, line in enumerate(lines.split(b"\n"), start=1):
        if line.strip():
            try:
                yield decode_job(line.strip())
            except InvalidJob as error:
                raise InvalidJob(f"{source}, line {number}: {error}; nothing was sent") from None


def _expand(source: str, list_objects: ListObjects | None, http: HttpImageSettings | None) -> list[Image]:
    if is_http_uri(source):
        check_http_uri(source, http or HttpImageSettings())
        return [source]
    if "://" in source:
        pattern = ObjectPattern.of(source)
        if pattern is not None:
            return _listed(source, pattern, list_objects)
        check_object_uri(source)
        return [source]
    path = Path(source)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if _is_image(file.name) and file.is_file())
    elif path.exists():
        if not _is_image(path.name) and not _begins_like_image(path):
            raise InvalidInput(f"{source} is no image: neither by its name nor by its first bytes")
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
    if not found:
        raise InvalidInput(f"{source}: no such file, and no images are found there")
    for file in found:
        check_file(file)
    return list(found)


def check_object_uri(source: str) -> None:
    """Raise InvalidInput where ``source`` is not the URI of one object."""
    if not is_object_uri(source):
        raise InvalidInput("only s3:// and https:// URIs can be sent; download what lies elsewhere, or put it into S3")
    if split_object(source) is None:
        raise InvalidInput(
            f"{source} names no object: it is s3://bucket/key, and a bucket's name has 3 to 63 characters"
        )


def check_http_uri(source: str, http: HttpImageSettings) -> None:
    """Raise InvalidInput where ``source`` is no URI over HTTP, or one of a host that ``http`` does not allow."""
    try:
        uri = parse_http_uri(source)
    except ValueError as error:
        raise InvalidInput(f"a URI that begins with http {error}") from None
    if not any(AllowedHost.of(entry).allows(uri) for entry in http.allow):
        raise InvalidInput(
            f"http_images.allow of these settings does not list {uri.origin}: set NANOVLLM_HTTP_IMAGES__ALLOW as the "
            "workers have it, download the image, or put it into S3"
        )


def check_file(path: Path) -> None:
    """Raise InvalidInput where a file is empty, which no message can carry and no image is."""
    if path.is_file() and path.stat().st_size == 0:
        raise InvalidInput(f"{path} is no image: the file is empty")


def _listed(source: str, pattern: ObjectPattern, list_objects: ListObjects | None) -> list[Image]:
    if list_objects is None:
        raise InvalidInput(f"{source} names a prefix; name the objects one by one")
    found = list(list_objects(pattern))
    # A glob says by itself which objects are meant; below a prefix, as in a directory, lies other than images too.
    images = [one for one in found if not pattern.is_prefix or _is_image(one.uri)]
    if not images:
        if not found:
            raise InvalidInput(f"{source}: no object is found there")
        what = f"{counted(len(found), 'object')}, none of them with an image's suffix"
        raise InvalidInput(f"{source}: there are {what}; {source.rstrip('/')}/** takes all of them")
    if others := len(found) - len(images):
        print(f"{source}: {counted(others, 'object')} without an image's suffix left out", file=sys.stderr)
    return list(images)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _begins_like_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return image_type(file.read(IMAGE_HEAD_BYTES)) is not None
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror or type(error).__name__}") from None


def _identity(image: Image) -> list[Any]:
    if isinstance(image, ListedObject):
        return [image.uri, image.etag]
    if isinstance(image, Path) and image.exists():
        about = image.stat()
        return [str(image), about.st_size, about.st_mtime_ns]
    return [str(image)]


def _size(image: Image) -> int | None:
    if isinstance(image, ListedObject):
        return image.size
    return image.stat().st_size if isinstance(image, Path) and image.exists() else None
