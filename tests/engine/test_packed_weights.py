"""Packed weights in a file: mapped where they were packed before, and the same bits as packed in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoint_files import edit_tensors
from checkpoints import MAKERS, make_llava, make_qwen3, make_text
from engine_parts import drain, greedy, noise_image, recording_engine
from torch import Tensor

from nanovllm.engine import kernels
from nanovllm.engine.diagnostics import describe
from nanovllm.engine.execution import packed_weights
from nanovllm.engine.layers import linear
from nanovllm.engine.layers.linear import has_panels
from nanovllm.engine.layers.packed_cache import PackedCache, Write
from nanovllm.engine.layers.packed_file import PackedFileWriter, read_packed

pytestmark = pytest.mark.skipif(
    not has_panels(torch.float32, torch.device("cpu")), reason="weights are packed by our kernel alone, with AVX-512"
)

OPTIONS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int8 of bfloat16": {"dtype": "bfloat16", "quantization": "int8"},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own, in which the kernels are already; every layer is packed, every model worth a file."""
    compiled = kernels.kept(torch.backends.cpu.get_cpu_capability())
    assert kernels.missing() is None
    folder = tmp_path / "cache" / "nanovllm"
    folder.mkdir(mode=0o755, parents=True)
    monkeypatch.setattr(kernels, "cache_folder", lambda: folder)
    monkeypatch.setattr(kernels, "kept", lambda capability: folder / compiled.name)
    monkeypatch.setattr(packed_weights, "LEAST_BYTES", 0)
    monkeypatch.setattr(linear, "_MIN_PACKED_ELEMENTS", 256)
    yield folder
    folder.chmod(0o755)


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("weights-*.safetensors"))


def logits(directory: Path, *, sees: bool = False, **options: object) -> Tensor:
    engine = recording_engine(directory, kv_cache_bytes=1 << 20, **options)
    prompt, images = "the total" + " <|image|> and" * sees, [noise_image(1, 90, 70)] * sees
    engine.add_request(prompt, greedy(3), images=images, request_id="it")
    drain(engine)
    engine.close()
    return torch.stack(list(engine.sampler.logits["it"].values()))  # type: ignore[attr-defined]


def forbid_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    def packs(*_: object) -> None:
        raise AssertionError("a weight is packed")

    monkeypatch.setattr(linear, "to_panels", packs)


