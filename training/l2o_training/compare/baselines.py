"""The one list of hand-made optimizers that learned ones are compared with."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from l2o_runtime.config import ConfigError, nearest, require
from l2o_runtime.solvers import AMP, FISTA, ISTA
from l2o_runtime.solvers.base import Point, Problems, Solver
from l2o_runtime.state import State
from l2o_runtime.wrappers.talt import TALT
from l2o_training.compare.classical import Alternating, ExtraGradient, LineSearch, Optimistic, ParticleSwarm
from l2o_training.compare.muon import MuonAdamW

Make = Callable[..., Any]
"""Parameters, and a learning rate under the name `lr`, → optimizer; or of one for flat tasks alone, a rate → solver."""

Schedule = Callable[[int, int], float]
"""The factor on a learning rate after t of T steps."""

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

GAME_RATES = (0.01, 0.03, 0.05, 0.1, 0.2, 0.3)
"""Learning rates of solvers for games."""

INERTIAS = (0.4, 0.5, 0.6, 0.729, 0.8, 0.9)
"""Of particle swarms; 0.729 is that of Eberhart & Shi 2000."""
WEIGHTS, TUNINGS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5), (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0)
"""λ of ISTA and FISTA, and α of AMP."""

WARMUP = 0.02
"""Share of a run over which schedules rise."""


def cosine(done: int, total: int) -> float:
    """½ (1 + cos π t/T): the factor on a learning rate that falls to zero along a cosine, after t of T steps.

    >>> cosine(0, 5), cosine(5, 5)
    (1.0, 0.0)
    """
    return (1 + math.cos(math.pi * done / total)) / 2


def warmup(done: int, total: int) -> float:
    """A rise to 1 over the first 2 % of the steps.

    >>> warmup(0, 100), warmup(1, 100), warmup(99, 100)
    (0.5, 1.0, 1.0)
    """
    return min(1.0, (done + 1) / (WARMUP * total))


def warm_cosine(done: int, total: int) -> float:
    """That rise, and the fall to zero along a cosine."""
    return warmup(done, total) * cosine(done, total)


def warm_linear(done: int, total: int) -> float:
    """That rise, and a fall to zero along a line.

    >>> warm_linear(0, 100), warm_linear(50, 100), warm_linear(100, 100)
    (0.5, 0.5, 0.0)
    """
    return warmup(done, total) * (1 - done / total)


def schedule_free(params: Iterable[Tensor], lr: float, weight_decay: float) -> Optimizer:
    """Schedule-free AdamW (Defazio et al. 2024), in training mode."""
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(params, lr, weight_decay=weight_decay)
    optimizer.train()
    return optimizer  # type: ignore[no-any-return]


def talt_sgd(params: Iterable[Tensor], lr: float) -> Optimizer:
    """TALT around SGD with momentum 0.9."""
    return TALT(partial(SGD, momentum=0.9), params, lr)


def talt_adam(params: Iterable[Tensor], lr: float) -> Optimizer:
    """TALT around Adam."""
    return TALT(Adam, params, lr)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A hand-made optimizer, with the settings it may be run with; PyTorch's defaults where nothing is said.

    Attributes:
        name: how tables and the command line call it.
        label: what it is, in words.
        make: builds it.
        lr: its learning rate where nobody tunes it.
        grid: learning rates that it is tuned over.
        schedule: what the learning rate is multiplied with; the rate that is tuned is the peak.
        stacks: whether it is elementwise with a state per element, so that it can run on stacked parameters too.
        package: that it comes from, where that is not torch.
        extra: whether "all" leaves it out.
        structured: whether it reads the A and b of a problem, and solves no other.
    """

    name: str
    label: str
    make: Callable[..., Any]
    lr: float
    grid: tuple[float, ...] = ADAPTIVE
    schedule: Schedule | None = None
    stacks: bool = True
    package: str | None = None
    extra: bool = False
    structured: ClassVar[bool] = False

    def optimizer(self, params: Iterable[Tensor], lr: float, steps: int) -> tuple[Optimizer, LRScheduler | None]:
        """For a training script of so many steps: the optimizer, and its schedule if it has one."""
        optimizer, schedule = self.make(params, lr=lr), self.schedule
        return optimizer, None if schedule is None else LambdaLR(optimizer, lambda done: schedule(done, steps))

    def solver(self, lr: float, steps: int) -> Solver:
        """For tasks whose instances are optimized side by side, for so many steps.

        Raises:
            ConfigError: it cannot run there.
        """
        self.require_stacks()
        schedule = self.schedule
        return TorchSolver(self.make, lambda done: lr if schedule is None else lr * schedule(done, steps))

    def require_stacks(self) -> None:
        """Refuse flat tasks.

        Raises:
            ConfigError: it cannot run on them.
        """
        require(
            self.stacks,
            f"{self.name} runs on training scripts only: flat tasks stack the parameters of all instances as rows, "
            "where it would step all of them as one; leave it out, or take adamw-linear",
        )

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return self.package is None or find_spec(self.package) is not None

    @property
    def scripts(self) -> bool:
        """Whether it is a torch optimizer, which training scripts need."""
        return True


