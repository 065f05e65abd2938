"""The licences of what an installation brings: ``python tools/licences.py`` writes docs/licences.md; a test compares.

Names and licences only: versions are an installation's own, in the bill of materials of a release (tools/release.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "licences.md"
EXTRAS = ("worker", "documents", "remote", "heic", "msk", "obstore", "convert")
"""What users install; ``cuda`` and ``vllm`` bring builds of their own, ``dev`` stays with the developers."""

_HEAD = """# Licences

nanovllm is under Apache-2.0. Below is what pip installs with it and its extras beside a CPU build of PyTorch, with the
licence that each package declares. A CUDA build of PyTorch brings NVIDIA's libraries, under NVIDIA's licences. Each
release has the exact versions, as a CycloneDX bill of materials (`make release`). The wheels of PyTorch, NumPy and
Pillow contain libraries of others, whose texts lie in the wheels.

The page is generated (`.venv/bin/python tools/licences.py`).

| package | licence | comes with |
|---|---|---|
"""

_EXPRESSIONS = {
    "apache": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "apache software license 2.0": "Apache-2.0",
    "bsd": "BSD",
    "bsd license": "BSD",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
}


def dependencies(extra: str = "") -> dict[str, metadata.Distribution]:
    """The installed distributions that nanovllm needs with ``extra`` (empty: the base), by normalised name."""
    found: dict[str, metadata.Distribution] = {}
    _collect("nanovllm", {extra}, found)
    return found


def _collect(name: str, extras: Iterable[str], found: dict[str, metadata.Distribution]) -> None:
    for text in metadata.requires(name) or ():
        needed = Requirement(text)
        wanted = any(needed.marker.evaluate({"extra": extra}) for extra in extras) if needed.marker else True
        key = normalised(needed.name)
        if not wanted or key in found:
            continue
        if key == "nanovllm":
            _collect(key, needed.extras, found)
            continue
        try:
            found[key] = metadata.distribution(key)
        except metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
        _collect(key, needed.extras or {""}, found)


def normalised(name: str) -> str:
    """The name of a distribution as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(distribution: metadata.Distribution) -> str:
    """The licence that a distribution declares: an SPDX expression, else its classifiers, else its text."""
    declared = distribution.metadata
    if expression := declared.get("License-Expression"):
        return expression
    classifiers = [line for line in declared.get_all("Classifier") or () if line.startswith("License ::")]
    names = [line.rpartition("::")[2].strip() for line in classifiers]
    text = (declared.get("License") or "").strip()
    if text and "\n" not in text and "dependency" not in text and text != "Dual License":
        names = [text]
    return " OR ".join(_EXPRESSIONS.get(name.lower(), name) for name in names) or text


def page(by_extra: Mapping[str, Mapping[str, metadata.Distribution]]) -> str:
    """The page of licences; ``by_extra`` has the distributions of the base (empty name) and of each extra."""
    rows = []
    for name in sorted({name for found in by_extra.values() for name in found}):
        owners = [extra or "base" for extra, found in by_extra.items() if name in found]
        owner = "base" if "base" in owners else ", ".join(f"`{extra}`" for extra in owners)
        distribution = next(found[name] for found in by_extra.values() if name in found)
        rows.append(f"| {name} | {licence(distribution)} | {owner} |")
    return _HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page({extra: dependencies(extra) for extra in ("", *EXTRAS)}), encoding="utf-8")
