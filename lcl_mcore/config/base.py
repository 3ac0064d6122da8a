"""How every configuration class in this project is made: frozen, strict, validated at once, with short errors."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, dataclass_transform

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from lcl_mcore.errors import ConfigError, explain

T = TypeVar("T")
MOST_LINES = 3
"""Lines of the message for a configuration with many mistakes."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config_dataclass(cls: type[T]) -> type[T]:
    """Frozen keyword-only dataclass whose types and bounds are checked on construction.

    A field has its type with its bounds (`PositiveInt`, `Annotated[float, Field(ge=0, lt=1)]`), its default and, as
    a docstring below, its help. Unknown keys, NaN and infinity are errors. Rules across fields go into a
    ``__post_init__`` that calls `require`.
    """
    decorate: Callable[[type[T]], type[T]] = pydantic_dataclass(  # type: ignore[assignment]
        frozen=True,
        kw_only=True,
        config=pydantic.ConfigDict(extra="forbid", strict=False, allow_inf_nan=False, use_attribute_docstrings=True),
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


def from_dict(cls: type[T], data: dict[str, Any], source: str = "", flags: Mapping[str, str] | None = None) -> T:
    """Build a configuration from a nested dict.

    Args:
        cls: a class made by `config_dataclass`.
        data: its fields; sections may be dicts or finished configurations.
        source: the file that the values come from, named in front of every mistake.
        flags: how a field is spelled on the command line, by its path, for classes that are only read from there.

    Raises:
        ConfigError: one line for each mistake, `MOST_LINES` at most: the value, the rule, the remedy.
    """
    try:
        return pydantic.TypeAdapter(cls).validate_python(data)
    except pydantic.ValidationError as error:
        prefix = f"{source}: " if source else ""
        lines = [prefix + _describe(cls, item, flags or {}) for item in _by_value(cls, error.errors())]
        if len(lines) > MOST_LINES:
            more = len(lines) - MOST_LINES + 1
            lines[MOST_LINES - 1 :] = [f"and {more} more mistakes."]
        raise ConfigError("\n".join(lines)) from None


def fields_of(cls: type) -> dict[str, FieldInfo]:
    """The fields of a class made by `config_dataclass`, with their help also where it is inherited."""
    fields: dict[str, FieldInfo] = getattr(cls, "__pydantic_fields__", {})
    return fields


def help_of(cls: type, name: str) -> str | None:
    """Help of a field: the docstring below it, in the class that has it."""
    for owner in cls.__mro__:
        field = fields_of(owner).get(name)
        if field is not None and field.description:
            return field.description
    return None


def section_in(annotation: Any) -> type | None:
    """The configuration class that a field's type is or holds (in a tuple, say); None for a plain value."""
    if fields_of(annotation):
        return annotation  # type: ignore[no-any-return]
    return next((found for part in typing.get_args(annotation) if (found := section_in(part))), None)


def paths(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted path of every value of a configuration class."""
    for name, field in fields_of(cls).items():
        section = section_in(field.annotation)
        if section is not None:
            yield from paths(section, f"{prefix}{name}.")
        yield f"{prefix}{name}"


# Rules in words, by pydantic's name of the mistake; {0} is the bound it reports.
_RULES = {
    "greater_than": ("gt", "must be greater than {0}"),
    "greater_than_equal": ("ge", "must be at least {0}"),
    "less_than": ("lt", "must be less than {0}"),
    "less_than_equal": ("le", "must be at most {0}"),
    "literal_error": ("expected", "must be one of {0}"),
    "finite_number": ("", "must be finite"),
    "string_too_short": ("", "must not be empty"),
    "missing": ("", "must be given"),
    "dataclass_type": ("", "is a section of settings, not a value"),
}
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
_AT_ZERO = {"greater_than": "must be positive", "greater_than_equal": "cannot be negative"}
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "tuple": "a list"}


def _by_value(cls: type, mistakes: Sequence[Any]) -> Iterator[Any]:
    """One mistake for each value: of a number or a word pydantic reports what is wrong as a number, and as a word."""
    places = [item["loc"] if item["type"] in _UNKNOWN else _place(cls, item["loc"]) for item in mistakes]
    for item, place in zip(mistakes, places, strict=True):
        rest = [other for other, same in zip(mistakes, places, strict=True) if same == place]
        if len(rest) == 1 or place == item["loc"]:
            yield item
        elif item is rest[0]:
            words = "".join(f" or {other['ctx']['expected']}" for other in rest if other["type"] == "literal_error")
            yield item | {"loc": place, "or": words.replace("'", "")}


def _place(cls: type, location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A mistake's location as far as it names settings; what follows tells which of a setting's types is meant."""
    section: type | None = cls
    for depth, part in enumerate(location):
        if isinstance(part, str):
            if section is None or (depth and part not in fields_of(section)):
                return location[:depth]
            section = section_in(fields_of(section)[part].annotation) if part in fields_of(section) else None
    return location


def _describe(cls: type, item: Any, flags: Mapping[str, str]) -> str:
    """One mistake that pydantic reports, as value, rule and remedy."""
    kind, context, value = item["type"], item.get("ctx", {}), item["input"]
    if kind == "value_error" and isinstance(context["error"], ConfigError):
        return str(context["error"])  # from `require`: complete
    where = ".".join(str(part) for part in item["loc"])
    if kind in _UNKNOWN:
        return explain(where, "no setting has this name", _nearest(cls, where))
    flag = flags.get(".".join(part for part in item["loc"] if isinstance(part, str)))
    given = f"{flag} {shown(value)}" if flag else f"{where} = {shown(value)}"
    if kind in _RULES:
        bound, rule = _RULES[kind]
        limit = context.get(bound, "")
        named = f"{limit:g}" if isinstance(limit, int | float) else limit.replace("'", "").replace(" or ", ", ")
        rule = _AT_ZERO[kind] if named == "0" and kind in _AT_ZERO else rule.format(named)
    elif kind.partition("_")[0] in _KINDS and kind != "string_pattern_mismatch":
        rule = f"must be {_KINDS[kind.partition('_')[0]]}"
    else:
        rule = item["msg"].removeprefix("Value error, ")
    rule += item.get("or", "")
    if kind == "missing":
        return explain(where, rule, "Give a value.")
    if isinstance(value, bool) and kind == "literal_error":
        return explain(given, rule, "YAML reads on and off as true and false: put the word in quotes.")
    return explain(given, rule, _example(cls, item["loc"]))


def shown(value: object) -> str:
    """A value in a message: as typed, and short."""
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _example(cls: type, location: tuple[int | str, ...]) -> str:
    """The remedy for a value out of bounds: the one that the class itself has."""
    field: FieldInfo | None = None
    for part in location:
        if isinstance(part, str) and part in fields_of(cls):
            field = fields_of(cls)[part]
            cls = section_in(field.annotation) or cls
    default = None if field is None or field.is_required() else field.default
    if default in (None, "", ()) or dataclasses.is_dataclass(default):
        return "See --help, or any run's config.yaml."
    return f"For example {' '.join(map(str, default)) if isinstance(default, tuple) else default}."


def _nearest(cls: type, where: str) -> str:
    """The remedy for an unknown name: the known one that is most like it."""
    known = list(paths(cls))
    leaf = where.rpartition(".")[2]
    near = [path for path in known if path.rpartition(".")[2] == leaf]
    near = near or difflib.get_close_matches(where, known, n=1, cutoff=0.8)
    return f"Did you mean {near[0]}?" if near else "See --help, or any run's config.yaml."
