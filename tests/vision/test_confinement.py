"""Decoder processes: fair turns, no view of their parent, answers that are checked, images refused before decoding."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from parts import png
from PIL import Image

from nanovllm.confinement import environment
from nanovllm.errors import DecoderFailed, InvalidImage, TooManyPixels
from nanovllm.vision.images import decode
from nanovllm.vision.images.decode import ImageLimits
from nanovllm.vision.images.fair_turns import FairTurns
from nanovllm.vision.images.pool import DecoderPool
from nanovllm.vision.images.preprocess import ImageTransform, prepare_image

PICTURE = png((200, 30, 30))


async def order_of_turns(turns: FairTurns[str], groups: list[str], seconds: Callable[[str], float]) -> list[str]:
    """The groups in the order in which their calls had a turn, each as long as ``seconds`` says."""
    served: list[str] = []
    now = 0.0
    turns._clock = lambda: now

    async def call(group: str) -> None:
        nonlocal now
        member = await turns.take(group)
        served.append(group)
        now += seconds(group)
        await asyncio.sleep(0)
        turns.give_back(member)

    await asyncio.gather(*(call(group) for group in groups))
    return served


async def test_a_tenant_with_slow_images_waits_behind_one_with_quick_ones() -> None:
    turns: FairTurns[str] = FairTurns()
    turns.add("decoder")
    served = await order_of_turns(turns, ["slow"] * 8 + ["quick"] * 4, lambda group: 10.0 if group == "slow" else 0.1)
    assert served == ["slow", *["quick"] * 4, *["slow"] * 7]


async def test_equal_tenants_take_turns_and_a_new_one_has_saved_up_nothing() -> None:
    turns: FairTurns[str] = FairTurns()
    turns.add("decoder")
    served = await order_of_turns(turns, ["a"] * 3 + ["b"] * 3, lambda _: 1.0)
    assert sorted(served[:2]) == sorted(served[2:4]) == sorted(served[4:]) == ["a", "b"]
    assert turns._used_s == {}


async def test_an_idle_member_that_is_preferred_is_taken_and_none_is_waited_for() -> None:
    turns: FairTurns[str] = FairTurns()
    for member in ("first", "second", "third"):
        turns.add(member)
    assert await turns.take("a", lambda member: member == "first") == "first"
    assert await turns.take("a", lambda member: member == "first") == "third"
    assert await turns.take("b") == "second"


async def test_a_call_that_is_cancelled_with_its_turn_gives_the_member_back() -> None:
    turns: FairTurns[str] = FairTurns()
    waiting = asyncio.create_task(turns.take("a"))
    await asyncio.sleep(0)
    turns.add("decoder")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await turns.take("b") == "decoder"


PARENT = """
import os, subprocess, sys
from nanovllm.confinement import environment, forbid_debugging
forbid_debugging()
child = '''
import os
from nanovllm.confinement import confine
confine(1 << 30)
for name in ("environ", "mem", "maps"):
    try:
        open(f"/proc/{os.getppid()}/{name}", "rb").read(1)
        print("read", name)
    except OSError as error:
        print("refused", name)
'''
print(subprocess.run([sys.executable, "-c", child], env=environment(), stdout=subprocess.PIPE, text=True).stdout)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_confined_process_reads_neither_environment_nor_memory_of_its_parent() -> None:
    secret = {**environment(), "AWS_SECRET_ACCESS_KEY": "hunter2"}
    said = subprocess.run([sys.executable, "-c", PARENT], env=secret, stdout=subprocess.PIPE, text=True, check=True)
    assert said.stdout.split("\n")[:3] == ["refused environ", "refused mem", "refused maps"]


