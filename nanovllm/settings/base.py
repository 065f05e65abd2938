"""Settings model and the types that its sections share."""

from __future__ import annotations

import re
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_settings import NoDecode

from nanovllm.messages.job import TOPIC_PATTERN


def split_list(value: Any) -> Any:
    """Accept ``a,b`` or a JSON/YAML list from the environment, where every value is one string."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError("is neither a,b nor a list in brackets") from None  # the parser quotes what it fell on
    return [item.strip() for item in value.split(",") if item.strip()]


def _check_topic(name: str) -> str:
    if not re.fullmatch(TOPIC_PATTERN, name) or name in (".", ".."):
        raise ValueError("is no name of a topic: 1 to 249 letters, digits, '.', '_' and '-', and not '.' or '..'")
    return name


StrList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_list)]
IntList = Annotated[tuple[int, ...], NoDecode, BeforeValidator(split_list)]
MAX_TOPIC_CHARS = 249
TopicName = Annotated[str, AfterValidator(_check_topic), WithJsonSchema({"type": "string", "pattern": TOPIC_PATTERN})]
TopicList = Annotated[tuple[TopicName, ...], NoDecode, BeforeValidator(split_list)]
Bytes = Annotated[int, Field(ge=1)]
Millis = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class SettingsModel(BaseModel):
    """One level of the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
