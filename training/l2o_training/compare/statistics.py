"""Formulas of comparisons: final losses, steps to a target, ratios, profiles; and how sure a difference is."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.stats import bootstrap, trim_mean

LAST = 10
"""Steps at the end of a run over which its loss is averaged, as in Table 1 of arXiv 2211.16268."""

CAP = 100.0
"""Ratios of losses count as no larger than this, and no smaller than its inverse; a diverged run counts as this."""

MAX_TAU = 4.0
"""End of performance profiles."""

RESAMPLES = 10_000
"""Of the tasks, for an interval."""

FEWEST = 5
"""Tasks that an interval over them takes: that of two is no more than the two."""


def running_mean(losses: np.ndarray) -> np.ndarray:
    """Mean over the last 10 steps at each step from the tenth on: (..., steps) → (..., steps − 9).

    Of runs that are shorter, one mean over all.
    """
    width = min(LAST, losses.shape[-1])
    return np.asarray(np.lib.stride_tricks.sliding_window_view(losses, width, axis=-1).mean(-1))


def smoothed(losses: np.ndarray) -> np.ndarray:
    """`running_mean` at every step; NaN where there are fewer before it: (runs, steps) → (runs, steps)."""
    means = running_mean(losses)
    return np.pad(means, ((0, 0), (losses.shape[-1] - means.shape[-1], 0)), constant_values=np.nan)


def final(losses: np.ndarray) -> np.ndarray:
    """Mean over the last 10 steps: (..., steps) → (...)."""
    return np.asarray(losses[..., -LAST:].mean(-1))


def diverged(losses: np.ndarray) -> np.ndarray:
    """Whether a run's loss was not finite, or ended above twice what it began with: (..., steps) → (...)."""
    return np.asarray(~(final(losses) <= 2 * losses[..., 0]))


def settled(losses: np.ndarray) -> np.ndarray:
    """`final`, infinite where a run diverged."""
    return np.where(diverged(losses), np.inf, final(losses))


def steps_to(target: float, losses: np.ndarray) -> float:
    """Steps until the mean loss of the last 10 is at the target or below; infinite if it never is.

    Args:
        target: a loss.
        losses: (steps,) of one run.
    """
    if not math.isfinite(target):
        return math.inf
    below = np.flatnonzero(running_mean(losses) <= target * (1 + 1e-9))  # a run must not miss itself by rounding
    return float(below[0] + min(LAST, len(losses))) if len(below) else math.inf


def log_ratio(values: np.ndarray, control: np.ndarray) -> np.ndarray:
    """ln(value / control) within ± ln 100; values that are not finite count as 100."""
    with np.errstate(all="ignore"):
        ratio = np.log(values) - np.log(control)
    limit = math.log(CAP)
    return np.clip(np.where(np.isnan(ratio), limit, ratio), -limit, limit)


QUARTER = 0.25
"""Share of the values that an interquartile mean leaves out at either end."""


def iqm(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Interquartile mean of values (n,), and its 95 % bootstrap interval over them; NaN where they are fewer than five.

    Source: Agarwal et al. 2021; percentile bootstrap.
    """
    return centre(values, QUARTER, seed)


def centre(values: np.ndarray, share: float, seed: int = 0) -> tuple[float, float, float]:
    """`iqm`, but that another share of the values is left out at either end; of none, it is the mean."""
    mean = float(trim_mean(values, share))
    if len(values) < FEWEST:
        return mean, math.nan, math.nan
    found = bootstrap(
        (values,),
        lambda x, axis: trim_mean(x, share, axis=axis),
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return mean, float(found.confidence_interval.low), float(found.confidence_interval.high)


def slowdowns(costs: np.ndarray) -> np.ndarray:
    """Cost on every workload relative to the cheapest there: (optimizers, workloads) → the same.

    Infinite where the target was not reached, by anybody or by this one.
    """
    best = costs.min(0, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(costs), costs / best, np.inf)


def profile(ratios: np.ndarray, taus: np.ndarray) -> np.ndarray:
    """ρ(τ): share of workloads on which an optimizer is at most τ times as slow as the fastest.

    Args:
        ratios: (workloads,) of one optimizer, from `slowdowns`.
        taus: (t,).

    Source: Dolan & Moré 2002.
    """
    return np.asarray((ratios[:, None] <= taus).mean(0))


def score(ratios: np.ndarray) -> float:
    """Mean of ρ over τ in 1 … 4: 1 is the fastest everywhere, 0 within four times of the fastest nowhere.

    The integral of a step function, exactly.

    Source: AlgoPerf, Dahl et al. 2023.
    """
    return float(np.clip((MAX_TAU - ratios) / (MAX_TAU - 1), 0, 1).mean())


CONFIDENCE = 0.95
"""Of intervals over seeds of meta-training, which are the unit of replication of what was meta-trained."""


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
