"""What tests of models of transformers share: recorded logits, and the answers of transformers itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.models.generic_loading import OLDEST
from nanovllm.engine.scheduling.sequence import Sequence as EngineSequence
from nanovllm.sampling_params import SamplingParams

needs_release = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST,
    reason="transformers is older than these models need",
)
NEW = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)

Answer = tuple[list[int], Tensor]
"""New tokens, and the logits [tokens, vocab] that they are drawn from."""


class Recorded:
    """An engine whose logits are kept: for each request those of every token that it sampled.

    ``is_mixed``: a step has sampled for requests with images and for requests without.
    """

    def __init__(self, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = engine
        self.is_mixed = False
        self._logits: dict[str, list[Tensor]] = defaultdict(list)
        sample = engine.sampler.sample

        def record(logits: Tensor, sequences: Sequence[EngineSequence], guided: Any) -> Tensor:
            for sequence, row in zip(sequences, logits, strict=True):
                self._logits[sequence.request_id].append(row.clone())
            self.is_mixed |= len({bool(sequence.images) for sequence in sequences}) == 2
            return sample(logits, sequences, guided)

        monkeypatch.setattr(engine.sampler, "sample", record)

    def answers(
        self,
        prompts: Sequence[Any],
        images: Any = None,
        sampling: SamplingParams = GREEDY,
        *,
        tokens: int | None = None,
    ) -> list[Answer]:
        """The answers to prompts that are computed together, anew; the KV cache has room for ``tokens``, or has all."""
        self._logits.clear()
        blocks = self.engine.scheduler.blocks
        taken = blocks.allocate(blocks.num_free)  # so that none has a prefix
        room = len(taken) if tokens is None else blocks.blocks_for(tokens)
        blocks.free(taken[:room])
        outputs = self.engine.generate(list(prompts), sampling, images, use_tqdm=False)
        blocks.free(taken[room:])
        self.engine.audit()
        return [(list(output.token_ids), torch.stack(self._logits[output.request_id])) for output in outputs]

    def preempted(self, prompts: Sequence[Any], images: Any = None, *, tokens: int) -> list[Answer]:
        """As `answers`, where ``tokens`` are so few that a request is computed again."""
        before = self.engine.stats().num_preemptions
        found = self.answers(prompts, images, tokens=tokens)
        assert self.engine.stats().num_preemptions > before
        return found


def transformers_answer(model: Any, inputs: Mapping[str, Tensor], without: Sequence[int] = ()) -> Answer:
    """What cached generation of transformers makes of a prompt, ``without`` some tokens."""
    output = model.generate(
        **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, suppress_tokens=list(without) or None,
    )  # fmt: skip
    return output.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(output.logits)


def assert_same(found: Answer, wanted: Answer, tolerance: float, without: Sequence[int] = ()) -> None:
    """Equal tokens, and logits within ``tolerance`` of the largest."""
    assert found[0] == wanted[0]
    kept = [token for token in range(wanted[1].shape[1]) if token not in without]
    difference = (found[1][:, kept] - wanted[1][:, kept]).abs().max()
    assert float(difference) <= tolerance * float(wanted[1].abs().max())
