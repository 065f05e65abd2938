"""The decoder process: ``python -m nanovllm.vision.images.child``, fed by `nanovllm.vision.images.pool`.

It runs image libraries on untrusted bytes, with bounded memory and without credentials, model or files to write.
Frames on stdin: a length (4 bytes, big-endian) and that many bytes, first the settings as JSON, then one image each.
Frames on stdout: a JSON header likewise, then as many bytes of pixels as it says.
"""

from __future__ import annotations

import json
import signal
import struct
from dataclasses import asdict
from typing import Any, BinaryIO

from PIL import Image

from nanovllm.confinement import confine, take_over_streams
from nanovllm.errors import DecoderFailed, NanoVLLMError
from nanovllm.vision.images.decode import ImageLimits
from nanovllm.vision.images.preprocess import ImageTransform, prepare_image

LENGTH = struct.Struct(">I")


def frame(body: bytes) -> bytes:
    """Frame of ``body``: its length, then itself."""
    return LENGTH.pack(len(body)) + body


def settings_frame(transform: ImageTransform, limits: ImageLimits, memory_bytes: int, timeout_s: float) -> bytes:
    """First frame to a decoder process."""
    bounds = {"limits": asdict(limits), "memory_bytes": memory_bytes, "timeout_s": timeout_s}
    return frame(json.dumps({"transform": transform.to_json(), **bounds}).encode())


def main() -> None:
    """Serve until stdin ends."""
    requests, answers = take_over_streams()
    settings = json.loads(_read_frame(requests) or b"{}")
    transform = ImageTransform.from_json(settings["transform"])
    limits = ImageLimits(**{**settings["limits"], "formats": tuple(settings["limits"]["formats"])})
    # ``limits`` are checked on every header; Pillow's own global bound would refuse larger ones.
    Image.MAX_IMAGE_PIXELS = None
    confine(settings["memory_bytes"])
    _answer(answers, {"ready": True})
    is_usable = True
    while is_usable and (data := _read_frame(requests)) is not None:
        # The parent kills after timeout_s; the alarm ends a process whose parent was killed.
        signal.setitimer(signal.ITIMER_REAL, 2 * settings["timeout_s"])
        is_usable = _serve(data, transform, limits, settings["memory_bytes"], answers)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _serve(data: bytes, transform: ImageTransform, limits: ImageLimits, memory_bytes: int, answers: BinaryIO) -> bool:
    """Answer one request; false where the process must not take another."""
    try:
        image = prepare_image(data, transform, limits)
    except NanoVLLMError as error:
        _answer(answers, {"error": error.code, "message": str(error)})
        return True
    except MemoryError:
        message = f"decoding needs more than the {memory_bytes} bytes of memory allowed"
        _answer(answers, {"error": DecoderFailed.code, "message": message, "is_last": True})
        return False
    assert image.pixels is not None  # only an image of the cache has none
    header = {"shape": image.pixels.shape, "digest": image.digest.hex(), "width": image.width, "height": image.height}
    _answer(answers, header, image.pixels.tobytes())
    return True


def _read_frame(requests: BinaryIO) -> bytes | None:
    length = requests.read(LENGTH.size)
    if len(length) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(length)
    body = requests.read(size)
    return body if len(body) == size else None


def _answer(answers: BinaryIO, header: dict[str, Any], payload: bytes = b"") -> None:
    answers.write(frame(json.dumps({**header, "payload_bytes": len(payload)}).encode()) + payload)
    answers.flush()


if __name__ == "__main__":
    main()
