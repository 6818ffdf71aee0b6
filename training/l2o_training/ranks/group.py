"""The ranks that meta-train together: how they sum, agree, and say which of them is missing.

Tensors travel through torch.distributed, NCCL on GPUs and gloo elsewhere. What is said only now and then, such as
settings and errors, goes through the store that the ranks have met at: it needs no collective, so that it also works
when one rank is in trouble.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from l2o_runtime import ArtifactError, ConfigError
from l2o_runtime.files.atomic import TEMPORARY
from l2o_training.errors import Quiet, RunError
from l2o_training.meta.provenance import differences, spell
from l2o_training.tasks.data import DataError
from l2o_training.tasks.places import TaskError

START_TIMEOUT = float(os.environ.get("L2O_START_TIMEOUT", "50"))
"""Seconds that ranks wait for each other before the first step; the environment has the last word."""

TIMEOUT = 300.0
"""Seconds that ranks wait for each other from then on."""

HEARD_TIMEOUT = 5.0
"""Seconds that rank 0 waits for the others to have heard that all stop."""

PROBE = "ranks"
"""Temporary files of this name show whether ranks share a folder."""

EXPECTED = (ArtifactError, ConfigError, DataError, RunError, TaskError, OSError)
T = TypeVar("T")


class Ranks:
    """This process among those that meta-train together; by default it is alone.

    Args:
        store: where they met; None alone.
        rank, size: number of this process, and of all.
        timeout: seconds to wait for the others in a sum.

    Attributes:
        restarted: whether a launcher has started the ranks again.
        idle: seconds that this rank has waited in sums so far.
        sums: number of sums so far.
        bytes: size of what this rank has put into sums so far.
    """

    def __init__(self, store: Store | None = None, rank: int = 0, size: int = 1, timeout: float = TIMEOUT):
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.restarted = False
        self.idle, self.sums, self.bytes, self._turn = 0.0, 0, 0, 0
        self._group: Any = None
        self.saving: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def place(self, device: str) -> str:
        """The device of this rank: of several GPUs, ranks of a machine take one each."""
        if device != "cuda" or self.store is None:
            return device
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"

    def connect(self, device: torch.device) -> None:
        """Make the process groups: one for sums, one for checkpoints that are written in the background.

        Raises:
            RunError: a rank cannot be reached, within START_TIMEOUT seconds.
        """
        if self.store is None:
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # else a rank that hangs is no Python error
        try:
            dist.init_process_group(
                backend, store=self.store, rank=self.rank, world_size=self.size, timeout=span(START_TIMEOUT)
            )
            self._group = dist.new_group(timeout=span(self.timeout))
            self.saving = dist.new_group(timeout=span(self.timeout), backend="gloo")
        except RuntimeError as error:  # gloo has no error class of its own
            self._judge(f"the ranks cannot connect to each other: {first_line(error)}", error)

    def sum(self, vector: Tensor) -> Tensor:
        """Σ over ranks of a vector (n,), the same on every rank.

        In float64, sums of a few numbers that were float32 are exact but for rare cases, so that neither the order nor
        the number of ranks shows in them.

        Raises:
            RunError: a rank is gone, or does not answer within the timeout; Quiet: another rank says so.
        """
        if self.store is None:
            return vector
        self.sums, started = self.sums + 1, time.perf_counter()
        self.bytes += vector.numel() * vector.element_size()
        try:
            self.store.set(f"at/{self.rank}", str(self.sums))
            dist.all_reduce(vector, group=self._group)
        except RuntimeError as error:
            self._lost(error, time.perf_counter() - started)
        self.idle += time.perf_counter() - started
        return vector

    def gather(self, value: float, device: torch.device) -> list[float]:
        """A number of every rank."""
        vector = torch.zeros(self.size, dtype=torch.float64, device=device)
        vector[self.rank] = value
        return [float(number) for number in self.sum(vector).tolist()]

    def exchange(self, text: str, timeout: float | None = None) -> list[str]:
        """A text of every rank, through the store.

        Raises:
            RunError: a rank did not give its text in time; Quiet: another rank says so.
        """
        if self.store is None:
            return [text]
        self._turn += 1
        limit = timeout or self.timeout
        keys = [f"say/{self._turn}/{rank}" for rank in range(self.size)]
        summary = f"said/{self._turn}"
        try:
            self.store.set(keys[self.rank], text)
            if self.main:  # which reads for all: else the store would serve size² requests
                self.store.wait(keys, span(limit))
                said = [self.store.get(key).decode() for key in keys]
                self.store.set(summary, json.dumps(said))
                return said
            self.store.wait([summary], span(limit + 1))
            return [str(word) for word in json.loads(self.store.get(summary))]
        except RuntimeError as error:
            # Where all have given theirs, rank 0 has not put them together.
            missing = [rank for rank, key in enumerate(keys) if not self._has(key)] or [0]
            self._judge(f"{name_ranks(missing)} gave no answer within {limit:g} s: hangs, or was not started", error)

    def agree(self, action: Callable[[], T], timeout: float | None = None) -> T:
        """Do something on every rank, and go on only if it went well on all of them.

        Raises:
            RunError: on rank 0, what went wrong, and where; Quiet: on the others.
        """
        if self.store is None:
            return action()
        outcome: list[T] = []
        failure = ""
        try:
            outcome.append(action())
        except EXPECTED as error:
            failure = _message(error)
        failures = self.exchange(failure, timeout)
        if any(failures):
            first = next(rank for rank, text in enumerate(failures) if text)
            common = len(set(failures)) == 1 or first == 0
            self._tell(failures[first] if common else f"rank {first}: {failures[first]}")
        return outcome[0]

    def require_same(self, settings: dict[str, Any]) -> None:
        """Check that all ranks were started with the same settings.

        Args:
            settings: plain data.

        Raises:
            RunError: on rank 0, the first difference; Quiet: on the others.
        """
        said = self.exchange(json.dumps(settings, sort_keys=True), START_TIMEOUT)
        for rank, text in enumerate(said):
            for key, here, there in differences(json.loads(said[0]), json.loads(text)):
                theirs = f"rank {rank} was started with {key} = {spell(there)}"
                self._tell(f"{theirs}, rank 0 with {spell(here)}: make them the same")

    def require_shared(self, folder: Path) -> None:
        """Check that all ranks see the same folder; it is made if needed.

        Raises:
            RunError: on rank 0, which one does not; Quiet: on the others.
        """
        if self.store is None:
            return
        probe = self.agree(lambda: _make_probe(folder) if self.main else None, START_TIMEOUT)
        name = self.exchange(probe.name if probe else "", START_TIMEOUT)[0]
        try:
            self.agree(lambda: _look_for(folder, name), START_TIMEOUT)
        finally:
            if probe is not None:
                probe.unlink()

    def fail(self, error: BaseException) -> None:
        """Let the others know that this rank stops and tells why itself."""
        if not isinstance(error, Quiet):
            self._set("verdict", f"{self.rank}")

    def _tell(self, message: str) -> NoReturn:
        """Stop all ranks; rank 0 says why."""
        self._last_word()
        raise RunError(message) if self.main else Quiet(message)

    def leave(self) -> None:
        """Part, when all is done."""
        self._last_word()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _last_word(self) -> None:
        """Rank 0, which may keep the store, waits until the others have read all that they will read."""
        self._set(f"heard/{self.rank}")
        if self.main and self.store is not None:
            with suppress(RuntimeError):
                self.store.wait([f"heard/{rank}" for rank in range(self.size)], span(HEARD_TIMEOUT))

    def _lost(self, error: RuntimeError, waited: float) -> NoReturn:
        """Find out who is missing in a sum: who did not come to it, or came and is silent, as a stopped process is."""
        self._set(f"lost/{self.rank}")
        behind = [rank for rank in range(self.size) if self._at(rank) < self.sums]
        late = waited >= 0.95 * self.timeout
        if late and behind:
            self._judge(f"{name_ranks(behind)} did not come to sum {self.sums} within {waited:.0f} s: hangs", error)
        time.sleep(1)  # the rank that knows more, since it waited longest, comes first; all that live have said so
        silent = [rank for rank in range(self.size) if not self._has(f"lost/{rank}")]
        if late and silent:
            self._judge(f"{name_ranks(silent)} came to, but hangs in sum {self.sums} for {waited:.0f} s", error)
        who = f"; {name_ranks(behind)} had not come to it" if behind else ""
        self._judge(f"a connection broke in sum {self.sums}{who}: {first_line(error)}", error)

    def _judge(self, message: str, error: Exception) -> NoReturn:
        """Raise this error on the first rank that comes here, and Quiet on all others."""
        mine = f"{self.rank}"
        try:
            first = self.store.compare_set("verdict", "", mine).decode() if self.store is not None else mine
        except RuntimeError:  # the store went down with rank 0
            first = ""
        raise (RunError(message) if first == mine else Quiet(message)) from error

    def _at(self, rank: int) -> int:
        key = f"at/{rank}"
        return int(self.store.get(key)) if self.store is not None and self._has(key) else 0

    def _set(self, key: str, value: str = "") -> None:
        with suppress(RuntimeError):  # the store may be gone
            if self.store is not None:
                self.store.set(key, value)

    def _has(self, key: str) -> bool:
        try:
            return self.store is not None and self.store.check([key])
        except RuntimeError:
            return False


ALONE = Ranks()
"""One process, no torch.distributed."""


def span(seconds: float) -> timedelta:
    """What torch.distributed takes as a timeout."""
    return timedelta(seconds=seconds)


def first_line(error: BaseException) -> str:
    """The first line of its message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def name_ranks(ranks: list[int]) -> str:
    """Such as rank 2, or ranks 1, 3."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks)) or '?'}"


def _make_probe(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{PROBE}.", suffix=TEMPORARY)
    os.close(handle)
    return Path(name)


def _look_for(folder: Path, name: str, patience: float = 5.0) -> None:
    """Wait a little for a file: network file systems take their time."""
    end = time.monotonic() + patience
    while not (folder / name).is_file():
        if time.monotonic() > end:
            raise RunError(f"{folder} is not the folder that rank 0 writes to: use one that all machines share")
        time.sleep(0.1)
