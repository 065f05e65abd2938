"""Which objects a prefix or a glob names, on an S3 server."""

from __future__ import annotations

import pytest
from parts import S3Part

from nanovllm.errors import InvalidInput, StoreUnreachable
from nanovllm.objects.listing import ObjectPattern, list_objects
from nanovllm.settings.s3 import S3Settings

KEYS = ("a.png", "in/1.png", "in/2.PNG", "in/deep/3.png", "in/deep/er/4.png", "in/n [1].txt", "in/", "inner/5.png")


def settings_of(s3: S3Part) -> S3Settings:
    return S3Settings(endpoint_url=s3.endpoint_url, addressing_style="path", connect_timeout_s=1, max_attempts=1)


def listed(s3: S3Part, bucket: str, pattern: str, **options: int) -> list[str]:
    found = ObjectPattern.of(f"s3://{bucket}/{pattern}")
    assert found is not None
    return [one.uri.removeprefix(f"s3://{bucket}/") for one in list_objects(settings_of(s3), found, **options)]


@pytest.fixture
def bucket(s3: S3Part) -> str:
    name = s3.make_bucket()
    for number, key in enumerate(KEYS):
        s3.put(name, key, b"" if key.endswith("/") else b"x" * (number + 1))
    return name


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("in/", ["in/1.png", "in/2.PNG", "in/deep/3.png", "in/deep/er/4.png", "in/n [1].txt"]),
        ("", [key for key in sorted(KEYS) if key != "in/"]),
        ("in/*.png", ["in/1.png"]),
        ("in/**/*.png", ["in/1.png", "in/deep/3.png", "in/deep/er/4.png"]),
        ("**/*.png", ["a.png", "in/1.png", "in/deep/3.png", "in/deep/er/4.png", "inner/5.png"]),
        ("in/*/*.png", ["in/deep/3.png"]),
        ("in*/*.png", ["in/1.png", "inner/5.png"]),
        ("in/**", ["in/1.png", "in/2.PNG", "in/deep/3.png", "in/deep/er/4.png", "in/n [1].txt"]),
        ("in/[0-9].[pP]??", ["in/1.png", "in/2.PNG"]),
        ("in/n [1].txt", ["in/n [1].txt"]),
        ("in/**/deep/**/**/4.png", ["in/deep/er/4.png"]),
        ("none/*.png", []),
    ],
)
def test_a_prefix_names_all_below_it_and_a_glob_what_it_matches(
    s3: S3Part, bucket: str, pattern: str, keys: list[str]
) -> None:
    assert listed(s3, bucket, pattern) == keys
    assert listed(s3, bucket, pattern, page_keys=2) == keys


def test_an_object_is_listed_with_its_entity_tag_and_size(s3: S3Part, bucket: str) -> None:
    pattern = ObjectPattern.of(f"s3://{bucket}/in/1.*")
    assert pattern is not None
    (one,) = list_objects(settings_of(s3), pattern)
    head = s3.client.head_object(Bucket=bucket, Key="in/1.png")
    assert (one.etag, one.size) == (head["ETag"].strip('"'), head["ContentLength"])


@pytest.mark.parametrize("uri", ["s3://bucket/a.png", "s3://bucket/a b/ü.png", "https://bucket/*.png", "s3://b/*"])
def test_what_names_one_object_is_no_pattern(uri: str) -> None:
    assert ObjectPattern.of(uri) is None


def test_a_bucket_that_is_not_there_is_named(s3: S3Part) -> None:
    with pytest.raises(InvalidInput, match=r"s3://no-such-bucket/in/ .*NoSuchBucket.*s3:ListBucket"):
        listed(s3, "no-such-bucket", "in/*.png")


def test_a_store_that_does_not_answer_is_no_mistake_of_the_pattern(s3: S3Part) -> None:
    pattern = ObjectPattern("bucket", "in/")
    with pytest.raises(StoreUnreachable):
        list(list_objects(S3Settings(endpoint_url="http://127.0.0.1:1", connect_timeout_s=1, max_attempts=1), pattern))
