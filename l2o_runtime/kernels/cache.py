"""Machine code on disk, so that only the first process has to compile it.

A file's name is the digest of all that its code depends on: LLVM code, or what writes it, compiler, processor (see
`machine.Compiled`). Its contents begin with their own digest, for disks fill up and processes are killed. Whoever could
write here could run code as this user; so the folder belongs to the user and nobody else may write to it, and files are
read only if the same is true of them. Where that cannot be had, nothing is kept.
"""

import hashlib
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

VARIABLE = "L2O_CACHE"
"""Names another folder; `off` keeps nothing."""

KEPT = 64
"""Files; those that were used longest ago are deleted."""

PREFIX = "l2o-new-"
"""Of files that are being written."""

NAMES = rf"[0-9a-f]{{64}}|{PREFIX}.*"
"""Of our files."""

DIGEST = hashlib.sha256().digest_size


def folder() -> Path | None:
    """Where code is kept, made if it is missing; None where it cannot be kept safely."""
    given = os.environ.get(VARIABLE, "")
    if given == "off" or not hasattr(os, "getuid"):
        return None
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        found = Path(given or f"{base}/l2o").expanduser()
        found.mkdir(mode=0o700, parents=True, exist_ok=True)
        return found if _own(found.lstat()) else None
    except (OSError, RuntimeError):  # no home
        return None


def name_of(*parts: str) -> str:
    """The name of the code that depends on these.

    >>> name_of("code", "processor")[:8] == name_of("codeprocessor", "")[:8]
    False
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode() + part.encode())
    return digest.hexdigest()


def read(name: str) -> bytes | None:
    """Code that was kept; None if there is none, or if it is damaged or not ours."""
    place = folder()
    if place is None:
        return None
    try:
        descriptor = os.open(place / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not _own(os.fstat(file.fileno())):
                return None
            digest, code = file.read(DIGEST), file.read()
    except OSError:
        return None
    if hashlib.sha256(code).digest() != digest:
        return None
    with suppress(OSError):
        os.utime(place / name)
    return code


def write(name: str, code: bytes) -> None:
    """Keep code; nothing is said if that does not work."""
    place = folder()
    if place is None:
        return
    with suppress(OSError):
        file = NamedTemporaryFile(dir=place, prefix=PREFIX, delete=False)  # noqa: SIM115  # readable by the user alone
        try:
            with file:
                file.write(hashlib.sha256(code).digest() + code)
            Path(file.name).replace(place / name)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise
        _tidy(place)


def _own(status: os.stat_result) -> bool:
    """Whether it belongs to this user, and nobody else may write to it."""
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _tidy(place: Path) -> None:
    """Delete what was used longest ago; whatever else lies there is not ours."""
    ours = (path for path in place.iterdir() if re.fullmatch(NAMES, path.name) and path.is_file())
    files = sorted(ours, key=lambda path: -path.stat().st_mtime)
    for path in files[KEPT:]:
        path.unlink(missing_ok=True)
