"""A result is an object with attributes, a dictionary, and JSON."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_llava

from nanovllm.engine.multimodal_llm_engine import MultiModalLLM
from nanovllm.engine.outputs import RequestOutput, RequestTimings, Usage
from nanovllm.engine.text.detokenizer import Detokenizer
from nanovllm.sampling_params import SamplingParams

PICTURE = np.arange(64 * 48 * 3, dtype=np.uint8).reshape(64, 48, 3)
PROMPT = "Look: <|image|> and say"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MultiModalLLM]:
    directory = make_llava(tmp_path_factory.mktemp("llava"), size=64)
    with MultiModalLLM(str(directory), enable_multimodal=True, kv_cache_bytes=4 << 20) as engine:
        yield engine


@pytest.fixture
def result(engine: MultiModalLLM) -> RequestOutput:
    params = SamplingParams(n=2, seed=3, max_tokens=5, logprobs=2, prompt_logprobs=1)
    return engine.generate(PROMPT, params, images=PICTURE, use_tqdm=False)[0]


def plain(value: Any) -> Any:
    """What JSON keeps of a value."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, max_tokens=5),
        SamplingParams(n=3, seed=1, max_tokens=5),
        SamplingParams(temperature=0.0, max_tokens=5, logprobs=3),
        SamplingParams(n=2, seed=1, max_tokens=5, logprobs=0, prompt_logprobs=2),
    ],
    ids=["greedy", "n", "logprobs", "all"],
)
def test_a_result_is_json_as_it_is(engine: MultiModalLLM, params: SamplingParams) -> None:
    results = engine.generate([PROMPT, "hello"], params, images=[[PICTURE], []], use_tqdm=False)
    for result in results:
        assert json.loads(json.dumps(result)) == plain(dataclasses.asdict(result))
        assert json.loads(json.dumps(result, indent=1)) == plain(dict(result))
    assert [one["text"] for one in json.loads(json.dumps(results))] == [result.text for result in results]


def test_json_holds_every_field_of_every_record(result: RequestOutput) -> None:
    written = json.loads(json.dumps(result))
    assert list(written) == [field.name for field in dataclasses.fields(result)]
    assert written["token_ids"] == list(result.token_ids)
    assert written["usage"]["image_tokens"] == result.usage.image_tokens == 4
    assert written["timings"]["e2e_ms"] == result.timings.e2e_ms
    assert written["images"][0]["digest"] == result.images[0].digest
    assert [output["text"] for output in written["outputs"]] == [output.text for output in result.outputs]
    assert result.logprobs is not None
    scores = result.logprobs[0][result.token_ids[0]]
    assert written["logprobs"][0][str(result.token_ids[0])] == {
        "logprob": scores.logprob,
        "rank": scores.rank,
        "text": scores.text,
    }


def test_figures_are_json_too(engine: MultiModalLLM, result: RequestOutput) -> None:
    assert json.loads(json.dumps(engine.get_multimodal_stats())) == engine.get_multimodal_stats()


def test_attributes_and_items_are_the_same_at_every_depth(result: RequestOutput) -> None:
    assert isinstance(result, Mapping)
    for record in (result, result.usage, result.timings, result.images[0], result.outputs[1]):
        assert {name: getattr(record, name) for name in record} == dict(record)
    assert result["usage"]["output_tokens"] == result["usage"].output_tokens == 10
    with pytest.raises(KeyError):
        result["nothing"]


def test_a_result_is_copied_and_pickled_whole(result: RequestOutput) -> None:
    for other in (copy.copy(result), copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert type(other) is RequestOutput
        assert other == result
        assert dict(other) == dict(result)
        assert other.usage.image_tokens == 4
    replaced = dataclasses.replace(result, timings=RequestTimings())
    assert (replaced["timings"].e2e_ms, replaced.text) == (0.0, result.text)
    assert replaced != result


def test_a_result_cannot_be_changed(result: RequestOutput) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.text = "other"  # type: ignore[misc]
    with pytest.raises(TypeError, match="RequestOutput cannot be changed"):
        result["text"] = "other"
    with pytest.raises(TypeError, match="RequestOutput cannot be changed"):
        del result["text"]
    with pytest.raises(TypeError, match="Usage cannot be changed"):
        result.usage.update(image_tokens=0)
    assert hash(Usage(1, 2, 3, 4)) == hash(Usage(1, 2, 3, 4))


def test_a_record_is_made_by_position_and_by_name() -> None:
    assert Usage(1, 2, 3, 4) == Usage(1, 2, cached_tokens=4, image_tokens=3) == dict(Usage(1, 2, 3, 4))
    assert (RequestTimings().e2e_ms, RequestTimings(e2e_ms=2.0)["e2e_ms"]) == (0.0, 2.0)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'cached_tokens'"):
        Usage(1, 2, 3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'tokens'"):
        Usage(1, 2, 3, 4, tokens=5)  # type: ignore[call-arg]


def test_a_result_has_no_path_of_this_machine(engine: MultiModalLLM, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    result = engine.generate(PROMPT, SamplingParams(max_tokens=2), images=tmp_path / "a.png", use_tqdm=False)[0]
    assert str(tmp_path) not in json.dumps(result)


def test_text_ends_lead_from_tokens_to_their_characters(engine: MultiModalLLM) -> None:
    params = SamplingParams(n=2, seed=3, temperature=1.5, max_tokens=40, logprobs=0)
    (result,) = engine.generate("h\u00e9llo \u65e5\u672c", params, use_tqdm=False)
    for output in result.outputs:
        assert output.text_ends is not None
        assert len(output.text_ends) == len(output.token_ids)
        detokenizer = Detokenizer(engine.tokenizer, params)
        for token, end in zip(output.token_ids, output.text_ends, strict=True):
            detokenizer.append(token)
            assert output.text[:end] == detokenizer.text
    (result,) = engine.generate("hello", SamplingParams(n=2, max_tokens=4), use_tqdm=False)
    assert [output.text_ends for output in result.outputs] == [None, None]
