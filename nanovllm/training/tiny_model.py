"""Recipe of the shipped tiny model: its tokenizer, processor and sizes, and its training batches.

A CLIP tower (3 layers of 192), a projector and a Qwen3 text model (3 layers of 144) learn together from synthetic
receipts and shapes. Each receipt is drawn once and asked about twice, because the tower costs as much as the answers.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from nanovllm.image_placeholder import IMAGE_PLACEHOLDER
from nanovllm.training import synthetic
from nanovllm.training.trainer import Batch, GlyphHead, Question, encode_question, pad_by_length

SIDE_PX, PATCH_PX = 224, 32
PATCHES_A_SIDE = SIDE_PX // PATCH_PX
TOKENS_PER_IMAGE = PATCHES_A_SIDE**2
GLYPHS_PER_PATCH = 3
SCAFFOLDING = ('{"vendor": "', '", "number": "', '", "date": "', '", "total": "', '"}')
"""Fixed parts of the JSON answers: one token each, which halves the time of training and generation."""

_PAD, _EOS, _UNK = "<pad>", "<eos>", "<unk>"
_PAGES, _PAIRS = 22, 6
_FORM_LETTERS = dict(zip(synthetic.SHAPES, "cstdx", strict=True))


def tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with one token per printable ASCII character and newline, and one per part of ``SCAFFOLDING``."""
    tokens = [_PAD, _EOS, _UNK, IMAGE_PLACEHOLDER, "\n", *map(chr, range(32, 127)), *SCAFFOLDING]
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=_UNK))
    pieces = Regex("|".join([*map(re.escape, SCAFFOLDING), r"[\s\S]"]))
    characters.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    # Without a decoder a word-level tokenizer puts spaces between its tokens.
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_UNK,
        extra_special_tokens={"image_token": IMAGE_PLACEHOLDER},
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def processor() -> LlavaProcessor:
    """Processor: images resized to 224 x 224 (bicubic, no crop), values in -1..1, 49 tokens an image."""
    images = CLIPImageProcessorPil(
        size={"height": SIDE_PX, "width": SIDE_PX},
        resample=3,
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        image_token=IMAGE_PLACEHOLDER,
        num_additional_image_tokens=1,
    )


def model(words: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A randomly initialised model of 2.7 million parameters for the tokenizer ``words``, in fp32."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=6,
        image_size=SIDE_PX,
        patch_size=PATCH_PX,
        projection_dim=192,
    )
    ends: dict[str, Any] = {
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "tie_word_embeddings": True,
    }
    text = Qwen3Config(
        vocab_size=len(words),
        hidden_size=144,
        intermediate_size=432,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=24,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **ends,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=words.convert_tokens_to_ids(IMAGE_PLACEHOLDER),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=TOKENS_PER_IMAGE,
        **ends,
    )
    return LlavaForConditionalGeneration(config)


def glyph_head(of: LlavaForConditionalGeneration) -> GlyphHead:
    """Auxiliary head for ``of``; not exported."""
    return GlyphHead(of.config.vision_config.hidden_size, GLYPHS_PER_PATCH, of.config.text_config.vocab_size)


def speed_up(of: LlavaForConditionalGeneration, *, compiled: bool = True) -> None:
    """Replaces the patch embedding by a matrix product, and compiles the layers.

    oneDNN's convolution with a stride of 32 takes a quarter of a training step on a CPU; the product is equal up to
    rounding.
    """
    tower = of.model.vision_tower
    tower.embeddings.patch_embedding.forward = partial(_embed_patches, tower.embeddings.patch_embedding)
    if compiled:
        for layer in (*tower.encoder.layers, *of.model.language_model.layers):
            layer.compile()


