"""Settings of image limits, decoder processes and reuse."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nanovllm.settings.base import Bytes, Seconds, SettingsModel, StrList


class ImageSettings(SettingsModel):
    """Limits that hold before an image is decoded, and the processes that decode."""

    max_bytes: Bytes = Field(32 * 2**20, description="Largest encoded image.")
    max_pixels: int = Field(50_000_000, ge=1, description="Most pixels of one image.")
    min_side: int = Field(1, ge=1, description="Shortest side in pixels. Deprecated.")
    max_frames: int = Field(1, ge=1, description="Most frames or pages; above 1 the first one is used.")
    formats: StrList = Field(
        ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"),
        description="Allowed formats, by Pillow's names; `HEIF` needs the extra `heic`.",
    )
    decoders: int = Field(2, ge=1, description="Decoder processes.")
    decode_timeout_s: Seconds = Field(20.0, description="A decoder that takes longer is killed.")
    decoder_memory_bytes: Bytes = Field(2**30, description="Address space of one decoder process.")


class ReuseSettings(SettingsModel):
    """What one job has made and the next one can use. A job's own `reuse` wins over `level`, inside these bounds."""

    level: Literal["none", "images", "answers"] = Field(
        "images",
        description="`images`: read and decoded once; `answers`: an equal greedy job gets the same answer, marked so.",
    )
    image_bytes: int = Field(256 * 2**20, ge=0, description="Size of the memory of read and prepared images.")
    answer_bytes: int = Field(64 * 2**20, ge=0, description="Size of the memory of answers; 0: none, for no job.")
