"""A release: ``python tools/release.py dist`` writes wheel, sdist and bills of materials into ``dist``.

The version stands in pyproject.toml alone; changelog and chart must name the same one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

from tools.licences import EXTRAS, dependencies, normalised

ROOT = Path(__file__).resolve().parent.parent


def version() -> str:
    """The version of the project."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


def check_versions() -> None:
    """Raise ValueError where the changelog or the chart names another version than pyproject.toml."""
    chart = yaml.safe_load((ROOT / "helm" / "nanovllm" / "Chart.yaml").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {
        "CHANGELOG.md": newest[1] if newest else None,
        "Chart.yaml, version": chart["version"],
        "Chart.yaml, appVersion": chart["appVersion"],
    }
    wrong = {place: one for place, one in named.items() if one != version()}
    if wrong:
        raise ValueError(f"pyproject.toml has version {version()}, others do not: {wrong}")


def build_archives(folder: Path) -> tuple[Path, Path]:
    """Build the wheel, from the sdist, and the sdist into ``folder``."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True)
    stem = folder / f"nanovllm-{version()}"
    return Path(f"{stem}-py3-none-any.whl"), Path(f"{stem}.tar.gz")


def bill_of_materials(names: Collection[str]) -> dict[str, Any]:
    """The CycloneDX bill of materials of this environment, without what is not among the normalised ``names``."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", str(ROOT / "pyproject.toml")]
    command += ["--mc-type", "library", "--output-reproducible", "--output-format", "JSON", sys.executable]
    bill: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    bill["components"] = [one for one in bill["components"] if normalised(one["name"]) in names]
    kept = {bill["metadata"]["component"]["bom-ref"], *(one["bom-ref"] for one in bill["components"])}
    for one in bill["components"]:
        # Where a package came from on the machine of the release: a mirror or a folder, of no use to a reader.
        one.pop("externalReferences", None)
    bill["dependencies"] = [
        {**one, "dependsOn": [ref for ref in one.get("dependsOn", ()) if ref in kept]}
        for one in bill["dependencies"]
        if one["ref"] in kept
    ]
    return bill


def check_extras() -> None:
    """Raise ValueError where what an extra of users needs is not installed: the bill would lack it."""
    needed = [Requirement(text) for text in metadata.requires("nanovllm") or ()]
    missing = []
    for extra in EXTRAS:
        wanted = {normalised(one.name) for one in needed if one.marker and one.marker.evaluate({"extra": extra})}
        if wanted - {"nanovllm"} - dependencies(extra).keys():
            missing.append(extra)
    if missing:
        command = f"{sys.executable} -m pip install '.[{','.join(missing)}]'"
        raise ValueError(f"the bill of materials would lack what these extras need: {', '.join(missing)} ({command})")


def main(folder: Path) -> None:
    """Write a release into ``folder``.

    Raises ValueError where the places that name its version differ, or an extra of users is not installed.
    """
    check_versions()
    check_extras()
    build_archives(folder)
    names = {name for extra in ("", *EXTRAS) for name in dependencies(extra)}
    bill = folder / f"nanovllm-{version()}.cdx.json"
    bill.write_text(json.dumps(bill_of_materials(names), indent=2) + "\n", encoding="utf-8")
    print(f"{bill}: {len(names)} packages")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
