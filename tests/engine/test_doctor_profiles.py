"""What `nanovllm doctor CHECKPOINT` says of a model and its profile, as its text for six checkpoints.

The texts are held in tests/golden/doctor; `UPDATE_GOLDEN=1` writes what is said now.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from checkpoint_files import edit_json
from checkpoints import make_qwen_vl
from generic_checkpoints import make_generic_images
from generic_parts import needs_release

from nanovllm.cli.main import main

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "doctor"
CHECKPOINTS = {
    "Qwen3-VL-mine": "qwen3_vl",
    "Chandra-OCR-2": "qwen3_5",
    "MinerU2.5-2509-1.2B": "qwen2_vl",
    "GLM-OCR": "glm_ocr",
    "a-lighton-ocr": "lighton_ocr",
    "some-granite": "idefics3",
}
"""Names of directories, and the families of the small random checkpoints in them."""


def make(directory: Path, family: str) -> Path:
    if family == "qwen3_vl":
        return make_qwen_vl(directory, family="qwen3_vl")
    checkpoint = make_generic_images(directory, family)
    if family == "idefics3":
        tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
        token = {**tokenizer["added_tokens"][-1], "id": tokenizer["added_tokens"][-1]["id"] + 1, "content": "<doctag>"}
        edit_json(checkpoint / "tokenizer.json", added_tokens=[*tokenizer["added_tokens"], token])
    return checkpoint


@needs_release
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_doctor_says_which_profile_a_checkpoint_has_and_why(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOVLLM_ENGINE__KV_CACHE_BYTES", "1048576")
    monkeypatch.setenv("NANOVLLM_ENGINE__ENABLE_PREFIX_CACHING", "false")
    assert main(["doctor", str(make(tmp_path / name, CHECKPOINTS[name])), "--seconds", "0", "--json"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out) if row["what"].partition(" ")[0] in ("model", "profile")]
    rows[0]["why"] = ""  # the digest of random weights
    lines = [f"{row['what']}: {row['is']}" + (f" ({row['why']})" if row["why"] else "") for row in rows]
    text = "\n".join(lines) + "\n"
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")
