"""Tuning while training: tangents are exact, updates follow them, and what cannot work is said in a line."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW

from l2o_runtime import ConfigError
from l2o_training.tune import GlocalTuner
from l2o_training.tune.steps import moved, slope

MOMENTUM, DECAY = ("lr", "momentum", "weight_decay"), ("lr", "beta1", "weight_decay")
CASES = {
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.02}, MOMENTUM),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.02, "nesterov": True}, MOMENTUM),
    "dampening": (SGD, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.02, "dampening": 0.3}, MOMENTUM),
    "plain": (SGD, {"lr": 0.1, "weight_decay": 0.02}, ("lr", "weight_decay")),
    "adam": (Adam, {"lr": 0.01, "weight_decay": 0.02}, DECAY),
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.2}, DECAY),
}


def problem():
    """A network with two groups of parameters, one of them not used; losses of two sets of examples."""
    rng = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.randn(param.shape, generator=rng))
    inputs = torch.randn(2, 20, 4, generator=rng, dtype=torch.float64)
    labels = torch.randint(3, (2, 20), generator=rng)
    groups = [{"params": [*net[0].parameters(), unused]}, {"params": list(net[2].parameters())}]
    return groups, *(lambda k=k: F.cross_entropy(net(inputs[k]), labels[k]) for k in range(2))


def nudged(settings, name: str, step: float):
    """Settings of a group whose hyper-parameter has made a step of its logarithm or logit."""
    if name == "beta1":
        return settings | {"betas": (moved(name, 0.9, step), 0.999)}
    return settings | {name: moved(name, settings[name], step)}


def trained(kind, settings, steps: int, where=None, step: float = 0.0) -> float:
    """Validation loss after training, in one of whose groups one hyper-parameter has made a step."""
    groups, loss, validation = problem()
    if where is not None:
        groups[where[0]] |= {k: v for k, v in nudged(settings, where[1], step).items() if k != "params"}
    optimizer = kind(groups, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return validation().item()


@pytest.mark.parametrize("case", CASES)
def test_tangents_are_those_of_the_unrolled_optimizer(case):
    """Central differences of seven steps of torch's own optimizer, by group and hyper-parameter."""
    kind, settings, names = CASES[case]
    groups, loss, validation = problem()
    tuner = GlocalTuner(kind(groups, **settings), names, 100, validation=validation)
    for _ in range(7):
        tuner.step(loss())
    assert validation().item() == pytest.approx(trained(kind, settings, 7), rel=1e-12)
    for (group, name), found in zip(tuner.tuned, tuner.hypergradient().tolist(), strict=True):
        there, back = (trained(kind, settings, 7, (group, name), step) for step in (1e-5, -1e-5))
        assert found == pytest.approx((there - back) / 2e-5, rel=1e-5, abs=1e-10), (group, name)


