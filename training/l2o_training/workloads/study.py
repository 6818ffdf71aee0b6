"""A comparison of optimizers on workloads: what has to be measured, and the cells that keep it."""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from l2o_runtime.config import require
from l2o_training.cells import numbers, read_cell, write_cell
from l2o_training.sharing import POLL, Job, Report, share
from l2o_training.tasks.data import Datasets
from l2o_training.workloads import train as training
from l2o_training.workloads.base import Problem, Workload, code_version
from l2o_training.workloads.entrants import Entrant
from l2o_training.workloads.train import Run, looks, step_times, train

ROUNDS, WARMUP = 30, 5
"""Timed and untimed steps per optimizer and workload."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared.

    Attributes:
        workloads, entrants: on what, and who.
        steps: of a run at horizon 1.
        horizons: multiples of `steps`; learning rates are tuned for each.
        seeds: runs per workload, optimizer and learning rate: seeds 0, 1, …
        cells: folder of what was measured.
        data_root, download: where data sets are, and whether torchvision may fetch them.
    """

    workloads: list[Workload]
    entrants: list[Entrant]
    steps: int = 100
    horizons: tuple[int, ...] = (1, 5, 25)
    seeds: int = 3
    cells: Path
    data_root: Path
    download: bool = False
    _problems: dict[str, Problem] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"--steps: must be 1 or more, got {self.steps}")
        require(self.seeds >= 1, f"--runs: must be 1 or more, got {self.seeds}")
        require(all(h >= 1 for h in self.horizons), f"--horizons: must be 1 or more, got {self.horizons}")

    @functools.cached_property
    def load(self) -> Datasets:
        """Gives the data set of a name."""
        return Datasets(self.data_root, download=self.download)

    def problem(self, workload: Workload) -> Problem:
        """A workload's problem, built once."""
        if workload.name not in self._problems:
            self._problems[workload.name] = workload.build(self.load)
        return self._problems[workload.name]

    def cell(
        self, workload: Workload, entrant: Entrant, lr: float, seed: int, horizon: int
    ) -> tuple[Path, dict[str, Any]]:
        """File and key of a run."""
        key = self._key(workload) | {
            "optimizer": entrant.identity,
            "lr": lr,
            "seed": seed,
            "steps": self.steps * horizon,
        }
        return self.folder(workload, entrant) / f"{self.steps * horizon}-{lr:g}-s{seed}.json", key

    def _key(self, workload: Workload) -> dict[str, Any]:
        data = None if workload.data is None else str(self.data_root.resolve())
        return {"workload": workload.name, "code": _code(workload), "data": data}

    def folder(self, workload: Workload, entrant: Entrant) -> Path:
        """Folder of the runs of an optimizer on a workload."""
        return self.cells / workload.name / quote(entrant.name, safe="")

    def runs(self, entrant: Entrant) -> Iterator[tuple[float, int]]:
        """Learning rate and seed of every run of an optimizer on a workload."""
        return itertools.product(entrant.lrs, range(self.seeds))


@functools.cache
def _code(workload: Workload) -> str:
    """What the code of a workload and of the training loop does; parsed once, for it is asked for every cell."""
    return f"{workload.version}-{code_version(training)}"


def read_run(study: Study, workload: Workload, entrant: Entrant, lr: float, seed: int, horizon: int) -> Run | None:
    """A run that was measured; None where its cell is missing, damaged, or of other code."""
    path, key = study.cell(workload, entrant, lr, seed, horizon)
    fields = ("train", "validation", "batch_validation")
    content, times = read_cell(path, key, *fields), len(looks(key["steps"]))
    if content is None or [content[name].shape for name in fields[:2]] != [(key["steps"],), (times,)]:
        return None
    if content["batch_validation"].shape not in ((0,), (times,)):
        return None
    try:
        curves = {name: content[name].tolist() for name in fields}
        return Run(**curves, state_bytes=float(content["state_bytes"]), parameters=int(content["parameters"]))
    except (KeyError, TypeError, ValueError):
        return None


