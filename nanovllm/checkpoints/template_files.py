"""Chat templates: a file that did not come whole is found at load, and the variables that a template reads."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError, meta, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment

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


@pass_context
def _of_context(context: Context, *arguments: object, **named: object) -> object:
    """A filter, or test, that no constant expression can have: it takes what is known when a template runs."""
    raise NotImplementedError


class _AnyName(dict[str, Any]):
    """Filters, or tests, of every name: transformers and checkpoints have some that jinja has not."""

    def get(self, name: str, default: object = None) -> Any:
        """`_of_context`, whatever ``name`` is."""
        return _of_context


class _Unevaluated(SandboxedEnvironment):
    """An environment in which constant expressions stay as they are: ``9 ** 9 ** 9`` would not end."""

    intercepted_binops = frozenset(SandboxedEnvironment.default_binop_table)
    intercepted_unops = frozenset(SandboxedEnvironment.default_unop_table)


@lru_cache(maxsize=16)
def template_variables(template: str) -> frozenset[str]:
    """The variables that ``template`` reads from its caller, without running it; none of one that is broken."""
    environment = _Unevaluated(extensions=[_Generation, loopcontrols])
    environment.filters, environment.tests = _AnyName(), _AnyName()
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(template)))
    except (TemplateError, RecursionError, ValueError):  # found at load, with its remedy
        return frozenset()


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
