"""``MultiModalLLM``: the engine with the options and figures of vision in its signature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanovllm.engine.llm_engine import LLMEngine


class MultiModalLLM(LLMEngine):
    """An engine that takes images when ``enable_multimodal`` is set, and is ``LLMEngine`` without images otherwise.

    A LLaVA checkpoint brings its own tower, size and number of tokens; others than its own are interpolated and pooled,
    with a warning. A Qwen-VL checkpoint takes images at their own size, between ``min_pixels`` and ``max_pixels``, and
    at most ``max_image_tokens`` tokens each; there ``max_image_size`` bounds the area, to that of a square, and
    ``num_vision_tokens`` the tokens. A text checkpoint is composed with ``vision_model``, by default CLIP's base tower
    with patches of 32 pixels, at 224 pixels and 49 tokens an image; its projector is untrained unless ``projector``
    names one. Without ``enable_multimodal`` the vision options have no effect.
    """

    def __init__(
        self,
        model: str,
        *,
        enable_multimodal: bool = False,
        vision_model: str | None = None,
        max_image_size: int | None = None,
        num_vision_tokens: int | None = None,
        freeze_vision_weights: bool = True,
        projector: str | Path | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_image_tokens: int | None = None,
        **options: Any,
    ) -> None:
        """Further ``options``, and errors, are those of ``LLMEngine``."""
        vision: dict[str, Any] = {}
        if enable_multimodal:
            vision = {
                "vision_model": vision_model,
                "max_image_size": max_image_size,
                "num_vision_tokens": num_vision_tokens,
                "freeze_vision_weights": freeze_vision_weights,
                "projector": projector,
                "min_pixels": min_pixels,
                "max_pixels": max_pixels,
                "max_image_tokens": max_image_tokens,
            }
        super().__init__(model, enable_multimodal=enable_multimodal, **vision, **options)

    def get_multimodal_stats(self) -> dict[str, Any]:
        """What sees, and what it did so far; only ``multimodal_enabled`` without vision."""
        if self.processor is None:
            return {"multimodal_enabled": False}
        encoder = self.processor.encoder
        return {
            "multimodal_enabled": True,
            "vision_model": encoder.vision_model,
            "max_image_size": (encoder.transform.output_size or (None,))[0],
            "num_vision_tokens": encoder.num_vision_tokens,
            "freeze_vision_weights": self.config.freeze_vision_weights,
            "image_token": self.processor.image_token,
            "image_token_id": self.processor.image_token_id,
            **self.model_runner.get_vision_stats(),
        }


MultiModalLLMEngine = MultiModalLLM
"""The engine under the name of the guide's API reference."""
