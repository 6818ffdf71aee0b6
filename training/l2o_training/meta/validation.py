"""How good a rule is on instances that it was not meta-trained on; ranks share the work."""

from itertools import pairwise
from math import inf, isfinite

import torch

from l2o_runtime.rules import Rule
from l2o_runtime.solvers import Descent, Solver
from l2o_training.compare.baselines import BASELINES, best_lr
from l2o_training.config import TrainConfig
from l2o_training.meta.curriculum import VALIDATION_SEED
from l2o_training.meta.objectives import logarithm, loss_objectives
from l2o_training.meta.unroll import begin, unroll, weight
from l2o_training.ranks.group import Ranks
from l2o_training.tasks import Task

RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Learning rates of the Adam that the rule is held against."""


class Validation:
    """Fresh instances of tasks, always the same ones.

    Args:
        config: the run.
        tasks: what is optimized.
        ranks: who shares the work.
        device: where.
    """

    def __init__(self, config: TrainConfig, tasks: list[Task], ranks: Ranks, device: torch.device):
        self.config, self.tasks, self.ranks, self.device = config, tasks, ranks, device

    def score(self, rule: Rule) -> float:
        """The rule's loss, see `_mean`."""
        return self._mean(Descent(rule))

    def adam(self) -> dict[str, float | None]:
        """What stands beside the rule's loss: the lowest of Adam over `RATES`, and its rate; None if none is finite."""
        adam, horizon = BASELINES["adam"], self.config.horizon
        losses = {lr: self._mean(adam.solver(lr, horizon)) for lr in RATES}
        lr = best_lr((lr, loss) for lr, loss in losses.items())
        return {"lr": lr, "loss": losses[lr]} if isfinite(losses.get(lr, inf)) else {"lr": None, "loss": None}

    def _mean(self, solver: Solver) -> float:
        """Mean loss over T steps, all tasks and instances, those at the mean of the latest parameters included with a
        tail; the same on every rank. Networks with BatchNorm are in evaluation mode, as those are that people use.
        Where meta-training counts the end of an optimization alone, so does this.

        Where logarithms of losses are meta-trained on, the mean over tasks and steps is geometric: a hard task counts
        like an easy one. That over the instances of a task is not, so that one that goes wrong counts in full.

        Args:
            solver: makes the steps.
        """
        runs, objectives = self.config.validation_runs, loss_objectives(tail=self.config.tail)
        sums = torch.zeros(
            len(self.tasks), len(objectives), self.config.horizon, dtype=torch.float64, device=self.device
        )
        for number, (index, start, stop) in enumerate(self._cells()):
            if number % self.ranks.size != self.ranks.rank:
                continue
            instances = self.tasks[index].instances(runs, VALIDATION_SEED + self.config.seed + index)
            if stop - start < runs:
                instances = instances.part(start, stop)
            instances.steps = self.config.horizon
            with torch.no_grad():
                trace = unroll(solver, begin(solver, instances), self.config.horizon, objectives)
            sums[index] += trace.scores.double().sum(-1)
        steps = range(self.config.horizon)
        counted = [step for step in steps if self.config.weights != "end" or weight("end", step, len(steps))]
        means = self.ranks.sum(sums)[..., counted] / runs
        return float(logarithm(means).mean().exp() if self.config.objective == "log_loss" else means.mean())

    def _cells(self) -> list[tuple[int, int, int]]:
        """Task, first instance and end of what is validated together: tasks, cut up where ranks are more than tasks."""
        runs = self.config.validation_runs
        parts = min(runs, -(-self.ranks.size // len(self.tasks)))
        cuts = [runs * part // parts for part in range(parts + 1)]
        return [(task, *cut) for task in range(len(self.tasks)) for cut in pairwise(cuts)]
