"""The glocal hypergradient: exact on linear recurrences, and careful elsewhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l2o_runtime import ConfigError
from l2o_training.meta.estimators.glocal import foretell, hankel


def recurrence(rates, size: int, count: int, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    limit = torch.randn(size, generator=rng, dtype=torch.float64)
    modes = torch.randn(len(rates), size, generator=rng, dtype=torch.float64)
    powers = torch.tensor(rates, dtype=torch.float64) ** torch.arange(count, dtype=torch.float64)[:, None]
    return limit + powers @ modes, limit


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0.9, 0.6, 0.3, -0.5]), min_size=1, max_size=3, unique=True),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_linear_dynamics_are_foretold_exactly(rates, size, seed):
    """Theorem 1."""
    trajectory, limit = recurrence(rates, size, 12, seed)
    found = foretell(trajectory)
    assert not found.fell_back
    assert found.residual < 1e-9
    torch.testing.assert_close(found.value, limit, rtol=0, atol=1e-8)


def test_a_rotation_is_no_obstacle():
    turn = 0.9 * torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)
    seen, limit = [torch.tensor([1.0, 2.0], dtype=torch.float64)], torch.tensor([3.0, -1.0], dtype=torch.float64)
    for _ in range(11):
        seen.append(turn @ seen[-1])
    torch.testing.assert_close(foretell(limit + torch.stack(seen)).value, limit, rtol=0, atol=1e-8)


def test_the_embedding_has_blocks_of_neighbours():
    trajectory = torch.arange(10.0).view(5, 2)
    embedded = hankel(trajectory, 3)
    assert embedded.shape == (6, 3)
    for column in range(3):
        assert torch.equal(embedded[:, column], trajectory[column : column + 3].flatten())


def test_without_a_steady_mode_it_is_the_mean():
    trajectory = 0.5 ** torch.arange(10, dtype=torch.float64)[:, None]
    found = foretell(trajectory)
    assert found.fell_back
    torch.testing.assert_close(found.value, trajectory.mean(0))
    for useless in (torch.zeros(5, 2), torch.full((5, 2), float("nan"))):
        assert foretell(useless).fell_back


def test_a_constant_stays():
    torch.testing.assert_close(foretell(torch.full((6, 2), 0.25)).value, torch.full((2,), 0.25).double())


@pytest.mark.parametrize(
    ("count", "arguments", "message"),
    [
        (2, {}, "tau: expected 3 hypergradients or more, got 2"),
        (6, {"delay": 5}, r"delay: expected a whole number in 1..4 \(tau − 2\), got 5"),
        (6, {"tolerance": -1.0}, "tolerance"),
        (6, {"rank": 0}, "rank"),
    ],
)
def test_bad_numbers_get_one_line(count, arguments, message):
    with pytest.raises(ConfigError, match=message):
        foretell(torch.ones(count, 1), **arguments)
