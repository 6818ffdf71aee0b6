"""Checkpoints of runs: safetensors files, which hold no code, as torch.distributed.checkpoint writes them.

A checkpoint is a folder, `checkpoints/epoch-00000020`, with a file per rank. Its tensors have names such as
`lane/3/inners/0/params`, and what is no tensor is JSON, as bytes, under the name `info`; so any number of ranks can
read what any other number wrote. It is written under another name and takes its own when all ranks are done.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from l2o_training.errors import Quiet, RunError
from l2o_training.ranks.group import ALONE, Ranks

FOLDER = "checkpoints"
INFO, MARK = "info", "rank"
KEEP = 2
"""Checkpoints that are kept, beside that of the best validation."""


def flatten(nested: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors in nested dictionaries and lists, by their path: {"a": {"b": x}} is {"a/b": x}."""
    if isinstance(nested, Tensor):
        return {prefix: nested}
    parts = enumerate(nested) if isinstance(nested, list) else nested.items()
    return {k: v for key, value in parts for k, v in flatten(value, f"{prefix}/{key}" if prefix else str(key)).items()}


def nest(flat: dict[str, Tensor]) -> dict[str, Any]:
    """The inverse of `flatten`, but that lists become dictionaries, and empty ones are lost."""
    nested: dict[str, Any] = {}
    for path, tensor in flat.items():
        *parents, last = path.split("/")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = tensor
    return nested


def find(out: Path) -> dict[int, Path]:
    """Checkpoints of a run by their epoch, the oldest first."""
    matches = ((re.fullmatch(r"epoch-(\d{8})", path.name), path) for path in (out / FOLDER).glob("epoch-*"))
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def read(path: Path, wanted: Callable[[str], bool] = lambda key: True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nested tensors, on the CPU, and what is no tensor.

    Args:
        path: the checkpoint.
        wanted: which names to read.

    Raises:
        RunError: the checkpoint is damaged.
    """
    flat: dict[str, Tensor] = {}
    try:
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    if key == INFO or key.startswith(f"{MARK}/") or wanted(key):
                        flat[key] = tensors.get_tensor(key)
        info = json.loads(bytes(flat.pop(INFO).tolist()))
        for rank in range(info["ranks"]):
            flat.pop(f"{MARK}/{rank}")
    except Exception as error:  # what reading raises on damage has no common base class
        raise RunError(
            f"{path} is damaged ({type(error).__name__}): "
            "remove it to go on from the checkpoint before, if there is one"
        ) from None
    return nest(flat), info


class Checkpoints:
    """Writes the checkpoints of a run.

    Args:
        out: the run's folder.
        ranks: who writes; each has a file of its own.
    """

    def __init__(self, out: Path, ranks: Ranks = ALONE):
        self.out, self.ranks = out, ranks
        self._pending: tuple[Future[Any], int, int] | None = None

    def save(self, epoch: int, best: int, state: dict[str, Any], info: dict[str, Any]) -> None:
        """Write a checkpoint: at once if this process is alone, else in the background.

        Args:
            epoch: its number.
            best: epoch of the best validation, whose checkpoint is kept.
            state: nested tensors; those of a name are written by one rank only.
            info: plain data, written by rank 0.

        Raises:
            RunError: it cannot be written.
        """
        self.settle(wait=True)
        flat: dict[str, Any] = flatten(state) | {f"{MARK}/{self.ranks.rank}": torch.ones(1, dtype=torch.uint8)}
        if self.ranks.main:
            text = json.dumps(info | {"ranks": self.ranks.size}).encode()
            flat[INFO] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        folder = _temporary(self.out, epoch)
        if self.ranks.store is None:
            _write(folder, flat)
            self._commit(epoch, best)
            return
        # Imported here, as it takes a second.
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        # The groups of sums and of checkpoints differ: two threads must not talk through one.
        future: Any = async_save(
            flat,
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
            process_group=self.ranks.saving,
        )
        self._pending = future, epoch, best

    def settle(self, wait: bool = False) -> None:
        """Give a checkpoint that was written in the background its name.

        Args:
            wait: for it to be written, if it is not yet.

        Raises:
            RunError: it could not be written.
        """
        if self._pending is None or not (wait or self._pending[0].done()):
            return
        future, epoch, best = self._pending
        self._pending = None
        try:
            future.result()
        except BaseException as error:  # CheckpointException derives from it
            causes = getattr(error, "failures", {})
            why = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in causes.items()) or error
            message = f"{self.out / FOLDER}: the checkpoint of epoch {epoch} cannot be written: {why}"
            raise (RunError if self.ranks.main else Quiet)(message) from None  # every rank hears of every failure
        if self.ranks.main:
            self._commit(epoch, best)

    def tidy(self, epoch: int, best: int) -> None:
        """Remove what killed runs left behind, half written, half removed, or no longer to be kept.

        Args:
            epoch: where the run goes on: what a shorter run did after it goes, too.
            best: as `save` takes it.
        """
        for path in (self.out / FOLDER).glob(".epoch-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        self._remove({later for later in find(self.out) if later > epoch})
        self._prune(best)

    def _commit(self, epoch: int, best: int) -> None:
        _temporary(self.out, epoch).replace(self.out / FOLDER / f"epoch-{epoch:08}")
        self._prune(best)

    def _prune(self, best: int) -> None:
        found = list(find(self.out))
        self._remove(set(found[:-KEEP]) - {best})

    def _remove(self, epochs: set[int]) -> None:
        for epoch, path in find(self.out).items():
            if epoch in epochs:
                # A folder that is half removed must not look like a checkpoint.
                path.replace(_temporary(self.out, epoch))
                shutil.rmtree(_temporary(self.out, epoch))


def _temporary(out: Path, epoch: int) -> Path:
    return out / FOLDER / f".epoch-{epoch:08}.tmp"


def _write(folder: Path, flat: dict[str, Tensor]) -> None:
    """What torch.distributed.checkpoint writes, without it: a process that is alone has nobody to agree with."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "shard-00001-model-00001-of-00001.safetensors").open("wb") as file:
        file.write(save({key: tensor.contiguous() for key, tensor in flat.items()}))
        file.flush()
        os.fsync(file.fileno())