LIAR = """
import json, struct, sys
def read():
    (size,) = struct.unpack(">I", sys.stdin.buffer.read(4))
    return sys.stdin.buffer.read(size)
def answer(header, payload=b""):
    body = json.dumps(header).encode()
    sys.stdout.buffer.write(struct.pack(">I", len(body)) + body + payload)
    sys.stdout.buffer.flush()
read(); answer({"ready": True, "payload_bytes": 0})
sys.stdin.buffer.read(json.loads(read())["payload_bytes"]); answer(%r, %r)
"""
SOUND: dict[str, Any] = {
    "shape": [2, 2, 3], "digest": "00" * 32, "width": 2, "height": 2, "payload_bytes": 12,
}  # fmt: skip


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": [2, 2, 4]},
        {"shape": [4, 4, 3]},
        {"shape": [-2, -2, 3]},
        {"shape": "no"},
        {"shape": [2, 2]},
        {"digest": "00"},
        {"digest": 7},
        {"width": "2"},
        {"height": 0},
        {"payload_bytes": -1},
        {"payload_bytes": 1 << 40},
        {"payload_bytes": "12"},
        {"error": "no_such_code", "message": "x"},
        {"x": "x" * 100_000},
        {"documents": 3},
        {"documents": [[]]},
    ],
    ids=lambda lie: str(lie)[:30],
)
async def test_an_answer_that_is_no_image_ends_the_image_and_its_process(
    lie: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = asyncio.create_subprocess_exec

    async def lying(*_: object, **options: Any) -> asyncio.subprocess.Process:
        return await start(sys.executable, "-c", LIAR % ({**SOUND, **lie}, b"\x00" * 12), **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", lying)
    pool = DecoderPool(ImageTransform(), ImageLimits(), workers=1, timeout_s=10)
    await pool.start()
    try:
        with pytest.raises(DecoderFailed, match="answer what is no image"):
            await pool.prepare(PICTURE)
        monkeypatch.undo()
        assert (await pool.prepare(PICTURE)).size == (224, 224)
    finally:
        await pool.close()


@pytest.mark.parametrize("payload", [b"", b"null", b"[]", b"{}", b'{"words": 3}', bytes(7), b"\xff", b"[" * 99_999])
async def test_an_answer_that_is_no_document_ends_the_document_and_its_process(
    payload: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = asyncio.create_subprocess_exec
    header = {"media_type": "application/pdf", "payload_bytes": len(payload)}

    async def lying(*_: object, **options: Any) -> asyncio.subprocess.Process:
        return await start(sys.executable, "-c", LIAR % (header, payload), **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", lying)
    pool = DecoderPool(ImageTransform(), ImageLimits(), workers=1, timeout_s=10)
    await pool.start()
    try:
        for read in (pool.open_document(PICTURE), pool.page_text(PICTURE, 1)):
            with pytest.raises(DecoderFailed, match="answer what is no document"):
                await read
        monkeypatch.undo()
        assert (await pool.open_document(PICTURE)).media_type.startswith("image/")
    finally:
        await pool.close()


def progressive(side: int, scans: int) -> bytes:
    """A progressive JPEG with that many more scans than an encoder makes."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * scans + data[-2:]


def refuses_before_decoding(data: bytes, transform: ImageTransform, limits: ImageLimits, error: type[Exception]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "decode_image", lambda image: pytest.fail("it was decoded"))
        with pytest.raises(error) as refusal:
            prepare_image(data, transform, limits)
    return str(refusal.value)


def test_a_progressive_jpeg_of_too_many_scans_is_refused_before_decoding() -> None:
    limits = ImageLimits(max_pixels=10_000)
    said = refuses_before_decoding(progressive(64, 100), ImageTransform(), limits, TooManyPixels)
    assert "scans of 64x64 pixels; together 160000 are allowed" in said
    assert prepare_image(progressive(64, 10), ImageTransform(), limits).width == 64
    assert prepare_image(progressive(99, 0), ImageTransform(), limits).width == 99


@pytest.mark.parametrize("size", [(1, 3_000_000), (3_000_000, 1)])
def test_an_image_too_narrow_for_the_model_is_refused_before_decoding(size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    refuses_before_decoding(buffer.getvalue(), ImageTransform(), ImageLimits(), TooManyPixels)
    qwen = ImageTransform(resize="pixel_budget", size=(3136, 1_003_520, 28), crop=None)
    refuses_before_decoding(buffer.getvalue(), qwen, ImageLimits(), InvalidImage)