def _embed_patches(convolution: nn.Conv2d, pixels: Tensor) -> Tensor:
    side = convolution.kernel_size[0]
    patches = F.unfold(pixels, side, stride=side).transpose(1, 2)
    embedded = F.linear(patches, convolution.weight.flatten(1), convolution.bias)
    return embedded.transpose(1, 2).unflatten(2, (pixels.shape[2] // side, -1))


class Batches:
    """Batches by turns of practice for the tower (22 sheets of random characters, 12 shapes) and of questions (22
    receipts with two each, 6 pairs of shapes with three each), shared between processes.

    A batch is a function of (seed, step, rank): a resumed run continues the series.
    """

    def __init__(self, words: PreTrainedTokenizerFast, seed: int, *, rank: int = 0, processes: int = 1) -> None:
        self.words, self.seed, self.rank, self.processes = words, seed, rank, processes
        self.ids: dict[str, int] = words.get_vocab()

    def batch(self, step: int, tower_only: bool) -> Batch:
        """This process's part of one step's batch; with ``tower_only`` practice in every step."""
        rng = synthetic.generator(step * self.processes + self.rank, seed=self.seed, split="train")
        practice = tower_only or step % 2 == 1
        pages = [
            synthetic.practice_sheet(rng) if practice else synthetic.receipt(rng, "train")
            for _ in range(_PAGES // self.processes)
        ]
        # A remainder of pairs goes to each process in turn.
        pairs = [
            synthetic.shape_pair(rng, "train")
            for _ in range((_PAIRS + (step // 2 + self.rank) % self.processes) // self.processes)
        ]
        shapes = [shape for pair in pairs for shape in pair]
        images = [*(page.image for page in pages), *(shape.image for shape in shapes)]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        marks = torch.stack([*map(self.glyphs, pages), *map(self.shape_marks, shapes)])
        if practice:
            return Batch(pixels, [], marks)
        questions: list[Question] = []
        for index, page in enumerate(pages):
            whole = rng.choices(("json", "text"), (75, 25))[0]
            part = rng.choices(("vendor", "total", "date", "number", "describe"), (30, 20, 20, 20, 10))[0]
            questions += [self.question(synthetic.ask(page, kind), index) for kind in (whole, part)]
        for index, pair in zip(range(len(pages), len(images), 2), pairs, strict=True):
            questions += [self.question(synthetic.describe(shape), index + side) for side, shape in enumerate(pair)]
            questions.append(self.question(synthetic.compare(*pair), index, index + 1))
        return Batch(pixels, pad_by_length(questions, self.words.pad_token_id), marks)

    def question(self, sample: synthetic.Sample, *images: int) -> Question:
        """Tokenized question of a sample about the batch's ``images``."""
        return encode_question(self.words, sample.prompt, sample.answer, list(images), TOKENS_PER_IMAGE)

    def glyphs(self, drawn: synthetic.Receipt) -> Tensor:
        """Token ids [49, 3] of the characters centred in each patch, from left to right, then zeros."""
        ids = torch.zeros(TOKENS_PER_IMAGE, GLYPHS_PER_PATCH, dtype=torch.long)
        used = [0] * TOKENS_PER_IMAGE
        for glyph in drawn.glyphs:
            patch = glyph.y // PATCH_PX * PATCHES_A_SIDE + glyph.x // PATCH_PX
            ids[patch, used[patch]] = self.ids[glyph.character]
            used[patch] += 1
        return ids

    def shape_marks(self, drawn: synthetic.Shape) -> Tensor:
        """Token ids [49, 3] for colour, form and size in the patches that a shape mostly fills, zeros elsewhere."""
        patches = drawn.coverage.reshape(PATCHES_A_SIDE, PATCH_PX, PATCHES_A_SIDE, PATCH_PX)
        filled = torch.from_numpy(patches.mean((1, 3)).flatten() / 255)
        letters = (drawn.colour[0], _FORM_LETTERS[drawn.form], drawn.size[0])
        ids = torch.zeros(TOKENS_PER_IMAGE, GLYPHS_PER_PATCH, dtype=torch.long)
        ids[filled >= min(0.3, filled.max().item())] = torch.tensor([self.ids[letter] for letter in letters])
        return ids
