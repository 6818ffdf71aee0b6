"""Losses of rules and baselines on a study's tasks, kept as JSON, so that nothing is computed twice."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2o_runtime.config import to_dict
from l2o_runtime.files.artifact import find_rule, load_rule
from l2o_runtime.solvers import Descent
from l2o_training.cells import numbers, read_cell, write_cell
from l2o_training.compare import baselines
from l2o_training.compare.baselines import BASELINES
from l2o_training.evaluation.evaluate import name_of
from l2o_training.fused.lstm import fuse
from l2o_training.meta import unroll
from l2o_training.meta.folder import RULE
from l2o_training.meta.unroll import rollout
from l2o_training.reproduction.plans import Study, Variant, task_name
from l2o_training.tasks import Instances, Task, TaskConfig, data, make_task, quadratic, supervised
from l2o_training.tasks import base as task_base
from l2o_training.tasks import config as task_config
from l2o_training.tasks import networks as task_networks
from l2o_training.tasks.data import Datasets
from l2o_training.workloads.base import code_version
from l2o_training.workloads.entrants import FORMULAS

TOGETHER = 5
"""Runs advanced together: ten of them are those of `l2o eval --runs 5` with seeds 0 and 1."""


@dataclass(frozen=True)
class Lab:
    """Where everything is.

    Attributes:
        runs: folder of the runs.
        data_root, download: where data sets are, and whether torchvision may fetch them.
        changes: overrides on top of every variant's own.
    """

    runs: Path
    data_root: Path
    download: bool = False
    changes: tuple[str, ...] = ()
    _tasks: dict[TaskConfig, Task] = field(default_factory=dict)

    @cached_property
    def load(self) -> Datasets:
        """Gives the data set of a name."""
        return Datasets(self.data_root, download=self.download)

    def task(self, config: TaskConfig) -> Task:
        """A task, built once."""
        if config not in self._tasks:
            self._tasks[config] = make_task(config, self.load, torch.device("cpu"))
        return self._tasks[config]

    def folder(self, variant: Variant, seed: int) -> Path:
        """Folder of a run."""
        return self.runs / f"{variant.name}-s{seed}"


@dataclass(frozen=True)
class Contender:
    """A frozen rule, or Adam at one learning rate.

    Attributes:
        name: of its folder among the runs.
        path: file of the rule.
        lr: Adam's learning rate, where `path` is None.
    """

    name: str
    path: Path | None = None
    lr: float = 0.0

    @property
    def exists(self) -> bool:
        """Whether there is anything to measure."""
        return self.path is None or self.path.is_file()

    @cached_property
    def identity(self) -> str:
        """What its losses belong to: the digest of the rule's file, or Adam's learning rate."""
        return f"adam {self.lr:g}" if self.path is None else hashlib.sha256(self.path.read_bytes()).hexdigest()

    def rollout(self, instances: Instances, steps: int) -> Tensor:
        """Losses (steps, B) before each step."""
        if self.path is None:
            return rollout(BASELINES["adam"].solver(self.lr, steps), instances, steps)
        return rollout(Descent(fuse(load_rule(self.path))), instances, steps)


def trained(lab: Lab, variant: Variant, seed: int) -> Contender:
    """The rule of a run."""
    folder = lab.folder(variant, seed)
    return Contender(folder.name, folder / RULE)


def bundled(rule: str) -> Contender:
    """A rule by bundled name or file.

    Raises:
        ArtifactError: there is none.
    """
    path = find_rule(rule)
    return Contender(name_of(path), path)


def adam(lr: float) -> Contender:
    """Adam at a learning rate."""
    return Contender(f"adam-{lr:g}", lr=lr)


def contenders(lab: Lab, study: Study) -> list[Contender]:
    """All that a study compares, whether the rule exists already or not."""
    runs = [trained(lab, variant, seed) for variant in study.variants for seed in range(study.seeds)]
    return [*runs, *(bundled(rule) for rule in study.rules), *(adam(lr) for lr in study.lrs)]


def losses(lab: Lab, contender: Contender, study: Study, task: TaskConfig) -> np.ndarray | None:
    """Losses (runs, steps) that were measured; None where some are missing."""
    if not contender.exists:
        return None
    parts = []
    for path, key, _, _ in _cells(lab, contender, study, task):
        part = read_losses(path, key)
        if part is None:
            return None
        parts.append(part)
    return np.concatenate(parts)


def measure(lab: Lab, contender: Contender, study: Study, task: TaskConfig) -> None:
    """Compute the losses of a contender on a task that are missing; a stopped one keeps what it has."""
    for path, key, count, seed in _cells(lab, contender, study, task):
        if read_losses(path, key) is None:
            curves = contender.rollout(lab.task(task).instances(count, seed), study.steps)
            write_cell(path, key, {"losses": [numbers(run) for run in curves.T.tolist()]})


def _cells(
    lab: Lab, contender: Contender, study: Study, task: TaskConfig
) -> Iterator[tuple[Path, dict[str, Any], int, int]]:
    """File, key, number and seed of each group of runs that are advanced together."""
    folder = lab.runs / contender.name / "evaluation"
    for seed, start in enumerate(range(0, study.runs, TOGETHER)):
        count = min(TOGETHER, study.runs - start)
        key = {
            "optimizer": contender.identity,
            "code": _code(contender.path is not None),
            "task": to_dict(task),
            "data": str(lab.data_root.resolve()),
            "steps": study.steps,
            "runs": count,
            "seed": seed,
        }
        yield folder / f"{task_name(task)}-{study.steps}x{count}-s{seed}.json", key, count, seed


@functools.cache
def _code(learned: bool) -> str:
    """What the code does that a contender's losses come from."""
    tasks = (task_base, task_config, task_networks, quadratic, supervised, data)
    return code_version(*tasks, *((*FORMULAS, unroll) if learned else (baselines,)))


def read_losses(path: Path, key: dict[str, Any]) -> np.ndarray | None:
    """Losses (runs, steps) of a file, if it is there and belongs to `key`."""
    content = read_cell(path, key, "losses")
    return None if content is None else np.asarray(content["losses"])
