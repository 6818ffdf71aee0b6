"""Koopman acceleration: extrapolation against plain references, and the optimizer that jumps."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Regression, assert_resumes, assert_same_state, minibatches
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from l2o_runtime import ConfigError, LearnedOptimizer
from l2o_runtime.wrappers import extrapolation
from l2o_runtime.wrappers.extrapolation import combine, resting_weights, step_gram
from l2o_runtime.wrappers.koopman import STATE, KoopmanAccelerated
from l2o_runtime.wrappers.pace import below_trend

QUICK = {"window": 4, "every": 5, "stride": 1}


def recurrence(eigenvalues, count: int, size: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Snapshots (count, size) of s ← s* + A (s − s*) with a random basis, and s*."""
    rng = torch.Generator().manual_seed(seed)
    rest = torch.randn(size, generator=rng, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64))[0][:, : len(eigenvalues)]
    powers = torch.tensor(eigenvalues, dtype=torch.float64) ** torch.arange(count, dtype=torch.float64)[:, None]
    return rest + powers @ basis.T, rest


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-0.9, 0.98), min_size=1, max_size=3, unique=True), st.integers(0, 1000))
def test_a_linear_recurrence_is_followed_to_its_end(eigenvalues, seed):
    snapshots, rest = recurrence(eigenvalues, len(eigenvalues) + 2, seed=seed)
    weights = resting_weights(step_gram([snapshots]), 0.0)
    assert weights.sum().item() == pytest.approx(1)
    reached = (combine(snapshots, weights) - rest).norm()
    # Modes that are close to each other or to zero are as far as rounding lets them be told apart.
    assert reached <= 1e-6 * (snapshots - rest).norm() or reached < 0.1 * (snapshots[-1] - rest).norm()


def test_three_modes_are_exact():
    snapshots, rest = recurrence([0.95, 0.8, -0.5], 5)
    assert (combine(snapshots, resting_weights(step_gram([snapshots]), 0.0)) - rest).norm() < 1e-6


def test_what_does_not_change_stays():
    """λ = 1: a drift has no end, and its differences are no reason to leave."""
    still = torch.ones(6, 3)
    assert torch.equal(combine(still, resting_weights(step_gram([still]), 1e-6)), still[0])


def test_weights_are_those_of_least_squares():
    """Against NumPy: minimise over weights that sum to one, by eliminating the last."""
    steps = np.random.default_rng(0).normal(size=(5, 20))
    ridge = 0.3 * np.mean((steps**2).sum(1))
    rows = np.vstack([steps.T, np.sqrt(ridge) * np.eye(5)])
    free, *_ = np.linalg.lstsq(rows[:, :-1] - rows[:, -1:], -rows[:, -1], rcond=None)
    expected = np.append(free, 1 - free.sum())
    gram = torch.tensor(steps @ steps.T)
    torch.testing.assert_close(resting_weights(gram, 0.3), torch.tensor(expected))


def test_a_large_ridge_is_the_mean_of_the_window():
    snapshots = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    weights = resting_weights(step_gram([snapshots]), 1e9)
    torch.testing.assert_close(combine(snapshots, weights), snapshots[1:].mean(0))


def test_the_gram_matrix_is_a_sum_over_tensors_and_pieces(monkeypatch):
    snapshots = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    whole = step_gram([snapshots])
    monkeypatch.setattr(extrapolation, "CHUNK", 7)
    torch.testing.assert_close(step_gram([snapshots[:, :11].view(5, 11, 1), snapshots[:, 11:]]), whole)
    weights = resting_weights(whole, 0.1)
    torch.testing.assert_close(combine(snapshots, weights), (weights @ snapshots[1:].double()).float())
    ring = snapshots.roll(2, 0)
    torch.testing.assert_close(step_gram([ring], 2), whole)
    torch.testing.assert_close(combine(ring, weights, 2), combine(snapshots, weights))


def descend(make, steps: int, how="closure", rising=0.0, scheduled=False):
    """Least squares in 20 unknowns; every evaluation adds `rising` to the loss, so that jumps seem to be bad."""
    rng = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 20, generator=rng) * torch.logspace(0, -1.5, 20)
    target = matrix @ torch.randn(20, generator=rng)
    x = nn.Parameter(torch.zeros(20))
    optimizer, calls = make([x]), [0]
    scheduler = StepLR(optimizer, 7, 0.9) if scheduled else None

    def closure():
        calls[0] += 1
        optimizer.zero_grad()
        loss = (matrix @ x - target).square().mean() + rising * calls[0]
        loss.backward()
        return loss

    for _ in range(steps):
        if how == "closure":
            optimizer.step(closure)
        elif how == "loss":
            optimizer.step(loss=closure())
        else:
            closure()
            optimizer.step()
        if scheduler:
            scheduler.step()
    with torch.no_grad():
        return float((matrix @ x - target).square().mean()), x, optimizer


