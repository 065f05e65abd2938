"""Hugging Face checkpoint directory: configuration, tokenizer, weight files (one or shards), and their digest."""

from __future__ import annotations

import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

from nanovllm.checkpoints.config_fields import reading_config
from nanovllm.checkpoints.digest import digest_of
from nanovllm.checkpoints.resolve import (
    checkpoint_name,
    is_lfs_pointer,
    read_config,
    read_json_object,
    weight_files,
    why_unreadable,
)
from nanovllm.checkpoints.template_files import TEMPLATE, check_templates
from nanovllm.checkpoints.tensors import names_in
from nanovllm.checkpoints.transformers_imports import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from nanovllm.errors import ModelNotFound, UnsupportedModel
from nanovllm.start_phases import START, Phase

logger = logging.getLogger(__name__)

_GENERATION = "generation_config.json"
_TOKENIZER_FILES = (
    "tokenizer*.json", "special_tokens_map.json", "*.model", "*.tiktoken", "vocab.*", "merges.txt", "tekken.json",
)  # fmt: skip
_PREPROCESSOR = "preprocessor_config.json"
_TEMPLATE_JSON = "chat_template.json"
_GENERATION_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
# What changes the text that transformers generates, vLLM leaves out too, and the value that changes nothing.
_GENERATION_IGNORED: dict[str, object] = {
    **dict.fromkeys((
        "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "force_words_ids", "constraints",
        "forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids", "exponential_decay_length_penalty",
        "stop_strings", "max_time", "top_h", "watermarking_config", "dola_layers", "token_healing",
    )),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "typical_p", "guidance_scale",
                     "encoder_repetition_penalty"), 1),
    **dict.fromkeys(("min_new_tokens", "min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
                     "epsilon_cutoff", "eta_cutoff", "diversity_penalty", "penalty_alpha"), 0),
    "max_length": 20,
}  # fmt: skip


WITHOUT_PROCESSOR = ("llama", "qwen2", "qwen3")
"""Model types that are text alone, the most frequent ones."""


def _has_processor(model_type: str) -> bool:
    """Whether transformers has a processor for a model type. Its table comes with all that its models import."""
    if model_type in WITHOUT_PROCESSOR:
        return False
    with START.timed(Phase.IMPORTS):
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    return model_type in PROCESSOR_MAPPING_NAMES


def _lost_its_bytes(file: Path, tokenizer: Any) -> bool:
    """Whether tokenizer.json works on bytes, and what transformers made of it does not.

    transformers 5 gives every LlamaTokenizerFast the pre-tokeniser of SentencePiece, whatever its file says (DeepSeek's
    and Llama 3's descendants): spaces and letters beyond ASCII are then lost without an error.
    """
    made = getattr(tokenizer, "backend_tokenizer", None)
    if made is None or not file.is_file() or "ByteLevel" in repr((made.pre_tokenizer, made.decoder)):
        return False
    stored = read_json_object(file, missing=file.name)
    return "ByteLevel" in json.dumps([stored.get("pre_tokenizer"), stored.get("decoder")])


