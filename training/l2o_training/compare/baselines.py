"""The one list of hand-made optimizers that learned ones are compared with."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from l2o_runtime.config import nearest, require
from l2o_runtime.solvers.base import Point, Problems, Solver
from l2o_runtime.state import State

Make = Callable[..., Optimizer]
"""Parameters, and a learning rate under the name `lr`, → optimizer."""

GRID_SIZE = 14
"""Learning rates of a baseline, three per decade."""

GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""The coarser learning rates of comparisons on the tasks of meta-training."""

UNTUNED = "adam-0.001"
"""What people use who tune nothing."""


def grid(first: float) -> tuple[float, ...]:
    """14 learning rates, first · 10^(i/3), three digits each.

    >>> grid(1e-4)[:4], grid(1e-4)[-1]
    ((0.0001, 0.000215, 0.000464, 0.001), 2.15)
    """
    return tuple(float(f"{first * 10 ** (i / 3):.3g}") for i in range(GRID_SIZE))


ADAPTIVE, PLAIN = grid(1e-4), grid(1e-3)


def cosine(done: int, total: int) -> float:
    """½ (1 + cos π t/T): the factor on a learning rate that falls to zero along a cosine, after t of T steps.

    >>> cosine(0, 5), cosine(5, 5)
    (1.0, 0.0)
    """
    return (1 + math.cos(math.pi * done / total)) / 2


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A hand-made optimizer, with the settings it may be run with; PyTorch's defaults where nothing is said.

    Attributes:
        name: how tables and the command line call it.
        label: what it is, in words.
        make: builds it.
        lr: its learning rate where nobody tunes it.
        grid: learning rates that it is tuned over.
        anneals: whether the learning rate falls to zero along a cosine over the run.
    """

    name: str
    label: str
    make: Make
    lr: float
    grid: tuple[float, ...] = ADAPTIVE
    anneals: bool = False

    def optimizer(self, params: Iterable[Tensor], lr: float, steps: int) -> tuple[Optimizer, LRScheduler | None]:
        """For a training script of so many steps: the optimizer, and its schedule if it has one."""
        optimizer = self.make(params, lr=lr)
        return optimizer, CosineAnnealingLR(optimizer, steps) if self.anneals else None

    def solver(self, lr: float, steps: int) -> "TorchSolver":
        """For tasks whose instances are optimized side by side, for so many steps."""
        rate = (lambda done: lr * cosine(done, steps)) if self.anneals else (lambda done: lr)
        return TorchSolver(self.make, rate)


class TorchSolver(Solver):
    """A torch optimizer over stacked parameters (B, n).

    The optimizers are elementwise, so one of them over the stack is B separate ones. The state is the optimizer's own,
    and the number of steps.

    Args:
        make: builds the optimizer.
        rate: its learning rate after so many steps.
    """

    def __init__(self, make: Make, rate: Callable[[int], float]):
        super().__init__()
        self.make, self.rate = make, rate

    def init(self, problems: Problems) -> State:
        """No step was made; torch optimizers lay out their state with the first."""
        return {"done": torch.zeros((), dtype=torch.int64)}

    @torch.no_grad()
    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """The step that the optimizer makes in place, on copies."""
        done, params = state["done"], point.params.detach().clone()
        optimizer = self.make([params], lr=self.rate(int(done)))
        optimizer.state[params] = {key: value.clone() for key, value in state.items() if key != "done"}
        params.grad = point.grad
        optimizer.step()
        return params.detach(), dict(optimizer.state[params]) | {"done": done + 1}


BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline(name=UNTUNED, label="Adam, lr 0.001, not tuned", make=Adam, lr=0.001, grid=(0.001,)),
        # The untuned rate is that of arXiv 2211.16268.
        Baseline(name="adam", label="Adam", make=Adam, lr=0.01),
        Baseline(
            name="adamw-cosine", label="AdamW, weight decay 0.01, cosine to 0", make=AdamW, lr=0.001, anneals=True
        ),
        Baseline(
            name="nadamw",
            label="NAdam, decoupled weight decay 0.01",
            make=partial(NAdam, decoupled_weight_decay=True, weight_decay=0.01),
            lr=0.002,
        ),
        Baseline(name="sgd", label="SGD", make=SGD, lr=0.1, grid=PLAIN),
        Baseline(name="momentum", label="SGD, momentum 0.9", make=partial(SGD, momentum=0.9), lr=0.03, grid=PLAIN),
        Baseline(name="rmsprop", label="RMSprop", make=RMSprop, lr=0.01),
    )
}
"""Name → baseline."""


def find_baselines(text: str) -> list[Baseline]:
    """Baselines from "adam,momentum", in that order; all of them for "all", none for "".

    Raises:
        ConfigError: an unknown one.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    names = list(BASELINES) if names == ["all"] else names
    for name in names:
        require(name in BASELINES, f"unknown baseline {name!r}: {nearest(name, list(BASELINES))}")
    return [BASELINES[name] for name in names]


def best_lr(scores: Iterable[tuple[float, float]]) -> float:
    """The learning rate with the lowest score, from (lr, score) pairs; NaN counts as none."""
    return min(((score, lr) for lr, score in scores if score == score), default=(0.0, GRID[0]))[1]
