"""Jobs for workers on every backend: those that have answers, and those that are at fault, with their codes."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

from document_files import SCHEMA
from parts import S3Part, png
from PIL import Image

from nanovllm.training.synthetic import DEMO_SEED, Sample, sample

Job = dict[str, Any]
NUM_QUESTIONS = 24
MAX_IMAGES, MAX_BYTES, MAX_PIXELS = 4, 200_000, 100_000
"""Limits that the workers have: images of a job, bytes and pixels of an image."""
MALFORMED = "malformed"
"""The id in tests of a record that is no job."""
TOTAL = "What is the total? <|image|>"
CHOICES = ["paid", "unpaid"]
GUIDED: dict[str, dict[str, Any]] = {
    "json_schema": {"json_schema": SCHEMA},
    "regex": {"regex": "[A-Z]{2}-[0-9]{3}"},
    "choice": {"choice": CHOICES},
    "grammar": {"grammar": 'start: "TOTAL " /[0-9]{2}/'},
}
BEYOND_THE_PROTOCOL: dict[str, dict[str, Any]] = {
    "prompt_logprobs": {"prompt_logprobs": 1, "max_tokens": 4},
    "loop_tokens": {"loop_tokens": 16, "max_tokens": 4},
}
"""What an engine in the worker has, and no server of OpenAI's protocol."""


def questions() -> list[Sample]:
    """Questions of every kind about receipts and shapes, of one and two images."""
    return [sample(number, seed=DEMO_SEED, split="heldout") for number in range(NUM_QUESTIONS)]


def record_of(job_id: str, job: Mapping[str, Any]) -> bytes:
    """The value of a job's record."""
    return json.dumps({"job_id": job_id, **job}).encode()


def answered_jobs(s3: S3Part, bucket: str) -> dict[str, Job]:
    """Jobs that have an answer on every backend, by their ids; those with images and those with text alone in turn."""
    jobs: dict[str, Job] = {}
    for number, one in enumerate(questions()):
        uris = [s3.put(bucket, f"{number}-{place}.png", file_of(image)) for place, image in enumerate(one.images)]
        jobs[f"question-{number}"] = {"prompt": one.prompt, "images": uris}
        jobs[f"text-{number}"] = {"prompt": f"Say {number}", "sampling": {"max_tokens": 6}}
    image = jobs["question-0"]["images"][0]
    chat = [{"type": "text", "text": TOTAL.removesuffix("<|image|>")}, {"type": "image"}]
    inside = base64.b64encode(file_of(questions()[0].images[0])).decode()
    sampling: dict[str, dict[str, Any]] = {
        "plain": {},
        "cut": {"max_tokens": 2},
        "stopped": {"stop": ["."]},
        "stop-kept": {"stop": ["."], "include_stop_str_in_output": True},
        "logprobs": {"logprobs": 2},
        # top_k: the native engine may sample an image's token, the generic one never does.
        "several": {"n": 3, "temperature": 5.0, "top_k": 20, "seed": 5, "max_tokens": 8},
        "drawn": {"temperature": 5.0, "top_k": 20, "top_p": 0.9, "seed": 3, "max_tokens": 8},
        **GUIDED,
    }
    jobs |= {name: {"prompt": TOTAL, "images": [image], "sampling": own} for name, own in sampling.items()}
    jobs |= {name: {"prompt": TOTAL, "images": [image], "reuse": "answers"} for name in ("reused-1", "reused-2")}
    return jobs | {
        "chat": {"messages": [{"role": "user", "content": chat}], "images": [image]},
        "inside": {"prompt": TOTAL, "images": [{"data": inside}]},
        "three-images": {"prompt": "<|image|><|image|><|image|>", "images": [image] * 3, "sampling": {"max_tokens": 8}},
    }


def faulty_jobs(s3: S3Part, bucket: str, image: str) -> dict[str, tuple[Job, str]]:
    """Jobs at fault, by their ids, each with the code of its dead letter; ``image`` is one in the bucket."""
    files = {
        "broken": (png((9, 9, 9))[:-30], "invalid_image"),
        "no-image": (b"%PDF-1.7 and no image", "unsupported_image_format"),
        "large": (png((9, 9, 9)) + bytes(MAX_BYTES), "image_too_large"),
        "wide": (png((9, 9, 9), (1_000, 1 + MAX_PIXELS // 1_000)), "too_many_pixels"),
    }
    images: dict[str, tuple[Any, str]] = {
        **{name: (s3.put(bucket, name, file), code) for name, (file, code) in files.items()},
        "missing": (f"s3://{bucket}/none.png", "object_not_found"),
        "elsewhere": (s3.put(s3.make_bucket(), "secret.png", png((1, 2, 3))), "forbidden_uri"),
        "changed": ({"uri": image, "sha256": hashlib.sha256(b"other").hexdigest()}, "object_changed"),
    }
    fields: dict[str, tuple[Job, str]] = {
        "long": ({"prompt": "A" * 600}, "prompt_too_long"),
        "many": ({"prompt": TOTAL * (MAX_IMAGES + 1), "images": [image] * (MAX_IMAGES + 1)}, "invalid_input"),
        "places": ({"prompt": TOTAL + TOTAL, "images": [image]}, "placeholder_mismatch"),
        "misspelt": ({"sampling": {"temprature": 1}}, "invalid_job"),
        "greedy": ({"sampling": {"max_tokens": 1_000_000}}, "invalid_job"),
        "template": ({"chat_template_kwargs": {"enable_thinking": True}}, "invalid_job"),
        "expression": ({"sampling": {"regex": "(?=a)a"}}, "unsupported_constraint"),
        "late": ({"deadline": "2026-01-01T00:00:00Z"}, "deadline_exceeded"),
        "newer": ({"version": 2}, "unsupported_version"),
    }
    return {
        **{name: ({"prompt": TOTAL, "images": [one]}, code) for name, (one, code) in images.items()},
        **{name: ({"prompt": "Say", **own}, code) for name, (own, code) in fields.items()},
    }


def file_of(image: Image.Image) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
