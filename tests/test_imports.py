"""What may be imported where: the rooms by the table of ARCHITECTURE.md, and producing jobs without torch."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import nanovllm

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "PIL", "jinja2", "tqdm")
REFUSE_HEAVY = f"""
import sys
import tomllib
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f'{{name}} is not installed here', name=name)
sys.meta_path.insert(0, Refuse())
"""


def run(script: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    script = f"import sys, nanovllm\nprint([name for name in {HEAVY!r} if name in sys.modules], len(nanovllm.__all__))"
    assert run(script, tmp_path) == "[] 8\n"


def test_producers_and_readers_import_without_torch_installed(tmp_path: Path) -> None:
    run(
        REFUSE_HEAVY
        + "from nanovllm import JobProducer, Job, Result, DeadLetter, SamplingParams\n"
        + "import nanovllm.messages.job, nanovllm.messages.codec, nanovllm.settings.worker, nanovllm.cli.main\n"
        + "import nanovllm.pipeline.routing.bridge, nanovllm.pipeline.routing.sqs, nanovllm.pipeline.app\n"
        + "import nanovllm.messages.result, nanovllm.sinks.kafka, nanovllm.sinks.jsonl, nanovllm.metrics\n"
        + "import nanovllm.engine.backends.base, nanovllm.engine.outputs\n"
        + "import nanovllm.engine.text.prompt_encoder, nanovllm.engine.backends.echo\n",
        tmp_path,
    )


def test_a_worker_in_front_of_servers_starts_without_what_only_engines_and_other_commands_need(tmp_path: Path) -> None:
    unneeded = ("torch", "transformers", "tokenizers", "safetensors", "llguidance", "tqdm", "jinja2")  # not installed
    unneeded += ("boto3", "rich.console", "pypdfium2", "jsonschema_rs", "moto")  # they cost its start
    script = f"""
import sys
sys.modules |= dict.fromkeys({unneeded!r})
import nanovllm.cli.main, nanovllm.pipeline.app, nanovllm.sinks.kafka, nanovllm.pipeline.run
import nanovllm.vision.images.child
from nanovllm.settings.worker import Settings
from nanovllm.pipeline.build import check_parts
from nanovllm.pipeline.build_remote import build_remote_engine
settings = Settings.model_validate(
    dict(engine=dict(backend="openai", model="m"), remote=dict(endpoints=("http://127.0.0.1:1/v1",)))
)
check_parts(settings)
print(build_remote_engine(settings).model_info.id)
"""
    assert run(script, tmp_path) == "m\n"


def test_a_job_is_made_and_a_result_is_read_without_torch_installed(tmp_path: Path) -> None:
    run(
        REFUSE_HEAVY
        + "from nanovllm import Job, JobProducer, SamplingParams\n"
        + "from nanovllm.messages.codec import decode_job, encode_job\n"
        + "job = Job(prompt='Say hello', sampling={'max_tokens': 8})\n"
        + "assert decode_job(encode_job(job, 'json')) == job\n"
        + "JobProducer(bootstrap_servers='localhost:9092')\n",
        tmp_path,
    )


def test_the_engine_without_torch_says_what_is_missing(tmp_path: Path) -> None:
    script = "import nanovllm\ntry:\n    nanovllm.LLM\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    assert run(REFUSE_HEAVY + script, tmp_path) in {"torch\n", "transformers\n", "numpy\n"}


def test_every_public_name_imports_beside_packages_of_the_users_own(tmp_path: Path) -> None:
    for room in ("engine", "pipeline", "sinks", "vision", "layers"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("OWNER = 'user'\n")
    script = (
        "import engine, pipeline, sinks, vision, layers, nanovllm\n"
        "from nanovllm.layers.vision import VisionEncoder\n"
        "print(*(getattr(nanovllm, name).__module__.split('.')[0] for name in nanovllm.__all__))\n"
        "assert {room.OWNER for room in (engine, pipeline, sinks, vision, layers)} == {'user'}\n"
    )
    assert set(run(script, tmp_path).split()) == {"nanovllm"}


def test_the_public_names_are_listed_and_others_are_not_there() -> None:
    assert set(nanovllm.__all__) <= set(dir(nanovllm))
    with pytest.raises(AttributeError, match="Nothing"):
        nanovllm.Nothing  # noqa: B018 (looking is the test)


Edges = dict[str, set[str]]


def module_files() -> dict[str, Path]:
    """Every module of the package by its name."""
    files = (ROOT / "nanovllm").rglob("*.py")
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports_of(tree: ast.AST, *, is_inside_function: bool = False) -> Iterator[tuple[str, bool]]:
    """The names that a module imports, for type checkers alone too, and whether a function does it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, is_inside_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the package imports by absolute names"
            yield from ((f"{node.module}.{alias.name}", is_inside_function) for alias in node.names)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports_of(node, is_inside_function=is_inside_function or is_function)


