"""What the commands share: consoles, and how errors are told."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from l2o_runtime import ArtifactError, ConfigError

out = Console(highlight=False, emoji=False, markup=False)  # brackets in paths are no markup
err = Console(stderr=True, highlight=False, emoji=False, markup=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of text.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0 leaves it to torch.")]


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output, and nothing else."""
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=True) + "\n")


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Turn expected errors into one line on standard error and exit code 2; Ctrl-C into exit code 130.

    A KeyboardInterrupt may say what is kept. All ranks get it, and rank 0 tells.
    """
    try:
        from l2o_export.formats import ExportError
        from l2o_training.data import DataError
        from l2o_training.errors import Interrupted, Quiet, RunError

        yield
    except KeyboardInterrupt as error:  # the first one, as it may come before the others are imported
        if os.environ.get("RANK", "0") == "0":
            _say(str(error) or "interrupted")
        raise typer.Exit(130) from None
    except (ArtifactError, ConfigError, DataError, ExportError, RunError) as error:
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


def set_threads(threads: int) -> None:
    """Use that many CPU threads in torch; 0 changes nothing."""
    import torch

    if threads:
        torch.set_num_threads(threads)
