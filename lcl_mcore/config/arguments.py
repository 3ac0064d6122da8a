"""How every command reads its command line: tyro over a configuration class, with what all commands share.

A command's options are a class made by `config_dataclass`; sections inside it become groups of flags. tyro makes flags
and help from it; the values are then checked as those of a file are, by `from_dict`, so that a mistake gets the same
short message. A repeated flag that takes any number of values appends.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import io
import itertools
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.constructors import (
    MISSING,
    MISSING_NONPROP,
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from lcl_mcore.config.base import fields_of, from_dict, help_of
from lcl_mcore.errors import ConfigError, explain

T = TypeVar("T")


@dataclass(frozen=True)
class Given:
    """What the command line gives to a configuration class, not checked yet.

    Attributes:
        cls: the class.
        values: by field; a section is a `Given` itself.
    """

    cls: type
    values: dict[str, Any]

    def tree(self) -> dict[str, Any]:
        """As a nested dict."""
        return {name: value.tree() if isinstance(value, Given) else value for name, value in self.values.items()}


@dataclass(frozen=True)
class Flag:
    """One spelling of a flag.

    Attributes:
        path: dotted path of its field.
        appends: it takes any number of values, and repeating it appends.
    """

    path: str
    appends: bool


def parse(cls: type[T], arguments: Sequence[str] | None = None) -> T:
    """Read the command line of a command.

    Args:
        cls: the command's options, made by `config_dataclass`; its docstring is the head of --help.
        arguments: the words; None: those of this process.

    Raises:
        ConfigError: a flag or value is refused.
    """
    return checked(cls, parse_unchecked(cls, arguments).tree())


def parse_commands(
    commands: Mapping[str, type[T]], arguments: Sequence[str] | None = None, about: str | None = None
) -> T:
    """Read the command line of a command that has sub-commands.

    Args:
        commands: options by name of the sub-command.
        arguments: as for `parse`.
        about: head of --help.

    Returns:
        The options of the sub-command that was named.

    Raises:
        ConfigError: a flag or value is refused.
    """
    members = tuple(Annotated[cls, tyro.conf.subcommand(name)] for name, cls in commands.items())
    given = parse_unchecked(typing.Union[members], arguments, about)  # noqa: UP007  # made of a tuple
    return checked(given.cls, given.tree())


def parse_unchecked(
    cls: Any, arguments: Sequence[str] | None = None, about: str | None = None, defaults: dict[type, Any] | None = None
) -> Given:
    """`parse` without the last step, for a caller that still changes values.

    Args:
        cls: as for `parse`, or a union of such classes for sub-commands.
        arguments: as for `parse`.
        about: head of --help instead of the docstring.
        defaults: for a class of a section, the instance whose values are the defaults.

    Raises:
        ConfigError: a flag is refused.
    """
    flags = flags_of(cls)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            given, unknown = tyro.cli(
                cls,
                args=joined(sys.argv[1:] if arguments is None else arguments, flags),
                description=about or inspect.cleandoc(cls.__doc__ or ""),
                registry=_registry(defaults or {}),
                return_unknown_args=True,
                config=(tyro.conf.PositionalMetavarFromFieldName,),
            )
    except SystemExit as end:
        if end.code in (None, 0):
            raise
        raise ConfigError(_in_one_line(printed.getvalue())) from None
    if unknown:
        word = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(word, flags, n=1, cutoff=0.7)
        rule = "no flag has this name" if word.startswith("-") else "belongs to no flag"
        raise ConfigError(explain(word, rule, f"Did you mean {near[0]}?" if near else "See --help."))
    assert isinstance(given, Given)
    return given


def checked(cls: type[T], tree: dict[str, Any]) -> T:
    """The options that the values of a command line make; a mistake is named by its flag.

    Raises:
        ConfigError: a value or combination is refused.
    """
    spelled: dict[str, str] = {}
    for flag, field in flags_of(cls).items():
        spelled.setdefault(field.path, flag)
    return from_dict(cls, tree, flags=spelled)


def flags_of(cls: Any, prefix: str = "", path: str = "") -> dict[str, Flag]:
    """Every spelling of every flag that `cls` gives, without positional arguments."""
    if typing.get_origin(cls) is typing.Union or isinstance(cls, types.UnionType):
        return functools.reduce(
            lambda found, member: found | flags_of(_bare(member)), typing.get_args(cls), dict[str, Flag]()
        )
    found: dict[str, Flag] = {}
    for name, annotation in typing.get_type_hints(cls, include_extras=True).items():
        marks, bare = _marks(annotation), _bare(annotation)
        if name not in fields_of(cls) or {tyro.conf.Suppress, tyro.conf.Positional} & set(marks):
            continue
        own = next((m.name for m in marks if getattr(m, "name", None) is not None), name)
        if fields_of(bare):
            omitted = tyro.conf.OmitArgPrefixes in marks or not own
            found |= flags_of(bare, prefix if omitted else f"{prefix}{own}.", f"{path}{name}.")
            continue
        spellings = [f"--{prefix}{own}", *(s for m in marks for s in getattr(m, "aliases", None) or ())]
        if bare is bool:
            spellings.append(f"--{prefix}no-{own}")
        value = _without_none(bare)
        flag = Flag(path + name, typing.get_origin(value) is tuple and ... in typing.get_args(value))
        found |= {spelling.replace("_", "-"): flag for spelling in spellings}
    return found


def joined(words: Sequence[str], flags: dict[str, Flag]) -> list[str]:
    """The words, with all values of a repeated flag behind its first appearance: `--a 1 --b --a 2` is `--a 1 2 --b`."""
    groups: list[list[str]] = [[]]
    of_path: dict[str, list[str]] = {}
    group = groups[0]
    for word in words:
        name, equals, value = word.partition("=")
        flag = flags.get(name.replace("_", "-")) if word.startswith("--") else None
        if flag is None or not flag.appends:
            if word.startswith("--"):
                groups.append(group := [])
            group.append(word)
            continue
        if flag.path not in of_path:
            groups.append([name])
            of_path[flag.path] = groups[-1]
        group = of_path[flag.path]
        if equals:
            group.append(value)
    return [word for group in groups for word in group]


def last_value(words: Sequence[str], flag: str) -> str | None:
    """Value of a flag in a command line that is not parsed yet; None if it is not there."""
    found = None
    for word, following in itertools.zip_longest(words, words[1:]):
        if word == flag:
            found = following
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def _in_one_line(box: str) -> str:
    """What tyro says in a box about a command line that it cannot take apart: the sentences above the rule in it."""
    lines = [line.strip("\u2502| ") for line in box.splitlines()]
    content = list(itertools.takewhile(lambda line: line.strip("\u2500-"), lines[1:]))
    return f"{' '.join(content) or box.strip()} See --help."


def _marks(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__metadata__", ())


def _bare(annotation: Any) -> Any:
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation


def _without_none(annotation: Any) -> Any:
    """`T` of `T | None`, anything else as it is."""
    members = [m for m in typing.get_args(annotation) if m is not type(None)]
    is_union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    return _bare(members[0]) if is_union and len(members) == 1 else annotation


def _registry(defaults: dict[type, Any]) -> ConstructorRegistry:
    """tyro's rules for our classes: sections become `Given`, and words stay text for pydantic to convert."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def section(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not fields_of(info.type):
            return None
        hints = typing.get_type_hints(info.type, include_extras=True)
        instance = defaults.get(info.type)
        if info.default not in (MISSING, MISSING_NONPROP):
            instance = instance or info.default
        specs = []
        for field in fields(info.type):  # type: ignore[arg-type]
            hint, text = hints[field.name], help_of(info.type, field.name)
            default = field.default if instance is None else getattr(instance, field.name)
            if default in (None, "", ()):
                hint = Annotated[hint, tyro.conf.arg(help_behavior_hint="")]  # its help says what none means
            inner = _bare(hint)
            if text is None and fields_of(inner):
                text = (inner.__doc__ or "").partition("\n")[0]
            text = " ".join(text.split()) if text else None
            specs.append(StructFieldSpec(field.name, hint, MISSING if default is NO_DEFAULT else default, text))
        return StructConstructorSpec(lambda **values: Given(info.type, values), tuple(specs))

    @registry.primitive_rule
    def words(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        kind = _without_none(info.type)
        if kind not in (int, float, str, Path) and typing.get_origin(kind) not in (Literal, tuple):
            return None
        optional = kind is not info.type
        members = [_bare(m) for m in typing.get_args(kind)] if typing.get_origin(kind) is tuple else []
        metavar = _metavar(members[0] if members else kind)
        if not members:
            return PrimitiveConstructorSpec(
                nargs=1,
                metavar=metavar,
                instance_from_str=lambda given: None if optional and given[0] in ("none", "None") else given[0],
                is_instance=lambda value: True,
                str_from_instance=lambda value: [str(value)],
            )
        width = len(typing.get_args(members[0])) if typing.get_origin(members[0]) is tuple else 1
        return PrimitiveConstructorSpec(
            nargs="*" if ... in members else len(members),
            metavar=f"[{metavar} ...]" if ... in members else " ".join(_metavar(m) for m in members),
            instance_from_str=lambda given: None if optional and given == ["none"] else _tuples(given, width),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [
                str(v) for part in value or () for v in (part if isinstance(part, tuple) else (part,))
            ],
        )

    return registry


def _tuples(words: list[str], width: int) -> tuple[Any, ...]:
    """The words, or with a width above 1 as many to a tuple."""
    if width == 1:
        return tuple(words)
    return tuple(tuple(words[i : i + width]) for i in range(0, len(words), width))


def _metavar(kind: Any) -> str:
    """How a value of this type is written in --help."""
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(str(value) for value in typing.get_args(kind)) + "}"
    if typing.get_origin(kind) is tuple:
        return " ".join(_metavar(_bare(m)) for m in typing.get_args(kind))
    return {int: "INT", float: "FLOAT", Path: "PATH"}.get(kind, "TEXT")
