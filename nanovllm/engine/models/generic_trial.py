"""The trial at load of a model of transformers: the engine's logits against the model's own, from the same weights.

Two references, because neither is the truth for every model: generation with transformers' cache, in which some models
have windows that a full forward pass does not show, and a full forward pass. They are computed before the model's
attention and layouts are the engine's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from nanovllm.engine.attention.base import AttentionBackend, AttentionBatch
from nanovllm.engine.models.generic import PROVEN_TOKENS, GenericDecoder, image_token_ids, positions
from nanovllm.engine.models.generic_attention import MASKS, RECORDED, MaskRecord
from nanovllm.engine.models.generic_loading import known_window, max_positions
from nanovllm.engine.models.generic_states import SequenceStates
from nanovllm.engine.scheduling.sequence import ImageSpan
from nanovllm.errors import ConfigurationError, UnsupportedModel
from nanovllm.vision.encoders.base import ImageEncoder
from nanovllm.vision.encoders.generic_processor import OneImageProcessor
from nanovllm.vision.images.preprocess import PreparedImage

TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""The largest difference of a logit, relative to the largest logit."""

_PROMPT_TOKENS = 640  # at least, where the context allows: windows that no field names are mostly of 512 or less
_BEYOND = 32  # tokens behind the largest window that is named
_NEW_TOKENS = 16
_IMAGE_SIZES = ((96, 128), (128, 64))  # height and width of its images
_BETWEEN = 3  # tokens, of two images
_APART = "transformers does not generate what its full forward pass says, so that neither is sure to be right"
_OTHER = (
    "it does something that this engine's attention does not, such as a window or a mask that its layers do not name"
)
_IMAGE = ", or attention to later tokens inside an image"
_IMAGES = ", or features and positions of an image that depend on the others: max_images_per_request=1 tries one"
_NEIGHBOUR_TOKENS = 5  # of a sequence that is computed beside the trial's


@dataclass(frozen=True)
class Reference:
    """What transformers computes: a prompt and its continuation, and the logits [new tokens, vocab] of that."""

    token_ids: tuple[int, ...]
    generated: Tensor  # by generation with transformers' cache
    full: Tensor  # by one forward pass over all tokens
    images: tuple[ReferenceImage, ...]


@dataclass(frozen=True)
class ReferenceImage:
    """An image of the prompt: uint8 pixels [H, W, 3], and its tokens' place."""

    pixels: np.ndarray
    start: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class TrialResult:
    """The largest differences of a logit from both references, relative to the largest logit."""

    num_tokens: int
    image_tokens: int  # among them, of all images
    error_generated: float
    error_full: float


