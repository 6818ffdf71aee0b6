"""How good a rule is on instances that it was not meta-trained on; ranks share the work."""

from itertools import pairwise
from math import exp, inf, isfinite, log
from typing import Any

import torch
from torch import Tensor

from l2o_runtime.solvers import FISTA, Solver
from l2o_training.compare.baselines import BASELINES, best_lr
from l2o_training.config import TrainConfig
from l2o_training.meta.curriculum import VALIDATION_SEED
from l2o_training.meta.objectives import logarithm, loss_objectives
from l2o_training.meta.unroll import Weights, begin, unroll, weight
from l2o_training.ranks.group import Ranks
from l2o_training.tasks import Task

RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Learning rates of the Adam that the rule is held against."""

END = 0.1
"""Share of an optimization at whose end losses are averaged where it is asked how it ends."""


def ends(losses: Tensor) -> Tensor:
    """Mean of the last tenth of losses (..., T)."""
    return losses[..., -max(1, round(END * losses.shape[-1])) :].mean(-1)


def speedup(losses: Tensor, targets: Tensor) -> float | None:
    """How many times fewer steps than T it takes until the mean of the latest T/10 losses is at a target.

    Args:
        losses: (tasks, T).
        targets: (tasks,), where another optimizer ends after T steps.

    Returns:
        Geometric mean over tasks; None where one does not get there.

    >>> speedup(torch.linspace(1, 0, 100).unsqueeze(0), torch.tensor([0.5]))
    1.8181818181818181
    """
    steps, width = losses.shape[-1], max(1, round(END * losses.shape[-1]))
    found = []
    for row, target in zip(losses.unfold(-1, width, 1).mean(-1), targets, strict=True):
        below = (row <= target).nonzero().flatten()
        if not len(below):
            return None
        found.append(log(steps / (int(below[0]) + width)))
    return exp(sum(found) / len(found))


def score(config: TrainConfig, losses: Tensor) -> float:
    """Mean over steps and tasks of mean losses over instances (..., T), those at the mean of the latest parameters
    included with a tail. Where meta-training counts the end of an optimization alone, so does this.

    Where anything but plain losses is meta-trained on, the mean over tasks and steps is geometric: a hard task counts
    like an easy one. That over the instances of a task is not, so that one that goes wrong counts in full. Games are
    scored by the distance from a solution.
    """
    steps = range(losses.shape[-1])
    counted = [step for step in steps if config.weights != "end" or weight("end", step, len(steps))]
    means = losses[..., counted]
    return float(means.mean() if config.objective == "loss" else logarithm(means).mean().exp())


class Validation:
    """Fresh instances of tasks, always the same ones.

    Args:
        config: the run.
        horizon: inner steps.
        tasks: what is optimized.
        ranks: who shares the work.
        device: where.
    """

    def __init__(self, config: TrainConfig, horizon: int, tasks: list[Task], ranks: Ranks, device: torch.device):
        self.config, self.horizon, self.tasks, self.ranks, self.device = config, horizon, tasks, ranks, device

    def beside(self) -> dict[str, Any]:
        """What stands beside the rule's loss: FISTA after as many steps, where all problems can be solved with it, or
        the lowest of Adam over `RATES`, and its rate; None if none is finite.

        With it where it ends on every task, see `ends`.
        """
        if all(task.structured for task in self.tasks):
            losses = self.losses(FISTA())
            return {"name": "FISTA", "lr": None, "loss": self.score(losses), "ends": ends(losses[:, 0]).tolist()}
        adam = BASELINES["adam"]
        curves = {lr: self.losses(adam.solver(lr, self.horizon)) for lr in RATES}
        scores = {lr: self.score(found) for lr, found in curves.items()}
        lr = best_lr(scores.items())
        if not isfinite(scores.get(lr, inf)):
            return {"lr": None, "loss": None}
        return {"lr": lr, "loss": scores[lr], "ends": ends(curves[lr][:, 0]).tolist()}

    def score(self, losses: Tensor) -> float:
        """`score` of mean losses over instances."""
        return score(self.config, losses)

    def losses(self, solver: Solver) -> Tensor:
        """Mean losses over instances, (tasks, 1 or 2, T): at the parameters, and with a tail at their mean. The same on
        every rank. Networks with BatchNorm are in evaluation mode, as those are that people use.

        Args:
            solver: makes the steps.
        """
        runs, last = self.config.validation_runs, self.config.last_counts
        squared = self.config.objective == "squared_error"
        objectives = loss_objectives("squared_error" if squared else "loss", self.config.tail)
        weights: Weights = "last" if last else "uniform"
        shape = (len(self.tasks), len(objectives), 1 if last else self.horizon)
        sums = torch.zeros(shape, dtype=torch.float64, device=self.device)
        for number, (index, start, stop) in enumerate(self._cells()):
            if number % self.ranks.size != self.ranks.rank:
                continue
            instances = self.tasks[index].instances(runs, VALIDATION_SEED + self.config.seed + index)
            if stop - start < runs:
                instances = instances.part(start, stop)
            instances.steps = self.horizon
            with torch.no_grad():
                trace = unroll(solver, begin(solver, instances), self.horizon, objectives, weights)
            sums[index] += trace.scores[:, -shape[-1] :].double().sum(-1)
        return self.ranks.sum(sums) / runs

    def _cells(self) -> list[tuple[int, int, int]]:
        """Task, first instance and end of what is validated together: tasks, cut up where ranks are more than tasks."""
        runs = self.config.validation_runs
        parts = min(runs, -(-self.ranks.size // len(self.tasks)))
        cuts = [runs * part // parts for part in range(parts + 1)]
        return [(task, *cut) for task in range(len(self.tasks)) for cut in pairwise(cuts)]
