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

    Raises:
        OSError: with `path`, whatever could not be written.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    except OSError as error:
        raise _of(error, path) from None
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)  # mkstemp gives 0600; a file is as readable as any other
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, temporary):
            raise _of(error, path) from None
        raise


def _of(error: OSError, path: Path) -> OSError:
    """The same error, which names the file that was to be written."""
    return error if error.errno is None else type(error)(error.errno, error.strerror, str(path))


def remove_leftovers(path: str | Path) -> None:
    """Remove what writers of `path` that were killed left behind; for when no other process can be writing it.

    Args:
        path: what `atomic_write` was to write.
    """
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.????????{TEMPORARY}"):
        leftover.unlink(missing_ok=True)
