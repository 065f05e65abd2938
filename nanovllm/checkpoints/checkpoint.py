"""Hugging Face checkpoint directory: configuration, tokenizer, weight files (one or shards), and their digest."""

from __future__ import annotations

import hashlib
import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig

from nanovllm.checkpoints.resolve import checkpoint_name, read_config, weight_files
from nanovllm.checkpoints.tensors import open_tensors
from nanovllm.errors import ModelNotFound

logger = logging.getLogger(__name__)

_GENERATION = "generation_config.json"


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
        """Configuration, with the defaults of its family."""
        return AutoConfig.from_pretrained(self.directory, local_files_only=True, trust_remote_code=False)

    @property
    def architecture(self) -> str:
        """First entry of ``architectures``; empty where there is none."""
        return next(iter(self.fields.get("architectures") or ()), "")

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of all stored tensors."""
        names: set[str] = set()
        for file in self.files:
            with open_tensors(file) as tensors:
                names.update(tensors.keys())
        return frozenset(names)

    def tokenizer(self) -> Any:
        """Tokenizer with the chat template, which older checkpoints have in chat_template.json, for the processor.

        Raises:
            ModelNotFound: the checkpoint has no tokenizer, or none that can be read.
        """
        name, why = checkpoint_name(self.directory), "it has no vocabulary"
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.directory, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            tokenizer, why = None, type(error).__name__
        # Without its files transformers 5 builds some families' tokenizers of their control tokens alone.
        if tokenizer is None or tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():
            raise ModelNotFound(
                f"{name!r} ({self.architecture or 'no architecture'}) has no tokenizer that can be read ({why}): the "
                "directory of a model holds tokenizer.json or tokenizer.model; a vision tower goes with vision_model="
            )
        own = self.directory / "chat_template.json"
        if not tokenizer.chat_template and own.is_file():
            tokenizer.chat_template = json.loads(own.read_text()).get("chat_template")
        return tokenizer

    def eos_token_ids(self, vocab_size: int) -> frozenset[int]:
        """End-of-sequence tokens: of generation_config.json where it names any, else of the configuration.

        Ids outside the model's vocabulary can never be sampled: they are left out with a warning.
        """
        text: Any = self.config.get_text_config()
        file, found = "config.json", getattr(text, "eos_token_id", None)
        if (self.directory / _GENERATION).is_file():
            generation = GenerationConfig.from_pretrained(self.directory, local_files_only=True)
            if generation.eos_token_id is not None:
                file, found = _GENERATION, generation.eos_token_id
        named = found if isinstance(found, list) else [] if found is None else [found]
        known = [token for token in named if type(token) is int and 0 <= token < vocab_size]
        if len(known) < len(named):
            logger.warning(
                "eos_token_id is %r in %s, and the model has the tokens 0 to %d: the others are ignored, so that %s",
                found,
                file,
                vocab_size - 1,
                f"an output ends with {known}" if known else "an output ends at max_tokens or its own stop only",
            )
        return frozenset(known)

    @cached_property
    def parameter_digest(self) -> str:
        """SHA-256 (hex) over the weight files in order of their names."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                hashlib.file_digest(stream, lambda: digest)
        return digest.hexdigest()

    @property
    def revision(self) -> str:
        """Commit of the hub where the directory is a snapshot of its cache, else the start of the digest."""
        if self.directory.parent.name == "snapshots":
            return self.directory.name
        return self.parameter_digest[:12]
