"""A study: what is compared on what, and where the result cache keeps it."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from l2o_runtime.config import require
from l2o_training.compare.cache import read_result, rounded
from l2o_training.compare.contenders import Contender
from l2o_training.compare.workloads import Curves, Group, TimedWorkload, Workload, joined

TUNABLE = ("training", "validation")
"""Final losses that learning rates are tuned on."""

FIELDS = ("train", "validation", "batch_validation")

Times = dict[str, tuple[float, float]]
"""Seconds of a training step and of the optimizer's part of it, by contender."""


class Trial(NamedTuple):
    """Runs that are measured together: one file of the cache."""

    workload: Workload
    contender: Contender
    lr: float
    group: Group
    steps: int


@dataclass(frozen=True, kw_only=True)
class Study:
    """Tasks × contenders × learning rates × runs × lengths.

    Attributes:
        suite: name of the tasks.
        workloads, contenders: on what, and who.
        steps: of a run at horizon 1.
        horizons: multiples of `steps`; learning rates are tuned for each.
        runs: per task, contender and learning rate.
        seed: of the first run.
        cache: folder of what was measured.
        caveat: what a reader has to know of these tasks.
        tune_on: the final loss that learning rates are tuned on, "training" or "validation".
    """

    suite: str
    workloads: list[Workload]
    contenders: list[Contender]
    steps: int = 100
    horizons: tuple[int, ...] = (1,)
    runs: int = 3
    seed: int = 0
    cache: Path
    caveat: str = ""
    tune_on: str = "training"

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"--steps: must be 1 or more, got {self.steps}")
        require(self.runs >= 1, f"--runs: must be 1 or more, got {self.runs}")
        require(all(h >= 1 for h in self.horizons), f"--horizons: must be 1 or more, got {self.horizons}")
        require(self.tune_on in TUNABLE, f"--tune-on: must be {' or '.join(TUNABLE)}, got {self.tune_on!r}")
        blind = [each.name for each in self.workloads if not each.validates] if self.tune_on == "validation" else []
        require(
            not blind,
            f"--tune-on validation: {', '.join(blind)} has a training loss only; take training scripts, or tasks of "
            "your own that give a validation loss",
        )

    def trials(
        self, workload: Workload, contender: Contender, horizon: int, lr: float | None = None
    ) -> Iterator[Trial]:
        """What is measured of a contender, at one of its learning rates or at all."""
        rates = contender.lrs if lr is None else (lr,)
        for rate, group in itertools.product(rates, workload.groups(self.runs, self.seed)):
            yield Trial(workload, contender, rate, group, self.steps * horizon)

    def folder(self, workload: Workload, contender: Contender) -> Path:
        """Folder of the runs of a contender on a task."""
        return self.cache / quote(workload.name, safe="") / quote(contender.name, safe="")

    def place(self, trial: Trial) -> tuple[Path, dict[str, Any]]:
        """File and key of some runs."""
        (seed, size), lr = trial.group, trial.lr
        key = trial.workload.key(trial.contender) | {"lr": lr, "seed": seed, "runs": size, "steps": trial.steps}
        return self.folder(trial.workload, trial.contender) / f"{trial.steps}-{lr:g}-s{seed}x{size}.json", key

    def times_place(self, workload: TimedWorkload) -> tuple[Path, dict[str, Any]]:
        """File and key of the times of all contenders, which are taken together."""
        key = workload.times_key(self.contenders)
        name = hashlib.sha256(json.dumps(key["optimizers"]).encode()).hexdigest()[:12]
        return self.cache / quote(workload.name, safe="") / "times" / f"{name}.json", key


def read_trial(study: Study, trial: Trial) -> Curves | None:
    """Runs that were measured; None where their file is missing, damaged, or of other code."""
    content = read_result(*study.place(trial), *FIELDS)
    if content is None:
        return None
    try:
        curves = Curves(
            **{name: content[name].reshape(trial.group.size, -1) for name in FIELDS},
            parameters=int(content["parameters"]),
            state_bytes=None if content["state_bytes"] is None else float(content["state_bytes"]),
        )
    except (KeyError, TypeError, ValueError):
        return None
    return curves if curves.fits(trial.group.size, trial.steps) else None


def read_curves(study: Study, workload: Workload, contender: Contender, lr: float, horizon: int) -> Curves | None:
    """All runs of a contender at a learning rate; None where some are missing."""
    parts = [read_trial(study, trial) for trial in study.trials(workload, contender, horizon, lr)]
    found = [part for part in parts if part is not None]
    return joined(found) if len(found) == len(parts) else None


def measure_trial(trial: Trial) -> dict[str, Any]:
    """Run, and give what the cache keeps of it."""
    curves = trial.workload.measure(trial.contender, trial.lr, trial.group, trial.steps)
    rows = {name: rounded(np.asarray(getattr(curves, name)).tolist()) for name in FIELDS}
    return {**rows, "parameters": curves.parameters, "state_bytes": curves.state_bytes}


def read_times(study: Study, workload: Workload) -> Times | None:
    """Times of all contenders; None where they were not taken."""
    if not isinstance(workload, TimedWorkload):
        return None
    content = read_result(*study.times_place(workload), "step", "optimizer")
    if content is None or not content["step"].shape == content["optimizer"].shape == (len(study.contenders),):
        return None
    pairs = zip(content["step"].tolist(), content["optimizer"].tolist(), strict=True)
    return dict(zip((contender.name for contender in study.contenders), pairs, strict=True))


def measure_times(study: Study, workload: TimedWorkload) -> dict[str, Any]:
    """Let all contenders take turns, and give what the cache keeps of it."""
    times = workload.times(study.contenders)
    rows = [times[contender.name] for contender in study.contenders]
    return {"step": rounded([row[0] for row in rows]), "optimizer": rounded([row[1] for row in rows])}
