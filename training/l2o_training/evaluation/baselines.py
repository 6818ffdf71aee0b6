"""Hand-made optimizers to compare with, at their usual learning rate and tuned over a grid."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer, RMSprop

from l2o_runtime.config import nearest, require
from l2o_runtime.rules import Spec
from l2o_runtime.state import State
from l2o_training.tasks import Instances

Make = Callable[..., Optimizer]

BASELINES: dict[str, tuple[Make, float]] = {
    "adam": (Adam, 0.01),
    "sgd": (SGD, 0.1),
    "momentum": (partial(SGD, momentum=0.9), 0.03),
    "rmsprop": (RMSprop, 0.01),
}
"""Name → optimizer and its untuned learning rate (Adam's 0.01 is that of arXiv 2211.16268)."""

GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Learning rates of a tuned baseline."""


def parse_baselines(text: str) -> list[str]:
    """Baseline names from "adam,sgd"; "" is none.

    Raises:
        ConfigError: an unknown one.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        require(name in BASELINES, f"unknown baseline {name!r}: {nearest(name, list(BASELINES))}")
    return names


def baseline_rollout(name: str, lr: float, instances: Instances, steps: int) -> Tensor:
    """Losses (steps, B) before each step of a torch optimizer; with BatchNorm those of evaluation mode.

    These optimizers are elementwise, so one of them over the stacked (B, n) parameters is B separate ones.
    """
    params = instances.params.clone().requires_grad_()
    optimizer = BASELINES[name][0]([params], lr=lr)
    statistics, scores = instances.statistics, []
    for _ in range(steps):
        _, params.grad, score, statistics = instances.look(params.detach(), statistics)
        scores.append(score)
        optimizer.step()
    return torch.stack(scores)


class BaselineRule:
    """A torch optimizer in the place of a rule, for one unrolled batch of optimizations.

    Args:
        name, lr: the baseline.
    """

    def __init__(self, name: str, lr: float):
        self.make = partial(BASELINES[name][0], lr=lr)
        self.spec, self.per_tensor = Spec({}, {}, {}), False
        self.params: Tensor | None = None

    def __call__(
        self, params: Tensor, grad: Tensor, loss: Tensor, coordinates: State, optimization: State, layout: Any
    ) -> tuple[Tensor, State, State]:
        """The step (B, n) from parameters and gradients (B, n); states are the optimizer's own."""
        if self.params is None:
            self.params = torch.empty_like(params)
            self.optimizer = self.make([self.params])
        self.params.copy_(params)
        self.params.grad = grad
        self.optimizer.step()
        return self.params - params, coordinates, optimization


def best_lr(scores: Iterable[tuple[float, float]]) -> float:
    """The learning rate with the lowest finite score, from (lr, score) pairs."""
    return min(((score, lr) for lr, score in scores if score == score), default=(0.0, GRID[0]))[1]