CASES = [*((kind, "float32") for kind in MAKERS), *(("qwen2, tied", name) for name in OPTIONS if name != "float32")]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_panels_from_a_file_give_the_bits_of_panels_packed_in_memory(
    tmp_path: Path, cache: Path, kind: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, sees = MAKERS[kind](tmp_path / "it"), "vl" in kind or "llava" in kind
    given = OPTIONS[options]
    expected = logits(directory, sees=sees, packed_weights_bytes=0, **given)
    assert files(cache) == []
    assert torch.equal(logits(directory, sees=sees, **given), expected)
    assert len(files(cache)) == 1 + sees
    forbid_packing(monkeypatch)
    assert torch.equal(logits(directory, sees=sees, **given), expected)


def test_panels_of_16_bits_and_of_32_are_each_kept_as_they_are(tmp_path: Path, cache: Path) -> None:
    directory = make_qwen3(tmp_path / "it")
    edit_tensors(directory, lambda tensors: {name: tensor.bfloat16().float() for name, tensor in tensors.items()})
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(directory, lambda tensors: {**tensors, name: tensors[name] * (1 + 2**-20)})
    expected = logits(directory, packed_weights_bytes=0)
    assert torch.equal(logits(directory), expected)
    (file,) = files(cache)
    kept = {name: tensor.dtype for name, tensor in read_packed(file).tensors.items() if name.endswith(".panels")}
    assert kept.pop("layers.0.mlp.down_proj.panels.panels") == torch.float32
    assert set(kept.values()) == {torch.bfloat16}


DAMAGE: dict[str, Callable[[bytearray], bytes]] = {
    "cut": lambda content: bytes(content[: len(content) // 2]),
    "empty": lambda content: b"",
    "one bit of a tensor": lambda content: flipped(content, len(content) - 5000),
    "one bit of the header": lambda content: flipped(content, content.index(b"embed_tokens")),
    "one bit of a note": lambda content: flipped(content, content.index(b"aliases")),
    "one bit of an offset": lambda content: flipped(content, content.index(b"data_offsets") + 16),
    "zeros": lambda content: bytes(content[: len(content) - 8192]) + bytes(8192),
}


def flipped(content: bytearray, place: int) -> bytes:
    content[place] ^= 1
    return bytes(content)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("checkpoint") / "it", family="qwen2", tie_word_embeddings=True)


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damaged_panels_are_told_of_and_made_anew(
    checkpoint: Path, cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(checkpoint)
    (file,) = files(cache)
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[damage](bytearray(whole)))
    assert torch.equal(logits(checkpoint), expected)
    assert "is damaged and is made anew" in caplog.text
    assert file.read_bytes() == whole


@pytest.mark.parametrize("make", [make_qwen3, make_llava], ids=["text", "image"])
def test_a_file_of_another_module_is_passed_over(
    make: Callable[[Path], Path],
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory, sees = make(tmp_path / "model"), make is make_llava
    expected = logits(directory, sees=sees, packed_weights_bytes=0)
    add, written = PackedFileWriter.add, set[int]()

    def add_all_but_the_first(writer: PackedFileWriter, name: str, tensor: Tensor) -> None:
        if id(writer) in written:
            add(writer, name, tensor)
        written.add(id(writer))

    monkeypatch.setattr(PackedFileWriter, "add", add_all_but_the_first)
    assert torch.equal(logits(directory, sees=sees), expected)
    assert caplog.text.count("is passed over, and weights are packed in memory: it lacks") == 1 + sees


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_panels_are_packed_in_memory_where_the_cache_cannot_be_written(
    checkpoint: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(checkpoint, packed_weights_bytes=0)
    cache.chmod(0o555)
    assert torch.equal(logits(checkpoint), expected)
    assert caplog.text.count("packed weights cannot be kept in") == 1


def test_panels_are_packed_in_memory_where_the_cache_is_no_folder(
    checkpoint: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(checkpoint, packed_weights_bytes=0)
    shutil.rmtree(cache)
    cache.write_text("a file")
    assert torch.equal(logits(checkpoint), expected)
    assert caplog.text.count("packed weights cannot be kept in") == 1


def test_panels_that_others_could_have_written_are_not_taken(
    checkpoint: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(checkpoint)
    (file,) = files(cache)
    file.chmod(0o666)
    assert torch.equal(logits(checkpoint), expected)
    assert "is writable by other users: chmod go-w" in caplog.text


def test_a_disk_that_is_full_leaves_no_panels_behind(
    checkpoint: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(checkpoint, packed_weights_bytes=0)

    def full(self: PackedFileWriter, name: str, tensor: Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PackedFileWriter, "add", full)
    assert torch.equal(logits(checkpoint), expected)
    assert "No space left on device" in caplog.text
    assert [path.name for path in cache.iterdir() if "weights" in path.name] == ["weights.lock"]


def test_what_a_killed_process_has_left_of_a_file_is_removed_by_the_next_that_writes_one(
    checkpoint: Path, cache: Path
) -> None:
    (cache / ".weights-x1").write_bytes(b"half of it")
    logits(checkpoint)
    assert [path.name for path in cache.glob(".weights-*")] == []
    assert len(files(cache)) == 1


def test_the_log_and_the_doctor_tell_where_panels_lie(
    checkpoint: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told(**options: object) -> str:
        with recording_engine(checkpoint, kv_cache_bytes=1 << 20, **options) as engine:
            return next(finding.note for finding in describe(engine) if finding.subject == "weights")

    assert "panels are mapped from" in told(quantization="int8")
    (int8,) = files(cache)
    int8.unlink()
    with caplog.at_level("INFO"):
        assert "in no file: engine.packed_weights_bytes is 0" in told(packed_weights_bytes=0)
        first = told()
        (file,) = files(cache)
        assert f"packed weights are written to {file}" in caplog.text
        assert "packed weights are mapped from" not in caplog.text
        assert told() == first
    assert f"panels are mapped from {file} (2 MiB)" in first
    assert f"packed weights are mapped from {file}" in caplog.text


def test_panels_belong_to_a_state_of_the_checkpoint_s_files_and_to_the_options(checkpoint: Path, cache: Path) -> None:
    logits(checkpoint)
    logits(checkpoint, quantization="int8")
    logits(checkpoint, dtype="bfloat16")
    assert len(files(cache)) == 3
    before = logits(checkpoint)
    edit_tensors(checkpoint, lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})
    assert not torch.equal(logits(checkpoint), before)
    assert len(files(cache)) == 4


def test_a_checkpoint_overwritten_under_its_old_size_and_time_is_another_one(
    checkpoint: Path, cache: Path, tmp_path: Path
) -> None:
    before = logits(checkpoint)
    other = edit_tensors(
        shutil.copytree(checkpoint, tmp_path / "other"),
        lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()},
    )
    file = checkpoint / "model.safetensors"
    known = file.stat()
    with file.open("r+b") as same:  # as `rsync --inplace --times` does
        same.write((other / file.name).read_bytes())
    os.utime(file, ns=(known.st_atime_ns, known.st_mtime_ns))
    found = file.stat()
    assert (found.st_size, found.st_mtime_ns, found.st_ino) == (known.st_size, known.st_mtime_ns, known.st_ino)
    expected = logits(checkpoint, packed_weights_bytes=0)
    assert not torch.equal(expected, before)
    assert torch.equal(logits(checkpoint), expected)


def test_what_a_killed_process_left_of_a_file_is_removed_by_the_next_that_writes(checkpoint: Path, cache: Path) -> None:
    left = cache / ".weights-1a2b3c4d"
    left.write_bytes(b"half of a file")
    logits(checkpoint)
    assert not left.exists()
    assert len(files(cache)) == 1


def test_the_least_recently_used_panels_are_removed_beyond_the_limit(checkpoint: Path, cache: Path) -> None:
    logits(checkpoint)
    (first,) = files(cache)
    os.utime(first, (1, 1))
    limit = 2 * first.stat().st_size
    logits(checkpoint, quantization="int8", packed_weights_bytes=limit)
    (second,) = set(files(cache)) - {first}
    os.utime(second, (2, 2))
    logits(checkpoint, packed_weights_bytes=limit)  # used: now it is the newer one
    logits(checkpoint, dtype="bfloat16", packed_weights_bytes=limit)
    assert first in files(cache)
    assert second not in files(cache)
    assert len(files(cache)) == 2
    logits(checkpoint, dtype="bfloat16", quantization="int8", packed_weights_bytes=1)
    assert len(files(cache)) == 2, "what is larger than the limit is not written"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_about_as_much_is_expected_of_a_file_as_it_has(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, options: str, stored: torch.dtype
) -> None:
    expected: list[int] = []

    class Noting(PackedCache):
        def open(self, key: str, expected_bytes: int, write: Write) -> object:
            expected.append(expected_bytes)
            return super().open(key, expected_bytes, write)

    monkeypatch.setattr(packed_weights, "PackedCache", Noting)
    generator = torch.Generator().manual_seed(1)

    def rewritten(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.randn(one.shape, generator=generator).to(stored) for name, one in tensors.items()}

    edit_tensors(checkpoint, rewritten)
    logits(checkpoint, **OPTIONS[options])
    (file,) = files(cache)
    # The file itself begins with up to a huge page for its header.
    assert sum(tensor.nbytes for tensor in read_packed(file).tensors.values()) == pytest.approx(expected[0], rel=0.1)


def test_what_one_process_writes_to_its_panels_another_does_not_see(checkpoint: Path, cache: Path) -> None:
    expected = logits(checkpoint)
    (file,) = files(cache)
    for tensor in read_packed(file).tensors.values():
        tensor.zero_()
    assert torch.equal(logits(checkpoint), expected)


def test_workers_that_start_at_once_pack_panels_once_and_share_them(checkpoint: Path, cache: Path) -> None:
    written = []

    class Counting(PackedCache):
        def _write(self, path: Path, write: Write) -> None:
            written.append(path)
            super()._write(path, write)

    def write(writer: PackedFileWriter) -> dict[str, str]:
        writer.add("it", torch.arange(70_000))
        return {}

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: Counting(1 << 30, cache).open("key", 1, write), range(4)))
    assert len(written) == 1
    assert all(kept is not None and torch.equal(kept.tensors["it"], torch.arange(70_000)) for kept in found)


def test_a_tower_warns_once_whether_its_weights_are_read_or_mapped(tmp_path: Path, cache: Path) -> None:
    directory = make_llava(tmp_path / "model", patch=16, size=64)
    for _ in range(2):
        with pytest.warns(UserWarning, match="trained on images of 64 pixels") as caught:
            logits(directory, sees=True, max_image_size=128, num_vision_tokens=16)
        assert len([one for one in caught if "trained on" in str(one.message)]) == 1
    assert len(files(cache)) == 2