@pytest.mark.parametrize("how", ["closure", "loss"])
def test_it_is_ahead_of_its_base(how):
    plain, *_ = descend(lambda p: SGD(p, 0.3), 60, "plain")
    faster, _, optimizer = descend(lambda p: KoopmanAccelerated(SGD(p, 0.3), **QUICK), 60, how)
    assert optimizer.health()["jumps"] > 0
    assert faster < 0.4 * plain


@pytest.mark.parametrize("base", [lambda p: Adam(p, 0.05), lambda p: SGD(p, 0.1, momentum=0.9)])
def test_with_a_closure_a_jump_that_fails_leaves_no_trace(base):
    _, x, plain = descend(base, 40, "plain")
    _, y, optimizer = descend(lambda p: KoopmanAccelerated(base(p), **QUICK), 40, "closure", rising=1e3)
    assert optimizer.health()["tries"] >= 4
    assert optimizer.health()["jumps"] == 0
    assert torch.equal(x, y)
    assert_same_state(plain.state_dict(), optimizer.optimizer.state_dict())


def test_without_one_it_costs_a_minibatch():
    _, y, optimizer = descend(lambda p: KoopmanAccelerated(Adam(p, 0.05), **QUICK), 40, "loss", rising=1e3)
    optimizer.settle()
    tries = optimizer.health()["tries"]
    assert tries >= 4
    _, x, plain = descend(lambda p: Adam(p, 0.05), 40 - tries, "plain")
    assert torch.equal(x, y)
    assert_same_state(plain.state_dict(), optimizer.optimizer.state_dict())


@pytest.mark.parametrize("raises", [KeyboardInterrupt, ValueError, None])
def test_a_closure_that_fails_on_trial_leaves_no_trace(raises):
    """Or that gives no loss there, beside one that was given."""
    param = nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer, seen = KoopmanAccelerated(SGD([param], 0.1), **QUICK), []

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        seen.append((param.detach().clone(), param.grad.clone()))
        if len(seen) > 1:
            if raises is not None:
                raise raises("on trial")
            return None
        return loss

    for _ in range(50):
        seen.clear()
        try:
            optimizer.step(closure, loss=param.detach().square().sum())
        except (KeyboardInterrupt, ValueError):
            break
    (before, grad), (there, _) = seen
    assert not torch.equal(before, there)
    assert torch.equal(param, before)
    assert torch.equal(param.grad, grad)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_losses_that_are_not_finite_are_no_trend(bad):
    falling = [3.0, 2.9, 2.8, 2.7]
    assert below_trend([*falling[:2], bad, *falling[2:]], 2.3)
    assert not below_trend(falling, bad)
    assert not below_trend([bad, 2.0, bad, 1.9], 1.0)


def test_settle_takes_back_what_is_on_trial():
    for steps in range(4, 12):
        _, x, optimizer = descend(lambda p: KoopmanAccelerated(SGD(p, 0.1), **QUICK), steps, "loss")
        if optimizer._pace().pending:
            break
    assert optimizer._pace().pending
    optimizer.settle()
    _, y, _ = descend(lambda p: SGD(p, 0.1), steps, "plain")
    assert torch.equal(x, y)
    optimizer.settle()
    assert torch.equal(x, y)


def test_schedules_act_on_the_base():
    _, x, _ = descend(lambda p: SGD(p, 0.1), 20, "plain", scheduled=True)
    _, y, optimizer = descend(lambda p: KoopmanAccelerated(SGD(p, 0.1), **QUICK), 20, rising=1e3, scheduled=True)
    assert torch.equal(x, y)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**2)


