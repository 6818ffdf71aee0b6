"""Bad numbers: what is not finite, what is huge, what is zero. Nothing of it may stay in the state."""

import copy
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from problems import Regression, flat, minibatches
from torch import nn

from l2o_runtime import HorizonWarning, LearnedOptimizer
from l2o_runtime.config import WindowConfig

pytestmark = pytest.mark.slow

REASONS = ("nonfinite_gradient", "nonfinite_loss", "nonfinite_parameter", "zero_gradient")
HUGE = [1e10, 1e18, 1e30, 3e38]


def one_step(model, optimizer, batch, *, spoil=None, loss=None, scale=1.0):
    """A step on a minibatch, whose gradient `spoil` may change."""
    optimizer.zero_grad()
    value = scale * model(*batch)
    value.backward()
    if spoil is not None:
        spoil(next(model.parameters()).grad)
    optimizer.step(loss=value if loss is None else loss)


def state_of(optimizer) -> dict:
    """The state but for the counters."""
    saved = copy.deepcopy(optimizer.state_dict()["state"])
    return {i: {k: v for k, v in state.items() if k != "health"} for i, state in saved.items()}


def poke(value):
    return lambda grad: grad.view(-1)[3].fill_(value)


FAULTS = {
    "NaN in a gradient": ({"spoil": poke(math.nan)}, "nonfinite_gradient"),
    "inf in a gradient": ({"spoil": poke(math.inf)}, "nonfinite_gradient"),
    "-inf in a gradient": ({"spoil": poke(-math.inf)}, "nonfinite_gradient"),
    "NaN loss": ({"loss": math.nan}, "nonfinite_loss"),
    "inf loss": ({"loss": math.inf}, "nonfinite_loss"),
    "loss beyond float32": ({"loss": 1e300}, "nonfinite_loss"),
    "no gradient at all": ({"scale": 0.0}, "zero_gradient"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_step_never_happened(rule_file, fault, first):
    """Bit for bit: the run goes on as one in which this minibatch was never seen; and the step was counted."""
    arguments, reason = FAULTS[fault]
    batches = minibatches(14)
    ends = []
    for with_fault in (True, False):
        model = Regression()
        optimizer = LearnedOptimizer(model.parameters(), rule=rule_file, weight_decay=0.01)
        for index, batch in enumerate(batches):
            if with_fault and index == (0 if first else 9):
                before = flat(model)
                one_step(model, optimizer, batch, **arguments)
                assert torch.equal(flat(model), before)
            one_step(model, optimizer, batch)
        health = optimizer.health()
        assert health["steps"] == 14
        assert {k: health[k] for k in REASONS} == {k: int(with_fault and k == reason) for k in REASONS}
        ends.append((flat(model), state_of(optimizer)))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_a_parameter_that_is_not_finite_does_not_enter_the_window(rule, rule_file):
    """It can be repaired: the state is as if nothing had been."""
    model = Regression()
    optimizer = LearnedOptimizer(model.parameters(), rule=rule_file)
    for batch in minibatches(8):
        one_step(model, optimizer, batch)
    good, before = copy.deepcopy(model.state_dict()), state_of(optimizer)
    weight = next(model.parameters())
    with torch.no_grad():
        weight.view(-1)[0] = math.nan
    one_step(model, optimizer, minibatches(1)[0])  # its gradients are not finite either
    model.load_state_dict(good)
    torch.testing.assert_close(state_of(optimizer), before, rtol=0, atol=0)
    health = optimizer.health()
    assert health["nonfinite_gradient"] == 1
    context = rule.config.context
    looks = isinstance(context, WindowConfig) and getattr(context, "snapshots", "theta") in ("theta", "delta")
    looks |= rule.per_tensor
    assert health["nonfinite_parameter"] == int(looks), (
        "only windows of parameters and the sizes of tensors look at them"
    )


@pytest.mark.parametrize("size", HUGE)
def test_huge_gradients_move_weights_by_a_bounded_step_and_are_forgotten(rule_file, size):
    model = Regression()
    optimizer = LearnedOptimizer(model.parameters(), rule=rule_file)
    before = flat(model)
    one_step(model, optimizer, minibatches(1)[0], spoil=poke(size))
    assert (flat(model) - before).abs().max() < 1, "a step's length does not follow the gradient's"
    for batch in minibatches(12):
        one_step(model, optimizer, batch)
    assert flat(model).isfinite().all()
    assert all(v.isfinite().all() for s in optimizer.state.values() for v in s.values())
    assert optimizer.health()["steps"] == 13


@pytest.mark.parametrize("size", HUGE)
def test_an_exploding_loss_leaves_the_window_again(rule_file, size):
    """While it is in the window the step is bounded; afterwards the context is that of a run without it."""
    model = Regression()
    optimizer = LearnedOptimizer(model.parameters(), rule=rule_file)
    moved = []
    for index, batch in enumerate(minibatches(20)):
        before = flat(model)
        one_step(model, optimizer, batch, loss=size if index == 5 else None)
        moved.append(float((flat(model) - before).abs().max()))
    assert max(moved) < 1
    first = optimizer.state[next(model.parameters())]
    assert all(v.isfinite().all() for v in first.values())
    if "context_losses" in first:
        assert first["context_losses"].max() < 100


def test_the_bundled_rule_survives_a_task_far_from_its_training():
    """Inputs ten thousand times too large, a ReLU network, a loss in the thousands: bounded, finite, and better."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = LearnedOptimizer(model.parameters())
    seen = []
    for x, y in minibatches(150):
        optimizer.zero_grad()
        loss = 1e3 * (model(x * 1e4) - y).square().mean()
        loss.backward()
        seen.append(loss.item())
        optimizer.step(loss=loss)
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.health()["steps"] == 150
    assert sum(seen[-10:]) < sum(seen[:10])


def test_the_end_of_the_horizon_is_announced_once():
    p = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([p], rule="normalized-dmd")

    def go(count):
        for _ in range(count):
            p.grad = torch.ones(3)
            optimizer.step(loss=1.0)

    go(150)
    twin = LearnedOptimizer([p], rule="normalized-dmd")
    twin.load_state_dict(optimizer.state_dict())
    optimizer = twin  # the count goes on after a resume
    go(50)
    with pytest.warns(HorizonWarning, match="200 steps") as caught:
        go(5)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go(5)


def test_the_counters_travel_with_the_state():
    p = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([p])
    assert set(optimizer.health().values()) == {0}
    for value in (1.0, math.nan, 0.0, 1.0):
        p.grad = torch.full((3,), value)
        optimizer.step()
    twin = LearnedOptimizer([p])
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = {"steps": 2, "nonfinite_gradient": 1, "nonfinite_loss": 0, "nonfinite_parameter": 0, "zero_gradient": 1}
    assert optimizer.health() == twin.health() == expected


def test_a_long_run_neither_grows_nor_drifts():
    """The benchmark in small: the window's Gram matrix stays what it is from scratch, memory stays flat."""
    script = Path(__file__).parents[1] / "fuzz" / "long_run.py"
    command = [sys.executable, str(script), "--steps", "400", "--every", "20"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


def test_asking_for_the_health_leaves_no_state():
    """An empty entry would keep torch.distributed.checkpoint from making the state."""
    optimizer = LearnedOptimizer([nn.Parameter(torch.ones(3))])
    optimizer.health()
    assert not optimizer.state
