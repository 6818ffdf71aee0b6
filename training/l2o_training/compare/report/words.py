"""What the findings say, in words and rounded figures: the same on the terminal and in the report."""

import itertools
import math

from l2o_training.compare import statistics
from l2o_training.compare.baselines import GRID_SIZE
from l2o_training.compare.contenders import REFERENCE, Contender
from l2o_training.compare.summary import Findings, Overall, Row

LAG = 0.25
"""Share of a validation loss by which running statistics may raise it without a word."""

WORTH = 0.05
"""By how much a final loss has to be lower than a baseline's to be worth a word, whatever an interval says."""

NAMED = 6
"""Learning rates at the edge that are named; of others, how many."""


def headline(findings: Findings, contender: Contender) -> list[str]:
    """What was found of a rule, in one sentence per horizon and one about time."""
    said = []
    rows = [row for row in findings.overall if row.optimizer == contender.name]
    for row in rows:
        centre, low, high = row.train
        known = "" if math.isnan(low) else f"95 % interval {digits(low)} to {digits(high)}: "
        said.append(
            f"After {findings.study.steps * row.horizon:,} steps its training loss is {digits(centre)} times that of "
            f"tuned Adam ({known}{verdict(row)}), and lower on {row.better} of {row.workloads} tasks."
        )
    if rows[0].optimizer_time is None:
        return said
    slower = digits(rows[0].optimizer_time)
    return [
        *said,
        f"Its step, without the network's forward and backward pass, takes {slower} times Adam's time.",
    ]


def advice(findings: Findings, contender: Contender) -> list[str]:
    """Whether to use a rule on each of a few tasks, from its runs there beside those of the best of all baselines.

    Runs are paired: the same instance, initial weights and minibatches. The baseline was tuned on these very runs, the
    rule on none of them.
    """
    study = findings.study
    if len(study.workloads) >= statistics.FEWEST or study.runs < statistics.FEWEST:
        return []
    found = []
    for horizon, workload in itertools.product(study.horizons, study.workloads):
        own = findings.row(horizon, workload.name, contender.name)
        if own.diverged:
            found.append(f"{workload.name}: it diverged in {own.diverged} of {own.runs}")
            continue
        rivals = [findings.row(horizon, workload.name, other.name) for other in study.contenders if not other.learned]
        best = min(rivals, key=lambda row: math.inf if row.train is None else row.train)
        ends = [
            statistics.settled(findings.tuned[horizon, workload.name, row.optimizer].curves.train)
            for row in (own, best)
        ]
        centre, low, high = (math.exp(x) for x in statistics.centre(statistics.log_ratio(ends[0], ends[1]), 0.0))
        worth = "use it" if high < 1 and centre < 1 - WORTH else "leave it" if low > 1 and centre > 1 + WORTH else ""
        said = worth or f"no better than {best.optimizer} at {best.lr:g}"
        faster = f", {digits(own.speedup)} x fewer steps than tuned Adam" if own.speedup else ""
        found.append(
            f"{workload.name}, {own.steps:,} steps: {said}: final loss {interval((centre, low, high))} of "
            f"{best.optimizer} at {best.lr:g}, the best of the baselines{faster}"
        )
    return found


def verdict(row: Overall) -> str:
    """What the interval of a ratio to tuned Adam says."""
    _, low, high = row.train
    if math.isnan(low):
        return f"{plural(row.workloads, 'task')}, too few for an interval"
    return "no difference shown" if low <= 1 <= high else "better" if high < 1 else "worse"


