"""Formulas of comparisons against plain ones."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import integrate, stats

from l2o_training.compare import statistics

LOSSES = arrays(float, st.integers(1, 40), elements=st.floats(1e-3, 1e3))


@given(LOSSES, st.floats(1e-3, 1e3))
def test_steps_to_a_target(losses, target):
    width = min(10, len(losses))
    reached = [t for t in range(width, len(losses) + 1) if losses[t - width : t].mean() <= target * (1 + 1e-9)]
    assert statistics.steps_to(target, losses) == (reached[0] if reached else math.inf)
    assert statistics.steps_to(float(statistics.final(losses)), losses) <= len(losses), "each reaches its own end"
    assert statistics.steps_to(math.inf, losses) == math.inf, "no target, nothing reached"


@given(arrays(float, st.integers(1, 30), elements=st.floats(1, 1e3) | st.just(math.inf)))
def test_the_score_is_the_area_under_the_profile(ratios):
    taus = np.unique([1.0, *ratios[ratios <= 4], 4.0])
    area = sum(statistics.profile(ratios, taus[:-1]) * np.diff(taus))  # a step function, exactly
    assert statistics.score(ratios) == pytest.approx(area / 3)
    fine = np.linspace(1, 4, 2001)
    assert statistics.score(ratios) == pytest.approx(
        integrate.trapezoid(statistics.profile(ratios, fine), fine) / 3, abs=2e-3
    )


def test_slowdowns():
    costs = np.array([[10.0, math.inf, math.inf], [5.0, 8.0, math.inf]])
    np.testing.assert_array_equal(statistics.slowdowns(costs), [[2, math.inf, math.inf], [1, 1, math.inf]])


def test_the_interquartile_mean_and_its_interval():
    values = np.random.default_rng(0).normal(size=13)
    centre, low, high = statistics.iqm(values)
    assert centre == pytest.approx(np.sort(values)[3:-3].mean())
    assert low < centre < high
    assert statistics.iqm(values) == (centre, low, high), "seeded"
    assert statistics.centre(values, 0)[0] == pytest.approx(values.mean())
    rng = np.random.default_rng(1)
    plain = [stats.trim_mean(rng.choice(values, 13), 0.25) for _ in range(4000)]
    np.testing.assert_allclose((low, high), np.quantile(plain, [0.025, 0.975]), atol=0.06)
    assert [math.isnan(statistics.iqm(values[:n])[1]) for n in (1, 2, 4, 5)] == [True, True, True, False]
    worse = np.append(values[:-1], math.log(statistics.CAP))
    assert statistics.iqm(worse)[0] >= centre


def test_ratios_are_capped_and_divergence_is_never_dropped():
    found = np.exp(statistics.log_ratio(np.array([1.0, 1e9, math.inf, math.nan, 0.0]), np.full(5, 2.0)))
    np.testing.assert_allclose(found, [0.5, 100, 100, 100, 0.01])
    ended = np.array([[1.0] * 12, [1.0] + [2.5] * 11, [1.0] * 11 + [math.nan]])
    np.testing.assert_array_equal(statistics.diverged(ended), [False, True, True])
    np.testing.assert_array_equal(statistics.settled(ended), [1, math.inf, math.inf])
