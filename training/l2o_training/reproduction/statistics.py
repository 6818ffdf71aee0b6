"""How sure a difference is. The seed of meta-training is the unit of replication."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; the bounds are NaN where one value is all there is.

    Attributes:
        mean, low, high: of the quantity.
        count: number of values.
    """

    mean: float
    low: float
    high: float
    count: int


def t_interval(values: np.ndarray) -> Interval:
    """Student's 95 % confidence interval of the mean of independent values (n,).

    Values that do not differ give an interval of no width.
    """
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2 or not np.isfinite(values).all():
        return Interval(mean, math.nan, math.nan, len(values))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half, len(values))


def log_ratios(values: np.ndarray, control: np.ndarray) -> np.ndarray:
    """Paired log-ratios, averaged within every seed: mean of ln(value / control).

    Args:
        values, control: (seeds, …), the same instances in the same places.

    Returns:
        (seeds,); NaN for a seed with a run that is not finite or not positive.
    """
    with np.errstate(all="ignore"):
        ratios = np.log(values) - np.log(control)
    ratios = np.where(np.isfinite(ratios), ratios, np.nan)
    return np.asarray(ratios.reshape(len(ratios), -1).mean(1))


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and runs, and how it scatters.

    Attributes:
        mean: over all.
        runs: standard deviation over runs, within a seed (root mean square over seeds); NaN for one run.
        seeds: standard deviation over seeds of the mean over runs; NaN for one seed.
    """

    mean: float
    runs: float
    seeds: float


def spread(values: np.ndarray) -> Spread:
    """Mean and deviations of values (seeds, runs)."""
    seeds, runs = values.shape
    within = float(np.sqrt(values.var(1, ddof=1).mean())) if runs > 1 else math.nan
    return Spread(float(values.mean()), within, float(values.mean(1).std(ddof=1)) if seeds > 1 else math.nan)


def verdict(interval: Interval) -> str:
    """What an interval of log-ratios to the placebo says, in words.

    >>> verdict(Interval(-0.22314, -0.3, -0.1, 3))
    'helps by 20 %'
    >>> verdict(Interval(-0.1, -0.3, 0.1, 3))
    'no effect shown beyond placebo'
    """
    if not math.isfinite(interval.mean):
        return "not comparable: runs diverged"
    if math.isnan(interval.low):
        return "one seed: no verdict"
    if interval.low <= 0 <= interval.high:
        return "no effect shown beyond placebo"
    change = 100 * abs(math.expm1(interval.mean))
    return f"{'helps' if interval.mean < 0 else 'hurts'} by {change:.2g} %"
