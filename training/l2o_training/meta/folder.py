"""A run's folder: what it holds, who may write it, and where a stopped run goes on."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from l2o_runtime.files.artifact import ArtifactError, read_learned, save_rule
from l2o_runtime.files.atomic import remove_leftovers
from l2o_runtime.learned import Learned
from l2o_training.config import TrainConfig
from l2o_training.errors import RunError
from l2o_training.meta import checkpoints
from l2o_training.meta.provenance import comparable, differences, kept_config, spell
from l2o_training.ranks.group import PROBE

CONFIG, METRICS, OLD_CHECKPOINT = "config.json", "metrics.jsonl", "checkpoint.pt"
RULE, CURVE, LOCK = "rule.safetensors", "learning-curve.png", ".lock"


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """What a run recorded, an epoch a row; nothing where there is no record."""
    path = out / METRICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def newest_checkpoint(out: Path, config: TrainConfig, resume: bool, restarted: bool) -> Path | None:
    """The checkpoint to continue from, None to begin."""
    if (out / OLD_CHECKPOINT).is_file():
        raise RunError(
            f"{out / OLD_CHECKPOINT} is of an older version, whose checkpoints this one does not read: "
            "finish the run with that version, or choose another --out"
        )
    found = checkpoints.find(out)
    if found and not (resume or restarted):
        raise RunError(f"{out} already holds a run: add --resume to continue it, or choose another --out")
    if not found:
        if resume and not restarted and not any((out / name).is_file() for name in (LOCK, CONFIG)):
            raise RunError(f"{out} holds no run to resume: leave --resume out to start one")
        if (out / RULE).is_file() and not restarted:
            raise RunError(f"{out / RULE} is there without a checkpoint: choose another --out, or remove it")
        return None
    begun = checkpoints.read(found[max(found)], lambda key: False)[1]["config"]
    return found[_last_common(out, list(found), kept_config(begun), kept_config(comparable(config)))]


def _last_common(out: Path, epochs: list[int], there: dict[str, Any], here: dict[str, Any]) -> int:
    """The last epoch, of those with a checkpoint, that is the same in a run as it was begun and as it is asked for.

    Raises:
        RunError: they are different runs.
    """
    changed = differences(there, here)
    if not changed:
        return max(epochs)
    text = "; ".join(f"{key}: {spell(old)} there, {spell(new)} here" for key, old, new in changed)
    # The last epoch is validated whatever its number, which a longer run does not do: it is done again.
    common = [epoch for epoch in epochs if epoch % here["validate_every"] == 0]
    if [key for key, *_ in changed] != ["epochs"] or here["epochs"] < there["epochs"]:
        why = "only epochs may differ, and only grow"
    elif here["final_lr"] is not None:
        why = "with final_lr, the learning rate of every epoch depends on the number of epochs"
    elif not common:
        why = "no checkpoint is left that a run of more epochs would have"
    else:
        return max(common)
    raise RunError(
        f"{out} was started with another configuration: {text} ({why}): "
        "give the settings that it was started with, or choose another --out"
    )


def kept(out: Path, epoch: int) -> str:
    """What is left of a run that is interrupted, and how to go on.

    Args:
        out: its folder.
        epoch: the last one that was done.
    """
    newest = max(checkpoints.find(out), default=0)
    if newest == 0:
        return (
            f"interrupted after epoch {epoch}, before the first checkpoint: nothing was kept; begin again with --resume"
        )
    return f"interrupted after epoch {epoch}; the checkpoint is of epoch {newest}; go on with --resume"


def keep_rule(path: Path, rule: Learned, provenance: dict[str, Any]) -> None:
    """Write a finished rule; one that is there already keeps the versions that it was made with.

    Args:
        path: its file.
        rule: of the lowest validation loss.
        provenance: what made it.
    """
    try:
        found, before = read_learned(path)
    except ArtifactError:
        found, before = None, {}
    weights = rule.state_dict()
    same = (
        found is not None
        and found.config == rule.config
        and all(torch.equal(weights[key], value) for key, value in found.state_dict().items())
    )
    if not (same and kept_config(before.get("config")) == kept_config(provenance["config"])):  # not of fewer epochs
        save_rule(path, rule, provenance)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Make the folder, hold its lock, so that two runs never write into it, and tidy up after a killed run."""
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (FileExistsError, NotADirectoryError) as error:
        raise RunError(f"{error.filename} is no folder: choose another --out") from None
    except Timeout:
        raise RunError(f"{folder} is being written by another run: wait for it, or choose another --out") from None
    try:
        for name in (CONFIG, METRICS, RULE, CURVE, PROBE):
            remove_leftovers(folder / name)
        yield
    finally:
        lock.release()
