"""Settings from ``NANOVLLM_`` variables, or from a YAML or TOML file with the same names.

Environment variables win over the file. An unknown name is an error in both: a misspelt limit that is silently ignored
is worse than a refusal to start."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import EnvSettingsSource
from pydantic_settings.exceptions import SettingsError

from nanovllm.errors import ConfigurationError
from nanovllm.messages.validation import describe_errors
from nanovllm.settings.worker import ENV_PREFIX, Settings

CONFIG_VARIABLE = "NANOVLLM_CONFIG"

# What Kubernetes injects into every pod for a Service called nanovllm (or nanovllm-…): never settings of ours. The
# double underscore of our own levels keeps NANOVLLM_HTTP__PORT apart from them.
_KUBERNETES_SERVICE = re.compile(
    r"^NANOVLLM(_[A-Z0-9]+)*_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$"
)


def load_settings(config: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Settings from a file (optional), the environment over it, and ``overrides`` (nested, as in the file) over both.

    Raises:
        ConfigurationError: an unknown name, a wrong value, or a file that cannot be read. Of values, numbers out of
            their range are repeated in the message, and no others: they may be secrets.
    """
    if unknown := list(unknown_variables(os.environ)):
        raise ConfigurationError(f"unknown settings in the environment: {', '.join(map(_with_guess, unknown))}")
    values = _read_config(config) if config else {}
    try:
        _merge(values, EnvSettingsSource(Settings)())
        _merge(values, overrides or {})
        return Settings(**values)
    except ValidationError as error:
        origin = partial(_origin, overrides or {}, _numbers_in(error))
        raise ConfigurationError(describe_errors(error, "settings", origin=origin)) from None
    except SettingsError:
        raise ConfigurationError(_no_json()) from None


Place = tuple[int | str, ...]

# Errors of pydantic's about a number, and what is one.
_ABOUT_NUMBERS = ("greater_than", "less_than", "int_", "float_", "finite_number", "multiple_of")
_NUMBER = re.compile(r"[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})(e[+-]?\d{1,3})?|[+-]?(inf|nan)", re.IGNORECASE)


def _numbers_in(error: ValidationError) -> dict[Place, str]:
    """Numbers that are out of their range, by place. A text that is no number may be a secret in the wrong place."""
    wrong = error.errors(include_url=False, include_context=False)
    found = {one["loc"]: str(one["input"]).strip() for one in wrong if one["type"].startswith(_ABOUT_NUMBERS)}
    return {place: text for place, text in found.items() if _NUMBER.fullmatch(text)}


def _origin(overrides: Mapping[str, Any], numbers: Mapping[Place, str], place: Place, message: str) -> str | None:
    """Where the values at ``place`` came from, and the number that is wrong there."""
    variables, number = _variables_of(overrides, place, message), numbers.get(place)
    if number is None:
        return variables
    return f"{variables}={number}" if variables else f"it is {number}"


def _variables_of(overrides: Mapping[str, Any], place: Place, message: str) -> str | None:
    """The variables of the environment that gave the values at ``place``: of the field, of those that the message of a
    section's rule names, or of the whole section.
    """
    if not place:
        return None
    section, *field = (str(part) for part in place[:2])
    given = overrides.get(section, {})
    if not isinstance(given, Mapping) or (field and field[0] in given):
        return None
    fields = field or re.findall(r"\w+", message)
    names = {f"{ENV_PREFIX}{section}__{one}".upper() for one in fields if one not in given}
    whole = f"{ENV_PREFIX}{section}".upper()
    found = [variable for variable in sorted(os.environ) if variable.upper() in names]
    return ", ".join(found or [variable for variable in os.environ if variable.upper() == whole]) or None


def _with_guess(name: str) -> str:
    near = get_close_matches(name.upper(), _VARIABLES, n=1, cutoff=0.8)
    return f"{name} (did you mean {near[0]}?)" if near else name


def _no_json() -> str:
    """The message for variables whose JSON cannot be parsed; their values may be secrets."""
    source, wrong = EnvSettingsSource(Settings), []
    for name in sorted(name for name in os.environ if name.upper() in _VARIABLES):
        source.env_vars = {name.lower(): os.environ[name]}  # each alone: the error names a section at most
        try:
            source()
        except SettingsError as error:
            mistake = error.__cause__
            place = f" at character {mistake.pos + 1}: {mistake.msg}" if isinstance(mistake, JSONDecodeError) else ""
            wrong.append(f"{name} is no valid JSON{place}")
    example = 'an object is written {"name": value}, in single quotes in a shell'
    return f"{'; '.join(wrong) or 'a variable is no valid JSON'} ({example})"


def unknown_variables(names: Iterable[str]) -> Iterable[str]:
    """Those of ``names`` that carry our prefix and name no setting (pydantic-settings ignores them)."""
    for name in sorted(names):
        upper = name.upper()
        if upper.startswith(ENV_PREFIX) and upper not in _VARIABLES and not _KUBERNETES_SERVICE.match(upper):
            yield name


def _setting_names() -> Iterator[str]:
    for name, field in Settings.model_fields.items():
        yield name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from (f"{name}__{inner}" for inner in field.annotation.model_fields)


_VARIABLES = {CONFIG_VARIABLE, *(ENV_PREFIX + name.upper() for name in _setting_names())}

_PARSERS: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}


def _read_config(path: Path) -> dict[str, Any]:
    # Not by the sources of pydantic-settings 2.16: they skip what is no regular file (a shell's `<(…)`), and take a
    # list of pairs for a mapping.
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigurationError(f"configuration file {path} cannot be read: {reason}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"configuration file {path} is not UTF-8") from error
    parse = _PARSERS.get(path.suffix)
    if parse is None:
        raise ConfigurationError(f"configuration file {path}: its name must end in .yaml, .yml or .toml")
    try:
        values = parse(text) or {}
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        # The parsers quote the line they fell on, which may hold a password: only its place is repeated.
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1})" if mark else ""
        raise ConfigurationError(f"configuration file {path} is not valid {path.suffix[1:].upper()}{place}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigurationError(f"configuration file {path} must hold a mapping of settings, by their names")
    return values


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(name), dict):
            _merge(below[name], value)
        else:
            below[name] = dict(value) if isinstance(value, Mapping) else value
