"""What was measured of an experiment, as arrays, and how numbers are written."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np

from l2o_training.compare.flat import task_name
from l2o_training.compare.papers.lab import Lab, rules_of
from l2o_training.compare.papers.plans import Experiment
from l2o_training.compare.papers.variants import Variant
from l2o_training.compare.statistics import Interval, Spread, final, log_ratios, spread, t_interval
from l2o_training.compare.study import read_curves

NOT_RUN = "not run"


@dataclass(frozen=True)
class Numbers:
    """Losses of an experiment.

    Attributes:
        lab, experiment: where, and of what.
        curves: (rule or "adam-0.01", task) → (runs, steps), as far as measured.
    """

    lab: Lab
    experiment: Experiment
    curves: dict[tuple[str, str], np.ndarray]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return [task_name(task) for task in self.experiment.tasks]

    def of(self, name: str, task: str) -> np.ndarray | None:
        """Losses (seeds, runs, steps) of a variant, of a rule or of Adam ("adam-0.01"); None where there are none.

        Seeds that are missing are left out.
        """
        seeded = [f"{name}-s{seed}" for seed in range(self.experiment.seeds)]
        found = [self.curves[key, task] for key in (*seeded, name) if (key, task) in self.curves]
        return np.stack(found) if found else None

    def tuned(self, task: str, at: int | None = None) -> tuple[float, float] | None:
        """Adam's lowest final loss (at step `at`) over its learning rates, and the rate; None if one is missing."""
        found = {lr: self.of(f"adam-{lr:g}", task) for lr in self.experiment.lrs}
        means = {lr: float(final(c[..., :at]).mean()) for lr, c in found.items() if c is not None}
        finite = [(mean, lr) for lr, mean in means.items() if math.isfinite(mean)]
        return min(finite) if finite and len(means) == len(found) else None

    def missing(self) -> list[str]:
        """Names of contenders, with the tasks they were not measured on."""
        if not self.curves:
            return [f"anything over {self.experiment.steps:,} steps"]
        names = [*rules_of(self.lab, self.experiment), *(f"adam-{lr:g}" for lr in self.experiment.lrs)]
        gaps = {name: [task for task in self.tasks if (name, task) not in self.curves] for name in names}
        return [
            name if len(tasks) == len(self.tasks) else f"{name} on {', '.join(tasks)}"
            for name, tasks in gaps.items()
            if tasks
        ]

    def effect(
        self, variant: Variant, statistic: Callable[[np.ndarray], np.ndarray] = final, control: str | None = None
    ) -> dict[str, Interval]:
        """Log-ratio of a variant's loss to its placebo's, per task and over all tasks (key "all").

        Runs and tasks are averaged within a seed first. Seeds count for which both were measured on all tasks.

        Args:
            variant: one with a placebo.
            statistic: (…, steps) → (…), what of a run is compared.
            control: name of another variant, to be compared with instead of the placebo.
        """
        pairs = []
        for seed in range(self.experiment.seeds):
            names = f"{variant.name}-s{seed}", f"{control or variant.placebo}-s{seed}"
            if all((name, task) in self.curves for name in names for task in self.tasks):
                pairs.append([[statistic(self.curves[name, task]) for task in self.tasks] for name in names])
        if not pairs:
            return {}
        ours, theirs = np.array(pairs).swapaxes(0, 1)  # each (seeds, tasks, runs)
        each = {task: t_interval(log_ratios(ours[:, i], theirs[:, i])) for i, task in enumerate(self.tasks)}
        return {"all": t_interval(log_ratios(ours, theirs))} | each


def collect(lab: Lab, experiment: Experiment) -> Numbers:
    """Read all losses of an experiment that were measured."""
    curves, study = {}, lab.study(experiment)
    for workload, contender in product(study.workloads, study.contenders):
        for lr in contender.lrs:
            found = read_curves(study, workload, contender, lr, 1)
            if found is not None:
                curves[contender.name if contender.learned else f"adam-{lr:g}", workload.name] = found.train
    return Numbers(lab, experiment, curves)


def number(value: float) -> str:
    """Three decimals, or two digits where those say little.

    >>> number(0.41649), number(0.0064), number(0.0000123), number(float("nan"))
    ('0.416', '0.0064', '1.2e-05', 'diverged')
    """
    if not math.isfinite(value):
        return "diverged"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2g}"


def with_spread(values: np.ndarray) -> str:
    """Mean ± deviation over runs ± deviation over seeds of values (seeds, runs)."""
    found: Spread = spread(values)
    parts = (found.mean, *(part for part in (found.runs, found.seeds) if not math.isnan(part)))
    return " ± ".join(map(number, parts)) if math.isfinite(found.mean) else "diverged"


def ratio(interval: Interval) -> str:
    """A ratio with its confidence interval, from that of its logarithm.

    >>> ratio(Interval(0.0, -0.6931, 0.6931, 3))
    '1.00 [0.50, 2.00]'
    """
    if not math.isfinite(interval.mean):
        return "diverged"
    mean = f"{math.exp(interval.mean):.2f}"
    return mean if math.isnan(interval.low) else f"{mean} [{_exp(interval.low)}, {_exp(interval.high)}]"


def _exp(value: float) -> str:
    """Two decimals, one power of ten where a wide interval has no use for them."""
    return f"{math.exp(value):.2f}" if value < math.log(1000) else f"{math.exp(min(value, 700)):.0e}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; all columns but the first to the right.

    >>> print(markdown(["a", "b"], [["x", "1"]]))
    | a | b |
    |---|---:|
    | x | 1 |
    """
    rule = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join([_row(header), rule, *(_row(row) for row in rows)])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
