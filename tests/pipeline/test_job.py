from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nanovllm.errors import InvalidJob, PlaceholderMismatch
from nanovllm.messages.codec import decode_job, encode_job
from nanovllm.messages.encoding import MessageFormat
from nanovllm.messages.job import ImageRef, Job, derive_job_id, image_name
from nanovllm.pipeline.stages.admit import sampling_defaults
from nanovllm.pipeline.stages.job_sampling import JobSampling
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings.engine import SamplingSettings
from nanovllm.settings.worker import Settings

DIGEST = "ab" * 32


def job(**fields: Any) -> Job:
    return Job.model_validate({"prompt": "What is the total?"} | fields)


def test_only_a_prompt_is_required() -> None:
    asked = job()
    assert asked.job_id is None
    assert asked.images == ()
    assert asked.priority == 0


def test_the_design_documents_example_is_a_job() -> None:
    asked = job(
        version=1,
        job_id="r-0001",
        prompt="What is the total? <|image|> <|image|> <|image|>",
        images=[
            "s3://bucket/key.png",
            {"uri": "s3://bucket/k", "version_id": "v", "sha256": DIGEST},
            {"data": base64.b64encode(b"png").decode()},
        ],
        sampling={"max_tokens": 64, "temperature": 0.0},
        deadline="2030-01-31T12:00:00+02:00",
        priority=0,
        metadata={"tenant": "a", "deep": {"list": [1, 2.5, None, True]}},
        reply_to="answers",
    )
    assert [image.uri for image in asked.images] == ["s3://bucket/key.png", "s3://bucket/k", None]
    assert asked.images[2].data == b"png"
    assert asked.deadline == datetime(2030, 1, 31, 10, tzinfo=UTC)


def test_unknown_top_level_fields_are_tolerated() -> None:
    assert job(of_the_future={"x": 1}) == job()
    assert job(job="x", prio=1, meta={}, reply=None, version_2=2) == job()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("samplng", "sampling"),
        ("imagess", "images"),
        ("image", "images"),
        ("metdata", "metadata"),
        ("Deadline", "deadline"),
        ("job-id", "job_id"),
        ("jobid", "job_id"),
        ("priroity", "priority"),
        ("message", "messages"),
        ("reply_tp", "reply_to"),
    ],
)
def test_an_unknown_field_one_letter_from_an_absent_one_is_refused(name: str, meant: str) -> None:
    with pytest.raises(ValidationError, match=f"unknown name {name}: did you mean {meant}\\?"):
        job(**{name: None})
    present = {"sampling": {}, "images": [], "metadata": {}, "deadline": None, "job_id": "a", "priority": 0}
    present |= {"messages": None, "reply_to": None}
    assert job(**{name: None, meant: present[meant]}) == job(**{meant: present[meant]}), "what it may mean is there"


def test_a_prompt_by_another_name_is_named_before_it_is_missed() -> None:
    with pytest.raises(ValidationError, match="did you mean prompt"):
        Job.model_validate({"promt": "What is the total?"})


def test_an_image_has_the_name_that_its_sender_gave_it() -> None:
    assert job(images=[{"data": b"png", "name": "scans/a.png"}]).images[0].name == "scans/a.png"
    for name in ("", "a\nb", "x" * 1_025, 7):
        with pytest.raises(ValidationError, match="name"):
            job(images=[{"data": b"png", "name": name}])


