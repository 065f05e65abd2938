"""The checkpoints that every engine of a comparison loads: random weights in a named shape, or a real small model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.smollm import smollm

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class Shape:
    """A Qwen3 text model: width, layers, heads, KV heads, width of a head and of the MLP, vocabulary."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 16, 128, 512),
    "small": Shape(256, 6, 8, 4, 32, 768, 16_000),
    "medium": Shape(512, 12, 8, 4, 64, 1536, 32_000),
    "0.6b": Shape(1024, 28, 16, 8, 128, 3072, 151_936),
}


def make_text_checkpoint(directory: Path, shape: Shape) -> None:
    """A Qwen3 checkpoint with seeded random weights, drawn wide so that greedy decoding wanders, and a tokenizer."""
    config = Qwen3Config(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.06,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)  # as published checkpoints are
    words = {"<pad>": 0, "<eos>": 1, **{f"w{index}": index for index in range(2, shape.vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(directory)


def make_llava(directory: Path, text: Path) -> None:
    """The text model of ``text`` behind a random tower of ViT-B/16's shape (224 px, 196 tokens), all in bfloat16."""
    language = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tower = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
        projection_dim=512,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=tower, text_config=language.config, image_token_index=image_token, image_seq_length=196
    )
    config.eos_token_id = language.config.eos_token_id
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.to(torch.bfloat16).save_pretrained(directory)  # as published checkpoints are
    name_as_published(directory / "model.safetensors")
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
    ).save_pretrained(directory)


def checkpoint(name: str, root: Path) -> Path:
    """The directory of a text model (a shape or ``smollm``) or of NAME-vision under ``root``, made where it is not."""
    if name == "smollm":
        return smollm()
    directory = root / name
    if (directory / "config.json").is_file():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    if name.endswith("-vision"):
        make_llava(directory, checkpoint(name.removesuffix("-vision"), root))
    else:
        make_text_checkpoint(directory, SHAPES[name])
    return directory


def name_as_published(path: Path) -> None:
    """Give the tower's tensors the names that published LLaVA checkpoints have, and that vLLM knows."""
    tensors = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def draw_picture(seed: int) -> Image.Image:
    """A picture of 224 x 224 coarse random tiles, different for every seed."""
    tiles = torch.randint(0, 256, (14, 14, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(tiles.numpy()).resize((224, 224), Image.Resampling.NEAREST)
