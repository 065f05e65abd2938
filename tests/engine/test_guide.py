"""Every Python snippet of the guides runs, in order, in one namespace, against small stand-ins of the models named."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_clip, make_llava, make_qwen3
from PIL import Image

from nanovllm.errors import ModelNotFound
from nanovllm.vision import checkpoints as registry
from nanovllm.vision.checkpoints import register_alias, resolve_checkpoint

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
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    root = tmp_path_factory.mktemp("models")
    known = dict(registry._aliases)
    text = make_qwen3(root / "text")
    models = {
        "qwen3-0.6b": text,
        "model-name": text,
        "openai/clip-vit-base-patch32": make_clip(root / "clip32", patch=32, with_text_tower=True),
        "openai/clip-vit-small-patch16": make_clip(root / "clip16", patch=16),
    }
    try:
        resolve_checkpoint("tiny-receipts")
    except ModelNotFound:
        models["tiny-receipts"] = make_llava(root / "llava")
    for name, directory in models.items():
        register_alias(name, directory)
    yield
    registry._aliases.clear()
    registry._aliases.update(known)


@pytest.fixture
def namespace(stand_ins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for number, name in enumerate(PICTURES):
        pixels = random.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(name)
    return {"np": np, "__name__": "guide"}


@pytest.mark.skipif(not FIRST_GUIDE.is_file(), reason="the first guide is not beside this repository")
def test_every_snippet_of_the_first_guide_runs(namespace: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the untrained projector says so
        run_all(FIRST_GUIDE, namespace)
    engine, features = namespace["engine"], namespace["features"]
    assert features.shape == (namespace["num_tokens"], 768) == (49, 768)
    assert engine.get_multimodal_stats()["multimodal_enabled"] is True
    assert namespace["modified"].count("<|image|>") == len(namespace["positions"]) * 49
    assert "Vision cache size: " in capsys.readouterr().out


def test_every_snippet_of_our_own_guide_runs(
    namespace: dict[str, Any], embedded_broker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
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
