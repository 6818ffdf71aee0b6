"""Flat tasks, those of meta-training's kind: many instances advanced at once by solvers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2o_runtime.config import to_dict
from l2o_runtime.solvers import Point, Solver
from l2o_training.compare.code import code_version
from l2o_training.compare.contenders import Contender
from l2o_training.compare.workloads import Curves, Group, Workload
from l2o_training.tasks import Instances, QuadraticConfig, Task, TaskConfig, make_task
from l2o_training.tasks.data import Datasets

CPU = torch.device("cpu")


@torch.no_grad()
def rollout(solver: Solver, instances: Instances, steps: int) -> Tensor:
    """Losses (steps, B) before each step of a solver; with BatchNorm those of evaluation mode."""
    params, statistics, scores = instances.params, instances.statistics, []
    state = solver.init(instances)
    for step in range(steps):
        loss, grad, score, statistics = instances.look(params, statistics)
        scores.append(score)
        if step < steps - 1:
            params, state = solver.step(Point(params, loss, grad), state)
    return torch.stack(scores)


def task_name(task: TaskConfig) -> str:
    """What tables and files call a task."""
    return f"quadratic-{task.size}" if isinstance(task, QuadraticConfig) else task.name


class FlatWorkload(Workload):
    """A task whose instances run side by side.

    Args:
        config: the task; it has a name, or is quadratic.
        load: gives the data set of a name.
        device: where to compute.
        together: runs of a group; None is all of them.
    """

    def __init__(self, config: TaskConfig, load: Datasets, device: torch.device = CPU, together: int | None = None):
        self.config, self.load, self.device, self.together = config, load, device, together
        self.name, self.data = task_name(config), getattr(config, "data", None)
        settings = {key: value for key, value in to_dict(config).items() if key != "name"}
        self.description = ", ".join(f"{key} {value}" for key, value in settings.items())
        self._task: Task | None = None

    @property
    def task(self) -> Task:
        """The task with its data, built once."""
        if self._task is None:
            self._task = make_task(self.config, self.load, self.device)
        return self._task

    def prepare(self) -> None:
        """Build the task."""
        _ = self.task

    def key(self, contender: Contender) -> dict[str, Any]:
        """Settings of the task, and the code of tasks, of the loop and of the contender's steps."""
        code = code_version("l2o_training.tasks.config:make_task", "l2o_training.compare.flat:rollout")
        return {
            "optimizer": contender.identity,
            "task": to_dict(self.config),
            "code": f"{code} {contender.stepping[1]}",
            "data": None if self.data is None else str(Path(self.load.root).resolve()),
            "device": self.device.type,
        }

    def groups(self, runs: int, seed: int) -> list[Group]:
        """As many runs together as are wanted, each group with the next seed."""
        size = self.together or runs
        return [Group(seed + i, min(size, runs - start)) for i, start in enumerate(range(0, runs, size))]

    def measure(self, contender: Contender, lr: float, group: Group, steps: int) -> Curves:
        """Losses of fresh instances, minibatches drawn with replacement: none are kept for a validation."""
        instances = self.task.instances(group.size, group.seed)
        losses = rollout(contender.solver(lr, steps).to(self.device), instances, steps)
        none = np.empty((group.size, 0))
        return Curves(losses.double().cpu().numpy().T, none, none, parameters=instances.params.shape[1])