@pytest.mark.parametrize(
    ("text", "name"),
    [("scans/ü.png", "scans/ü.png"), ("a\nb.png", "a\ufffdb.png"), ("\udcff.png", "?.png"), ("", None)],
)
def test_any_path_makes_a_name(text: str, name: str | None) -> None:
    assert image_name(text) == name
    assert image_name("x" * 2_000 + "/end.png") == ("x" * 2_000 + "/end.png")[-1_024:]


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"prompt": None}, "prompt or messages"),
        ({"prompt": ""}, "prompt"),
        ({"messages": [{"role": "user", "content": "a"}]}, "prompt or messages"),
        ({"version": 2}, "version"),
        ({"images": [{"uri": False}]}, "images.0.uri"),
        ({"job_id": ""}, "job_id"),
        ({"job_id": "a\nb"}, "job_id"),
        ({"job_id": 7}, "job_id"),
        ({"images": ["ftp://example.com/a.png"]}, "images.0.uri"),
        ({"images": ["https://user@example.com/a.png"]}, "images.0.uri"),
        ({"images": ["s3://bucket/" + "a/" * 1_024]}, "images.0.uri"),
        ({"images": [{"uri": "https://example.com/a.png", "version_id": "v"}]}, "images.0"),
        ({"images": ["file:///etc/passwd"]}, "images.0.uri"),
        ({"images": ["s3://bucket"]}, "images.0.uri"),
        ({"images": ["s3://bucket/" + "a" * 1_025]}, "images.0.uri"),
        ({"images": ["s3://bucket/" + "😀" * 257]}, "images.0.uri"),
        ({"images": [{"uri": "s3://bucket/k", "version_id": "ü" * 513}]}, "images.0.version_id"),
        ({"images": [{"uri": "s3://bucket/k", "data": "QQ=="}]}, "images.0"),
        ({"images": [{}]}, "images.0"),
        ({"images": [{"uri": "s3://bucket/k", "crc32": "x"}]}, "images.0.crc32"),
        ({"images": [{"uri": "s3://bucket/k", "sha256": "AB" * 32}]}, "images.0.sha256"),
        ({"images": [{"data": "not base64!"}]}, "images.0.data"),
        ({"images": [{"data": "QQ==", "version_id": "v"}]}, "images.0"),
        ({"sampling": {"max_tokenz": 1}}, "max_tokenz"),
        ({"sampling": {"max_tokens": "64"}}, "sampling"),
        ({"sampling": {"max_tokens": 0}}, "max_tokens"),
        ({"sampling": {"stop": ["x"] * 17}}, "stop"),
        ({"sampling": {"top_p": 1.5}}, "top_p"),
        ({"deadline": 1893456000}, "deadline"),
        ({"deadline": "2030-01-31T12:00:00"}, "deadline"),
        ({"deadline": "tomorrow"}, "deadline"),
        ({"priority": "high"}, "priority"),
        ({"priority": True}, "priority"),
        ({"metadata": {"n": 2**53 + 1}}, "metadata"),
        ({"metadata": {"x": "y" * 70_000}}, "metadata"),
        ({"reply_to": "../x"}, "reply_to"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError, match=where.replace(".", r"\.")):
        job(**fields)


def test_a_key_may_have_as_many_bytes_as_s3_allows() -> None:
    key = "😀" * 256
    assert job(prompt="<|image|>", images=["s3://bucket/" + key]).image_refs()[0].bucket_and_key == ("bucket", key)


def test_the_key_is_the_first_images_identity() -> None:
    inline = job(prompt="<|image|>", images=[{"data": b"png"}])
    by_digest = job(
        prompt="<|image|>",
        images=[{"uri": "s3://bucket/k", "sha256": inline.image_key().removeprefix("sha256:")}],  # type: ignore[union-attr]
    )
    assert inline.image_key() == by_digest.image_key(), "equal bytes meet, wherever they come from"
    by_uri = job(prompt="<|image|>", images=["s3://bucket/k"])
    assert by_uri.image_key() == "s3://bucket/k"
    versioned = job(prompt="<|image|>", images=[{"uri": "s3://bucket/k", "version_id": "2"}])
    assert versioned.image_key() != by_uri.image_key()
    signed, again = (job(prompt="<|image|>", images=[f"https://x.example/a.png?sig={n}"]).image_key() for n in "12")
    assert signed != again
    assert str(signed).startswith("https://x.example/a.png#")
    assert "sig" not in str(signed)
    assert job().image_key() is None


