"""A checkpoint's processor of transformers, called for one image at a time and without torchvision."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.checkpoints.resolve import checkpoint_name, read_json_object
from nanovllm.errors import InvalidImage, UnsupportedModel

_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_OF_TOKENS = ("attention_mask", "mm_token_type_ids", "token_type_ids")
_MAX_SHOWN_CHARS = 300


class OneImageProcessor:
    """Pixels of one image to a model's inputs, and the tokens that stand for the image.

    ``options`` are arguments of each call of transformers' processor. Raises UnsupportedModel for a processor that
    transformers does not have, or not for Pillow.
    """

    def __init__(self, checkpoint: Checkpoint, image_token_id: int, options: Mapping[str, Any] | None = None) -> None:
        self._image_token_id = image_token_id
        self._options = dict(options or {})
        self._lock = Lock()
        self._name = checkpoint_name(checkpoint.directory)
        try:
            images = AutoImageProcessor.from_pretrained(
                checkpoint.directory, backend="pil", local_files_only=True, trust_remote_code=False
            )
            self._processor = _processor_class(checkpoint)(
                images, checkpoint.tokenizer(), **_own_options(checkpoint, _processor_class(checkpoint))
            )
        except Exception as error:  # a family's constructor raises whatever it likes
            why = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_SHOWN_CHARS]
            if "trust_remote_code" in str(error):
                why = "its processor is code of the checkpoint, which is never run"
            raise UnsupportedModel(
                f"images of {self._name!r} cannot be processed here: {why}; enable_multimodal=False serves its "
                "text alone"
            ) from error

    def __call__(self, pixels: np.ndarray) -> tuple[list[int], dict[str, Tensor]]:
        """The tokens of uint8 pixels [H, W, 3], and what goes with them to the model by name; one thread at a time.

        Raises:
            InvalidImage: an image that the processor refuses.
        """
        token = self._processor.image_token
        try:
            # As an image of Pillow: of an array of three rows a processor takes the rows for channels.
            image = Image.fromarray(np.ascontiguousarray(pixels))
            with self._lock:
                found = self._processor(
                    text=[token], images=[image], add_special_tokens=False, return_tensors="pt", **self._options
                )
        except Exception as error:  # a processor raises whatever it likes
            why = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_SHOWN_CHARS]
            height, width = pixels.shape[:2]
            raise InvalidImage(f"the model's processor refuses an image of {width}x{height} pixels: {why}") from error
        ids = found.pop("input_ids")[0].tolist()
        if self._image_token_id not in ids:
            raise UnsupportedModel(
                f"the processor of {self._name!r} writes no token {self._image_token_id}, which the configuration has "
                "for images"
            )
        return ids, {
            name: value for name, value in found.items() if isinstance(value, torch.Tensor) and name not in _OF_TOKENS
        }

    def fingerprint(self) -> dict[str, Any]:
        """What determines the outputs, for a digest."""
        options = {
            name: value
            for name, value in vars(self._processor).items()
            if isinstance(value, (str, int, float)) and name != "chat_template"
        }
        return {"class": type(self._processor).__name__, "images": self._processor.image_processor.to_dict(), **options}


def image_token_of(config: Any) -> int | None:
    """The token that a transformers ``config`` has in the places of an image; None where it names none."""
    found = (getattr(config, name, None) for name in ("image_token_index", "image_token_id"))
    return next((int(token) for token in found if token is not None), None)


def _processor_class(checkpoint: Checkpoint) -> type[Any]:
    """The processor's class, without the check that wants a video processor where torchvision is missing."""
    name = next((found for file in _FILES if (found := _fields(checkpoint, file).get("processor_class"))), None)
    name = name or PROCESSOR_MAPPING_NAMES.get(checkpoint.config.model_type)
    kinds = [kind for kind, known in PROCESSOR_MAPPING_NAMES.items() if known == name]
    for kind in (checkpoint.config.model_type, *kinds, str(name).removesuffix("Processor").lower()):
        module = model_type_to_module_name(kind)
        try:
            found = getattr(_processing_module(module), str(name), None)
        except ModuleNotFoundError:
            continue
        if found is not None:
            return type(found.__name__, (found,), {"check_argument_for_proper_class": _unchecked})
    raise UnsupportedModel(
        f"transformers has no processor {name!r} for models of type {checkpoint.config.model_type!r}"
    )


def _processing_module(family: str) -> Any:
    """The module of a family's processor.

    Not the package's lazy module, which has stand-ins for classes that want torchvision. Where a module takes helpers
    of the torchvision variant of its image processor, it gets those of the Pillow variant.
    """
    package = f"transformers.models.{family}"
    try:
        return importlib.import_module(f"{package}.processing_{family}")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
    wanted = f"{package}.image_processing_{family}"
    sys.modules[wanted] = importlib.import_module(f"{package}.image_processing_pil_{family}")
    try:
        return importlib.import_module(f"{package}.processing_{family}")
    finally:
        del sys.modules[wanted]


def _unchecked(self: Any, name: str, argument: object) -> None:
    return None


def _own_options(checkpoint: Checkpoint, kind: type[Any]) -> dict[str, Any]:
    """What processor_config.json sets of the constructor's arguments; no video processor."""
    parameters = inspect.signature(kind.__init__).parameters
    fields = _fields(checkpoint, _FILES[0])
    options = {
        name: fields[name]
        for name in parameters
        if name in fields and not isinstance(fields[name], dict) and name != "chat_template"
    }
    return options | ({"video_processor": None} if "video_processor" in parameters else {})


def _fields(checkpoint: Checkpoint, file: str) -> dict[str, Any]:
    path = checkpoint.directory / file
    return read_json_object(path, missing="") if path.is_file() else {}