class Checkpoint:
    """A checkpoint directory. Nothing in it is executed, and no weight format but safetensors is opened.

    Raises ModelNotFound where config.json or the weights are missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fields = read_config(directory)
        self.files = weight_files(directory)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Configuration, with the defaults of its family; UnsupportedModel for one that transformers does not know."""
        with reading_config(self.fields, checkpoint_name(self.directory)):
            return AutoConfig.from_pretrained(self.directory, local_files_only=True, trust_remote_code=False)

    @property
    def architecture(self) -> str:
        """First entry of ``architectures``; empty where there is none."""
        return next(iter(self.fields.get("architectures") or ()), "")

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of all stored tensors."""
        return names_in(self.files)

    def tokenizer(self) -> Any:
        """Tokenizer with the chat template: the processor's where it has one, else its own.

        Raises:
            UnsupportedModel: config.json is not understood, which transformers reads for the tokenizer too.
            ModelNotFound: the checkpoint has no tokenizer, or none that can be read.
        """
        name, why = checkpoint_name(self.directory), "it has no vocabulary"
        files = [file for pattern in _TOKENIZER_FILES for file in sorted(self.directory.glob(pattern))]
        for file in files:
            if is_lfs_pointer(file) or file.stat().st_size == 0:
                raise ModelNotFound(f"{file.name} of checkpoint {name!r} {why_unreadable(file)}")
        check_templates(self.directory)
        tokenizer, _ = None, self.config
        try:
            # Without its files transformers 5 builds the tokenizers of some families of their control tokens alone.
            if any(not file.name.startswith(("tokenizer_config", "special_tokens")) for file in files):
                tokenizer = AutoTokenizer.from_pretrained(
                    self.directory, local_files_only=True, trust_remote_code=False
                )
                if _lost_its_bytes(self.directory / "tokenizer.json", tokenizer):
                    tokenizer = PreTrainedTokenizerFast.from_pretrained(self.directory, local_files_only=True)
        except Exception as error:  # tokenizers raises bare Exceptions for a damaged file
            why = f"{type(error).__name__}: a file of it may be cut or damaged"
        if tokenizer is None or tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():
            raise ModelNotFound(
                f"{name!r} ({self.architecture or 'no architecture'}) has no tokenizer that can be read ({why}): the "
                "directory of a model holds tokenizer.json or tokenizer.model; a vision tower goes with vision_model="
            )
        template = self.processor_template
        if template is None and not tokenizer.chat_template:
            template = _json_fields(self.directory / _TEMPLATE_JSON).get("chat_template")
        if template is not None:
            tokenizer.chat_template = template
        return tokenizer

    @cached_property
    def processor_template(self) -> str | None:
        """Chat template of the checkpoint's processor; None where it has no processor, or one without a template.

        Read in the order of ``ProcessorMixin.from_pretrained`` (transformers 5): processor_config.json,
        chat_template.json, chat_template.jinja. The processor itself is not made: some need torchvision.
        """
        own = _json_fields(self.directory / "processor_config.json")
        is_named = any("processor_class" in fields for fields in (own, _json_fields(self.directory / _PREPROCESSOR)))
        if not is_named and not _has_processor(self.config.model_type):
            return None
        template = own.get("chat_template") or _json_fields(self.directory / _TEMPLATE_JSON).get("chat_template")
        if template is None and (self.directory / TEMPLATE).is_file():
            template = (self.directory / TEMPLATE).read_text(encoding="utf-8")
        return template if isinstance(template, str) else None

    @cached_property
    def generation_defaults(self) -> dict[str, Any]:
        """Sampling parameters that generation_config.json sets, under the names of SamplingParams, as vLLM reads it."""
        fields = _json_fields(self.directory / _GENERATION)
        return {ours: fields[name] for name, ours in _GENERATION_SAMPLING.items() if fields.get(name) is not None}

    @cached_property
    def generation_ignored(self) -> list[str]:
        """Names that generation_config.json sets, that have an effect in transformers, and none in this engine."""
        fields = _json_fields(self.directory / _GENERATION)
        return [
            name
            for name, without_effect in _GENERATION_IGNORED.items()
            if fields.get(name) not in (None, False, [], {}, without_effect)
        ]

    def eos_token_ids(self, vocab_size: int, tokenizer: Any) -> frozenset[int]:
        """End-of-sequence tokens: all that generation_config.json, the configuration or the tokenizer names.

        Ids outside the model's vocabulary can never be sampled: they are left out with a warning.

        Raises:
            UnsupportedModel: none is left, so that no output would end by itself.
        """
        text: Any = self.config.get_text_config()
        own, outer = getattr(text, "eos_token_id", None), self.fields.get("eos_token_id")
        named = [
            (_GENERATION, _json_fields(self.directory / _GENERATION).get("eos_token_id")),
            ("config.json", own),
            ("config.json", None if outer == own else outer),
            ("the tokenizer", tokenizer.eos_token_id),
        ]
        known: set[int] = set()
        for file, found in named:
            ids = _listed(found)
            usable = {token for token in ids if type(token) is int and 0 <= token < vocab_size}
            known |= usable
            if len(usable) < len(set(map(repr, ids))):
                logger.warning(
                    "eos_token_id is %r in %s, and the model has the tokens 0 to %d: the others are ignored",
                    found,
                    file,
                    vocab_size - 1,
                )
        if not known:
            raise UnsupportedModel(
                f"checkpoint {checkpoint_name(self.directory)!r} names no token that ends a text: set eos_token_id in "
                f"{_GENERATION}, or eos_token in tokenizer_config.json, to one of the model's {vocab_size} tokens"
            )
        return frozenset(known)

    @cached_property
    def parameter_digest(self) -> str:
        """SHA-256 (hex) over the weight files in order of their names."""
        return digest_of(self.files)

    @property
    def revision(self) -> str:
        """Commit of the hub where the directory is a snapshot of its cache, else the start of the digest."""
        if self.directory.parent.name == "snapshots":
            return self.directory.name
        return self.parameter_digest[:12]


def _json_fields(file: Path) -> dict[str, Any]:
    return read_json_object(file, missing="") if file.is_file() else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