def measure_run(study: Study, workload: Workload, entrant: Entrant, lr: float, seed: int, horizon: int) -> None:
    """Train, and keep what came out."""
    run = train(study.problem(workload), entrant, lr, seed, study.steps * horizon)
    path, key = study.cell(workload, entrant, lr, seed, horizon)
    content = {
        "train": numbers(run.train),
        "validation": numbers(run.validation),
        "batch_validation": numbers(run.batch_validation),
        "state_bytes": run.state_bytes,
        "parameters": run.parameters,
        "torch": torch.__version__,
    }
    write_cell(path, key, content)


def read_times(study: Study, workload: Workload) -> dict[str, tuple[float, float]] | None:
    """Seconds of a training step and of the optimizer's part, by optimizer; None where they were not taken."""
    path, key = _timing_cell(study, workload)
    content = read_cell(path, key, "step", "optimizer")
    count = len(study.entrants)
    if content is None or not content["step"].shape == content["optimizer"].shape == (count,):
        return None
    pairs = zip(content["step"].tolist(), content["optimizer"].tolist(), strict=True)
    return dict(zip((entrant.name for entrant in study.entrants), pairs, strict=True))


def measure_times(study: Study, workload: Workload) -> None:
    """Let all optimizers take turns, and keep their times."""
    times = step_times(study.problem(workload), study.entrants, ROUNDS, WARMUP)
    path, key = _timing_cell(study, workload)
    rows = [times[entrant.name] for entrant in study.entrants]
    write_cell(path, key, {"step": numbers(r[0] for r in rows), "optimizer": numbers(r[1] for r in rows)})


def _timing_cell(study: Study, workload: Workload) -> tuple[Path, dict[str, Any]]:
    """All optimizers of a study are timed together: times on a busy machine compare only within one process."""
    key = study._key(workload) | {
        "optimizers": [entrant.identity for entrant in study.entrants],
        "threads": torch.get_num_threads(),
    }
    name = hashlib.sha256(json.dumps(key["optimizers"]).encode()).hexdigest()[:12]
    return study.cells / workload.name / "times" / f"{name}.json", key


def measure(study: Study, report: Report = lambda what, detail, done, total: None, poll: float = POLL) -> None:
    """Measure all that is missing; other processes with the same study share the work.

    Args:
        study: what.
        report: called before every run.
        poll: seconds between looks at what other processes do.

    Raises:
        DataError: data is missing; told before anything is measured.
    """
    for workload in study.workloads:
        if workload.data is not None:
            study.load(workload.data)
    jobs = [_timing_job(study, workload) for workload in study.workloads]
    for horizon, workload, entrant in itertools.product(study.horizons, study.workloads, study.entrants):
        jobs.append(_job(study, workload, entrant, horizon))
    share(jobs, report, poll)


def _job(study: Study, workload: Workload, entrant: Entrant, horizon: int) -> Job:
    """All runs of one length of an optimizer on a workload."""

    def missing() -> Iterator[tuple[float, int]]:
        for lr, seed in study.runs(entrant):
            if read_run(study, workload, entrant, lr, seed, horizon) is None:
                yield lr, seed

    def work(report: Report) -> None:
        todo, steps = list(missing()), study.steps * horizon
        for index, (lr, seed) in enumerate(todo):
            report(f"{workload.name}: {entrant.name}", f"lr {lr:g}, {steps} steps, seed {seed}", index, len(todo))
            measure_run(study, workload, entrant, lr, seed, horizon)

    name = f"{workload.name}: {entrant.name}"
    return Job(name, study.folder(workload, entrant), lambda: next(missing(), None) is None, work)


def _timing_job(study: Study, workload: Workload) -> Job:
    def work(report: Report) -> None:
        report(workload.name, "times", 0, 1)
        measure_times(study, workload)

    folder = study.cells / workload.name / "times"
    return Job(f"{workload.name}: times", folder, lambda: read_times(study, workload) is not None, work)
