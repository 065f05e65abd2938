"""Builders of small random checkpoints in Hugging Face's own layouts, saved by transformers itself.

Weights are seeded and drawn wide (norms and biases too), so that greedy decoding wanders instead of repeating one token
and a forgotten bias or norm weight shows. Every builder takes a directory that need not exist and returns it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

Family = Literal["llama", "qwen2", "qwen3"]
QwenVL = Literal["qwen2_5_vl", "qwen3_vl"]

IMAGE_TOKEN = "<|image|>"
END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
PLAIN_ADDED_TOKENS = ("<think>", "</think>")  # added tokens that are not marked special, as in Qwen3's own tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|image|>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CORPUS = (
    "Describe this image: What is the total? Extract the fields as JSON: Extract text from this document: "
    '{"vendor": "North Cafe", "number": "A-1042", "date": "2024-05-17", "total": "18.40"} '
    "The quick brown fox jumps over the lazy dog. Compare these two images and say which one is larger. "
    "user assistant system hello world receipt invoice shape circle square triangle red green blue yellow"
)


def make_tokenizer(*, chat_template: bool = True, image_token: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens: any text round-trips, one token may be part of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        show_progress=False,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE if chat_template else None,
    )
    fast.add_tokens(list(PLAIN_ADDED_TOKENS))
    if image_token:
        fast.add_special_tokens({"additional_special_tokens": [IM_START, IMAGE_TOKEN]})
    return fast


def randomise(model: torch.nn.Module, seed: int, std: float = 0.12, embedding_std: float = 0.3) -> None:
    """Draw all parameters anew: matrices at ``std``, embeddings and head at ``embedding_std``, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("logit_scale"):
                continue
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1.0 + 0.1 * noise)
            elif parameter.ndim <= 1:
                parameter.copy_(0.1 * noise)
            elif "embed" in name or "lm_head" in name:
                parameter.copy_(embedding_std * noise)
            else:
                parameter.copy_(std * noise)


def make_text(
    directory: Path,
    *,
    family: Family = "qwen3",
    seed: int = 0,
    max_position_embeddings: int = 2048,
    tie_word_embeddings: bool = False,
    chat_template: bool = True,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    **config: Any,
) -> Path:
    """A text checkpoint with its tokenizer; ``config`` as ``_text_config`` takes it."""
    tokenizer = tokenizer or make_tokenizer(chat_template=chat_template)
    model = AutoModelForCausalLM.from_config(
        _text_config(
            family,
            tokenizer,
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=tie_word_embeddings,
            **config,
        )
    ).eval()
    randomise(model, seed)
    model.tie_weights()
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)
    return Path(directory)


def make_qwen3(directory: Path, **options: Any) -> Path:
    """A Qwen3 text checkpoint with its tokenizer."""
    return make_text(directory, family="qwen3", **options)


def make_clip(
    directory: Path,
    *,
    seed: int = 1,
    patch: int = 32,
    size: int = 224,
    hidden_size: int = 32,
    num_layers: int = 3,
    num_heads: int = 4,
    with_text_tower: bool = False,
    crop: bool = True,
) -> Path:
    """A CLIP vision tower with its image processor.

    With ``with_text_tower`` the whole two-tower CLIP is saved, as ``openai/clip-vit-base-patch32`` is on the hub.
    """
    config = _clip_config(patch, size, hidden_size, num_layers, num_heads)
    model: torch.nn.Module
    if with_text_tower:
        text = CLIPTextConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=64,
            projection_dim=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ).to_dict()
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=config.to_dict(), projection_dim=16))
    else:
        model = CLIPVisionModel(config)
    randomise(model.eval(), seed)
    model.save_pretrained(directory)
    clip_image_processor(size, crop=crop).save_pretrained(directory)
    return Path(directory)


def make_siglip(
    directory: Path,
    *,
    seed: int = 2,
    patch: int = 16,
    size: int = 64,
    hidden_size: int = 32,
    num_layers: int = 3,
    num_heads: int = 4,
) -> Path:
    """A SigLIP vision tower (no class token) with its image processor."""
    model = SiglipVisionModel(_siglip_config(patch, size, hidden_size, num_layers, num_heads)).eval()
    randomise(model, seed)
    model.save_pretrained(directory)
    SiglipImageProcessorPil(size={"height": size, "width": size}).save_pretrained(directory)
    return Path(directory)