def learn(model, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        optimizer.step(loss=loss)


@pytest.mark.parametrize("base", [lambda p: Adam(p, 0.02), lambda p: LearnedOptimizer(p, total_steps=60)])
@pytest.mark.parametrize("stop", [2, 5, 6, 17])
def test_a_run_resumes_bit_for_bit(base, stop):
    """The fifth step ends with a jump on trial."""
    batches = minibatches(30, size=128)
    make = lambda model: KoopmanAccelerated(base(model.parameters()), **QUICK)  # noqa: E731
    optimizer = assert_resumes(make, learn, batches, stop)
    assert optimizer.health()["tries"] >= 2


def test_a_state_of_another_kind_is_refused():
    make = lambda window=4: KoopmanAccelerated(Adam([nn.Parameter(torch.ones(2))]), window, every=5)  # noqa: E731
    one, other = make(), make(window=5)
    one.param_groups[0]["params"][0].grad = torch.ones(2)
    one.step(loss=1.0)
    with pytest.raises(ValueError, match="window: the state has one of 4"):
        other.load_state_dict(one.state_dict())
    plain = Adam([nn.Parameter(torch.ones(2))])
    plain.param_groups[0]["params"][0].grad = torch.ones(2)
    plain.step()
    with pytest.raises(ValueError, match="without Koopman acceleration"):
        one.load_state_dict(plain.state_dict())


def test_averaged_is_where_the_window_rests_and_gives_back():
    _, x, optimizer = descend(lambda p: KoopmanAccelerated(SGD(p, 0.3), 10, every=1000, stride=3), 80)
    before = x.detach().clone()
    with optimizer.averaged():
        assert not torch.equal(x, before)
        rests = x.detach().clone()
        with pytest.raises(RuntimeError, match="within averaged"):
            optimizer.step(loss=1.0)
        with pytest.raises(RuntimeError, match="within averaged"), optimizer.averaged():
            pass
    assert torch.equal(x, before)
    _, solution, _ = descend(lambda p: SGD(p, 0.3), 20000, "plain")
    assert (rests - solution).norm() < 0.75 * (before - solution).norm()


def test_parameters_may_join_and_freeze():
    model, late = Regression(), nn.Parameter(torch.ones(3))
    optimizer = KoopmanAccelerated(Adam(model.parameters(), 0.02), **QUICK)
    batches = minibatches(40, size=64)
    learn(model, optimizer, batches[:5])
    assert optimizer._pace().pending
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    assert not optimizer._pace().pending
    late.grad = torch.ones(3)
    learn(model, optimizer, batches[5:20])
    next(model.parameters()).requires_grad_(False)
    learn(model, optimizer, batches[20:])
    assert optimizer.health()["tries"] > 2
    assert set(optimizer.state[late]) <= set(STATE)


def test_an_overflow_takes_a_jump_back():
    x = nn.Parameter(torch.ones(3))
    optimizer = KoopmanAccelerated(SGD([x], 0.1), **QUICK)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    pending = []
    for _ in range(6):
        optimizer.zero_grad()
        pending.append(optimizer._pace().pending)
        loss = x.square().sum() * (float("inf") if pending[-1] else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer, loss=loss)
        scaler.update()
    assert pending == [False] * 5 + [True]
    torch.testing.assert_close(x.detach(), torch.full((3,), 0.8**5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_other_dtypes(dtype):
    x = nn.Parameter(torch.linspace(1, 2, 6, dtype=dtype))
    optimizer = KoopmanAccelerated(SGD([x], 0.1), **QUICK)
    for _ in range(12):
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        optimizer.step(loss=loss)
    assert x.dtype == optimizer.state[x]["snapshots"].dtype == dtype
    assert x.isfinite().all()


def test_maximize_goes_up():
    x = nn.Parameter(torch.ones(3))
    optimizer = KoopmanAccelerated(SGD([x], 0.2, maximize=True), **QUICK)

    def closure():
        optimizer.zero_grad()
        value = -x.square().sum()
        value.backward()
        return value

    for _ in range(9):
        optimizer.step(closure)
    assert optimizer.health()["jumps"] >= 1
    assert x.abs().max() < 1e-3


def test_states_are_made_by_a_step_without_loss_or_gradients():
    x = nn.Parameter(torch.ones(3))
    optimizer = KoopmanAccelerated(Adam([x]))
    x.grad = torch.zeros(3)
    optimizer.step()
    assert "exp_avg" in optimizer.optimizer.state[x]
    x.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"step\(loss=loss\) or step\(closure\)"):
        optimizer.step()
    with pytest.raises(ValueError, match="expected one number"):
        optimizer.step(loss=torch.ones(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1}, "window: expected a whole number in 2..64, got 1"),
        ({"window": 1000}, "window: expected"),
        ({"every": 0}, "every: expected"),
        ({"stride": 1.5}, "stride: expected"),
    ],
)
def test_bad_numbers_get_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        KoopmanAccelerated(SGD([nn.Parameter(torch.ones(2))], 0.1), **arguments)
    assert "\n" not in str(error.value)


def test_what_cannot_be_wrapped_is_refused():
    x = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="expected a torch"):
        KoopmanAccelerated([x])
    with pytest.raises(TypeError, match="LBFGS calls the closure itself"):
        KoopmanAccelerated(torch.optim.LBFGS([x]))
    with pytest.raises(ValueError, match="view_as_real"):
        KoopmanAccelerated(SGD([nn.Parameter(torch.ones(2, dtype=torch.complex64))], 0.1))
