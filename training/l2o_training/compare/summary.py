"""What a study found: learning rates chosen, figures per workload and overall, and files of them."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from l2o_training.compare import statistics
from l2o_training.compare.contenders import REFERENCE, Contender
from l2o_training.compare.study import Study, read_curves, read_times
from l2o_training.compare.versus import Versus, final_losses, ratio, versus
from l2o_training.compare.workloads import Curves, TimedWorkload, Workload
from l2o_training.errors import RunError


class Incomplete(RunError):
    """A run that the figures need has not been measured, or another process has replaced it since."""


@dataclass(frozen=True)
class Tuned:
    """The runs of an optimizer on a workload at its best learning rate.

    Attributes:
        lr: the learning rate.
        edge: whether it is the first or the last of a grid, so that a better one may lie outside.
        curves: what they gave.
        grid_diverged: share of all runs of the grid that diverged.
    """

    lr: float
    edge: bool
    curves: Curves
    grid_diverged: float


@dataclass(frozen=True)
class Row:
    """An optimizer on a workload. Figures are means over runs unless said otherwise; None where one diverged.

    What nobody has measured is None as well: flat tasks have neither validation nor times.

    Attributes:
        workload, optimizer, horizon, steps: which.
        lr, edge: learning rate chosen, and whether it is at the grid's edge.
        train, train_std, validation, validation_std: final losses.
        batch_validation: final loss with the statistics of minibatches; None without BatchNorm as well.
        gap: validation less that.
        train_ratio, validation_ratio: to tuned Adam's, geometric mean over runs.
        diverged, runs: at this learning rate, how many of how many.
        grid_diverged: share of the grid's runs.
        steps_to_target: median over runs; None where not half of them reach it.
        seconds_to_target: that, times the seconds of a training step.
        speedup: steps of tuned Adam over these, median over runs; 0 where not half of them reach the target.
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
    validation_ratio: float | None
    diverged: int
    runs: int
    grid_diverged: float
    steps_to_target: float | None
    seconds_to_target: float | None
    speedup: float
    ms_step: float | None
    ms_optimizer: float | None
    state_bytes: float | None
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

    Validation, times and bytes are None where nobody has measured them.
    """

    optimizer: str
    horizon: int
    train: tuple[float, float, float]
    validation: tuple[float, float, float] | None
    better: int
    workloads: int
    diverged: float
    score_steps: float
    score_seconds: float | None
    speedup: float
    optimizer_time: float | None
    state_bytes: float | None


@dataclass(frozen=True)
class Findings:
    """All that a study found.

    Attributes:
        study: of what.
        tuned: (horizon, workload, optimizer) → runs at the best learning rate.
        rows: one per horizon, workload and optimizer.
        overall: one per horizon and optimizer.
        versus: one per horizon, rule and other optimizer.
    """

    study: Study
    tuned: dict[tuple[int, str, str], Tuned]
    rows: list[Row]
    overall: list[Overall]
    versus: list[Versus] = field(default_factory=list)

    def row(self, horizon: int, workload: str, optimizer: str) -> Row:
        """The row of an optimizer on a workload."""
        return next(r for r in self.rows if (r.horizon, r.workload, r.optimizer) == (horizon, workload, optimizer))

    @property
    def validated(self) -> bool:
        """Whether there are validation losses."""
        return any(row.validation is not None for row in self.overall)

    @property
    def timed(self) -> bool:
        """Whether there are times."""
        return any(row.optimizer_time is not None for row in self.overall)

    def costs(self, horizon: int, field: str) -> np.ndarray:
        """Steps or seconds to the target (optimizers, workloads), infinite where it was not reached."""
        return np.array(
            [
                [_or_infinite(getattr(self.row(horizon, w.name, e.name), field)) for w in self.study.workloads]
                for e in self.study.contenders
            ]
        )


def choose(study: Study, workload: Workload, contender: Contender, horizon: int) -> Tuned:
    """The runs at the learning rate with the lowest final loss, mean over the very runs that are scored.

    It is the training loss or the validation loss, as the study says. A rate with fewer diverged runs is always the
    better one.

    Raises:
        Incomplete: a run is missing.
    """
    found: dict[float, Curves] = {}
    for lr in contender.lrs:
        curves = read_curves(study, workload, contender, lr, horizon)
        if curves is None:
            raise _missing(study, f"{workload.name}, {contender.name}, lr {lr:g}")
        found[lr] = curves

    def badness(lr: float) -> tuple[int, float]:
        ends = final_losses(found[lr], study.tune_on)
        assert ends is not None
        finite = ends[np.isfinite(ends)]
        return len(ends) - len(finite), float(finite.mean()) if len(finite) else math.inf

    lr = min(contender.lrs, key=badness)
    return Tuned(
        lr=lr,
        edge=len(contender.lrs) > 1 and lr in (min(contender.lrs), max(contender.lrs)),
        curves=found[lr],
        grid_diverged=float(np.mean([statistics.diverged(curves.train) for curves in found.values()])),
    )


def _missing(study: Study, what: str) -> Incomplete:
    return Incomplete(f"{study.cache}: no measurement of {what}: run the command again, and no other version beside it")


def summarise(study: Study) -> Findings:
    """Choose learning rates and compute all figures.

    Raises:
        Incomplete: a run or the times are missing.
    """
    tuned, rows = {}, []
    for horizon, workload in itertools.product(study.horizons, study.workloads):
        times = read_times(study, workload)
        if times is None and isinstance(workload, TimedWorkload):
            raise _missing(study, f"{workload.name}, times")
        chosen = {contender.name: choose(study, workload, contender, horizon) for contender in study.contenders}
        for name, runs in chosen.items():
            tuned[horizon, workload.name, name] = runs
            rows.append(_row(workload.name, name, horizon, runs, chosen[REFERENCE], times[name] if times else None))
    findings = Findings(study, tuned, rows, [], versus(study, {place: runs.curves for place, runs in tuned.items()}))
    for horizon in study.horizons:
        findings.overall.extend(_overall(findings, horizon))
    return findings


def _row(
    workload: str, name: str, horizon: int, tuned: Tuned, reference: Tuned, seconds: tuple[float, float] | None
) -> Row:
    runs, control = tuned.curves, reference.curves
    ends, targets = statistics.settled(runs.train), statistics.settled(control.train)
    held, target = (final_losses(curves, "validation") for curves in (runs, control))
    steps, own = (
        np.array([statistics.steps_to(t, losses) for t, losses in zip(targets, curves.train, strict=True)])
        for curves in (runs, control)
    )
    reached = float(np.quantile(steps, 0.5, method="higher"))
    return Row(
        workload=workload,
        optimizer=name,
        horizon=horizon,
        steps=runs.train.shape[1],
        lr=tuned.lr,
        edge=tuned.edge,
        **_spread("train", ends),
        **_spread("validation", held),
        **_beside_batches(runs, held),
        train_ratio=ratio(ends, targets),
        validation_ratio=None if held is None or target is None else ratio(held, target),
        diverged=int(statistics.diverged(runs.train).sum()),
        runs=len(ends),
        grid_diverged=tuned.grid_diverged,
        steps_to_target=reached if math.isfinite(reached) else None,
        seconds_to_target=reached * seconds[0] if seconds and math.isfinite(reached) else None,
        speedup=float(np.quantile(own / steps, 0.5, method="lower")) if np.isfinite(own).all() else 0.0,
        ms_step=1000 * seconds[0] if seconds else None,
        ms_optimizer=1000 * seconds[1] if seconds else None,
        state_bytes=runs.state_bytes,
        parameters=runs.parameters,
    )


def _spread(name: str, values: np.ndarray | None) -> dict[str, Any]:
    """Mean and deviation over runs; None where a run diverged, and a deviation only of several runs."""
    finite = values is not None and bool(np.isfinite(values).all())
    return {
        name: float(values.mean()) if values is not None and finite else None,
        f"{name}_std": float(values.std(ddof=1)) if values is not None and finite and len(values) > 1 else None,
    }


def _beside_batches(runs: Curves, held: np.ndarray | None) -> dict[str, float | None]:
    """Validation with the statistics of minibatches, mean over runs, and what the losses (seeds,) exceed it by."""
    known = runs.batch_validation.size and np.isfinite(statistics.settled(runs.train)).all()
    batch = runs.batch_validation[:, -1].mean() if known else math.nan
    gap = math.nan if held is None else held.mean() - batch
    return {
        "batch_validation": float(batch) if math.isfinite(batch) else None,
        "gap": float(gap) if math.isfinite(gap) else None,
    }


def _overall(findings: Findings, horizon: int) -> list[Overall]:
    study = findings.study
    slow = {
        field: statistics.slowdowns(findings.costs(horizon, field))
        for field in ("steps_to_target", "seconds_to_target")
    }
    adam = [findings.row(horizon, workload.name, REFERENCE) for workload in study.workloads]
    found = []
    for index, contender in enumerate(study.contenders):
        rows = [findings.row(horizon, workload.name, contender.name) for workload in study.workloads]
        times = [(row.ms_optimizer, other.ms_optimizer) for row, other in zip(rows, adam, strict=True)]
        slower = [own / theirs for own, theirs in times if own is not None and theirs is not None]
        sizes = [row.state_bytes for row in rows if row.state_bytes is not None]
        train = _centre([row.train_ratio for row in rows])
        assert train is not None
        found.append(
            Overall(
                optimizer=contender.name,
                horizon=horizon,
                train=train,
                validation=_centre([row.validation_ratio for row in rows]),
                better=sum(row.train_ratio < 1 for row in rows),
                workloads=len(rows),
                diverged=sum(row.diverged for row in rows) / sum(row.runs for row in rows),
                score_steps=statistics.score(slow["steps_to_target"][index]),
                score_seconds=statistics.score(slow["seconds_to_target"][index]) if slower else None,
                speedup=float(np.median([row.speedup for row in rows])),
                optimizer_time=math.exp(float(np.mean(np.log(slower)))) if slower else None,
                state_bytes=float(np.median(sizes)) if sizes else None,
            )
        )
    return found


def _centre(ratios: Sequence[float | None]) -> tuple[float, float, float] | None:
    """Interquartile mean of ratios and its interval; None where one is unknown."""
    known = [ratio for ratio in ratios if ratio is not None]
    if len(known) < len(ratios):
        return None
    centre, low, high = (math.exp(x) for x in statistics.iqm(np.log(known)))
    return centre, low, high


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value
