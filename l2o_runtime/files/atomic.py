"""Files that appear whole, or not at all."""

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp"


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under `path` whole, or not at all.

    The bytes go to a temporary file in the same folder, are flushed to disk, and take the name at the end. A process
    that is killed meanwhile leaves the temporary file; see `remove_leftovers`.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)  # mkstemp gives 0600; a file is as readable as any other
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_leftovers(path: str | Path) -> None:
    """Remove what writers of `path` that were killed left behind; for when no other process can be writing it.

    Args:
        path: what `atomic_write` was to write.
    """
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.????????{TEMPORARY}"):
        leftover.unlink(missing_ok=True)
