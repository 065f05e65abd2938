"""What is known so far, as a file: a limit of time may end the run anywhere, and another run goes on from there."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Report:
    """Machine and shape, and by part: checks, figures, seconds, and whether it ran to its end.

    A part that did not says so in ``unfinished``: what is left out, what was cut, or the exception.
    """

    def __init__(self, path: Path, known: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.data: dict[str, Any] = {"machine": {}, "shape": None, "parts": {}, **(known or {})}

    @classmethod
    def read(cls, path: Path, *, into: Path | None = None) -> Report:
        """The report in ``path``, to be written to ``into``; an empty one where there is none.

        Exits where it is no report by parts, as those of earlier scripts.
        """
        known = json.loads(path.read_text()) if path.is_file() else None
        if known is not None and "parts" not in known:
            sys.exit(f"{path} is of an earlier script: it has no parts to go on from")
        return cls(into or path, known)

    def write(self) -> None:
        """Replace the file at once, so that it is whole whenever the run is cut."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(self.path.name + ".part")
        draft.write_text(json.dumps(self.data, indent=2) + "\n")
        os.replace(draft, self.path)

    def part(self, name: str) -> dict[str, Any]:
        """What is known of a part; empty for one that has not begun."""
        part: dict[str, Any] = self.data["parts"].get(name, {})
        return part

    def begin(self, name: str) -> dict[str, Any]:
        """A part anew; it counts as cut until it ends."""
        part: dict[str, Any] = {"checks": [], "figures": {}, "unfinished": "cut"}
        self.data["parts"][name] = part
        self.write()
        return part

    def is_finished(self, name: str) -> bool:
        """Whether the part need not run again."""
        part = self.part(name)
        return bool(part) and "unfinished" not in part

    def figures(self, name: str) -> dict[str, Any]:
        """Figures of a part, as far as there are any."""
        figures: dict[str, Any] = self.part(name).get("figures", {})
        return figures

    def failed(self) -> list[str]:
        """Names of the checks that did not pass."""
        return [
            check["name"]
            for part in self.data["parts"].values()
            for check in part.get("checks", ())
            if not check["passed"]
        ]