def make_llava(
    directory: Path,
    *,
    seed: int = 3,
    tower: Literal["clip", "siglip"] = "clip",
    patch: int = 32,
    size: int = 224,
    vision_hidden_size: int = 32,
    vision_layers: int = 3,
    vision_feature_layer: int | list[int] = -2,
    vision_feature_select_strategy: Literal["default", "full"] | None = None,
    text: Family = "qwen3",
    max_position_embeddings: int = 4096,
    tie_word_embeddings: bool = False,
    chat_template: bool = True,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    image_token: str = IMAGE_TOKEN,
    **config: Any,
) -> Path:
    """A LLaVA checkpoint (tower, projector, text) with tokenizer and processor; loads as it is in transformers.

    ``vision_feature_select_strategy`` unset means the tower's usual one: ``default`` (class token cut) for CLIP,
    ``full`` for SigLIP, which has no class token. ``config`` is the text's, as ``_text_config`` takes it.
    """
    strategy = vision_feature_select_strategy or ("default" if tower == "clip" else "full")
    tokenizer = tokenizer or make_tokenizer(chat_template=chat_template)
    vision_config = (
        _clip_config(patch, size, vision_hidden_size, vision_layers, 4)
        if tower == "clip"
        else _siglip_config(patch, size, vision_hidden_size, vision_layers, 4)
    )
    text_config = _text_config(
        text,
        tokenizer,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        **config,
    )
    class_tokens = 1 if tower == "clip" else 0
    llava_config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids(image_token),
        image_seq_length=(size // patch) ** 2 + class_tokens - (1 if strategy == "default" else 0),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(llava_config).eval()
    randomise(model, seed)
    model.tie_weights()
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    image_processor = (
        clip_image_processor(size) if tower == "clip" else SiglipImageProcessorPil(size={"height": size, "width": size})
    )
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        image_token=image_token,
        num_additional_image_tokens=class_tokens,
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(directory)
    return Path(directory)


QWEN_VL_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

QWEN_VL_TEMPLATE = CHAT_TEMPLATE.replace("'<|image|>'", "'<|vision_start|><|image_pad|><|vision_end|>'")


def make_qwen_vl(
    directory: Path,
    *,
    family: QwenVL = "qwen2_5_vl",
    seed: int = 4,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    tie_word_embeddings: bool = False,
    smallest: int = 32 * 32 * 4,
    largest: int = 224 * 224,
) -> Path:
    """A Qwen-VL checkpoint (tower and text) with tokenizer and processor; loads as it is in transformers."""
    tokenizer = make_tokenizer(image_token=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [IM_START, *QWEN_VL_TOKENS]})
    tokenizer.chat_template = QWEN_VL_TEMPLATE
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(QWEN_VL_TOKENS))
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tower: dict[str, Any] = {
        "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 128
    }  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
    if family == "qwen2_5_vl":
        text |= {"rope_parameters": {**rope, "mrope_section": [4, 6, 6]}}
        tower |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1, 3]}
    else:
        text |= {"head_dim": 32, "rope_parameters": {**rope, "mrope_section": [6, 5, 5], "mrope_interleaved": True}}
        tower |= {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]}
    config = AutoConfig.for_model(
        family,
        text_config=text,
        vision_config=tower,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=tie_word_embeddings,
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    randomise(model, seed)
    model.tie_weights()
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    Qwen2VLImageProcessorPil(
        size={"shortest_edge": smallest, "longest_edge": largest}, patch_size=tower["patch_size"]
    ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


def into_hub_cache(
    cache: Path, repository: str, directory: Path, *, revision: str = "a" * 40, main: bool = True
) -> Path:
    """Move a checkpoint's files into a hub cache as huggingface_hub lays them out; the snapshot's directory."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / revision
    for part in (folder / "blobs", folder / "refs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    if main:
        (folder / "refs" / "main").write_text(revision)
    for file in sorted(directory.iterdir()):
        blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def clip_image_processor(size: int, *, crop: bool = True) -> CLIPImageProcessorPil:
    """CLIP's own preprocessing: shortest edge and centre crop, or one fixed square without a crop."""
    if crop:
        return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return CLIPImageProcessorPil(size={"height": size, "width": size}, do_center_crop=False)


def _clip_config(patch: int, size: int, hidden_size: int, num_layers: int, num_heads: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        patch_size=patch,
        image_size=size,
        projection_dim=16,
    )


def _siglip_config(patch: int, size: int, hidden_size: int, num_layers: int, num_heads: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        patch_size=patch,
        image_size=size,
        vision_use_head=False,
    )


def _text_config(
    family: Family,
    tokenizer: Any,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    **config: Any,
) -> PreTrainedConfig:
    """Heads of 32 where the family has a width of its own for them, else of hidden_size / num_heads."""
    if family != "qwen2":
        config["head_dim"] = head_dim or 32
    return AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        **config,
    )


MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen3": make_qwen3,
    "qwen2, tied": functools.partial(make_text, family="qwen2", tie_word_embeddings=True),
    "llama, biases": functools.partial(make_text, family="llama", attention_bias=True, mlp_bias=True),
    "llava, clip": make_llava,
    "llava, siglip, tied": functools.partial(make_llava, tower="siglip", patch=16, size=64, tie_word_embeddings=True),
    "qwen2.5-vl": make_qwen_vl,
    "qwen3-vl, tied": functools.partial(make_qwen_vl, family="qwen3_vl", tie_word_embeddings=True),
}
"""One checkpoint of each way to name and to tie tensors."""
