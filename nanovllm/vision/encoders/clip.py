"""Vision encoder: a CLIP or SigLIP tower and the projector into the language model's space."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig, SiglipVisionConfig, SiglipVisionModel
from transformers.activations import ACT2FN

from nanovllm.checkpoints.config_fields import reading_config
from nanovllm.checkpoints.resolve import checkpoint_name, read_config, resolve_checkpoint
from nanovllm.errors import ConfigurationError, UnsupportedModel
from nanovllm.vision.encoders.base import ImageEncoder, tower_fields
from nanovllm.vision.encoders.recorded_batches import RecordedBatches, Recorder
from nanovllm.vision.images.preprocess import ImageTransform

SelectStrategy = Literal["default", "full"]

TOWER_PREFIXES = ("model.vision_tower.", "vision_tower.")
PROJECTOR_PREFIXES = ("model.multi_modal_projector.", "multi_modal_projector.")
"""In a LLaVA checkpoint: since transformers 4.52, and before it."""

_KEPT: ContextVar[dict[int, Tensor] | None] = ContextVar("_KEPT", default=None)
"""Hidden states that a pass of a tower keeps, by their index, beside the last one."""

DEFAULT_IMAGE_SIZE = 224
DEFAULT_VISION_TOKENS = 49
PROJECTOR_SEED = 0


class Projector(nn.Module):
    """LLaVA's projector: two linear layers around an activation, ``[…, in_features]`` to ``[…, hidden_size]``."""

    def __init__(self, in_features: int, hidden_size: int, *, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_size, bias=bias)
        self.act = ACT2FN[activation]
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Project tower features."""
        return self.linear_2(self.act(self.linear_1(features)))


class VisionEncoder(ImageEncoder):
    """A CLIP or SigLIP tower, composed with a projector to a language model of ``hidden_size``.

    The tower is resolved by name, never downloaded. Another ``max_image_size`` than the tower's own interpolates its
    position embeddings; fewer ``num_vision_tokens`` than patches pool the patch grid by adaptive averages, before the
    projector.

    Args:
        hidden_size: width of the language model's embeddings.
        vision_model: directory, alias or cached hub name of a CLIP or SigLIP checkpoint.
        projector: safetensors file, or directory of a LLaVA checkpoint or of an aligned projector. Unset, the
            projector is random from a fixed seed: its embeddings mean nothing, and a warning says so once a process.
        max_image_size: side of the square that images are resized to, in pixels; unset 224.
        num_vision_tokens: a square number of tokens an image; unset 49, or the patches where they are fewer.
        freeze_vision_weights: whether the tower's parameters take no gradient (the projector's do).
        vision_feature_layer: index or indices into the tower's hidden states; unset the projector's own, or -2.
        dtype, device: of the parameters and the embeddings.

    Raises:
        ModelNotFound: a name that leads nowhere, or a checkpoint without the tensors.
        ConfigurationError: options that contradict one another or the projector.
        UnsupportedModel: a tower of another kind.
    """

    _recorded: RecordedBatches | None

    def __init__(
        self,
        hidden_size: int = 768,
        vision_model: str | Path = "openai/clip-vit-base-patch32",
        *,
        projector: str | Path | None = None,
        max_image_size: int | None = None,
        num_vision_tokens: int | None = None,
        freeze_vision_weights: bool = True,
        vision_feature_layer: int | list[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        directory = resolve_checkpoint(vision_model)
        path, options = _find_projector(projector)
        layer = vision_feature_layer if vision_feature_layer is not None else options.get("vision_feature_layer", -2)
        fields = read_config(directory)
        with reading_config(fields, checkpoint_name(directory)):
            self._build_tower(_tower_config(fields), layer, None)
        if self._has_class_token and options.get("vision_feature_select_strategy") == "full":
            raise ConfigurationError("the projector was trained with the class token; composing takes patches only")
        self._load(self.tower, directory, ("vision_model.", *TOWER_PREFIXES, ""), self._left_out)

        size = max_image_size or DEFAULT_IMAGE_SIZE
        self._set_transform(_composed_transform(directory, self._has_class_token, size))
        self._choose_tokens(num_vision_tokens, math.isqrt(DEFAULT_VISION_TOKENS))

        self.projector = Projector(
            self.tower.config.hidden_size * len(self._layers),
            hidden_size,
            activation=options.get("projector_hidden_act", "gelu"),
            bias=options.get("multimodal_projector_bias", True),
        )
        if path is None:
            _initialise(self.projector)
            _warn_untrained()
        else:
            self._load(self.projector, path, (*PROJECTOR_PREFIXES, ""))
        self._finish(str(vision_model), freeze_vision_weights, dtype, device)

    @classmethod
    def from_llava(
        cls,
        directory: str | Path,
        *,
        max_image_size: int | None = None,
        num_vision_tokens: int | None = None,
        freeze_vision_weights: bool = True,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Self:
        """Tower and projector of a LLaVA checkpoint, with its own feature layers and preprocessing.

        Another ``max_image_size`` or ``num_vision_tokens`` than the checkpoint's interpolates and pools as for a
        composed tower, and warns. With a class token among the checkpoint's features, a square number of tokens leaves
        it out, and one more keeps it.

        Raises:
            ModelNotFound: the directory lacks a file or tensors.
            ConfigurationError: a number of tokens that no pooling of the patches makes, or a preprocessor of another
                size than the tower.
            UnsupportedModel: no LLaVA checkpoint, or a tower of another kind than CLIP's and SigLIP's.
        """
        directory = Path(directory)
        encoder, config = cls._tower_of_llava(directory, max_image_size, num_vision_tokens)
        name, side, transform = checkpoint_name(directory), encoder.tower.config.image_size, encoder.transform
        with reading_config(read_config(directory), name):
            encoder.projector = Projector(
                encoder.tower.config.hidden_size * len(encoder._layers),
                config.text_config.hidden_size,
                activation=config.projector_hidden_act,
                bias=config.multimodal_projector_bias,
            )
        encoder._load(encoder.tower, directory, TOWER_PREFIXES, encoder._left_out)
        encoder._load(encoder.projector, directory, PROJECTOR_PREFIXES)
        if max_image_size is None and transform.output_size != (side, side):
            raise ConfigurationError(
                f"the preprocessor makes images of {transform.output_size}, the tower takes {side}x{side}"
            )
        encoder._warn_if_changed(name)
        encoder._finish(name, freeze_vision_weights, dtype, device)
        return encoder

    @classmethod
    def tokens_of_llava(
        cls, directory: Path, *, max_image_size: int | None = None, num_vision_tokens: int | None = None
    ) -> tuple[ImageTransform, int]:
        """The preprocessing and the tokens of an image that `from_llava` would have; reads no weights."""
        with torch.device("meta"):
            encoder, _ = cls._tower_of_llava(directory, max_image_size, num_vision_tokens)
        return encoder.transform, encoder.num_vision_tokens

    @classmethod
    def _tower_of_llava(
        cls, directory: Path, max_image_size: int | None, num_vision_tokens: int | None
    ) -> tuple[Self, LlavaConfig]:
        """An encoder with its tower, transform and number of tokens, before weights and projector."""
        fields = read_config(directory)
        if fields.get("model_type") != "llava":
            kind = fields.get("model_type")
            raise UnsupportedModel(f"{checkpoint_name(directory)} is a {kind!r} checkpoint, not a LLaVA one")
        encoder = cls.__new__(cls)
        nn.Module.__init__(encoder)
        with reading_config(fields, checkpoint_name(directory)):
            config = LlavaConfig.from_dict(fields)
            tower = _tower_config(config.vision_config.to_dict())
            encoder._build_tower(tower, config.vision_feature_layer, config.vision_feature_select_strategy)
        transform = ImageTransform.from_preprocessor_config(directory)
        if max_image_size is not None and transform.output_size != (max_image_size, max_image_size):
            transform = transform.resized(max_image_size)
        encoder._set_transform(transform)
        encoder._choose_tokens(num_vision_tokens, encoder.tower.config.image_size // encoder.tower.config.patch_size)
        return encoder, config

    @torch.no_grad()
    def encode(self, pixels: np.ndarray | Tensor) -> Tensor:
        """Embed uint8 images ``[N, H, W, 3]``: ``[N, num_vision_tokens, hidden_size]``.

        Raises:
            ConfigurationError: pixels of another type or size than this encoder's transform makes.
        """
        # Copies an array: a decoder's is read-only, and torch has no read-only tensors.
        batch = pixels if isinstance(pixels, Tensor) else torch.tensor(pixels)
        expected = self.transform.output_size
        if batch.dtype != torch.uint8 or batch.ndim != 4 or (*batch.shape[1:],) != (*(expected or ()), 3):
            raise ConfigurationError(
                f"the encoder takes uint8 pixels [N, {expected}, 3], not {batch.dtype} {list(batch.shape)}"
            )
        if not len(batch):
            return self._levels.new_empty((0, self.num_vision_tokens, self.hidden_size), dtype=self.dtype)
        with self._counted(len(batch)):
            return torch.cat([self(self.normalise(part)) for part in batch.split(self.batch_size)])

    @torch.no_grad()
    def record(self, recorder: Recorder) -> None:
        """See ImageEncoder."""
        pixels = torch.zeros(self.batch_size, *self.transform.output_size or (), 3, dtype=torch.uint8)
        self._recorded = RecordedBatches(self._of_pixels, pixels.to(self._levels.device), recorder)

    @property
    def num_replays(self) -> int:
        """Passes that ran as recorded."""
        return 0 if self._recorded is None else self._recorded.num_replays

    def _embed(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        compute = self._recorded or self._of_pixels
        return list(compute(self._send(images).view(len(images), *images[0].shape)))

    def _of_pixels(self, pixels: Tensor) -> Tensor:
        return self.forward(self.normalise(pixels))

    def _architecture(self) -> dict[str, Any]:
        return {
            "tower": tower_fields(self.tower.config),
            "layers": self._layers,
            "strategy": self._strategy,
            "pooled_grid": self._pooled_grid,
            "tokens": self.num_vision_tokens,
        }

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed normalised images ``[N, 3, H, W]``: ``[N, num_vision_tokens, hidden_size]``."""
        return self.projector(self.features(pixel_values))

    def features(self, pixel_values: Tensor) -> Tensor:
        """Selected hidden states of the tower, pooled: ``[N, num_vision_tokens, tower width × feature layers]``."""
        own = self.tower.config.image_size
        kept: dict[int, Tensor] = {}
        token = _KEPT.set(kept)
        try:
            outputs = self.tower(pixel_values, interpolate_pos_encoding=(*pixel_values.shape[-2:],) != (own, own))
        finally:
            _KEPT.reset(token)
        states = {**kept, self.tower.config.num_hidden_layers: outputs.last_hidden_state}
        selected = torch.cat([states[layer] for layer in self._layers], dim=-1)
        if self._pooled_grid is None:
            return selected[:, 1:] if self._strategy == "default" else selected
        patches = selected[:, int(self._has_class_token) :]
        grid = patches.unflatten(1, (self._grid, self._grid)).permute(0, 3, 1, 2)
        pooled = F.adaptive_avg_pool2d(grid, self._pooled_grid).flatten(2).transpose(1, 2)
        class_tokens = self.num_vision_tokens - self._pooled_grid**2
        return torch.cat([selected[:, :class_tokens], pooled], dim=1)

    def _build_tower(
        self,
        config: CLIPVisionConfig | SiglipVisionConfig,
        feature_layer: int | list[int],
        strategy: SelectStrategy | None,
    ) -> None:
        indices = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
        depth = config.num_hidden_layers
        if not indices or any(not -depth - 1 <= index <= depth for index in indices):
            raise ConfigurationError(f"vision_feature_layer {feature_layer} is not within a tower of {depth} layers")
        self._layers = [index if index >= 0 else depth + 1 + index for index in indices]
        has_class_token = config.model_type == "clip_vision_model"
        self._strategy: SelectStrategy = strategy or ("default" if has_class_token else "full")
        self._has_class_token = has_class_token
        kind = CLIPVisionModel if has_class_token else SiglipVisionModel
        # The tower ends with the last selected layer: no feature depends on what is behind it.
        with torch.device("meta"):
            whole = _parameter_names(kind(_with_head(config, True)))
        config.num_hidden_layers = max(self._layers)
        self.tower = kind(_with_head(config, False))
        # Hidden states are taken before this norm; some releases of transformers return the last one after it.
        inner = getattr(self.tower, "vision_model", self.tower)
        inner.post_layernorm = nn.Identity()
        for index in set(self._layers) - {config.num_hidden_layers}:
            inner.encoder.layers[index].register_forward_pre_hook(partial(_keep, index), with_kwargs=True)
        self._left_out = whole - _parameter_names(self.tower)

    def _finish(self, *args: Any) -> None:
        self.hidden_size = self.width = self.projector.linear_2.out_features
        self._recorded = None
        super()._finish(*args)
        self.batch_size = min(self.batch_size, max(1, self.batch_patches // self._grid**2))

    def _set_transform(self, transform: ImageTransform) -> None:
        if transform.output_size is None or transform.output_size[0] != transform.output_size[1]:
            raise UnsupportedModel("the preprocessor's images have no one square size")
        self.transform = transform
        self._grid: int = transform.output_size[0] // self.tower.config.patch_size
        if self._grid < 1:
            raise ConfigurationError(
                f"images of {transform.output_size[0]} pixels are smaller than the tower's patch of "
                f"{self.tower.config.patch_size}: max_image_size is {self.tower.config.patch_size} or more"
            )

    def _choose_tokens(self, wanted: int | None, default_side: int) -> None:
        """Keep all tokens of an image, or pool its patches to ``wanted``, by default to a grid of ``default_side``."""
        grid = self._grid
        class_tokens = int(self._has_class_token and self._strategy == "full")
        self._pooled_grid: int | None = None
        self.num_vision_tokens = grid**2 + int(self._has_class_token) - int(self._strategy == "default")
        if wanted == self.num_vision_tokens or (wanted is None and default_side >= grid):
            return
        if wanted is None:
            wanted = default_side**2 + class_tokens
        sides = {side**2 + extra: side for side in range(1, grid + 1) for extra in (0, class_tokens)}
        if wanted not in sides:
            nearest = sorted(sorted({*sides, self.num_vision_tokens}, key=lambda count: abs(count - wanted))[:2])
            raise ConfigurationError(
                f"num_vision_tokens={wanted} cannot be pooled from the {grid}x{grid} patches of an image of "
                f"{grid * self.tower.config.patch_size} pixels; the nearest that can: {', '.join(map(str, nearest))}"
            )
        self._pooled_grid = sides[wanted]
        self.num_vision_tokens = wanted

    def _warn_if_changed(self, name: str) -> None:
        """Warn where size or tokens differ from those of the checkpoint ``name``."""
        config = self.tower.config
        own = (config.image_size // config.patch_size) ** 2 + int(self._has_class_token)
        own -= int(self._strategy == "default")
        size = self.transform.output_size
        if size != (config.image_size, config.image_size) or self.num_vision_tokens != own:
            warnings.warn(
                f"{name!r} was trained on images of {config.image_size} pixels and {own} tokens; its answers are less "
                f"accurate with {size[0] if size else size} pixels and {self.num_vision_tokens} tokens. Leave "
                "max_image_size and num_vision_tokens unset for its own.",
                stacklevel=3,
            )


def _keep(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep what a layer is about to read; unlike transformers' `output_hidden_states`, which keeps all layers'."""
    if (kept := _KEPT.get()) is not None:
        kept[index] = args[0] if args else kwargs["hidden_states"]


def _tower_config(fields: dict[str, Any]) -> CLIPVisionConfig | SiglipVisionConfig:
    """Vision half of a CLIP, SigLIP or LLaVA configuration, or the configuration of a tower alone."""
    fields = fields.get("vision_config", fields)
    kind = fields.get("model_type")
    for config, name in ((CLIPVisionConfig, "clip"), (SiglipVisionConfig, "siglip")):
        if kind in (name, f"{name}_vision_model"):
            return config.from_dict({**fields, "model_type": f"{name}_vision_model"})
    raise UnsupportedModel(f"a vision tower of type {kind!r} is not supported; CLIP's and SigLIP's are")


def _with_head(config: Any, has_head: bool) -> Any:
    """The configuration, of SigLIP with or without the head that pools patches for retrieval."""
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = has_head
    return config


def _parameter_names(tower: nn.Module) -> set[str]:
    """Names within a tower, whatever release of transformers made it."""
    return {name.removeprefix("vision_model.") for name, _ in tower.named_parameters()}


def _composed_transform(directory: Path, is_clip: bool, size: int) -> ImageTransform:
    if any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return ImageTransform.from_preprocessor_config(directory).resized(size)
    return ImageTransform.for_clip(size) if is_clip else ImageTransform.for_siglip(size)


def _find_projector(projector: str | Path | None) -> tuple[Path | None, dict[str, Any]]:
    """Path of a projector, and the options of its training where a ``config.json`` is beside it."""
    if projector is None:
        return None, {}
    path = Path(projector).expanduser()
    path = path if path.exists() else resolve_checkpoint(projector)
    directory = path if path.is_dir() else path.parent
    return path, read_config(directory) if (directory / "config.json").is_file() else {}


def _initialise(projector: nn.Module) -> None:
    """Initialise an untrained projector from a fixed seed, at a scale that keeps the features' norm."""
    generator = torch.Generator().manual_seed(PROJECTOR_SEED)
    with torch.no_grad():
        for _, parameter in sorted(projector.named_parameters()):
            if parameter.ndim == 1:
                parameter.zero_()
            else:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator, device="cpu") / math.sqrt(parameter.shape[1])
                )


@cache  # once a process
def _warn_untrained() -> None:
    warnings.warn(
        "The projector between the vision tower and the language model is untrained (random): the model runs, but it "
        "cannot see what is in an image. Pass projector=, or train one with `nanovllm align`.",
        stacklevel=3,
    )