def test_bucket_and_key_are_taken_literally() -> None:
    image = ImageRef(uri="s3://bucket/a b/50%2F+ü?x#y.png")
    assert image.bucket_and_key == ("bucket", "a b/50%2F+ü?x#y.png")


def chat(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "Be brief. <|image|>"}, {"role": "user", "content": list(parts)}]


def test_images_of_a_chat_come_in_the_order_of_their_places() -> None:
    asked = Job.model_validate(
        {
            "messages": chat(
                {"type": "image_url", "image_url": {"url": "s3://bucket/first"}},
                {"type": "text", "text": "and <|image|>, which is plain text here"},
                {"type": "image"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}},
            ),
            "images": ["s3://bucket/second"],
        }
    )
    first, second, third = asked.image_refs()
    assert (first.uri, second.uri, third.data) == ("s3://bucket/first", "s3://bucket/second", b"ABC")
    messages = asked.message_dicts()
    assert messages is not None
    kinds = [part["type"] for part in messages[1]["content"]]
    assert kinds == ["image", "text", "image", "image"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "ftp://example.com/a.png"}},
        {"type": "image_url", "image_url": {"url": "https://example.com:0/a.png"}},
        {"type": "image_url", "image_url": {"url": "data:text/html;base64,QUJD"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,###"}},
        {"type": "image_url", "image_url": {"url": "s3://bucket/k", "detail": "high"}},
        {"type": "video", "video": "x"},
        {"type": "text", "text": "a", "cache_control": {}},
    ],
)
def test_a_chat_holds_nothing_that_would_be_ignored(part: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Job.model_validate({"messages": chat(part)})


@pytest.mark.parametrize(
    ("fields", "places", "images"),
    [
        ({"prompt": "<|image|> <|image|>", "images": ["s3://bucket/k"]}, 2, 1),
        ({"prompt": "none", "images": ["s3://bucket/k"]}, 0, 1),
        ({"prompt": None, "messages": chat({"type": "image"}), "images": []}, 1, 0),
    ],
)
def test_a_mismatch_of_images_and_places_names_both_numbers(fields: dict[str, Any], places: int, images: int) -> None:
    with pytest.raises(PlaceholderMismatch, match=f"{places}.*{images}"):
        job(**fields).image_refs()


def test_explicit_sampling_wins_over_the_workers_defaults_and_nothing_else_does() -> None:
    defaults = SamplingSettings(max_tokens=99, top_k=5)
    params = job(job_id="a", sampling={"top_k": 0, "stop": ["\n"]}).sampling_params(defaults)
    assert (params.max_tokens, params.top_k, params.stop, params.temperature) == (99, 0, ("\n",), 0.0)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"stop": "\n"}, {"stop": ("\n",)}),
        ({"stop": None}, {"stop": ()}),
        ({"stop_token_ids": None, "bad_words": None, "logit_bias": None}, {"stop_token_ids": (), "bad_words": ()}),
        ({"seed": -1}, {}),
        ({"seed": None}, {}),
        ({"max_tokens": None}, {"max_tokens": 500}),
        ({"max_tokens": None, "min_tokens": 300}, {"max_tokens": 500, "min_tokens": 300}),
    ],
)
@pytest.mark.parametrize("fmt", ["json", "msgpack"])
def test_sampling_may_be_written_as_for_vllm(
    written: dict[str, Any], meant: dict[str, Any], fmt: MessageFormat
) -> None:
    defaults = SamplingSettings(stop=("#",), logit_bias={7: 1.0})
    params = decode_job(encode_job(job(job_id="a", sampling=written), fmt)).sampling_params(defaults, 500)
    expected = (
        job(job_id="a")
        .sampling_params(defaults, 500)
        .model_copy(update=meant | ({"logit_bias": {}} if "logit_bias" in written else {}))
    )
    assert params == expected


