"""How every configuration class in this project is made: frozen, strict, validated at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

from lcl_mcore.errors import ConfigError, explain

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config_dataclass(cls: type[T]) -> type[T]:
    """Frozen keyword-only dataclass whose types and rules are checked on construction.

    Unknown keys are errors. Rules across fields go into a ``__post_init__`` that calls `require`.
    """
    decorate: Callable[[type[T]], type[T]] = pydantic_dataclass(  # type: ignore[assignment]
        frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid", strict=False)
    )
    return decorate(cls)


def require(condition: bool, value: object, rule: str, remedy: str) -> None:
    """Raise `ConfigError` naming value, rule and remedy unless `condition` holds."""
    if not condition:
        raise ConfigError(explain(value, rule, remedy))


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict (JSON types only) of a configuration."""
    result = pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")
    assert isinstance(result, dict)
    return result


def from_dict(cls: type[T], data: dict[str, Any], source: str) -> T:
    """Build `cls` from a nested dict; every mistake is reported by its path in `source`."""
    try:
        return pydantic.TypeAdapter(cls).validate_python(data)
    except pydantic.ValidationError as error:
        lines = [f"{source}: not a valid configuration."]
        for item in error.errors():
            path = ".".join(str(part) for part in item["loc"]) or "(top level)"
            given = "" if item["type"] == "missing" else f" = {item['input']!r}"
            lines.append(f"  {path}{given}: {item['msg'].removeprefix('Value error, ')}")
        raise ConfigError("\n".join(lines)) from None
