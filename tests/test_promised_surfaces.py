"""What scripts rely on, beside the list of it in promised_surfaces.json: settings, metrics, codes, commands.

The messages have lists of their own, docs/schemas. Descriptions may change; a name, type or default that changes or
goes needs a major version. After an addition ``python tests/test_promised_surfaces.py`` writes the list anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import typer

from nanovllm import errors
from nanovllm.cli.main import DONE, FAILED, MISUSE, app
from nanovllm.metrics import Metrics
from tools import reference

LIST = Path(__file__).with_name("promised_surfaces.json")


def settings() -> dict[str, list[str]]:
    """Type and default by variable, as docs/settings.md has them."""
    rows = (line.split(" | ") for line in reference.settings_page().splitlines() if line.startswith("| `NANOVLLM_"))
    return {name.strip("| `"): [kind, default] for name, kind, default, *_ in rows}


def metrics() -> dict[str, list[Any]]:
    collectors = Metrics().registry._collector_to_names
    return {
        name: [type(collector).__name__.removeprefix("_"), list(getattr(collector, "_labelnames", ()))]
        for collector, names in collectors.items()
        for name in names
    }


def codes(root: type[errors.NanoVLLMError] = errors.NanoVLLMError) -> dict[str, list[Any]]:
    """Class and retryable by code, of the most general error that has it: a dead letter says its own."""
    found: dict[str, list[Any]] = {}
    for error in root.__subclasses__():
        found |= codes(error)
    return found | {root.code: [root.error_class.value, root.retryable]}


def commands(group: click.Command, name: str = "nanovllm") -> dict[str, list[str]]:
    options = sorted(option for parameter in group.params for option in parameter.opts)
    found = {name: options}
    for inner, command in getattr(group, "commands", {}).items():
        found |= commands(command, f"{name} {inner}")
    return found


def surfaces() -> dict[str, Any]:
    return {
        "settings": settings(),
        "metrics": metrics(),
        "codes": codes(),
        "commands": commands(typer.main.get_command(app)),
        "exit codes": {"done": DONE, "failed": FAILED, "misuse": MISUSE},
    }


def test_what_scripts_rely_on_is_what_was_promised() -> None:
    promised = json.loads(LIST.read_text())
    now = json.loads(json.dumps(surfaces()))
    assert now.keys() == promised.keys()
    for surface, entries in promised.items():
        assert now[surface] == entries, (
            f"{surface}: after an addition run PYTHONPATH=. python tests/test_promised_surfaces.py"
        )


if __name__ == "__main__":
    LIST.write_text(json.dumps(surfaces(), indent=1, sort_keys=True) + "\n")