@dataclass(frozen=True, kw_only=True)
class FlatBaseline(Baseline):
    """A hand-made solver that is no torch optimizer: it runs on flat tasks, some on games or swarms alone."""

    grid: tuple[float, ...] = GAME_RATES

    def optimizer(self, params: Iterable[Tensor], lr: float, steps: int) -> tuple[Optimizer, LRScheduler | None]:
        """There is none.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.name} runs on flat tasks only, it is no torch optimizer: leave it out, or take sgd")

    def solver(self, lr: float, steps: int) -> Solver:
        """As made with this rate."""
        solver: Solver = self.make(lr)
        return solver

    @property
    def scripts(self) -> bool:
        """It is not."""
        return False


@dataclass(frozen=True, kw_only=True)
class Classical(FlatBaseline):
    """One for problems with A and b; in place of a learning rate, its own number is tuned: λ, or α."""

    stacks: bool = False
    structured: ClassVar[bool] = True


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
            name="adamw-cosine",
            label="AdamW, weight decay 0.01, 2 % warm-up, cosine to 0",
            make=AdamW,
            lr=0.001,
            schedule=warm_cosine,
        ),
        Baseline(
            name="adamw-linear",
            label="AdamW, weight decay 0.01, 2 % warm-up, linear to 0",
            make=AdamW,
            lr=0.001,
            schedule=warm_linear,
        ),
        Baseline(
            name="muon-linear",
            label="Muon for matrices, AdamW for the rest, weight decay 0.01, 2 % warm-up, linear to 0",
            make=MuonAdamW,
            lr=0.001,
            schedule=warm_linear,
            stacks=False,
        ),
        Baseline(
            name="schedule-free",
            label="schedule-free AdamW, weight decay 0.01, 2 % warm-up",
            make=partial(schedule_free, weight_decay=0.01),
            lr=0.0025,
            schedule=warmup,
            stacks=False,
            package="schedulefree",
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
        Baseline(
            name="talt-sgd",
            label="TALT around SGD, momentum 0.9",
            make=talt_sgd,
            lr=0.03,
            grid=PLAIN,
            stacks=False,
            extra=True,
        ),
        Baseline(name="talt-adam", label="TALT around Adam", make=talt_adam, lr=0.001, stacks=False, extra=True),
        FlatBaseline(
            name="line-search",
            label="gradient descent, backtracking line search",
            make=LineSearch,
            lr=1.0,
            grid=(1.0,),
        ),
        FlatBaseline(name="optimistic", label="optimistic gradient descent", make=Optimistic, lr=0.1),
        FlatBaseline(name="extra-gradient", label="extra-gradient", make=ExtraGradient, lr=0.1),
        FlatBaseline(name="alternating", label="gradient descent and ascent by turns", make=Alternating, lr=0.1),
        FlatBaseline(name="pso", label="particle swarm, inertia tuned", make=ParticleSwarm, lr=0.729, grid=INERTIAS),
        Classical(name="ista", label="ISTA, λ tuned", make=ISTA, lr=0.005, grid=WEIGHTS),
        Classical(name="fista", label="FISTA, λ tuned", make=FISTA, lr=0.005, grid=WEIGHTS),
        Classical(name="amp", label="AMP, threshold tuned", make=AMP, lr=1.3, grid=TUNINGS),
    )
}
"""Name → baseline."""


def find_baselines(text: str, *, flat: bool = False, structured: bool = False) -> list[Baseline]:
    """Baselines from "adam,momentum", in that order; none for "".

    "all" are all torch optimizers that can run but TALT: those whose package is installed and, on flat tasks, that
    stack. What is no torch optimizer is for tasks of its own, and has to be named; on tasks with A and b "all" are
    Adam and those that read A and b.

    Args:
        text: names.
        flat: whether they are for flat tasks.
        structured: whether all of these have A and b.

    Raises:
        ConfigError: one is unknown, not installed, or not for such tasks.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    if names == ["all"] and structured:
        return [baseline for baseline in BASELINES.values() if baseline.structured or baseline.name == "adam"]
    if names == ["all"]:
        able = (baseline for baseline in BASELINES.values() if baseline.installed and baseline.scripts)
        every = [baseline for baseline in able if not baseline.extra]
        return [baseline for baseline in every if baseline.stacks or not flat]
    for name in names:
        require(name in BASELINES, f"unknown baseline {name!r}: {nearest(name, list(BASELINES))}")
    found = [BASELINES[name] for name in names]
    for baseline in found:
        require(
            baseline.installed, f"{baseline.name} needs the package {baseline.package}: pip install {baseline.package}"
        )
        if flat and not baseline.structured:
            baseline.require_stacks()
        if not flat:
            require(
                baseline.scripts, f"{baseline.name} is no torch optimizer: it runs on flat tasks only; leave it out"
            )
        fits = structured or not baseline.structured
        require(
            fits, f"{baseline.name}: for tasks with A and b, as in the suites sparse-recovery and lasso; leave it out"
        )
    return found


def best_lr(scores: Iterable[tuple[float, float]]) -> float:
    """The learning rate with the lowest score, from (lr, score) pairs; NaN counts as none."""
    return min(((score, lr) for lr, score in scores if score == score), default=(0.0, GRID[0]))[1]
