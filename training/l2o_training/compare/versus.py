"""A rule beside each of the others: ratios of final losses over all tasks, and on the worst of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from l2o_training.compare import statistics
from l2o_training.compare.study import Study
from l2o_training.compare.workloads import Curves

SCHEDULES = ("adamw-cosine", "adamw-linear")
"""What people take who tune a schedule too."""

BEST_SCHEDULE = "adamw, best schedule"
"""On every task, whichever of these ends with the lower loss."""

Runs = Mapping[tuple[int, str, str], Curves]
"""(horizon, workload, optimizer) → runs at the chosen learning rate."""


@dataclass(frozen=True)
class Comparison:
    """Ratios of final losses to another optimizer's, tasks as units; below 1 is better.

    Attributes:
        mean: geometric mean over tasks, and its 95 % bootstrap interval, NaN where tasks are too few for one.
        iqm: the interquartile mean, and its interval.
        lower: tasks with a lower loss.
        workloads: their number.
        worst: the task with the highest ratio.
        worst_ratio: that ratio.
    """

    mean: tuple[float, float, float]
    iqm: tuple[float, float, float]
    lower: int
    workloads: int
    worst: str
    worst_ratio: float


@dataclass(frozen=True)
class Versus:
    """A rule beside another optimizer.

    Attributes:
        optimizer, against, horizon: which, and after how long.
        train, validation: by their final losses; None without any.
    """

    optimizer: str
    against: str
    horizon: int
    train: Comparison
    validation: Comparison | None


def final_losses(curves: Curves, loss: str) -> np.ndarray | None:
    """Final losses (runs,), infinite where a run diverged; None without any.

    Args:
        curves: of the runs.
        loss: "training" or "validation".
    """
    if loss == "training":
        return statistics.settled(curves.train)
    if not curves.validation.size:
        return None
    return np.where(statistics.diverged(curves.train), np.inf, curves.validation[:, -1])


def ratio(values: np.ndarray, control: np.ndarray) -> float:
    """Geometric mean over runs of capped ratios."""
    return math.exp(float(statistics.log_ratio(values, control).mean()))


def versus(study: Study, runs: Runs) -> list[Versus]:
    """Every rule beside every other contender, and beside AdamW under the better schedule where both were run."""
    names = [contender.name for contender in study.contenders]
    others: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    if set(SCHEDULES) <= set(names):
        others[BEST_SCHEDULE] = SCHEDULES
    found = []
    for horizon in study.horizons:
        for rule in (contender.name for contender in study.contenders if contender.learned):
            for against in (name for name in others if name != rule):
                train, validation = (
                    _compare(study, runs, horizon, rule, others[against], loss) for loss in ("training", "validation")
                )
                assert train is not None
                found.append(Versus(rule, against, horizon, train, validation))
    return found


def _compare(
    study: Study, runs: Runs, horizon: int, rule: str, others: tuple[str, ...], loss: str
) -> Comparison | None:
    ratios: dict[str, float] = {}
    for workload in study.workloads:
        own, *theirs = (final_losses(runs[horizon, workload.name, name], loss) for name in (rule, *others))
        known = [losses for losses in theirs if losses is not None]
        if own is None or not known:
            return None
        ratios[workload.name] = ratio(own, min(known, key=_mean))
    logs = np.log(list(ratios.values()))
    mean, iqm = (_exponentials(statistics.centre(logs, share)) for share in (0.0, statistics.QUARTER))
    worst = max(ratios, key=ratios.__getitem__)
    return Comparison(mean, iqm, sum(value < 1 for value in ratios.values()), len(ratios), worst, ratios[worst])


def _mean(losses: np.ndarray) -> float:
    """Infinite where one is not finite."""
    return float(losses.mean()) if np.isfinite(losses).all() else math.inf


def _exponentials(values: tuple[float, float, float]) -> tuple[float, float, float]:
    centre, low, high = map(math.exp, values)
    return centre, low, high
