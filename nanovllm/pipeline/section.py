"""What every section of the settings is made of."""

from __future__ import annotations

from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_settings import NoDecode


def _split_list(value: Any) -> Any:
    """Accept ``a,b`` or a JSON/YAML list from the environment, where every value is one string."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return yaml.safe_load(value)
    return [item.strip() for item in value.split(",") if item.strip()]


StrList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_list)]
IntList = Annotated[tuple[int, ...], NoDecode, BeforeValidator(_split_list)]
Bytes = Annotated[int, Field(ge=1)]
Millis = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """One level of the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