def test_without_a_seed_it_depends_on_the_job_id_alone() -> None:
    defaults = SamplingSettings()
    first = job(job_id="a").sampling_params(defaults)
    assert first.seed == job(job_id="a", prompt="other").sampling_params(defaults).seed
    assert first.seed != job(job_id="b").sampling_params(defaults).seed
    assert job(job_id="a", sampling={"seed": 7}).sampling_params(defaults).seed == 7


def test_a_job_may_not_ask_for_more_tokens_than_the_worker_allows() -> None:
    with pytest.raises(InvalidJob, match="max_tokens"):
        job(sampling={"max_tokens": 101}).sampling_params(SamplingSettings(), max_tokens=100)


def test_a_derived_job_id_is_the_same_at_every_delivery() -> None:
    assert derive_job_id("nanovllm.jobs", 3, 17) == "nanovllm.jobs:3:17"


def test_variables_of_the_chat_template_are_numbers_and_need_leave() -> None:
    asked = job(chat_template_kwargs={"enable_thinking": False, "budget": 3, "share": 0.5, "other": None})
    asked.check_template_kwargs(["enable_thinking", "budget", "share", "other", "more"])
    for allowed in ([], ["budget", "share", "other"]):
        with pytest.raises(InvalidJob, match=r"'.*' is not among the names .*engine\.job_chat_template_kwargs"):
            asked.check_template_kwargs(allowed)
    for value in ("text", ["text"], {"text": "text"}):
        with pytest.raises(ValidationError, match="chat_template_kwargs"):
            job(chat_template_kwargs={"enable_thinking": value})
    job().check_template_kwargs([])


def test_what_the_settings_leave_unset_is_the_checkpoint_s_where_that_counts() -> None:
    settings = Settings(sampling={"top_p": 0.5}, admission={"max_tokens": 300})
    assert sampling_defaults(settings, {}) == settings.sampling
    found = sampling_defaults(settings, {"temperature": 0.6, "top_p": 0.95, "max_tokens": 2048})
    assert (found.temperature, found.top_p, found.max_tokens) == (0.6, 0.5, 300)
    asked = job(sampling={"temperature": 1.5}).sampling_params(found, 300)
    assert (asked.temperature, asked.top_p, asked.max_tokens) == (1.5, 0.5, 300)


SAMPLINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 0.7, 1]),
        "max_tokens": st.sampled_from([1, 50, 51, None]),
        "seed": st.sampled_from([1, -1, None]),
        "top_k": st.sampled_from([0, 1, 20]),
        "ignore_eos": st.booleans(),
        "stop": st.sampled_from(["a", ["a"], None]),
        "min_tokens": st.sampled_from([0, 1]),
        "json_schema": st.just({"type": "object"}),
    },
)


@given(asked=st.lists(SAMPLINGS, min_size=1, max_size=12))
def test_sampling_that_is_remembered_is_what_each_job_asks_for(asked: list[dict[str, Any]]) -> None:
    defaults = SamplingParams(temperature=0.5, max_tokens=40)
    remembered = JobSampling(defaults, 50)
    for number, sampling in enumerate(asked):
        one = job(job_id=f"job-{number}", sampling=sampling)

        def outcome(resolve: Callable[[], SamplingParams]) -> Any:
            try:
                return resolve().model_dump()
            except InvalidJob as error:
                return str(error)

        assert outcome(partial(remembered.of, one)) == outcome(partial(one.sampling_params, defaults, 50))


def test_a_job_that_asks_for_no_seed_gets_its_own_where_the_worker_has_one() -> None:
    remembered = JobSampling(SamplingParams(seed=7), 50)
    jobs = [job(job_id=name, sampling={"seed": None}) for name in ("a", "b")]
    assert [remembered.of(one).seed for one in jobs] == [one.seed for one in jobs]


def test_no_more_samplings_are_remembered_than_allowed() -> None:
    remembered = JobSampling(SamplingParams(), 50)
    for number in range(300):
        assert remembered.of(job(job_id="j", sampling={"seed": number})).seed == number
    assert len(remembered._known) <= 256