def cautions(findings: Findings) -> list[str]:
    """What a reader has to know before believing the figures, a sentence each."""
    study, found = findings.study, []
    for contender in study.contenders:
        longest = study.steps * max(study.horizons)
        if contender.learned and longest > contender.horizon:
            found.append(
                f"{contender.name} was meta-trained for {contender.horizon:,} steps and runs for up to {longest:,}."
            )
        seen = sorted(contender.seen & {workload.data for workload in study.workloads if workload.data})
        if seen:
            found.append(f"{contender.name} was meta-trained on {' and '.join(seen)}: these data are not new to it.")
    found += lags(findings)
    found += _of_method(findings)
    edges = [row for row in findings.rows if row.edge]
    if edges:
        named = [f"{r.optimizer} on {r.workload} ({r.steps} steps, {r.lr:g})" for r in edges]
        named = named[:NAMED] + [f"and {len(named) - NAMED} more, marked in results.csv"] * (len(named) > NAMED)
        found.append(f"The best learning rate is at the grid's edge, a better one may lie outside: {', '.join(named)}.")
    tried = next(len(contender.lrs) for contender in study.contenders if contender.name == REFERENCE)
    if tried < GRID_SIZE:
        found.append(f"Baselines were tuned over {tried} of the {GRID_SIZE} learning rates of the full grid.")
    if study.runs < 3:
        found.append(f"Runs per setting: {study.runs}. Fewer than three say little.")
    return found


def _of_method(findings: Findings) -> list[str]:
    """What the way of comparing cannot tell: selection, one seed of meta-training, many tests, validation, time."""
    study, found = findings.study, [findings.study.caveat] if findings.study.caveat else []
    learned = [contender.name for contender in study.contenders if contender.learned]
    if learned:
        found.append("Each rule is one run of meta-training: another seed of it may give a better or a worse one.")
    intervals = sum(not math.isnan(row.train[1]) for row in findings.overall if row.optimizer in learned)
    if intervals > 1:
        found.append(f"{intervals} intervals of rules are shown: of twenty where nothing is, one excludes 1 by chance.")
    if not findings.validated:
        found.append("These tasks have a training loss only: nothing is said of data that was held out.")
    if not findings.timed:
        found.append("Steps are counted, not time: `l2o bench` times them.")
    return found


def lags(findings: Findings) -> list[str]:
    """Where BatchNorm's running statistics lag far behind the weights: a line for each task and length."""
    found = []
    for horizon, workload in itertools.product(findings.study.horizons, findings.study.workloads):
        rows = [row for row in findings.rows if (row.horizon, row.workload) == (horizon, workload.name)]
        named = [f"{r.optimizer} {loss(r.validation)} ({loss(r.batch_validation)})" for r in rows if _lags(r)]
        if named:
            found.append(
                f"{workload.name}, {rows[0].steps:,} steps: validation loss far from that with the statistics of "
                f"minibatches, in brackets: {', '.join(named)}."
            )
    return found


def _lags(row: Row) -> bool:
    """Whether the validation loss is far above, or not finite where that with the statistics of minibatches is."""
    return row.batch_validation is not None and (row.gap is None or row.gap > LAG * abs(row.batch_validation))


def loss(value: float | None) -> str:
    """A loss in three digits.

    >>> loss(0.41649), loss(0.000012345), loss(None)
    ('0.416', '1.23e-05', 'diverged')
    """
    return "diverged" if value is None else f"{value:#.3g}"


def digits(value: float | None) -> str:
    """Two decimals, or three digits; a dash where there is no value.

    >>> digits(1.006), digits(0.0123), digits(123.4), digits(None)
    ('1.01', '0.0123', '123', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    return (
        f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"
    )


def interval(values: tuple[float, float, float]) -> str:
    """A centre with its bounds.

    >>> interval((1.0, 0.5, 2.0))
    '1.00 [0.50, 2.00]'
    """
    centre, low, high = map(digits, values)
    return centre if math.isnan(values[1]) else f"{centre} [{low}, {high}]"


def speedup(value: float) -> str:
    """Steps of tuned Adam over these; 0 stands for a target that was not reached.

    >>> speedup(1.25), speedup(0.0)
    ('1.25', 'not reached')
    """
    return digits(value) if value else "not reached"


def share(value: float) -> str:
    """A share in per cent.

    >>> share(0.125)
    '12 %'
    """
    return f"{100 * value:.0f} %"


def plural(count: int, noun: str) -> str:
    """A number of things.

    >>> plural(1, "task"), plural(13, "task")
    ('1 task', '13 tasks')
    """
    return f"{count} {noun}" if count == 1 else f"{count:,} {noun}s"
