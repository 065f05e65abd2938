"""Files of chat templates: one that is a Git LFS pointer, empty or cut is found at load, not at the first chat."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from nanovllm.checkpoints.resolve import checkpoint_name, is_lfs_pointer, why_unreadable
from nanovllm.errors import ModelNotFound

TEMPLATE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates/*.jinja"


class _Generation(Extension):
    """The tag that transformers adds to jinja."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own class attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_templates(directory: Path) -> None:
    """Raise ModelNotFound for a file of a chat template in ``directory`` that did not come whole."""
    for file in (directory / TEMPLATE, *sorted(directory.glob(_MORE_TEMPLATES))):
        if not file.is_file():
            continue
        name = f"{file.relative_to(directory)} of checkpoint {checkpoint_name(directory)!r}"
        if is_lfs_pointer(file) or file.stat().st_size == 0:
            raise ModelNotFound(f"{name} {why_unreadable(file)}")
        try:
            # As transformers 5 makes its environment.
            Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]).parse(  # noqa: S701
                file.read_text(encoding="utf-8")
            )
        except (TemplateSyntaxError, UnicodeDecodeError) as error:
            line = f"line {error.lineno}: {error.message}" if isinstance(error, TemplateSyntaxError) else "no UTF-8"
            raise ModelNotFound(f"{name} {why_unreadable(file)} ({line})") from error