@torch.inference_mode()
def compute_reference(
    model: Any, max_model_len: int | None, processor: OneImageProcessor | None = None, max_images: int = 2
) -> Reference:
    """Let transformers' ``model`` continue a random prompt, greedily; with a ``processor`` there are images in it.

    ``max_model_len``: the longest context that is asked for, in tokens. ``max_images``: the most of a prompt; there
    are two where these allow.

    Raises UnsupportedModel where the model cannot generate, and ConfigurationError for a context without room for an
    image.
    """
    text = model.config.get_text_config()
    wanted = max(_PROMPT_TOKENS, min(known_window(text), PROVEN_TOKENS) + _BEYOND)
    room = (max_model_len or max_positions(model.config)) - _NEW_TOKENS
    images, inputs = list[ReferenceImage](), dict[str, Tensor]()
    if processor is not None:
        _check_told(model)
        for size in _IMAGE_SIZES[: max(1, max_images)]:
            pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
            images.append(ReferenceImage(pixels, 0, tuple(processor(pixels)[0])))
        if _length(images) > min(room, PROVEN_TOKENS):  # a trial of more would take too long
            del images[1:]
        if _length(images) > room:
            raise ConfigurationError(
                f"max_model_len={room + _NEW_TOKENS} does not hold an image, which has {len(images[0].token_ids)} "
                "tokens or more; enable_multimodal=False serves the model's text alone"
            )
        inputs = processor.together([image.pixels for image in images])
        wanted = max(wanted, _length(images) + _PROMPT_TOKENS // 4)
    length = max(1, min(wanted, room))
    tokens = image_token_ids(model.config)
    drawn = torch.randint(text.vocab_size, (2 * length + 64,), generator=torch.Generator().manual_seed(0))
    ids = [token for token in drawn.tolist() if token not in tokens][:length]
    end = length - _BEYOND // 2  # images are where they count for all logits that are compared
    for place, image in reversed(list(enumerate(images))):
        start = end - len(image.token_ids)
        images[place] = replace(image, start=start)
        ids[start:end] = image.token_ids
        end = start - _BETWEEN
    prompt = torch.tensor([ids], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=_NEW_TOKENS,
        min_new_tokens=_NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        suppress_tokens=list(tokens) or None,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    try:
        more = _image_inputs(model, prompt, inputs, tokens)
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, **more)
        more = _image_inputs(model, output.sequences, inputs, tokens)
        full = _full_forward(model, output.sequences, more)
    except UnsupportedModel:
        raise
    except Exception as error:  # a model of transformers raises whatever it likes
        name = type(model).__name__
        raise UnsupportedModel(f"transformers cannot generate with {name}: {type(error).__name__}: {error}") from error
    generated = torch.cat(output.logits).float()
    return Reference(
        tuple(output.sequences[0].tolist()), generated, full[0, -_NEW_TOKENS - 1 : -1].float(), tuple(images)
    )


def _length(images: Sequence[ReferenceImage]) -> int:
    return sum(len(image.token_ids) for image in images) + _BEYOND


def _check_told(model: Any) -> None:
    """Raise UnsupportedModel for layers that are to be told which tokens are an image's."""
    for name in inspect.signature(model.get_decoder().forward).parameters:
        if name.endswith("mm_token_type_ids"):
            raise UnsupportedModel(
                f"{type(model).__name__}: its layers are to be told which tokens are those of images ({name}), which "
                "is not supported; enable_multimodal=False serves its text alone"
            )


def _full_forward(model: Any, token_ids: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits of the last tokens by one pass.

    Raises UnsupportedModel, by layer, where its masks do more than hide later tokens.
    """
    text = model.config.get_text_config()
    masks = MaskRecord()
    more = dict[str, Any]()
    if text._attn_implementation == "sdpa":
        text._attn_implementation, more = RECORDED, {MASKS: masks}
    logits: Tensor = model(
        input_ids=token_ids, use_cache=False, logits_to_keep=_NEW_TOKENS + 1, **inputs, **more
    ).logits
    for index, feature in sorted(masks.features.items()):
        raise UnsupportedModel(f"{type(model).__name__}, layer {index}: {feature} is not supported")
    return logits


def _image_inputs(
    model: Any, token_ids: Tensor, inputs: Mapping[str, Tensor], image_tokens: Sequence[int]
) -> dict[str, Tensor]:
    """What a forward pass of ``model`` takes of a processor's ``inputs``, and which of its tokens are an image's."""
    if not inputs:
        return {}
    takes = inspect.signature(model.forward).parameters
    found = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
        if name in takes
    }
    kinds = torch.isin(token_ids, token_ids.new_tensor(image_tokens)).long()
    return found | {name: kinds for name in takes if name.endswith("token_type_ids")}


@torch.inference_mode()
def hold_against(
    model: GenericDecoder, attention: AttentionBackend, reference: Reference, encoder: ImageEncoder | None = None
) -> TrialResult:
    """Compute the reference's tokens in chunks, beside another sequence, over paged attention.

    Raises UnsupportedModel where a logit differs by more than `TOLERANCES`, which the model's dtype chooses.
    """
    tokens = reference.token_ids
    prompt = len(tokens) - _NEW_TOKENS
    first = reference.images[-1].start + 3 if reference.images else prompt // 3 + 1  # it ends inside an image
    chunks = [size for size in (first, min(16, prompt - first), max(0, prompt - first - 16)) if size > 0]
    try:
        images = tuple(_embedded(image, encoder) for image in reference.images) if encoder is not None else ()
        found = _logits(model, attention, _Row(tokens, images), [*chunks, *[1] * (_NEW_TOKENS - 1)])
    except Exception as error:  # layers of transformers raise whatever they like
        why = f"{type(error).__name__}: {error}"
        raise UnsupportedModel(f"{model.config.name} does not run over this engine's attention: {why}") from error
    dtype = model.embed_tokens.dtype
    errors = [_difference(found, wanted, model.never_sampled) for wanted in (reference.generated, reference.full)]
    apart = _difference(reference.generated, reference.full, model.never_sampled)
    for logits in (reference.generated, reference.full, found):
        if not logits[:, _kept(logits, model.never_sampled)].isfinite().all():
            whose = "this engine's" if logits is found else "transformers'"
            raise UnsupportedModel(
                f"{model.config.name}: {whose} logits of the trial at load are not finite in {dtype}: the weights are "
                "damaged, or want another dtype"
            )
    if max(errors) > (most := TOLERANCES[dtype]):
        why = _APART if errors[0] <= most else _OTHER + _IMAGE * bool(images) + _IMAGES * (len(images) > 1)
        raise UnsupportedModel(
            f"{model.config.name} does not pass the trial at load: over {len(tokens)} tokens its logits differ from "
            f"those of transformers' cached generation by {errors[0]:.2g} of the largest and from those of its full "
            f"forward pass by {errors[1]:.2g}, {most:.0e} being allowed (these two by {apart:.2g} from each other): "
            f"{why}"
        )
    return TrialResult(len(tokens), sum(image.length for image in images), *errors)


def _embedded(image: ReferenceImage, encoder: ImageEncoder) -> ImageSpan:
    height, width = image.pixels.shape[:2]
    prepared = PreparedImage(image.pixels, b"", width, height, (height, width))
    layout = encoder.layout(prepared.size)
    if layout is None or layout.token_ids != image.token_ids:
        raise ValueError("the tokens of an image depend on more than its size")
    (embedding,) = encoder.embed([prepared])
    encoder.reset_statistics()  # they are those of requests
    if len(embedding) != len(layout.places):
        raise ValueError(f"an image has {len(embedding)} features for {len(layout.places)} tokens")
    return ImageSpan(prepared, b"", image.start, len(layout.token_ids), layout=layout, embedding=embedding)


@dataclass
class _Row:
    tokens: Sequence[int]
    images: tuple[ImageSpan, ...] = ()
    table: list[int] = field(default_factory=list)
    states: SequenceStates = field(default_factory=SequenceStates)


def _logits(model: GenericDecoder, attention: AttentionBackend, ours: _Row, chunks: Sequence[int]) -> Tensor:
    """Logits of the last tokens of ``ours``, one before each new token; a neighbour goes along, a token a step."""
    size, tokens = attention.block_size, ours.tokens
    blocks = -(-len(tokens) // size)
    spare = -(-(_NEIGHBOUR_TOKENS + len(chunks)) // size)
    ours.table = list(range(blocks))
    other = _Row(tokens[-_NEW_TOKENS:], table=list(range(blocks, blocks + spare)))
    dtype = model.embed_tokens.dtype
    caches = [attention.allocate(blocks + spare, *shape, dtype) for shape in model.config.kv_shapes]
    found = []
    other_end = 0
    for end, chunk in zip(accumulate(chunks), chunks, strict=True):
        more = min(len(other.tokens), other_end + (1 if other_end else _NEIGHBOUR_TOKENS)) - other_end
        other_end += more
        rows = [(row, count, stop) for row, count, stop in ((other, more, other_end), (ours, chunk, end)) if count]
        rows.sort(key=lambda row: (row[1] != 1, row[2]))  # single tokens first, as in every step
        hidden = _step(model, attention, caches, rows)
        last = sum(count for _, count, _ in rows[: [row is ours for row, *_ in rows].index(True) + 1]) - 1
        if end >= len(tokens) - _NEW_TOKENS:
            found.append(model.logits(hidden[last : last + 1]))
    return torch.cat(found).float()


def _step(
    model: GenericDecoder, attention: AttentionBackend, caches: Sequence[Tensor], rows: Sequence[tuple[_Row, int, int]]
) -> Tensor:
    device, axes = model.embed_tokens.device, model.config.num_axes
    counts, stops = [count for _, count, _ in rows], [stop for *_, stop in rows]
    ends = list(accumulate(counts))
    ids: list[int] = []
    places: list[tuple[int, ...]] = []
    images: list[tuple[int, Tensor]] = []
    for row, count, stop in rows:
        for span in row.images:
            assert span.embedding is not None
            if span.touches(stop - count, stop):
                for first, low, high in span.runs(stop - count, stop):
                    images.append((len(ids) + first - stop + count, span.embedding[low:high]))
        ids += row.tokens[stop - count : stop]
        places += (
            positions(row.images, stop - count, stop, axes) if axes > 1 else [(at,) for at in range(stop)[-count:]]
        )
    hidden = model.embed(torch.tensor(ids, device=device).clamp(max=model.config.vocab_size - 1))
    located = torch.tensor(places, device=device)
    batch = AttentionBatch(counts, stops, [row.table for row, *_ in rows])
    states = [(end - count, end, row.states) for end, (row, count, _) in zip(ends, rows, strict=True)]
    computed: Tensor = model(
        hidden,
        located if axes > 1 else located[:, 0],
        caches,
        attention,
        attention.metadata(batch),
        images,
        states=states if model.has_states else (),
    )
    return computed


def _difference(found: Tensor, wanted: Tensor, without: Sequence[int]) -> float:
    keep = _kept(found, without)
    found, wanted = found[:, keep], wanted[:, keep]
    return float((found - wanted).abs().max() / wanted.abs().max())


def _kept(logits: Tensor, without: Sequence[int]) -> Tensor:
    keep = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    keep[list(without)] = False
    return keep
