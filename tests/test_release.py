"""A release: archives, a clean environment with them, bill of materials, and licences."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools import release
from tools.licences import EXTRAS, PAGE, dependencies, licence, normalised, page
from tools.release import bill_of_materials, build_archives, check_extras, check_versions, version

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist."""
    return build_archives(tmp_path_factory.mktemp("dist"))


@pytest.mark.slow
def test_the_wheel_holds_every_module_once_and_the_shipped_checkpoint(archives: tuple[Path, Path]) -> None:
    wheel = zipfile.ZipFile(archives[0])
    names = wheel.namelist()
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {"nanovllm", f"nanovllm-{version()}.dist-info"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "nanovllm").rglob("*.py")}
    assert modules <= set(names)
    assert {"nanovllm/checkpoints/assets/tiny-receipts/model.safetensors", "nanovllm/demo/report.html.jinja"} <= set(
        names
    )
    schemas = {f"nanovllm/messages/schemas/{path.name}" for path in (ROOT / "docs" / "schemas").glob("*.json")}
    assert len(schemas) == 5
    assert schemas <= set(names)
    assert sum(info.file_size for info in wheel.infolist()) < 12 * 2**20


@pytest.mark.slow
def test_the_sdist_holds_the_package_once_and_its_documentation(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[1]) as sdist:
        members = sdist.getmembers()
    names = [member.name.partition("/")[2] for member in members]
    assert len(names) == len(set(names))
    assert not [member.name for member in members if member.issym()]
    assert {name.partition("/")[0] for name in names} == {
        *(".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "docs", "nanovllm", "pyproject.toml"),
    }


@pytest.mark.slow
def test_the_wheel_alone_produces_jobs_in_a_clean_environment(archives: tuple[Path, Path], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NANOVLLM"))}
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(archives[0])]
    subprocess.run(pip, check=True, cwd=tmp_path, env=environment)
    command = [str(tmp_path / "venv" / "bin" / "nanovllm"), "--version"]
    shown = subprocess.check_output(command, text=True, cwd=tmp_path, env=environment)
    assert shown.split() == ["nanovllm", version()]
    script = (
        "import importlib.util, json\n"
        "from importlib.resources import files\n"
        "from nanovllm import Job, JobProducer, ResultReader\n"
        "job = Job(prompt='What is it? <|image|>', images=['s3://inbox/a.png'])\n"
        "schema = json.loads(files('nanovllm.messages').joinpath('schemas/job.v1.json').read_text())\n"
        "assert set(json.loads(job.model_dump_json(exclude_unset=True))) <= set(schema['properties'])\n"
        "assert not importlib.util.find_spec('torch') and not importlib.util.find_spec('numpy')\n"
    )
    subprocess.run([python, "-c", script], check=True, cwd=tmp_path, env=environment)


def test_the_version_is_the_same_in_project_changelog_and_chart() -> None:
    check_versions()


def needed_by_users() -> set[str]:
    """The distributions that the base and the extras of users name in pyproject.toml."""
    texts = [Requirement(text) for text in metadata.requires("nanovllm") or ()]
    of_users = [one for one in texts if not one.marker or any(one.marker.evaluate({"extra": e}) for e in EXTRAS)]
    return {normalised(one.name) for one in of_users} - {"nanovllm"}


@pytest.mark.slow
def test_the_bill_of_materials_has_what_users_install_and_nothing_else() -> None:
    names = {name for extra in ("", *EXTRAS) for name in dependencies(extra)}
    bill = bill_of_materials(names)
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["version"] == version()
    versions = {normalised(one["name"]): one["version"] for one in bill["components"]}
    assert set(versions) == names
    assert versions["aiokafka"] == metadata.version("aiokafka")
    assert "pytest" not in versions
    refs = {one["bom-ref"] for one in bill["components"]}
    assert {ref for one in bill["dependencies"] for ref in one["dependsOn"]} <= refs
    assert not re.search(rf"file:|{re.escape(sys.prefix)}|{re.escape(str(ROOT))}", json.dumps(bill))


def test_a_release_without_an_extra_of_users_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = dict.fromkeys(needed_by_users())
    monkeypatch.setattr(release, "dependencies", lambda extra: everything)
    check_extras()
    del everything["pillow-heif"]
    with pytest.raises(ValueError, match=r"need: heic \(.* -m pip install '\.\[heic\]'\)"):
        check_extras()


def test_the_page_of_licences_names_each_dependency_with_what_it_declares() -> None:
    rows = dict(re.findall(r"^\| ([^ |]+) \| ([^|]+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    missing = needed_by_users() - set(rows)
    assert not missing, f"docs/licences.md lacks {sorted(missing)}: run tools/licences.py"
    installed = {name: one for extra in ("", *EXTRAS) for name, one in dependencies(extra).items()}
    declared = {name: licence(one) for name, one in installed.items() if name in rows}
    assert {name: rows[name] for name in declared} == declared
    assert page({"": {}}).split("| package")[0] == PAGE.read_text(encoding="utf-8").split("| package")[0]


def test_nothing_under_a_licence_that_binds_our_users_is_a_dependency() -> None:
    rows = dict(re.findall(r"^\| ([^ |]+) \| ([^|]+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert not {name: one for name, one in rows.items() if re.search(r"GPL|SSPL|BUSL|^$", one)}
