"""TALT: its pure parts against NumPy, and what the optimizer inside sees of gradients."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Regression, assert_resumes, flat, minibatches
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from l2o_runtime import ConfigError
from l2o_runtime.wrappers.talt import BANK, TALT, WALLS
from l2o_runtime.wrappers.valleys import Covariance, chance_of_changes, leading_directions, orthonormal_weights, slopes

HEAVY = partial(SGD, momentum=0.9)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.floats(0.3, 1.0), st.integers(0, 1000))
def test_the_covariance_is_numpys(count, decay, seed):
    vectors = np.random.default_rng(seed).normal(3, 1, size=(count, 4))
    covariance = Covariance.empty(4)
    for vector in vectors:
        covariance.update(torch.tensor(vector), decay)
    weights = decay ** np.arange(count)[::-1]
    np.testing.assert_allclose(covariance.value(), np.cov(vectors.T, aweights=weights), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(covariance.mean, np.average(vectors, axis=0, weights=weights))


def test_the_covariance_has_no_bias():
    rng = torch.Generator().manual_seed(0)
    total = torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(2000):
        covariance = Covariance.empty(2)
        for _ in range(5):
            covariance.update(torch.randn(2, generator=rng, dtype=torch.float64), 0.7)
        total += covariance.value() / 2000
    torch.testing.assert_close(total, torch.eye(2, dtype=torch.float64), atol=0.08, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 8))
def test_leading_directions_are_those_of_lapack(seed, full):
    rng = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=rng, dtype=torch.float64))[0]
    spectrum = torch.tensor([4.0**-k if k < full else 0.0 for k in range(8)], dtype=torch.float64)
    matrix = 1e-12 * (basis * spectrum) @ basis.mT
    values, vectors = leading_directions(matrix, torch.randn(8, 3, generator=rng, dtype=torch.float64))
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(values, 1e-12 * spectrum[:3], rtol=1e-6, atol=1e-20)
    torch.testing.assert_close(matrix @ vectors, vectors * values, rtol=0, atol=1e-17)


@pytest.mark.parametrize("entry", [0.0, float("nan"), float("inf")])
def test_a_matrix_that_says_nothing_leaves_the_start(entry):
    start = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, vectors = leading_directions(torch.full((5, 5), entry, dtype=torch.float64), start)
    assert not values.any()
    torch.testing.assert_close(vectors, torch.linalg.qr(start)[0])


def test_chance_is_binomial():
    rng = np.random.default_rng(0)
    signs = rng.integers(0, 2, size=(20000, 9))
    changes = (signs[:, 1:] != signs[:, :-1]).sum(1)
    for seen in (0, 2, 7):
        assert chance_of_changes(9, seen) == pytest.approx(
            ((changes <= seen).mean(), (changes >= seen).mean()), abs=0.02
        )


def test_noise_alone_is_seldom_called_anything():
    paths = torch.randn(20, 2000, generator=torch.Generator().manual_seed(0))
    found = slopes(paths)
    assert 0 < np.mean(np.abs(found)) < 0.1


def test_a_trend_is_a_valley_and_an_alternation_is_not():
    t = torch.arange(20.0)
    noise = 0.3 * torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    assert slopes(noise + torch.stack([torch.ones(20), (-1) ** t], 1)) == [1, -1]


def test_weights_make_orthonormal_directions_near_the_axes():
    rng = torch.Generator().manual_seed(0)
    grads = torch.randn(BANK, 50, generator=rng, dtype=torch.float64)
    sketch = torch.randn(50, 16, generator=rng, dtype=torch.float64)
    axes = torch.linalg.qr((grads @ sketch).mT)[0][:, :3]
    weights = orthonormal_weights((grads @ sketch).mT, axes, grads @ grads.mT)
    directions = weights.mT @ grads
    torch.testing.assert_close(directions @ directions.mT, torch.eye(3, dtype=torch.float64))
    assert torch.linalg.matrix_norm(orthonormal_weights(torch.zeros(16, BANK).double(), axes, grads @ grads.mT)) == 0


def ravine(make, steps: int, split=(3, 4, 5), order=None, names=False):
    """A slope of 12 coordinates whose first goes steadily down while the last goes to and fro; several tensors."""
    params = [nn.Parameter(torch.zeros(size)) for size in split]
    places = torch.arange(12).split(list(split))
    order = order or range(len(split))
    given = [(f"tensor{i}", params[i]) for i in order] if names else [params[i] for i in order]
    optimizer, rng = make(given), torch.Generator().manual_seed(0)
    for step in range(steps):
        grad = 0.05 * torch.randn(12, generator=rng)
        grad[0] += 1.0
        grad[-1] += 3.0 * (-1) ** step
        for param, place in zip(params, places, strict=True):
            param.grad = grad[place].clone()
        optimizer.step()
    return params, optimizer


def test_it_stretches_the_valley_and_shrinks_what_goes_to_and_fro():
    params, optimizer = ravine(lambda p: TALT(SGD, p, 0.1, valley_strength=0.5), 61)
    plain, _ = ravine(lambda p: SGD(p, 0.1), 61)
    assert optimizer.health()["updates"] == 3
    assert optimizer.health()["valleys"] >= 3
    assert optimizer.health()["walls"] >= 3
    along, across = params[0][0] / plain[0][0], params[-1][-1] / plain[-1][-1]
    assert along > 1.2
    assert abs(across) < 0.8, "61 steps: an odd number is left over, cut by half"


def test_what_is_not_tracked_is_kept():
    """g' − g lies among the directions, and what is orthogonal to them goes through as it is."""
    params, optimizer = ravine(lambda p: TALT(SGD, p, 0.1, valley_strength=0.5), 20)
    axes = torch.cat([optimizer.state[p]["gradients"][BANK:] for p in params], 1)
    kept = axes.norm(dim=1) > 0
    torch.testing.assert_close(axes[kept] @ axes[kept].mT, torch.eye(int(kept.sum())), atol=1e-5, rtol=0)
    grad = torch.randn(12, generator=torch.Generator().manual_seed(5))
    free = grad - axes.mT @ (axes @ grad)
    for whole, same in ((free, True), (grad, False)):
        before = torch.cat([p.detach().clone() for p in params])
        for param, part in zip(params, whole.split([3, 4, 5]), strict=True):
            param.grad = part.clone()
        twin = copy.deepcopy(optimizer)
        moved = [param for group in twin.param_groups for param in group["params"]]
        for param, part in zip(moved, whole.split([3, 4, 5]), strict=True):
            param.grad = part.clone()
        twin.step()
        change = (before - torch.cat([p.detach() for p in moved])) / 0.1
        assert torch.allclose(change, whole, atol=1e-5) == same
        rest = change - whole
        assert (rest - axes.mT @ (axes @ rest)).norm() < 1e-4
        assert torch.equal(torch.cat([p.grad for p in moved]), whole), "gradients are not touched"


