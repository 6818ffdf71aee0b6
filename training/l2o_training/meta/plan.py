"""What can be done in so many minutes: a run is fitted to the time, from how fast it goes on this machine."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from l2o_runtime.config import require
from l2o_runtime.rules import Rule
from l2o_runtime.solvers import Descent, Solver
from l2o_training.compare.baselines import BASELINES
from l2o_training.config import TrainConfig
from l2o_training.curricula import RandomConfig
from l2o_training.meta.objectives import make_objectives
from l2o_training.meta.unroll import begin, unroll
from l2o_training.meta.validation import RATES
from l2o_training.tasks import Task

PROBED = 12
"""Steps that are timed."""

SPARE = 0.08
"""Share of the time that is left for starting, and for what goes slower than when it was timed."""

CHECKED = 0.25
"""Share of the time that validations may take."""

BESIDE = 0.3
"""Share of the time that Adam at all rates, and the first validations, may take: they have fewer instances where a run
is long.
"""

FIRST = 5
"""Validations that are counted on then: three lengths of steps, the start, and the end."""

FEWEST = 4
"""Outer updates below which there is no sense in it."""

ENOUGH = {"cem": 16}
"""Outer updates by estimator, below which each takes fewer optimizations."""

USUAL = 24
"""That of the others."""

MANY = (64, 48, 32, 24, 16, 12, 8, 6, 4, 2)
"""Lanes of an outer update, or instances of a lane, that are tried in this order."""

FEWEST_INSTANCES = 2
"""Of an outer update."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of what a run consists of, means over its tasks.

    Attributes:
        step: of an inner step of a slot, for all that its estimator asks.
        instance: what each instance of a slot has of it.
        checked: of an inner step of a validation, of one task.
        adam: the same with Adam.
    """

    step: float
    instance: float = 0.0
    checked: float
    adam: float

    def of(self, batch: int, measured: int) -> float:
        """`step` with another number of instances than it was measured with."""
        return self.step + (batch - measured) * self.instance


def measure_speed(config: TrainConfig, rule: Rule, tasks: list[Task]) -> Speed:
    """Time some steps of every task."""
    few = replace(config, batch=1)
    seconds = [
        (
            _estimator_seconds(config, rule, task),
            _estimator_seconds(few, rule, task),
            _seconds(config, Descent(rule), task, config.validation_runs, graph=False),
            _seconds(config, BASELINES["adam"].solver(0.001, 100), task, config.validation_runs, graph=False),
        )
        for task in tasks
    ]
    step, single, checked, adam = (sum(column) / len(tasks) for column in zip(*seconds, strict=True))
    instance = max(0.0, step - single) / max(1, config.batch - 1)
    return Speed(step=step, instance=instance, checked=checked, adam=adam)


def _estimator_seconds(config: TrainConfig, rule: Rule, task: Task) -> float:
    """Of an inner step of a slot: perturbed runs without a graph, or one with it, or both."""
    solver, total = Descent(rule), 0.0
    if config.estimator != "tbptt":
        runs = config.particles + (config.estimator in ("es", "mixed") and config.unroll > 0)
        total += runs * _seconds(config, solver, task, config.batch, graph=False)
    if config.estimator in ("tbptt", "mixed"):
        total += _seconds(config, solver, task, config.batch, graph=True)
    return total


def _seconds(config: TrainConfig, solver: Solver, task: Task, runs: int, *, graph: bool) -> float:
    """Of a step of so many optimizations side by side."""
    instances = task.instances(runs, 2**40)
    instances.steps = config.horizon
    with torch.set_grad_enabled(graph):
        inner = begin(solver, instances)
        unroll(solver, inner, 2, make_objectives(config))  # what is compiled or laid out is done once
        begun = time.perf_counter()
        trace = unroll(solver, inner, PROBED, make_objectives(config))
        if graph:
            trace.objective.backward()
    solver.zero_grad()
    return (time.perf_counter() - begun) / PROBED


def with_fewer_checked(config: TrainConfig, seconds: float, speed: Speed, ranks: int = 1) -> tuple[TrainConfig, Speed]:
    """The run with as many instances in a validation as its time allows, two at least, and how fast it then goes.

    Args:
        config: the run.
        seconds: in all.
        speed: how fast it goes.
        ranks: that share the work.

    >>> slow = Speed(step=0.1, checked=0.06, adam=0.06)
    >>> config, speed = with_fewer_checked(TrainConfig(horizon=1000, validation_runs=12), 600, slow)
    >>> config.validation_runs, speed.checked
    (3, 0.015)
    """
    check, beside = _checking(config, speed, ranks)
    runs = config.validation_runs
    fewer = max(2, min(runs, int(runs * BESIDE * seconds / max(beside + FIRST * check, 1e-9))))
    share = fewer / runs
    return (
        replace(config, validation_runs=fewer),
        replace(speed, checked=share * speed.checked, adam=share * speed.adam),
    )


def fit(
    config: TrainConfig, seconds: float, speed: Speed, ranks: int = 1, fewest: int = FEWEST, spent: float = 0.0
) -> TrainConfig:
    """The run with as many epochs as fit into a time: updates, validations, and the Adam that stands beside them.

    Where whole optimizations are long, an update averages over fewer of them.

    Args:
        config: the run; its epochs, lanes, particles and times of validation are replaced.
        seconds: in all.
        speed: how fast it goes.
        ranks: that share the lanes.
        fewest: updates; with 0 there is one where none fits.
        spent: seconds of them that are over.

    Raises:
        ConfigError: too few updates fit.
    """
    random = isinstance(config.curriculum, RandomConfig)
    require(random, f"--minutes: not with curriculum.kind={config.curriculum.kind}, which ends by itself: leave it out")
    check, beside = _checking(config, speed, ranks)
    left = (seconds - spent) * (1 - SPARE) - check - beside
    enough = ENOUGH.get(config.estimator, USUAL)
    for lanes, batch, particles in _sizes(config, ranks):
        step = speed.of(batch, config.batch) * particles / config.particles
        update = lanes * config.horizon * step / ranks
        epochs, every = _split(left, update, check)
        if epochs >= enough:
            break
    epochs = max(epochs, 0)
    needed = (seconds + (fewest * update + check - left) / (1 - SPARE)) / 60
    require(
        epochs >= fewest,
        f"--minutes: {epochs} updates of the rule fit, of optimizations of {config.horizon:,} steps, and "
        f"{fewest} are the least: give {math.ceil(10 * needed) / 10} minutes, fewer --steps, or smaller minibatches",
    )
    return replace(config, epochs=max(epochs, 1), lanes=lanes, batch=batch, particles=particles, validate_every=every)


def _checking(config: TrainConfig, speed: Speed, ranks: int) -> tuple[float, float]:
    """Seconds of a validation, and of Adam at all rates on the same instances."""
    steps = config.horizon * len(config.validation_tasks or config.tasks) / ranks
    return steps * speed.checked, len(RATES) * steps * speed.adam


def _sizes(config: TrainConfig, ranks: int) -> list[tuple[int, int, int]]:
    """Lanes, instances of each, and perturbations, the most first. All lanes of `cem` try the same: they need not be
    many. Where runs are long it has half the perturbations, and two instances in all.
    """
    particles = config.particles
    if config.estimator == "cem":
        lanes = ranks * max(1, -(-len(config.tasks) // ranks))
        few = [(lanes, batch, max(2, particles // 4 * 2)) for batch in (2, 1) if lanes * batch >= FEWEST_INSTANCES]
        return [*((lanes, batch, particles) for batch in MANY), *few]
    return [(lanes, config.batch, particles) for lanes in MANY if lanes >= ranks]


def _split(left: float, update: float, check: float) -> tuple[int, int]:
    """Epochs, and after how many of them there is a validation: a multiple of it."""
    every = max(1, round(check * (1 - CHECKED) / (CHECKED * update)), round(left / (update * 12)))
    return int(left / (update + check / every)) // every * every, every


def extended(config: TrainConfig, epoch: int, seconds: float, spent: float) -> TrainConfig:
    """A run that goes on for another while, at the pace that it had.

    Args:
        config: the run.
        epoch: that it is at.
        seconds: more.
        spent: seconds of its epochs so far.
    """
    more = int(seconds * (1 - SPARE) / max(spent / max(epoch, 1), 1e-9)) if epoch else config.epochs
    every = config.validate_every
    return replace(config, epochs=max(config.epochs, (epoch + max(more, 1)) // every * every))


def best_factor(score: Callable[[float], float], most: int) -> float:
    """The factor with the lowest score, sought from 1: by doubling or halving as long as that helps, then between.

    Args:
        score: of a factor; NaN counts as the worst.
        most: how many scores are asked for at most, 3 or more.

    >>> best_factor(lambda factor: abs(factor - 5.7), 20)
    5.656854249492381
    """
    known: dict[float, float] = {}

    def ask(factor: float) -> float:
        if factor not in known and len(known) < most:
            value = score(factor)
            known[factor] = value if value == value else math.inf
        return known.get(factor, math.inf)

    ask(1.0)
    ratio = 2.0 if ask(2.0) < ask(1.0) else 0.5
    here = max(1.0, ratio)
    while ask(here * ratio) < ask(here):
        here *= ratio
    for near in (here * math.sqrt(2), here / math.sqrt(2)):
        ask(near)
    return min(known, key=lambda factor: (known[factor], abs(math.log(factor))))
