"""l2o train --keys: what a preset may hold, read off the configuration itself."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Union

import typer
from rich.table import Table

from l2o_cli.console import out


class Entry(NamedTuple):
    """A key as one kind of a union has it.

    Attributes:
        key: its full name.
        union: the name of what has a kind, the nearest above the key; "" where nothing has.
        kind: of `union`; "" where it has none.
        words: its type, or what it may be.
        default: as TOML has it.
    """

    key: str
    union: str
    kind: str
    words: tuple[str, ...]
    default: str


def show_keys(show: bool) -> None:
    """Print all keys and stop, if asked to."""
    if not show:
        return
    from l2o_training.config import TrainConfig

    table = Table(box=None, pad_edge=False)
    table.add_column("key", no_wrap=True)
    for title in ("type", "default", "only with kind"):
        table.add_column(title, overflow="fold")
    for row in rows(TrainConfig):
        table.add_row(*row)
    out.print(table)
    raise typer.Exit


def rows(kind: type) -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and the kinds that have it, blank for all; each key once, its differences beside the kinds."""
    found: dict[str, list[Entry]] = {}
    for entry in entries(kind):
        found.setdefault(entry.key, []).append(entry)
    for key, same in found.items():
        kinds = {entry.kind for entry in same}
        every = {word for other in found.get(f"{same[0].union}.kind", ()) for word in other.words}
        words = _told([(word, entry.kind) for entry in same for word in entry.words], " | ")
        default = _told([(entry.default, entry.kind) for entry in same], "; ")
        yield key, words, default, ", ".join(dict.fromkeys(entry.kind for entry in same)) if kinds != every else ""


def _told(pairs: list[tuple[str, str]], between: str) -> str:
    """What was said by which kinds, each thing once, with its kinds where not all of them say it."""
    said: dict[str, list[str]] = {}
    for text, kind in pairs:
        said.setdefault(text, []).extend([kind] * (kind not in said.get(text, ())))
    everyone = {kind for _, kind in pairs}
    return between.join(
        text if set(kinds) == everyone else f"{text} ({', '.join(kinds)})" for text, kinds in said.items()
    )


def entries(
    kind: type, path: str = "", union: str = "", of: str = "", above: tuple[tuple[Any, ...], ...] = ()
) -> Iterator[Entry]:
    """The keys of a configuration and of those in it, in their order, once for every kind on the way.

    Args:
        kind: a dataclass.
        path: what stands before its keys.
        union, of: as in `Entry`.
        above: options of unions that it is in.
    """
    hints, seen = typing.get_type_hints(kind), list(above)
    for field in dataclasses.fields(kind):
        hint, key = hints[field.name], f"{path}{field.name}"
        inner, key = (typing.get_args(hint)[0], f"{key}[]") if _many(hint) else (_required(hint), key)
        if dataclasses.is_dataclass(inner):
            yield from entries(typing.cast(type, inner), f"{key}.", union, of, tuple(seen))
        elif _kinds(inner) and any({*_kinds(inner)} <= {*others} for others in seen):
            yield Entry(f"{key}.kind", union, of, ("as above",), _default(field))
        elif options := _kinds(inner):
            seen.append(options)
            yield Entry(f"{key}.kind", union, of, tuple(option.kind for option in options), _default(field))
            for option in options:
                yield from entries(option, f"{key}.", key, option.kind, tuple(seen))
        else:
            yield Entry(key, union, of, _spell(hint), _default(field))


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


def _spell(hint: Any) -> tuple[str, ...]:
    if typing.get_origin(hint) is Literal:
        return tuple(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return (f"list of {' | '.join(_spell(typing.get_args(hint)[0]))}",)
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    return _spell(options[0]) if options else (hint.__name__,)


def _default(field: dataclasses.Field[Any]) -> str:
    """As TOML has it."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "needed"
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        value = value[0]
    return "absent" if value is None else json.dumps(getattr(value, "kind", value))
