"""Data sets in plain files: texts, and tables with a header."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from l2o_runtime.config import nearest
from l2o_training.tasks.data import DataError

T = TypeVar("T")

TEXTS = {"tinyshakespeare": "tinyshakespeare.txt"}
"""Name → file."""

FEWEST_CHARACTERS = 100_000
"""Of a text: one that is shorter was cut off."""

FEWEST_ROWS = 1000
"""Of a table."""


@dataclass(frozen=True)
class Columns:
    """What is read of a table.

    Attributes:
        file: its name.
        numbers, categories: columns by their header.
    """

    file: str
    numbers: tuple[str, ...]
    categories: tuple[str, ...]


TABLES = {
    "diamonds": Columns(
        "diamonds.csv",
        numbers=("carat", "depth", "table", "price", "x", "y", "z"),
        categories=("cut", "color", "clarity"),
    )
}
"""Name → file and columns."""


@dataclass(frozen=True)
class Table:
    """A table, column by column.

    Attributes:
        numbers: column → (N,) float32.
        categories: column → (N,) int64, places of the values in their alphabetical order.
    """

    numbers: dict[str, Tensor]
    categories: dict[str, Tensor]


def load_text(name: str, root: Path) -> str:
    """A text.

    Raises:
        DataError: unknown, missing, no UTF-8, or cut off; the message names the file.
    """
    text = _read(name, root, _known(name, TEXTS, "text"))
    if len(text) < FEWEST_CHARACTERS:
        raise DataError(
            f"{name}: {(root / TEXTS[name]).absolute()} has {len(text):,} characters, expected "
            f"{FEWEST_CHARACTERS:,} or more: it is cut off; put the whole text there"
        )
    return text


def load_table(name: str, root: Path) -> Table:
    """A table.

    Raises:
        DataError: unknown, missing, lacking a column, with a value that is no number, or cut off; the message says
            which and where.
    """
    columns = _known(name, TABLES, "table")
    where = f"{name}: {(root / columns.file).absolute()}"
    reader = csv.DictReader(_read(name, root, columns.file).splitlines())
    missing = [column for column in (*columns.numbers, *columns.categories) if column not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{where} lacks the columns {', '.join(missing)}: its first line has to name them")
    rows = list(reader)
    if len(rows) < FEWEST_ROWS:
        raise DataError(f"{where} has {len(rows):,} rows, expected {FEWEST_ROWS:,} or more: it is cut off")
    numbers = {column: _numbers(where, column, [row[column] for row in rows]) for column in columns.numbers}
    return Table(numbers, {column: _places([row[column] for row in rows]) for column in columns.categories})


def _known(name: str, known: dict[str, T], kind: str) -> T:
    if name not in known:
        raise DataError(f"unknown {kind} {name!r}: {nearest(name, list(known))}")
    return known[name]


def _read(name: str, root: Path, file: str) -> str:
    try:
        return (root / file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = "it is no UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise DataError(
            f"no usable {name}: {(root / file).absolute()} cannot be read ({why}): put {file} there, or point "
            "--data-root at a folder that has it; there is no --download for it"
        ) from None


def _numbers(where: str, column: str, texts: list[str]) -> Tensor:
    values = [_number(text) for text in texts]
    bad = next((row for row, value in enumerate(values) if not math.isfinite(value)), None)
    if bad is not None:
        raise DataError(
            f"{where} has {texts[bad]!r} in column {column}, line {bad + 2}; expected a finite number: "
            "mend or remove it"
        )
    return torch.tensor(values, dtype=torch.float32)


def _number(text: str | None) -> float:
    """NaN for what is no number; a row that ends early has None."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _places(values: list[str]) -> Tensor:
    place = {value: index for index, value in enumerate(sorted(set(map(str, values))))}
    return torch.tensor([place[str(value)] for value in values])