@pytest.mark.parametrize("case", ["momentum", "adam", "adamw"])
def test_tangents_are_those_of_reverse_mode(case):
    """Differentiate through formulas written out once more, for one vector."""
    kind, settings, names = CASES[case]
    rng = torch.Generator().manual_seed(1)
    matrix, goal = (torch.randn(5, *size, generator=rng, dtype=torch.float64) for size in ((5,), ()))
    ahead = torch.randn(5, generator=rng, dtype=torch.float64)
    x = nn.Parameter(torch.ones(5, dtype=torch.float64))
    tuner = GlocalTuner(kind([x], **settings), names, 100, validation=lambda: (ahead * x).sin().sum())
    for _ in range(9):
        tuner.step((matrix @ x - goal).square().mean() + x.cos().sum())

    start = [0.9 if name == "beta1" else settings[name] for name in names]
    values = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    lr, inertia, decay = values
    theta = torch.ones(5, dtype=torch.float64, requires_grad=True)
    mean, square = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for number in range(1, 10):
        loss = (matrix @ theta - goal).square().mean() + theta.cos().sum()
        (grad,) = torch.autograd.grad(loss, theta, create_graph=True)
        if kind is AdamW:
            theta = theta - lr * decay * theta
        else:
            grad = grad + decay * theta
        if kind is SGD:
            mean = grad if number == 1 else inertia * mean + grad
            theta = theta - lr * mean
        else:
            mean, square = inertia * mean + (1 - inertia) * grad, 0.999 * square + 0.001 * grad**2
            unbiased = square / (1 - 0.999**number)
            theta = theta - lr * mean / (1 - inertia**number) / (unbiased.sqrt() + 1e-8)
    (by_value,) = torch.autograd.grad((ahead * theta).sin().sum(), values)
    slopes = torch.tensor([slope(name, value) for name, value in zip(names, start, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(x.data, theta.detach())
    torch.testing.assert_close(tuner.hypergradient(), by_value * slopes, rtol=1e-8, atol=1e-12)


def test_a_gradient_that_is_zero_from_the_start_leaves_adam_finite():
    x = nn.Parameter(torch.ones(3))
    tuner = GlocalTuner(Adam([x], lr=0.1), tau=50, validation=lambda: x.square().sum())
    for _ in range(5):
        tuner.step(x[:2].square().sum())
    assert tuner.hypergradient().isfinite().all()


def quadratic(estimate="glocal", lr: float = 0.01, **settings):
    """Ten curvatures from 1 to 0.1, and gradient descent on them."""
    x = nn.Parameter(torch.ones(10, dtype=torch.float64))
    curvature = torch.logspace(0, -1, 10, dtype=torch.float64)
    loss = lambda: (curvature * x.square()).sum() / 2  # noqa: E731
    return GlocalTuner(SGD([x], lr=lr), ("lr",), validation=loss, estimate=estimate, **settings), loss


FALLS_BACK = pytest.mark.filterwarnings("ignore:.*updates had no steady mode")


@FALLS_BACK
@pytest.mark.parametrize("estimate", ["glocal", "local", "mean"])
def test_a_rate_that_is_too_small_grows_and_the_loss_falls_below_that_without(estimate):
    tuner, loss = quadratic(estimate, tau=5, meta_lr=0.2)
    plain, alone = quadratic(estimate, tau=1000)
    for _ in range(100):
        tuner.step(loss())
        plain.step(alone())
    assert tuner.health()["updates"] == 20
    assert tuner.values()["lr"][0] > 0.1
    assert loss().item() < 0.1 * alone().item()
    assert plain.values() == {"lr": [0.01]}


@FALLS_BACK
def test_steps_are_no_longer_than_meta_lr():
    tuner, loss = quadratic(tau=4, meta_lr=0.3)
    before = tuner.values()["lr"][0]
    for _ in range(20):
        for _ in range(4):
            tuner.step(loss())
        after = tuner.values()["lr"][0]
        assert abs(math.log(after / before)) <= 0.3 + 1e-12
        before = after


def test_the_local_estimate_evaluates_the_validation_loss_once_an_update():
    counts = {}
    for estimate in ("local", "mean", "glocal"):
        tuner, loss = quadratic(estimate, tau=6, every=2)
        inner, seen = tuner.validation, []
        tuner.validation = lambda inner=inner, seen=seen: seen.append(1) or inner()
        for _ in range(24):
            tuner.step(loss())
        counts[estimate] = len(seen)
    assert counts == {"local": 2, "mean": 12, "glocal": 12}


def test_parameters_take_the_steps_of_the_optimizer_alone():
    """To the bit, as long as nothing is updated."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    other, inputs = copy.deepcopy(net), torch.randn(16, 4)
    tuner = GlocalTuner(Adam(net.parameters(), lr=0.01), tau=50, validation=lambda: net(inputs).square().mean())
    alone = Adam(other.parameters(), lr=0.01)
    for _ in range(10):
        tuner.step((net(inputs) - 1).square().mean())
        alone.zero_grad()
        (other(inputs) - 1).square().mean().backward()
        alone.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def noisy(**settings):
    rng = torch.Generator().manual_seed(0)
    x = nn.Parameter(torch.ones(4))
    pull = lambda: (x * torch.randn(4, generator=rng)).sum()  # noqa: E731
    return GlocalTuner(SGD([x], lr=1e-3), tau=6, validation=pull, tolerance=0.001, **settings), pull


def test_that_most_updates_fall_back_is_said_once():
    tuner, loss = noisy()

    def train() -> None:
        for _ in range(120):
            tuner.step(loss() + loss() ** 2)

    with pytest.warns(UserWarning, match=r"updates had no steady mode, and took the mean") as caught:
        train()
    assert len(caught) == 1
    health = tuner.health()
    assert health["updates"] == 20
    assert health["fallbacks"] > 10
    assert health["steady"] == 0
    assert 0 <= health["residual"] <= 1


def test_hyper_parameters_stay_where_hypergradients_are_not_finite():
    tuner, loss = quadratic(tau=3)
    tuner.validation = lambda inner=tuner.validation: inner() * float("inf")
    for _ in range(6):
        tuner.step(loss())
    assert tuner.health()["skipped"] == 2
    assert tuner.values() == {"lr": [0.01]}


def make(optimizer=SGD, settings=None, **arguments):
    x = nn.Parameter(torch.ones(2))
    return GlocalTuner(optimizer([x], **(settings or {"lr": 0.1})), **({"validation": x.sum} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hyperparameters": ("lr", "momentun")}, "this optimizer has no 'momentun' to tune.*momentum"),
        ({"hyperparameters": ("beta1",)}, "this optimizer has no 'beta1' to tune"),
        ({"hyperparameters": ()}, "expected different names"),
        ({"hyperparameters": ("momentum",)}, "momentum is tuned from between 0 and 1 on, it is 0"),
        ({"hyperparameters": ("weight_decay",)}, "weight_decay is tuned from between 0 and infinity on, it is 0"),
        ({"tau": 2}, "tau: expected 3 hypergradients or more, got 2"),
        ({"every": 0}, "every"),
        ({"meta_lr": 0.0}, "meta_lr"),
        ({"tolerance": 2.0}, "tolerance"),
        ({"tau": 6, "delay": 5}, r"delay: expected a number in 1..4 \(tau − 2\), got 5"),
        ({"estimate": "global"}, "estimate: 'global' is not one of glocal, local, mean"),
        ({"validation": 1.0}, "validation: expected a function that gives a loss, got 1.0"),
        ({"optimizer": torch.optim.RMSprop}, "tangents are known for SGD, Adam, AdamW .* got a RMSprop"),
        ({"optimizer": Adam, "settings": {"amsgrad": True}}, "amsgrad"),
        ({"settings": {"lr": 0.1, "maximize": True}}, "maximize"),
    ],
)
def test_what_cannot_be_tuned_gets_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loss", [torch.tensor(1.0), 1.0, torch.ones(2, requires_grad=True)])
def test_losses_without_a_graph_get_one_line(loss):
    with pytest.raises(ConfigError, match=r"^loss: expected a loss of one number with its graph"):
        make().step(loss)
    x = nn.Parameter(torch.ones(2))
    tuner = GlocalTuner(SGD([x], lr=0.1), validation=lambda: loss)
    with pytest.raises(ConfigError, match=r"^validation: expected a loss of one number with its graph"):
        tuner.step(x.sum())


@FALLS_BACK
def test_the_documented_example_runs():
    page = (Path(__file__).parents[2] / "docs" / "howto" / "dynamics.md").read_text(encoding="utf-8")
    section = page.split("## Tune hyper-parameters online", 1)[1]
    code = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)[1]
    scope = {}
    exec(code, scope)
    assert scope["tuner"].health()["updates"] > 0


@pytest.mark.parametrize("case", ["momentum", "adam"])
@pytest.mark.parametrize("stop", [7, 10])
def test_a_run_that_is_resumed_goes_on_to_the_bit(case, stop, tmp_path):
    """Within a trajectory, and just after an update."""
    kind, settings, names = CASES[case]

    def begin():
        groups, loss, validation = problem()
        optimizer = kind(groups, **settings)
        return groups, loss, optimizer, GlocalTuner(optimizer, names, tau=5, validation=validation)

    def advance(loss, tuner, steps):
        for _ in range(steps):
            tuner.step(loss())

    groups, loss, optimizer, tuner = begin()
    advance(loss, tuner, stop)
    params = [param.detach().clone() for group in groups for param in group["params"]]
    torch.save([params, optimizer.state_dict(), tuner.state_dict()], tmp_path / "run.pt")
    advance(loss, tuner, 20 - stop)
    others, other_loss, other_optimizer, other = begin()
    params, state, tuning = torch.load(tmp_path / "run.pt")
    with torch.no_grad():
        for param, saved in zip([p for group in others for p in group["params"]], params, strict=True):
            param.copy_(saved)
    other_optimizer.load_state_dict(state)
    other.load_state_dict(tuning)
    advance(other_loss, other, 20 - stop)
    assert other.health() == tuner.health()
    assert other.health()["updates"] == 4
    for group, again in zip(groups, others, strict=True):
        for param, same in zip(group["params"], again["params"], strict=True):
            assert torch.equal(param, same)


def test_a_state_of_something_else_gets_one_line():
    groups, loss, validation = problem()
    tuner = GlocalTuner(SGD(groups, lr=0.1, momentum=0.9), ("lr", "momentum"), tau=5, validation=validation)
    for _ in range(3):
        tuner.step(loss())
    other = GlocalTuner(SGD(problem()[0], lr=0.1, momentum=0.9), ("lr",), tau=5, validation=validation)
    for state, message in (
        ({"steps": 3}, "not of a GlocalTuner"),
        ([], "not of a GlocalTuner"),
        (tuner.state_dict(), "other parameters or hyper-parameters"),
    ):
        with pytest.raises(ConfigError, match=message):
            other.load_state_dict(state)
    assert other.state_dict()["steps"] == 0
