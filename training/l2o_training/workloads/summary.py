"""What a study found: learning rates chosen, figures per workload and overall, and files of them."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from l2o_training import metrics
from l2o_training.errors import RunError
from l2o_training.workloads.base import Workload
from l2o_training.workloads.entrants import REFERENCE, Entrant
from l2o_training.workloads.study import Study, read_run, read_times
from l2o_training.workloads.train import Run


class Incomplete(RunError):
    """A run that the figures need has not been measured, or another process has replaced it since."""


@dataclass(frozen=True)
class Tuned:
    """The runs of an optimizer on a workload at its best learning rate.

    Attributes:
        lr: the learning rate.
        edge: whether it is the first or the last of a grid, so that a better one may lie outside.
        train: (seeds, steps) losses of minibatches.
        validation: (seeds, looks).
        batch_validation: (seeds, looks) with the statistics of minibatches; (seeds, 0) without BatchNorm.
        state_bytes: of the optimizer, per parameter.
        parameters: of the network.
        grid_diverged: share of all runs of the grid that diverged.
    """

    lr: float
    edge: bool
    train: np.ndarray
    validation: np.ndarray
    batch_validation: np.ndarray
    state_bytes: float
    parameters: int
    grid_diverged: float


@dataclass(frozen=True)
class Row:
    """An optimizer on a workload. Figures are means over seeds unless said otherwise; None where a run diverged.

    Attributes:
        workload, optimizer, horizon, steps: which.
        lr, edge: learning rate chosen, and whether it is at the grid's edge.
        train, train_std, validation, validation_std: final losses.
        batch_validation: final loss with the statistics of minibatches; None without BatchNorm as well.
        gap: validation less that.
        train_ratio, validation_ratio: to tuned Adam's, geometric mean over seeds.
        diverged, runs: at this learning rate, how many of how many.
        grid_diverged: share of the grid's runs.
        steps_to_target: median over seeds; None where not half of them reach it.
        seconds_to_target: that, times the seconds of a training step.
        speedup: steps of tuned Adam over these, median over seeds; 0 where not half of them reach the target.
        ms_step, ms_optimizer: of a training step, and of the optimizer's part.
        state_bytes: of the optimizer, per parameter.
        parameters: of the network.
    """

    workload: str
    optimizer: str
    horizon: int
    steps: int
    lr: float
    edge: bool
    train: float | None
    train_std: float | None
    validation: float | None
    validation_std: float | None
    batch_validation: float | None
    gap: float | None
    train_ratio: float
    validation_ratio: float
    diverged: int
    runs: int
    grid_diverged: float
    steps_to_target: float | None
    seconds_to_target: float | None
    speedup: float
    ms_step: float
    ms_optimizer: float
    state_bytes: float
    parameters: int


@dataclass(frozen=True)
class Overall:
    """An optimizer over all workloads of a horizon.

    Attributes:
        optimizer, horizon: which.
        train, validation: interquartile mean of ratios to tuned Adam's final loss, and its 95 % interval, NaN where
            the workloads are too few for one.
        better: workloads with a lower final training loss than tuned Adam.
        workloads: their number.
        diverged: share of runs at the chosen learning rates that diverged.
        score_steps, score_seconds: of the performance profiles to τ = 4.
        speedup: median over workloads.
        optimizer_time: milliseconds of the optimizer's step over tuned Adam's, geometric mean over workloads.
        state_bytes: per parameter, median over workloads.
    """

    optimizer: str
    horizon: int
    train: tuple[float, float, float]
    validation: tuple[float, float, float]
    better: int
    workloads: int
    diverged: float
    score_steps: float
    score_seconds: float
    speedup: float
    optimizer_time: float
    state_bytes: float


@dataclass(frozen=True)
class Findings:
    """All that a study found.

    Attributes:
        study: of what.
        tuned: (horizon, workload, optimizer) → runs at the best learning rate.
        rows: one per horizon, workload and optimizer.
        overall: one per horizon and optimizer.
    """

    study: Study
    tuned: dict[tuple[int, str, str], Tuned]
    rows: list[Row]
    overall: list[Overall]

    def row(self, horizon: int, workload: str, optimizer: str) -> Row:
        """The row of an optimizer on a workload."""
        return next(r for r in self.rows if (r.horizon, r.workload, r.optimizer) == (horizon, workload, optimizer))

    def costs(self, horizon: int, field: str) -> np.ndarray:
        """Steps or seconds to the target (optimizers, workloads), infinite where it was not reached."""
        return np.array(
            [
                [_or_infinite(getattr(self.row(horizon, w.name, e.name), field)) for w in self.study.workloads]
                for e in self.study.entrants
            ]
        )


def choose(study: Study, workload: Workload, entrant: Entrant, horizon: int) -> Tuned:
    """The runs at the learning rate with the lowest final training loss, mean over the very seeds that are scored.

    A rate with fewer diverged runs is always the better one.

    Raises:
        Incomplete: a run is missing.
    """
    found: dict[float, list[Run]] = {lr: [] for lr in entrant.lrs}
    for lr, seed in study.runs(entrant):
        run = read_run(study, workload, entrant, lr, seed, horizon)
        if run is None:
            raise _missing(study, f"{workload.name}, {entrant.name}, lr {lr:g}, seed {seed}")
        found[lr].append(run)
    curves = {lr: np.array([run.train for run in runs]) for lr, runs in found.items()}

    def badness(lr: float) -> tuple[int, float]:
        ends = metrics.settled(curves[lr])
        finite = ends[np.isfinite(ends)]
        return len(ends) - len(finite), float(finite.mean()) if len(finite) else math.inf

    lr = min(entrant.lrs, key=badness)
    runs = found[lr]
    return Tuned(
        lr=lr,
        edge=len(entrant.lrs) > 1 and lr in (min(entrant.lrs), max(entrant.lrs)),
        train=curves[lr],
        validation=np.array([run.validation for run in runs]),
        batch_validation=np.array([run.batch_validation for run in runs]),
        state_bytes=runs[0].state_bytes,
        parameters=runs[0].parameters,
        grid_diverged=float(np.mean([metrics.diverged(c) for c in curves.values()])),
    )


def _missing(study: Study, what: str) -> Incomplete:
    return Incomplete(f"{study.cells}: no measurement of {what}: run the command again, and no other version beside it")


def summarise(study: Study) -> Findings:
    """Choose learning rates and compute all figures.

    Raises:
        Incomplete: a run or the times are missing.
    """
    tuned, rows = {}, []
    for horizon, workload in itertools.product(study.horizons, study.workloads):
        times = read_times(study, workload)
        if times is None:
            raise _missing(study, f"{workload.name}, times")
        chosen = {entrant.name: choose(study, workload, entrant, horizon) for entrant in study.entrants}
        for name, runs in chosen.items():
            tuned[horizon, workload.name, name] = runs
            rows.append(_row(workload.name, name, horizon, runs, chosen[REFERENCE], times[name]))
    findings = Findings(study, tuned, rows, [])
    for horizon in study.horizons:
        findings.overall.extend(_overall(findings, horizon))
    return findings


def _row(workload: str, name: str, horizon: int, runs: Tuned, control: Tuned, seconds: tuple[float, float]) -> Row:
    ends, targets = metrics.settled(runs.train), metrics.settled(control.train)
    held, target = (np.where(metrics.diverged(r.train), np.inf, r.validation[:, -1]) for r in (runs, control))
    steps = np.array([metrics.steps_to(t, losses) for t, losses in zip(targets, runs.train, strict=True)])
    own = np.array([metrics.steps_to(t, losses) for t, losses in zip(targets, control.train, strict=True)])
    reached = float(np.quantile(steps, 0.5, method="higher"))
    return Row(
        workload=workload,
        optimizer=name,
        horizon=horizon,
        steps=runs.train.shape[1],
        lr=runs.lr,
        edge=runs.edge,
        **_spread("train", ends),
        **_spread("validation", held),
        **_beside_batches(runs, held),
        train_ratio=_ratio(ends, targets),
        validation_ratio=_ratio(held, target),
        diverged=int(metrics.diverged(runs.train).sum()),
        runs=len(ends),
        grid_diverged=runs.grid_diverged,
        steps_to_target=reached if math.isfinite(reached) else None,
        seconds_to_target=reached * seconds[0] if math.isfinite(reached) else None,
        speedup=float(np.quantile(own / steps, 0.5, method="lower")) if np.isfinite(own).all() else 0.0,
        ms_step=1000 * seconds[0],
        ms_optimizer=1000 * seconds[1],
        state_bytes=runs.state_bytes,
        parameters=runs.parameters,
    )


def _spread(name: str, values: np.ndarray) -> dict[str, Any]:
    """Mean and deviation over seeds; None where a run diverged, and a deviation only of several runs."""
    finite = bool(np.isfinite(values).all())
    return {
        name: float(values.mean()) if finite else None,
        f"{name}_std": float(values.std(ddof=1)) if finite and len(values) > 1 else None,
    }


def _beside_batches(runs: Tuned, held: np.ndarray) -> dict[str, float | None]:
    """Validation with the statistics of minibatches, mean over seeds, and what the losses (seeds,) exceed it by."""
    known = runs.batch_validation.size and np.isfinite(metrics.settled(runs.train)).all()
    batch = runs.batch_validation[:, -1].mean() if known else math.nan
    gap = held.mean() - batch
    return {
        "batch_validation": float(batch) if math.isfinite(batch) else None,
        "gap": float(gap) if math.isfinite(gap) else None,
    }


def _ratio(values: np.ndarray, control: np.ndarray) -> float:
    """Geometric mean over seeds of capped ratios."""
    return math.exp(float(metrics.log_ratio(values, control).mean()))


def _overall(findings: Findings, horizon: int) -> list[Overall]:
    study = findings.study
    slow = {
        field: metrics.slowdowns(findings.costs(horizon, field)) for field in ("steps_to_target", "seconds_to_target")
    }
    adam = [findings.row(horizon, workload.name, REFERENCE) for workload in study.workloads]
    found = []
    for index, entrant in enumerate(study.entrants):
        rows = [findings.row(horizon, workload.name, entrant.name) for workload in study.workloads]
        centres = {
            name: tuple(math.exp(x) for x in metrics.iqm(np.log([getattr(row, name) for row in rows])))
            for name in ("train_ratio", "validation_ratio")
        }
        slower = [row.ms_optimizer / other.ms_optimizer for row, other in zip(rows, adam, strict=True)]
        found.append(
            Overall(
                optimizer=entrant.name,
                horizon=horizon,
                train=centres["train_ratio"],  # type: ignore[arg-type]
                validation=centres["validation_ratio"],  # type: ignore[arg-type]
                better=sum(row.train_ratio < 1 for row in rows),
                workloads=len(rows),
                diverged=sum(row.diverged for row in rows) / sum(row.runs for row in rows),
                score_steps=metrics.score(slow["steps_to_target"][index]),
                score_seconds=metrics.score(slow["seconds_to_target"][index]),
                speedup=float(np.median([row.speedup for row in rows])),
                optimizer_time=math.exp(float(np.mean(np.log(slower)))),
                state_bytes=float(np.median([row.state_bytes for row in rows])),
            )
        )
    return found


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value
