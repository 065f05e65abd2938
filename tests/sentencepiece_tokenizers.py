"""Builders of tokenizers as sentencepiece checkpoints have them, and of chat templates as checkpoints write them."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Literal

from checkpoints import CORPUS
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

Spaces = Literal["first", "always", "normalizer"]
"""Where ``▁`` is put before a text: at the beginning of a string (``legacy=False``), behind every special token too
(``legacy=True``), or by a normalizer, as tokenizer.json of Llama 2 says it."""

VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA 1.5's: no BOS, images first, parts only."""
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% elif message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' }}{% else %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""Llama 2's: it writes BOS itself, and trims."""
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""Phi 3's: its tokens take the white space behind them."""
THINKING = (
    "{% for message in messages %}{{ '<s>' + message.role + '\n' + message.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""Qwen 3's: a variable turns thinking off."""
TEMPLATES = {"vicuna": VICUNA, "llama 2": LLAMA2, "phi": PHI, "thinking": THINKING}


@lru_cache(1)
def _vocabulary() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Pieces and merges: control tokens, 256 bytes, and pairs of the corpus with ``▁`` for a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    reserved = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=640, show_progress=False, special_tokens=reserved)
    tokenizer.train_from_iterator([CORPUS, "the yes no What is 0 1 2 3 4 5 6 7 8 9"] * 4, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], tuple((first, second) for first, second in model["merges"])


def make_sentencepiece_tokenizer(
    spaces: Spaces = "first", *, chat_template: str | None = None, add_bos_token: bool = True, strips: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer of about 650 tokens with byte fallback and added tokens; ``strips``: they take white space behind."""
    vocab, merges = _vocabulary()
    fast: Any
    if spaces == "normalizer":
        backend = Tokenizer(models.BPE(dict(vocab), list(merges), fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        if add_bos_token:
            backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        fast = PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
        )
    else:
        fast = LlamaTokenizer(
            vocab=dict(vocab),
            merges=list(merges),
            legacy=spaces == "always",
            add_bos_token=add_bos_token,
            pad_token="<unk>",
        )
    names = ["<image>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    special = [AddedToken(name, normalized=False, special=True, rstrip=strips and name != "<image>") for name in names]
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.add_tokens([AddedToken(name, normalized=False) for name in ("<think>", "</think>")])
    fast.chat_template = chat_template
    return fast
