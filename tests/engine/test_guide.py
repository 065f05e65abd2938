"""Every Python snippet of the guides runs, in order, in one namespace, against small stand-ins.

The models that the guides name lie in a hub cache; ``model-name`` is an alias of each kind of checkpoint in turn.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import into_hub_cache, make_clip, make_llava, make_qwen3, make_qwen_vl
from PIL import Image

from nanovllm.checkpoints import resolve as registry
from nanovllm.checkpoints.resolve import register_alias
from nanovllm.engine.multimodal_llm_engine import MultiModalLLMEngine
from nanovllm.layers.vision import VisionProcessor

ROOT = Path(__file__).resolve().parent.parent.parent
OWN_GUIDE = ROOT / "docs" / "guide.md"
FIRST_GUIDE = ROOT.parent / "shared" / "GUIDE.md"
PICTURES = ("cat.jpg", "cat1.jpg", "cat2.jpg", "photo.jpg", "img1.jpg", "img2.jpg", "image.jpg", "receipt.png")


def snippets(guide: Path) -> list[tuple[int, str]]:
    """The Python snippets of a page, each with the number of its first line."""
    text = guide.read_text(encoding="utf-8")
    found = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(found) * 2 == len(re.findall("```", text)) > 0, "a fence that is no Python snippet"
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in found]


def run_all(guide: Path, namespace: dict[str, Any], replacements: dict[str, str] | None = None) -> None:
    for line, snippet in snippets(guide):
        for written, real in (replacements or {}).items():
            snippet = snippet.replace(written, real)
        # Empty lines in front: a traceback then names the line of the page.
        code = compile("\n" * (line - 1) + snippet, str(guide), "exec", dont_inherit=True)
        exec(code, namespace)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache with small models under the names of the guides, found as they are written there."""
    root = tmp_path_factory.mktemp("models")
    into_hub_cache(root / "hub", "Qwen/Qwen3-0.6B", make_qwen3(root / "text"))
    towers = {"openai/clip-vit-base-patch32": 32, "openai/clip-vit-base-patch16": 16}
    for name, patch in towers.items():
        into_hub_cache(root / "hub", name, make_clip(root / f"clip{patch}", patch=patch, with_text_tower=patch == 32))
    return root / "hub"


@pytest.fixture
def namespace(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(registry, "_aliases", dict(registry._aliases))
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for number, name in enumerate(PICTURES):
        pixels = random.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(name)
    return {"np": np, "__name__": "guide"}


def stand_in(kind: str, directory: Path) -> None:
    """Let ``model-name`` be a checkpoint of that kind."""
    make: dict[str, Callable[[Path], Path]] = {
        "text and tower": make_qwen3,
        "llava": make_llava,
        "llava over siglip": partial(make_llava, tower="siglip"),
        "qwen-vl": make_qwen_vl,
    }
    register_alias("model-name", make[kind](directory / "model-name"))


first_guide = pytest.mark.skipif(not FIRST_GUIDE.is_file(), reason="the first guide is not beside this repository")


@first_guide
@pytest.mark.filterwarnings("ignore:The projector between", "ignore:.* was trained on images of")
@pytest.mark.parametrize("kind", ["text and tower", "llava", "llava over siglip", "qwen-vl"])
def test_every_snippet_of_the_first_guide_runs(
    namespace: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    stand_in(kind, tmp_path)
    run_all(FIRST_GUIDE, namespace)
    engine, features = namespace["engine"], namespace["features"]
    assert features.shape == (namespace["num_tokens"], 768) == (49, 768)
    assert engine.get_multimodal_stats()["multimodal_enabled"] is True
    assert namespace["modified"].count("<|image|>") == len(namespace["positions"]) * 49
    assert "Vision cache size: " in capsys.readouterr().out


@first_guide
@pytest.mark.filterwarnings("ignore:The projector between")
def test_the_first_guides_prompts_and_images_go_to_its_engine_as_they_are(namespace: dict[str, Any]) -> None:
    found = [snippet for _, snippet in snippets(FIRST_GUIDE)]
    for snippet in found[:2]:  # its two ways to make an engine
        exec(snippet, namespace)
    engine, params = namespace["engine"], namespace["params"]
    (several,) = [snippet for snippet in found if snippet.startswith("# Multiple images per prompt")]
    exec(several, namespace)
    (result,) = engine.generate(namespace["prompts"], params, images=namespace["images"])
    assert result.usage.image_tokens == 2 * 49
    alone = [snippet for snippet in found if snippet.startswith("prompts = ") and snippet.count("<|image|>") == 1]
    assert len(alone) == 3
    for snippet in alone:
        exec(snippet, namespace)
        (result,) = engine.generate(namespace["prompts"], params, images=namespace["image"])
        assert json.loads(json.dumps(result))["usage"]["image_tokens"] == 49


@first_guide
def test_the_first_guides_figures_are_there_on_a_text_engine(
    namespace: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    exec("from nanovllm.engine.multimodal_llm_engine import MultiModalLLM", namespace)
    exec('engine = MultiModalLLM("qwen3-0.6b")  # Works exactly like LLMEngine', namespace)
    shown = [snippet for _, snippet in snippets(FIRST_GUIDE) if "_stats" in snippet]
    assert len(shown) == 2
    for snippet in shown:
        exec(snippet, namespace)
    assert capsys.readouterr().out.splitlines() == ["{'multimodal_enabled': False}", "Vision cache size: 0"]


@first_guide
@pytest.mark.parametrize(
    ("title", "owner"), [("MultiModalLLMEngine", MultiModalLLMEngine), ("VisionProcessor", VisionProcessor)]
)
def test_the_first_guides_reference_names_the_parameters_that_there_are(title: str, owner: type) -> None:
    section = FIRST_GUIDE.read_text(encoding="utf-8").split(f"### {title} Methods")[1].split("\n#")[0]
    listed = re.findall(r"^- `(\w+)\((.*)\)`", section, re.MULTILINE)
    assert len(listed) == 3
    for name, written in listed:
        parameters = list(inspect.signature(getattr(owner, name)).parameters.values())[1:]
        for parameter, text in zip(parameters, filter(None, written.split(", ")), strict=False):
            default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default}"
            assert text in (parameter.name, f"{parameter.name}{default}")


@pytest.mark.filterwarnings("ignore:The projector between", "ignore:.* was trained on images of")
@pytest.mark.parametrize("kind", ["text and tower", "llava"])
def test_every_snippet_of_our_own_guide_runs(
    namespace: dict[str, Any],
    tmp_path: Path,
    embedded_broker: str,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    stand_in(kind, tmp_path)
    run_all(OWN_GUIDE, namespace, {"localhost:9092": embedded_broker})
    shown = capsys.readouterr().out
    assert "model_not_found" in shown
    assert "invoice-0042" in shown


def test_our_own_guide_shows_every_name_that_the_first_one_promises() -> None:
    text = OWN_GUIDE.read_text(encoding="utf-8")
    promised = (
        "enable_multimodal vision_model max_image_size num_vision_tokens freeze_vision_weights add_request generate "
        "use_tqdm get_multimodal_stats get_vision_stats process_images replace_image_placeholders get_image_token_ids"
    )
    assert [name for name in promised.split() if name not in text] == []