@pytest.mark.parametrize("names", [True, False])
def test_the_order_of_parameters(names):
    """With names nothing depends on it; without them sketches do, but hardly what comes of them."""
    ways = [ravine(lambda p: TALT(HEAVY, p, 0.01), 60, order=order, names=names)[0] for order in ((0, 1, 2), (2, 0, 1))]
    tolerance = 1e-5 if names else 0.05
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("base", [HEAVY, Adam])
def test_it_differs_from_its_base_and_without_strength_it_does_not(base):
    plain, _ = ravine(lambda p: base(p, lr=0.01), 60)
    for strength, same in ((0.0, True), (0.2, False)):
        params, _ = ravine(lambda p, s=strength: TALT(base, p, 0.01, valley_strength=s), 60)
        assert all(torch.equal(a, b) for a, b in zip(plain, params, strict=True)) == same


def learn(model, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()


@pytest.mark.parametrize("stop", [3, 10, 11, 29])
def test_a_run_resumes_bit_for_bit(stop):
    make = lambda model: TALT(HEAVY, model.parameters(), 0.02, update_interval=10)  # noqa: E731
    assert_resumes(make, learn, minibatches(40), stop)


def test_a_state_of_another_kind_is_refused():
    _, one = ravine(lambda p: TALT(SGD, p, 0.1), 3)
    _, other = ravine(lambda p: TALT(SGD, p, 0.1, projection_dim=16), 1)
    with pytest.raises(ValueError, match="update_interval, projection_dim"):
        other.load_state_dict(one.state_dict())


def test_schedules_groups_and_missing_gradients():
    model, late = Regression(), nn.Parameter(torch.ones(3))
    optimizer = TALT(HEAVY, model.parameters(), 0.02, update_interval=6)
    scheduler = StepLR(optimizer, 2, 0.5)
    for number, batch in enumerate(minibatches(30)):
        if number == 8:
            optimizer.add_param_group({"params": [late], "lr": 0.1})
        optimizer.zero_grad()
        model(*batch).backward()
        late.grad = torch.ones(3) if number % 2 else None
        optimizer.step()
        if number == 1:
            scheduler.step()
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert late.isfinite().all()
    assert (late != 1).all()
    optimizer.zero_grad()
    before = flat(model)
    optimizer.step()
    assert torch.equal(before, flat(model))


def test_a_gradient_that_is_not_finite_spoils_nothing():
    params, optimizer = ravine(lambda p: TALT(SGD, p, 0.0), 45)
    before = copy.deepcopy(optimizer.state_dict())
    params[0].grad = torch.full((3,), float("nan"))
    optimizer.step()
    after = optimizer.state_dict()
    for index, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(value, after["state"][index][key]), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_other_dtypes(dtype):
    x = nn.Parameter(torch.ones(6, dtype=dtype))
    optimizer = TALT(SGD, [x], 0.01)
    for _ in range(45):
        x.grad = torch.ones(6, dtype=dtype)
        assert optimizer.step(lambda: 1.0) == 1.0
    assert x.dtype == dtype
    assert x.isfinite().all()
    assert optimizer.state[x]["gradients"].shape == (BANK + WALLS + 1, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"projection_dim": 4}, "projection_dim: expected a whole number in 8..4096, got 4"),
        ({"update_interval": 3}, f"update_interval: expected a whole number in {BANK}"),
        ({"valley_strength": 1.5}, "valley_strength: expected"),
        ({"smoothing_factor": 0.0}, "smoothing_factor: expected"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_bad_numbers_get_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        TALT(SGD, [nn.Parameter(torch.ones(2))], 0.1, **arguments)
    assert "\n" not in str(error.value)


def test_what_cannot_be_wrapped_is_refused():
    x = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="base_optimizer_factory: expected"):
        TALT(lambda params, lr: params, [x], 0.1)
    with pytest.raises(TypeError, match="LBFGS calls the closure itself"):
        TALT(torch.optim.LBFGS, [x], 0.1)
    x.grad = torch.eye(2).to_sparse()[0]
    with pytest.raises(RuntimeError, match="sparse"):
        TALT(SGD, [x], 0.1).step()
