"""Formulas of the comparison: final losses, steps to a target, ratios, profiles."""

import math

import numpy as np
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


def iqm(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Interquartile mean of values (n,), and its 95 % bootstrap interval over them; NaN where they are fewer than five.

    Source: Agarwal et al. 2021; percentile bootstrap.
    """
    centre = float(trim_mean(values, 0.25))
    if len(values) < FEWEST:
        return centre, math.nan, math.nan
    found = bootstrap(
        (values,),
        lambda x, axis: trim_mean(x, 0.25, axis=axis),
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return centre, float(found.confidence_interval.low), float(found.confidence_interval.high)


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
