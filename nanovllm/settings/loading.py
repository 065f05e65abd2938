"""Settings from ``NANOVLLM_`` variables, or from a YAML or TOML file with the same names.

Environment variables win over the file. An unknown name is an error in both: a misspelt limit that is silently ignored
is worse than a refusal to start."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
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
        ConfigurationError: an unknown name, a wrong value, or a file that cannot be read. Values are never repeated in
            the message: they may be secrets.
    """
    if unknown := list(unknown_variables(os.environ)):
        raise ConfigurationError(f"unknown settings in the environment: {', '.join(unknown)}")
    values = _read_config(config) if config else {}
    try:
        _merge(values, EnvSettingsSource(Settings)())
        _merge(values, overrides or {})
        return Settings(**values)
    except ValidationError as error:
        raise ConfigurationError(describe_errors(error, "settings")) from None
    except SettingsError as error:
        raise ConfigurationError(str(error)) from None


def unknown_variables(names: Iterable[str]) -> Iterable[str]:
    """Those of ``names`` that carry our prefix and name no setting (pydantic-settings ignores them)."""
    for name in sorted(names):
        upper = name.upper()
        if not upper.startswith(ENV_PREFIX) or upper == CONFIG_VARIABLE:
            continue
        if _is_setting(upper.removeprefix(ENV_PREFIX)) or _KUBERNETES_SERVICE.match(upper):
            continue
        yield name


def _is_setting(name: str) -> bool:
    section, *rest = name.lower().split("__")
    field = Settings.model_fields.get(section)
    if field is None:
        return False
    if not rest:
        return True
    nested = field.annotation
    fields = nested.model_fields if isinstance(nested, type) and issubclass(nested, BaseModel) else {}
    return len(rest) == 1 and rest[0] in fields


def _read_config(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"configuration file {path} cannot be read: {type(error).__name__}") from error
    try:
        if path.suffix == ".toml":
            values: Any = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            values = yaml.safe_load(text) or {}
        else:
            raise ConfigurationError(f"configuration file {path}: its name must end in .yaml, .yml or .toml")
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        # The parsers quote the line they fell on, which may hold a password: only its place is repeated.
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1})" if mark else ""
        raise ConfigurationError(f"configuration file {path} is not valid {path.suffix[1:].upper()}{place}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"configuration file {path} must hold a mapping of settings")
    return values


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(name), dict):
            _merge(below[name], value)
        else:
            below[name] = dict(value) if isinstance(value, Mapping) else value
