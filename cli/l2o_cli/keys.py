"""l2o train --keys: what a preset may hold, read off the configuration itself."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

import typer
from rich.table import Table

from l2o_cli.console import out

Row = tuple[str, str, str]
"""Key, type, default."""


def show_keys(show: bool) -> None:
    """Print all keys and stop, if asked to."""
    if not show:
        return
    from l2o_training.config import TrainConfig

    table = Table("key", "type", "default", box=None, pad_edge=False)
    for row in keys(TrainConfig):
        table.add_row(*row)
    out.print(table)
    raise typer.Exit


def keys(kind: type, path: str = "") -> Iterator[Row]:
    """The keys of a configuration and of those in it, in their order.

    Args:
        kind: a dataclass.
        path: what stands before its keys.
    """
    hints, seen = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        hint, key = hints[field.name], f"{path}{field.name}"
        inner, key = (typing.get_args(hint)[0], f"{key}[]") if _many(hint) else (_required(hint), key)
        if dataclasses.is_dataclass(inner):
            yield from keys(typing.cast(type, inner), f"{key}.")
        elif _kinds(inner) and inner in seen:
            yield f"{key}.kind", "as above", _default(field)
        elif options := _kinds(inner):
            seen.append(inner)
            yield f"{key}.kind", " | ".join(option.kind for option in options), _default(field)
            yield from _of_kinds(options, f"{key}.")
        else:
            yield key, _spell(hint), _default(field)


def _of_kinds(options: tuple[Any, ...], path: str) -> Iterator[Row]:
    """The keys of a union's members, each once, with the kinds that have it where not all do."""
    found: dict[Row, list[str]] = {}
    for option in options:
        for row in keys(option, path):
            found.setdefault(row, []).append(option.kind)
    for (key, spelled, default), kinds in found.items():
        whole = len(kinds) == len(options) or key.endswith(")")
        yield key if whole else f"{key} ({', '.join(kinds)})", spelled, default


def _many(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple and bool(_kinds(typing.get_args(hint)[0]))


def _required(hint: Any) -> Any:
    """A configuration that may be left out, as it is where it is not; any other type as it is."""
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    return options[0] if len(options) == 1 and dataclasses.is_dataclass(options[0]) else hint


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The configurations of a union of them, else nothing."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else ()
    return options if options and all(dataclasses.is_dataclass(option) for option in options) else ()


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"list of {_spell(typing.get_args(hint)[0])}"
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    return _spell(options[0]) if options else hint.__name__


def _default(field: dataclasses.Field[Any]) -> str:
    """As TOML has it."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "needed"
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        value = value[0]
    return "absent" if value is None else json.dumps(getattr(value, "kind", value))
