"""Writes the worker's settings into the chart's values.schema.json, so that Helm refuses what the worker would refuse.

    python tools/chart_schema.py

The rest of that file is written by hand. A test compares the two.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nanovllm.settings.worker import Settings

SCHEMA = Path(__file__).resolve().parent.parent / "helm" / "nanovllm" / "values.schema.json"
BROKERS = r"^[^\s,]+:[0-9]{1,5}(,[^\s,]+:[0-9]{1,5})*$"
# What other objects of the chart read from the settings has to be there, and in a form that they can use.
STRICTER: dict[str, dict[str, dict[str, Any]]] = {
    "kafka": {"bootstrap_servers": {"pattern": BROKERS}, "group_id": {}},
    "topics": {"jobs": {"pattern": r"^[A-Za-z0-9._-]{1,249}$"}},
    "http": {"port": {"minimum": 1024}},
    "admission": {"drain_timeout_s": {"maximum": 86400}},
}
DROPPED = ("title", "default", "discriminator")


def settings_schema() -> dict[str, Any]:
    """JSON Schema (draft 7) of the value ``settings``: every section and field of the worker, secrets left out."""
    whole = Settings.model_json_schema()
    schema = _plain(whole, whole.get("$defs", {}))
    schema["description"] = "The worker's settings, by section and field; generated from nanovllm.settings.worker."
    for section, fields in STRICTER.items():
        schema["properties"][section]["required"] = sorted(fields)
        for field, limits in fields.items():
            schema["properties"][section]["properties"][field] |= limits
    schema["required"] = sorted(STRICTER)
    return schema


def _plain(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_plain(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = definitions[node["$ref"].removeprefix("#/$defs/")]
        return _plain({**target, **{name: value for name, value in node.items() if name != "$ref"}}, definitions)
    plain = {
        name: _plain(value, definitions)
        for name, value in node.items()
        if name not in (*DROPPED, "$defs", "properties")
    }
    if "properties" in node:
        plain["properties"] = {
            name: _plain(value, definitions) for name, value in node["properties"].items() if not _is_secret(value)
        }
        plain["additionalProperties"] = False
    return plain


def _is_secret(node: dict[str, Any]) -> bool:
    return any(one.get("format") == "password" for one in (node, node.get("items", {}), *node.get("anyOf", ())))


def main() -> None:
    """Rewrite the file in place."""
    schema = json.loads(SCHEMA.read_text())
    schema["properties"]["settings"] = settings_schema()
    SCHEMA.write_text(json.dumps(schema, indent=2) + "\n")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
