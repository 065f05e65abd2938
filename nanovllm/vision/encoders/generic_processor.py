"""A checkpoint's processor of transformers, called for one image at a time and without torchvision."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
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
_OF_TOKENS = ("attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_PROMPTS = ("a b", "a{0}b", "{0} a", "a{0}b{0}", "a{0}{0}b")  # with none, one and two images
_SIZES = ((96, 128), (128, 64))  # height and width of these
_REMEDY = "enable_multimodal=False serves its text alone"
_MAX_SHOWN_CHARS = 300


class OneImageProcessor:
    """Pixels of one image to a model's inputs, and the tokens that stand for the image.

    Raises UnsupportedModel for a processor that transformers does not have, or not for Pillow, and for one whose
    prompts are more than their texts and what it makes of each image alone: it would be given other prompts here.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        image_token_id: int,
        *,
        max_images: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """``max_images``: the most of one prompt; what more would do is not looked at.

        ``options`` are further arguments of each call of transformers' processor.
        """
        self._image_token_id = image_token_id
        self._options = dict(options or {})
        self._lock = Lock()
        self._name = checkpoint_name(checkpoint.directory)
        self._takes_nested = True
        try:
            images = AutoImageProcessor.from_pretrained(
                checkpoint.directory, backend="pil", local_files_only=True, trust_remote_code=False
            )
            self._processor = _processor_class(checkpoint)(
                images, checkpoint.tokenizer(), **_own_options(checkpoint, _processor_class(checkpoint))
            )
            self._token: str = self._processor.image_token
            self._takes_nested = self._takes_nested_lists()
            changed = self._changed_prompt(max_images)
        except Exception as error:  # a family's processor raises whatever it likes
            why = str(error) if isinstance(error, InvalidImage) else _in_words(error)
            if "trust_remote_code" in str(error):
                why = "its processor is code of the checkpoint, which is never run"
            raise UnsupportedModel(f"images of {self._name!r} cannot be processed here: {why}; {_REMEDY}") from error
        if changed is not None:
            remedy = "max_images_per_request=1 allows one" if changed.count(self._token) > 1 else _REMEDY
            raise UnsupportedModel(
                f"the processor of {self._name!r} makes other tokens of {changed!r} than this engine, which takes "
                f"those of the text and of each image alone; {remedy}"
            )

    def __call__(self, pixels: np.ndarray) -> tuple[list[int], dict[str, Tensor]]:
        """The tokens of uint8 pixels [H, W, 3], and what goes with them to the model by name; one thread at a time.

        Raises:
            InvalidImage: an image that the processor refuses, or has no tokens for.
        """
        height, width = pixels.shape[:2]
        try:
            ids, inputs = self._process(self._token, [pixels])
        except Exception as error:  # a processor raises whatever it likes
            why = f"the model's processor refuses an image of {width}x{height} pixels: {_in_words(error)}"
            raise InvalidImage(why) from error
        if self._image_token_id not in ids:
            raise InvalidImage(
                f"the model's processor writes no token {self._image_token_id} for an image of {width}x{height} "
                "pixels, as for one smaller than a patch"
            )
        return ids, inputs

    def together(self, images: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """What goes to the model by name with several images of one prompt."""
        return self._process(self._token * len(images), images)[1]

    def _process(self, text: str, images: Sequence[np.ndarray]) -> tuple[list[int], dict[str, Tensor]]:
        # As images of Pillow: of an array of three rows a processor takes the rows for channels. As a list of lists:
        # of a flat one some processors take every image for a prompt of its own.
        given: Any = [Image.fromarray(np.ascontiguousarray(pixels)) for pixels in images]
        given = [given] if self._takes_nested and given else given or None
        with self._lock:
            found = self._processor(
                text=[text], images=given, add_special_tokens=False, return_tensors="pt", **self._options
            )
        ids = found.pop("input_ids")[0].tolist()
        return ids, {
            name: value for name, value in found.items() if isinstance(value, torch.Tensor) and name not in _OF_TOKENS
        }

    def _takes_nested_lists(self) -> bool:
        """Whether images may come as a list for each prompt; GOT-OCR takes such a list for pages of one image."""
        try:
            self(np.zeros((*_SIZES[0], 3), np.uint8))
        except InvalidImage:
            return False
        return True

    def _changed_prompt(self, max_images: int) -> str | None:
        """A prompt whose tokens are not those of its text with each image's own in their places; None: there is none.

        Raises what a processor raises.
        """
        tokenizer = self._processor.tokenizer
        placeholder = tokenizer.convert_tokens_to_ids(self._token)
        images = [np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8) for size in _SIZES]
        alone = [self(pixels)[0] for pixels in images]
        for form in _PROMPTS:
            if (count := form.count("{0}")) > max_images:
                continue
            prompt, each = form.format(self._token), iter(alone)
            wanted = list[int]()
            for token in tokenizer(prompt, add_special_tokens=False)["input_ids"]:
                wanted += next(each) if token == placeholder else [token]
            try:
                found, _ = self._process(prompt, images[:count])
            except Exception:
                if count:
                    raise
                continue  # it takes no text alone, of which there is nothing to compare then
            if found != wanted:
                return prompt
        return None

    def fingerprint(self) -> dict[str, Any]:
        """What determines the outputs, for a digest."""
        options = {
            name: value
            for name, value in vars(self._processor).items()
            if isinstance(value, (str, int, float)) and name != "chat_template"
        }
        return {"class": type(self._processor).__name__, "images": self._processor.image_processor.to_dict(), **options}


def _in_words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_SHOWN_CHARS]


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
