"""What the commands share: consoles, tables that fit, and how errors are told."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.segment import Segments
from rich.table import Table

from l2o_runtime import ArtifactError, ConfigError

out = Console(highlight=False, emoji=False, markup=False)  # brackets in paths are no markup
err = Console(stderr=True, highlight=False, emoji=False, markup=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of text.")]
Wide = Annotated[bool, typer.Option("--wide", help="Print all columns, however wide the terminal is.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0: as torch does.")]


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output, and nothing else."""
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=True) + "\n")


USUAL, ENDLESS = 80, 10_000
"""Columns of a terminal: what is to be expected, and what any table fits into."""


def table_of(names: str, *figures: str, title: str) -> Table:
    """An empty table with names on the left. Long names fold; figures are never wrapped or cut."""
    table = Table(title=title)
    table.add_column(names, overflow="fold")
    for figure in figures:
        table.add_column(figure, justify="right", no_wrap=True)
    return table


def fitting(make: Callable[[int], Table], most: int, *, wide: bool) -> int:
    """How many columns of figures, the first of `most`, fit into the terminal: at least one, and all if `wide`.

    Args:
        make: the table with the first n columns of figures.
        most: all of them.
        wide: do not ask what fits.
    """
    endless = out.options.update(max_width=ENDLESS)
    fits = (n for n in range(most, 1, -1) if wide or out.measure(make(n), options=endless).maximum <= out.width)
    return next(fits, 1)


def show(table: Table, *, wide: bool) -> None:
    """Print a table; rather than have its figures cut off, it sticks out of a terminal that is too narrow."""
    room = out.options.update(max_width=ENDLESS if wide else max(out.width, USUAL))
    out.print(Segments(out.render(table, room)), soft_wrap=True, end="")


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Turn expected errors into one line on standard error and exit code 2; Ctrl-C into exit code 130.

    A KeyboardInterrupt may say what is kept. All ranks get it, and rank 0 tells.
    """
    try:
        from l2o_export.formats import ExportError
        from l2o_training.errors import Interrupted, Quiet, RunError
        from l2o_training.tasks.data import DataError
        from l2o_training.tasks.places import TaskError

        yield
    except KeyboardInterrupt as error:  # the first one, as it may come before the others are imported
        if os.environ.get("RANK", "0") == "0":
            _say(str(error) or "interrupted")
        raise typer.Exit(130) from None
    except (ArtifactError, ConfigError, DataError, ExportError, RunError) as error:
        _fail(str(error))
    except TaskError as error:
        err.print(error.trace.rstrip(), soft_wrap=True, end="\n" if error.trace else "")
        _fail(str(error))
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        _fail(f"{name}{error.strerror or error}")
    except Quiet as error:
        raise typer.Exit(130 if isinstance(error, Interrupted) else 2) from None


def _fail(message: str) -> None:
    _say(f"error: {message}")
    raise typer.Exit(2)


def _say(message: str) -> None:
    err.print(" ".join(message.split()), soft_wrap=True, style="red")


@contextmanager
def progress(name: str) -> Iterator[Callable[[str, str, int, int], None]]:
    """A progress bar on standard error; gives what tells it what is done now, a detail, and how much of how much."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), MofNCompleteColumn())
    with Progress(*columns, TextColumn("{task.fields[detail]}", markup=False), TimeElapsedColumn(), console=err) as bar:
        job = bar.add_task(name, total=None, detail="")

        def tell(what: str, detail: str, done: int, total: int) -> None:
            bar.update(job, description=what, detail=detail, completed=done, total=total)

        yield tell


def set_threads(threads: int) -> None:
    """Use that many CPU threads in torch; 0 changes nothing."""
    import torch

    if threads:
        torch.set_num_threads(threads)
