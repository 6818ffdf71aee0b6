"""Jobs in folders, which several processes do together."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

BUSY_LOCK = ".reproduce.lock"
POLL = 5.0
"""Seconds between looks at work that another process is doing."""

Report = Callable[[str, str, int, int], None]
"""Called with what is done now, a detail, and how much of how much of it is done."""


class Busy(Exception):
    """Another process is at this job, or at one that has to come before it."""


@dataclass(frozen=True)
class Job:
    """A piece of work that one process does.

    Attributes:
        name: for messages.
        folder: locked meanwhile.
        done: whether nothing is left to do.
        work: does it.
    """

    name: str
    folder: Path
    done: Callable[[], bool]
    work: Callable[[Report], None]


def share(jobs: list[Job], report: Report, poll: float) -> None:
    """Do all jobs, in order; one that another process holds is passed over and looked at again later."""
    waiting = list(jobs)
    while waiting:
        before = len(waiting)
        for job in list(waiting):
            try:
                if not job.done():
                    job.folder.mkdir(parents=True, exist_ok=True)
                    with FileLock(job.folder / BUSY_LOCK, timeout=0):
                        if not job.done():
                            job.work(report)
            except (Busy, Timeout):
                continue
            waiting.remove(job)
        if len(waiting) == before:
            report(f"another process is at {waiting[0].name}", "waiting", len(jobs) - before, len(jobs))
            time.sleep(poll)
