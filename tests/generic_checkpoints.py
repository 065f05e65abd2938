"""Small random checkpoints of families that this engine has no code for, saved by transformers itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoint_files import edit_json
from checkpoints import CHAT_TEMPLATE, IM_START, make_tokenizer, randomise
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}

TEXT_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None, "num_local_experts": 4},  # experts
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},  # scaled logits
    "cohere": {"logit_scale": 0.25},  # scaled logits
    "phi3": {"sliding_window": None},  # one matrix for queries, keys and values
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 2048},  # learnt positions
    "gpt_bigcode": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 2048},  # one head of keys and values
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},  # its head calls the decoder
    "olmo2": {},
    "glm4": {"head_dim": 16},
    "deepseek_v3": {  # keys wider than values
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1,
        "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
        "num_key_value_heads": 4, "first_k_dense_replace": 1,
    },
}  # fmt: skip

STATEFUL_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        "head_dim": 16,
        "num_hidden_layers": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1],
                            "partial_rotary_factor": 0.5},
        **_LINEAR_ATTENTION,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "block_multiple_of": 16,
             "conv_L_cache": 3},
}  # fmt: skip


def make_generic_text(directory: Path, family: str, *, seed: int = 0, **config: Any) -> Path:
    """A text checkpoint of a ``family`` of transformers, by its ``model_type``, with a tokenizer."""
    tokenizer = make_tokenizer()
    shape = _text_shape(tokenizer)
    own = {**TEXT_FAMILIES, **STATEFUL_FAMILIES}.get(family, {})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shape, **own, **config})).eval()
    randomise(model, seed)
    model.tie_weights()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


_VISION = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_GRID_TOWER = {"hidden_size": 48, "intermediate_size": 64, "depth": 2, "num_heads": 4, "out_hidden_size": 64,
               "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
_QWEN_TOKENS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
                "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
_QWEN3_5 = {"num_hidden_layers": 4, "head_dim": 16, **_LINEAR_ATTENTION}
_SPLIT_TOKENS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
                 *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)))  # fmt: skip


_PINPOINTS = [[32, 64], [64, 32], [64, 64]]
_ERNIE_TOKENS = {f"{kind}_{part}token_id": f"<|{kind.upper()}_{text}|>" for kind in ("image", "video")
                 for part, text in (("", "PLACEHOLDER"), ("start_", "START"), ("end_", "END"))}  # fmt: skip


def _rope(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}}


@dataclass(frozen=True)
class ImageFamily:
    """What a small checkpoint of a family is made of; ``tokens`` are fields of the configuration and their tokens."""

    tokens: dict[str, str]
    tower: dict[str, Any]
    processor: str
    image_processor: str
    image_options: dict[str, Any]
    text: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    processor_options: dict[str, Any] = field(default_factory=dict)
    more_tokens: tuple[str, ...] = ()
    named_tokens: dict[str, str] = field(default_factory=dict)  # attributes of the tokenizer

    @property
    def image_token(self) -> str:
        """The placeholder of an image."""
        return self.tokens.get("image_token_id") or self.tokens["image_token_index"]


def _qwen(tower: dict[str, Any], processor: str, **text: Any) -> ImageFamily:
    return ImageFamily(
        tokens=_QWEN_TOKENS,
        tower=tower,
        processor=processor,
        image_processor="Qwen2VLImageProcessorPil",
        image_options={"size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}, "patch_size": 8},
        text=text,
    )


IMAGE_FAMILIES: dict[str, ImageFamily] = {
    "qwen2_vl": _qwen(
        {"embed_dim": 48, "hidden_size": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8,
         "spatial_merge_size": 2, "temporal_patch_size": 2},
        "Qwen2VLProcessor", **_rope(2, 3, 3),
    ),
    "qwen3_5": _qwen({**_GRID_TOWER, "num_position_embeddings": 64}, "Qwen3VLProcessor",
                     **_QWEN3_5, **_rope(2, 1, 1, partial_rotary_factor=0.5)),
    "qwen3_5_moe": _qwen({**_GRID_TOWER, "num_position_embeddings": 64}, "Qwen3VLProcessor", num_experts=4,
                         num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24,
                         **_QWEN3_5, **_rope(2, 1, 1, partial_rotary_factor=0.5)),
    "glm_ocr": ImageFamily(
        tokens={"image_token_id": "<|image|>", "video_token_id": "<|video|>",
                "image_start_token_id": "<|begin_of_image|>", "image_end_token_id": "<|end_of_image|>",
                "video_start_token_id": "<|begin_of_video|>", "video_end_token_id": "<|end_of_video|>"},
        tower={**_GRID_TOWER, "image_size": 64, "in_channels": 3},
        processor="Glm46VProcessor",
        image_processor="Glm46VImageProcessorPil",
        image_options={"size": {"shortest_edge": 16 * 16, "longest_edge": 2 * 48 * 48}, "patch_size": 8},
        text={"head_dim": 16, **_rope(2, 3, 3, partial_rotary_factor=1.0)},
    ),
    "paddleocr_vl": ImageFamily(
        tokens={"image_token_id": "<|IMAGE_PLACEHOLDER|>", "video_token_id": "<|video_pad|>",
                "vision_start_token_id": "<|IMAGE_START|>", "vision_end_token_id": "<|IMAGE_END|>"},
        tower={**_VISION, "image_size": 64, "patch_size": 8, "spatial_merge_size": 2},
        processor="PaddleOCRVLProcessor",
        image_processor="PaddleOCRVLImageProcessorPil",
        image_options={"min_pixels": 16 * 16, "max_pixels": 48 * 48, "patch_size": 8},
        text={"head_dim": 16, **_rope(2, 3, 3)},
        named_tokens={"image_token": "<|IMAGE_PLACEHOLDER|>"},
    ),
    "idefics3": ImageFamily(
        tokens={"image_token_id": "<image>"},
        tower={**_VISION, "image_size": 32, "patch_size": 8},
        processor="Idefics3Processor",
        image_processor="Idefics3ImageProcessorPil",
        image_options={"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
        text={"model_type": "llama"},
        config={"scale_factor": 2},
        processor_options={"image_seq_len": 4},
        more_tokens=_SPLIT_TOKENS[1:],
    ),
    "granite_docling": ImageFamily(
        tokens={"image_token_id": "<image>"},
        tower={**_VISION, "num_hidden_layers": 3, "image_size": 32, "patch_size": 4, "out_hidden_size": 64,
               "scale_factor": 4, "deepstack_visual_indexes": [0, 1], "use_fine_route": False},
        processor="GraniteDoclingProcessor",
        image_processor="GraniteDoclingImageProcessorPil",
        image_options={"size": {"height": 32, "width": 32}, "max_patches": 4},
        processor_options={"image_seq_len": 4},
        more_tokens=_SPLIT_TOKENS[1:],
    ),
    "lighton_ocr": ImageFamily(
        tokens={"image_token_id": "<|image_pad|>"},
        tower={**_VISION, "model_type": "pixtral", "image_size": 64, "patch_size": 8, "head_dim": 12},
        processor="LightOnOcrProcessor",
        image_processor="PixtralImageProcessorPil",
        image_options={"size": {"longest_edge": 64}, "patch_size": {"height": 8, "width": 8}},
        text={"model_type": "qwen3", "head_dim": 16},
        config={"spatial_merge_size": 2},
        processor_options={"patch_size": 8, "spatial_merge_size": 2},
        more_tokens=("<|vision_pad|>", "<|vision_end|>"),
        named_tokens={"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>",
                      "image_end_token": "<|vision_end|>"},
    ),
    "mistral3": ImageFamily(
        tokens={"image_token_index": "[IMG]"},
        tower={**_VISION, "model_type": "pixtral", "image_size": 64, "patch_size": 8, "head_dim": 12},
        processor="PixtralProcessor",
        image_processor="PixtralImageProcessorPil",
        image_options={"size": {"longest_edge": 64}, "patch_size": {"height": 8, "width": 8}},
        text={"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        config={"spatial_merge_size": 2},
        processor_options={"patch_size": 8, "spatial_merge_size": 2},
        more_tokens=("[IMG_BREAK]", "[IMG_END]"),
    ),
    "internvl": ImageFamily(
        tokens={"image_token_id": "<IMG_CONTEXT>"},
        tower={**_VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        processor="InternVLProcessor",
        image_processor="GotOcr2ImageProcessorPil",
        image_options={"size": {"height": 32, "width": 32}, "crop_to_patches": True, "min_patches": 1,
                       "max_patches": 3},
        text={"model_type": "qwen2"},
        processor_options={"image_seq_length": 4},
        more_tokens=("<img>", "</img>", "<video>"),
        named_tokens={"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                      "video_token": "<video>"},
    ),
    "deepseek_ocr2": ImageFamily(
        tokens={"image_token_id": "<image>"},
        tower={"sam_config": {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2,
                              "num_attention_heads": 2, "image_size": 768, "patch_size": 16, "mlp_dim": 32,
                              "window_size": 12, "global_attn_indexes": [], "downsample_channels": [16, 32]},
               "encoder_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                                  "num_attention_heads": 2, "num_key_value_heads": 2}},
        processor="DeepseekOcr2Processor",
        image_processor="DeepseekOcr2ImageProcessorPil",
        image_options={"size": {"height": 768, "width": 768}, "tile_size": 768},
        text={"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
              "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "llava_onevision": ImageFamily(
        tokens={"image_token_index": "<image>", "video_token_index": "<video>"},
        tower={**_VISION, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
        processor="LlavaOnevisionProcessor",
        image_processor="LlavaOnevisionImageProcessorPil",
        image_options={"size": {"height": 32, "width": 32}, "image_grid_pinpoints": _PINPOINTS},
        text={"model_type": "qwen2"},
        config={"image_grid_pinpoints": _PINPOINTS, "vision_feature_select_strategy": "full"},
        processor_options={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    "idefics2": ImageFamily(
        tokens={"image_token_id": "<image>"},
        tower={**_VISION, "image_size": 64, "patch_size": 8},
        processor="Idefics2Processor",
        image_processor="Idefics2ImageProcessorPil",
        image_options={"size": {"shortest_edge": 32, "longest_edge": 64}, "do_image_splitting": False},
        text={"model_type": "mistral", "sliding_window": None},
        config={"perceiver_config": {"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1,
                                     "resampler_n_heads": 4, "resampler_head_dim": 16, "num_key_value_heads": 2}},
        processor_options={"image_seq_len": 4},
        more_tokens=("<fake_token_around_image>", "<end_of_utterance>"),
        named_tokens={"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>",
                      "end_of_utterance_token": "<end_of_utterance>"},
    ),
    "ernie4_5_vl_moe": ImageFamily(
        tokens=_ERNIE_TOKENS,
        tower={"hidden_size": 48, "intermediate_size": 64, "depth": 2, "num_heads": 4, "patch_size": 8,
               "spatial_merge_size": 2},
        processor="Ernie4_5_VLMoeProcessor",
        image_processor="Ernie4_5_VLMoeImageProcessorPil",
        image_options={"size": {"shortest_edge": 256, "longest_edge": 48 * 48}, "patch_size": 8},
        text={"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [24, 16], "moe_num_shared_experts": 1,
              "mlp_layer_types": ["dense", "sparse"], **_rope(3, 3, 2)},
        named_tokens={name.removesuffix("_id"): token for name, token in _ERNIE_TOKENS.items()},
    ),
    "lfm2_vl": ImageFamily(  # its processor needs torchvision
        tokens={"image_token_id": "<image>"},
        tower={**_VISION, "model_type": "siglip2_vision_model", "patch_size": 8, "num_patches": 64},
        processor="Lfm2VlProcessor",
        image_processor="Lfm2VlImageProcessor",
        image_options={},
        text={"model_type": "lfm2", **STATEFUL_FAMILIES["lfm2"]},
        config={"downsample_factor": 2, "projector_hidden_size": 48},
    ),
    "got_ocr2": ImageFamily(  # 256 tokens an image, whatever its configuration says
        tokens={"image_token_index": "<imgpad>"},
        tower={"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
               "image_size": 1024, "mlp_dim": 32, "global_attn_indexes": []},
        processor="GotOcr2Processor",
        image_processor="GotOcr2ImageProcessorPil",
        image_options={"size": {"height": 1024, "width": 1024}},
        text={"model_type": "qwen2"},
        more_tokens=("<img>", "</img>"),
    ),
    "gemma3": ImageFamily(
        tokens={"image_token_index": "<image_soft_token>", "boi_token_index": "<start_of_image>",
                "eoi_token_index": "<end_of_image>"},
        tower={**_VISION, "image_size": 32, "patch_size": 8},
        processor="Gemma3Processor",
        image_processor="Gemma3ImageProcessorPil",
        image_options={"size": {"height": 32, "width": 32}},
        text={"head_dim": 16, "sliding_window": 4096, "query_pre_attn_scalar": 16},
        config={"mm_tokens_per_image": 4},
        processor_options={"image_seq_length": 4},
        named_tokens={"image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
                      "eoi_token": "<end_of_image>"},
    ),
}  # fmt: skip


def make_generic_images(directory: Path, family: str, *, seed: int = 0) -> Path:
    """An image-text checkpoint of a ``family`` of `IMAGE_FAMILIES`, with tokenizer and processor."""
    parts = IMAGE_FAMILIES[family]
    tokenizer = make_tokenizer(image_token=False)
    tokens = list(dict.fromkeys((*parts.tokens.values(), *parts.more_tokens)))
    tokenizer.add_special_tokens({"additional_special_tokens": [IM_START, *tokens]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|image|>", "".join(_around(parts, parts.image_token)))
    text = {**_text_shape(tokenizer), "hidden_size": 64, **parts.text}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in parts.tokens.items()}
    config = AutoConfig.for_model(family, text_config=text, vision_config=parts.tower, **ids, **parts.config)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).eval()
    randomise(model, seed)
    model.tie_weights()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if parts.named_tokens:
        edit_json(directory / "tokenizer_config.json", extra_special_tokens=parts.named_tokens)
    if parts.image_processor.endswith("Pil"):
        getattr(transformers, parts.image_processor)(**parts.image_options).save_pretrained(directory)
    else:
        fields = {"image_processor_type": parts.image_processor, **parts.image_options}
        (directory / "preprocessor_config.json").write_text(json.dumps(fields))
    options = {"processor_class": parts.processor, **parts.processor_options}
    (directory / "processor_config.json").write_text(json.dumps(options))
    return Path(directory)


def written_image(family: str) -> str:
    """An image in a prompt, as the family's chat template writes it."""
    parts = IMAGE_FAMILIES[family]
    return "".join(_around(parts, parts.image_token))


def _around(parts: ImageFamily, token: str) -> tuple[str, ...]:
    names = (("vision_start_token_id", "vision_end_token_id"), ("image_start_token_id", "image_end_token_id"))
    for before, behind in names:
        if before in parts.tokens:
            return parts.tokens[before], token, parts.tokens[behind]
    return (token,)


def _text_shape(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