def import_graph() -> tuple[Edges, Edges]:
    """Which modules each module imports: at its own level, and inside functions."""
    files = module_files()
    eager: Edges = {name: set() for name in files}
    lazy: Edges = {name: set() for name in files}
    for name, path in files.items():
        for imported, is_inside_function in imports_of(ast.parse(path.read_text())):
            target = imported if imported in files else imported.rpartition(".")[0]
            if target in files and target != name:
                (lazy if is_inside_function else eager)[name].add(target)
    return eager, lazy


def find_circle(edges: Edges) -> list[str]:
    """One circle of imports, first module first and last; nothing where there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def test_the_walker_finds_circles_of_type_checking_and_tells_functions_apart() -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import a.b
def late():
    from a import c
"""
    assert list(imports_of(ast.parse(source)))[1:] == [("a.b", False), ("a.c", True)]
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})[0] in "abc"
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_package_has_no_import_circle() -> None:
    eager, _ = import_graph()
    assert find_circle(eager) == []


def test_the_engine_has_no_import_circle_even_through_functions() -> None:
    eager, lazy = import_graph()
    assert find_circle({name: eager[name] | lazy[name] for name in eager if name.startswith("nanovllm.engine")}) == []


PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
OUTSIDE_THE_TABLE = ("nanovllm.layers", "nanovllm.vision.align")


def table_of_rooms() -> dict[str, set[str]]:
    """What each room of ARCHITECTURE.md may import: the first row's modules, and what its row names."""
    rows = re.findall(r"^\| (`[^|]+) \| [^|]+ \| ([^|]+) \|$", PAGE.split("## Rooms")[1], re.MULTILINE)
    first, *others = [(re.findall(r"`(\w+)(?:\.py|/)`", names), cell) for names, cell in rows]
    may_import: dict[str, set[str]] = {name: set() for name in first[0]} | {"metrics": {"statistics"}}
    basic = set(first[0])
    for (room,), cell in others:
        named = set(may_import) if cell == "every row above" else set(re.findall(r"`(\w+)`", cell))
        may_import[room] = basic | named
    return may_import


def test_each_room_imports_what_its_row_of_the_table_names() -> None:
    may_import = table_of_rooms()
    assert len(may_import) > 15
    eager, lazy = import_graph()
    unlisted = set()
    for name in eager:
        if name == "nanovllm" or name.startswith(OUTSIDE_THE_TABLE):
            continue
        room = name.split(".")[1]
        for target in eager[name] | lazy[name]:
            if target.split(".")[1:2] not in ([room], *([one] for one in may_import[room])):
                unlisted.add(f"{name} -> {target}")
    assert not unlisted


def test_the_contracts_refuse_whatever_the_table_does_not_name() -> None:
    """A pair of rooms may be refused by a layer, by a line that both are in, or by name."""
    refused = set()
    for contract in CONTRACTS:
        if contract["type"] == "layers" and "containers" not in contract:
            lines = [[name.strip() for name in line.split("|")] for line in contract["layers"]]
            for at, line in enumerate(lines):
                above = [name for upper in lines[: at + 1] for name in upper]
                refused |= {(one, other) for one in line for other in above if one != other}
        elif contract["type"] == "forbidden":
            refused |= {(one, other) for one in contract["source_modules"] for other in contract["forbidden_modules"]}
        elif contract["type"] == "independence":
            refused |= {(one, other) for one in contract["modules"] for other in contract["modules"] if one != other}
    may_import = table_of_rooms()
    for room, named in may_import.items():
        for other in may_import.keys() - {room}:
            pair = (f"nanovllm.{room}", f"nanovllm.{other}")
            assert (pair in refused) == (other not in named), f"{pair}: the table and the contracts differ"


def test_the_lines_inside_a_room_are_those_of_the_contracts() -> None:
    rows = re.findall(r"^\| ([^|]*)\| ([^|]*)\|$", PAGE.split("Inside a room")[1].split("## ")[0], re.MULTILINE)[1:]
    for column, room in enumerate(("pipeline", "engine")):
        (contract,) = (one for one in CONTRACTS if one.get("containers") == [f"nanovllm.{room}"])
        shown = [{name.removesuffix(".py") for name in re.findall(r"`([\w.]+)`", row[column])} for row in rows]
        lines = [{name.strip() for name in line.split("|")} for line in contract["layers"]]
        assert [line for line in shown if line] == lines
