"""Weights of examples: the hypergradient is that of a step, and wrong labels lose theirs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l2o_runtime import ConfigError
from l2o_training.tune import ExampleWeights
from l2o_training.tune.reweighting import FARTHEST, alignment


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_alignment_is_that_of_each_example_s_gradient():
    net, inputs, labels = network(), torch.randn(7, 4).double(), torch.randint(3, (7,))
    params = list(net.parameters())
    direction = [torch.randn_like(param) for param in params]
    losses = F.cross_entropy(net(inputs), labels, reduction="none")
    one_by_one = [
        sum((g * v).sum() for g, v in zip(torch.autograd.grad(loss, params, retain_graph=True), direction, strict=True))
        for loss in losses
    ]
    torch.testing.assert_close(alignment(losses, params, direction), torch.stack(one_by_one))
    assert torch.equal(alignment(losses, params, [None] * len(params)), torch.zeros(7).double())


def test_it_is_the_derivative_of_the_validation_loss_after_a_step():
    """Central differences, of a step so short that the gradient of V is the same before and after."""
    net, lr = network(), 1e-6
    inputs, labels = torch.randn(2, 6, 4).double(), torch.randint(3, (2, 6))
    params, start = list(net.parameters()), [param.detach().clone() for param in net.parameters()]

    def after(weights) -> float:
        for param, value in zip(params, start, strict=True):
            param.data.copy_(value)
        loss = (weights * F.cross_entropy(net(inputs[0]), labels[0], reduction="none")).sum()
        for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            param.data.sub_(lr * grad)
        return F.cross_entropy(net(inputs[1]), labels[1]).item()

    nudges = torch.eye(6).double()
    by_difference = torch.tensor([(after(1 + e) - after(1 - e)) / 2 / lr for e in nudges]).double()
    after(torch.zeros(6).double())
    ahead = torch.autograd.grad(F.cross_entropy(net(inputs[1]), labels[1]), params)
    found = -alignment(F.cross_entropy(net(inputs[0]), labels[0], reduction="none"), params, list(ahead))
    torch.testing.assert_close(by_difference, found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimate", ["local", "mean", "glocal"])
def test_examples_with_wrong_labels_lose_their_weight(estimate):
    """Two clusters, a third of the labels swapped, and a few clean ones."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (90,), generator=rng)
    inputs = torch.randn(90, 3, generator=rng) + 2 * labels[:, None]
    given = torch.cat([1 - labels[:24], labels[24:72]])
    line = nn.Linear(3, 2)
    nn.init.zeros_(line.weight)
    weights, optimizer = ExampleWeights(72, 4, estimate=estimate), torch.optim.SGD(line.parameters(), lr=0.1)
    for _ in range(40):
        losses = F.cross_entropy(line(inputs[:72]), given, reduction="none")
        weights.measure(losses, F.cross_entropy(line(inputs[72:]), labels[72:]), list(line.parameters()))
        share = weights(torch.arange(72))
        losses = F.cross_entropy(line(inputs[:72]), given, reduction="none")
        optimizer.zero_grad()
        ((share * losses).sum() / share.sum()).backward()
        optimizer.step()
    assert weights.updates == 10
    share = weights(torch.arange(72))
    assert share[:24].mean() < 0.5 * share[24:].mean()
    assert weights.logits.abs().max() <= FARTHEST


def test_what_is_not_finite_leaves_weights_as_they_are():
    theta = torch.ones(2, requires_grad=True)
    weights = ExampleWeights(2, 3)
    for _ in range(3):
        weights.measure(theta.square() * float("inf"), theta.sum(), [theta])
    assert torch.equal(weights(torch.arange(2)), torch.full((2,), 0.5))
    assert (weights.updates, weights.fallbacks) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count: expected 1 example or more, got 0"),
        ({"tau": 2}, "tau: expected 3 measurements or more, got 2"),
        ({"meta_lr": -1.0}, "meta_lr"),
        ({"tolerance": 2.0}, "tolerance"),
        ({"estimate": "global"}, "estimate: 'global' is not one of glocal, local, mean"),
    ],
)
def test_bad_numbers_get_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ExampleWeights(**({"count": 3} | arguments))


def test_bad_losses_get_one_line():
    theta = torch.ones(2, requires_grad=True)
    with pytest.raises(ConfigError, match=r"losses: expected one for each of the 3 examples, .* got \(2,\)"):
        ExampleWeights(3).measure(theta.square(), theta.sum(), [theta])
    with pytest.raises(ConfigError, match="validation: expected a loss of one number with its graph"):
        ExampleWeights(2).measure(theta.square(), theta.detach().sum(), [theta])


def test_a_run_that_is_resumed_goes_on_to_the_bit():
    theta, labels = torch.zeros(1, requires_grad=True), torch.tensor([1.0, -5.0])

    def measure(weights, times):
        for _ in range(times):
            weights.measure((theta - labels).square(), (theta - 1).square().sum(), [theta])

    weights, again = (ExampleWeights(2, tau=3) for _ in range(2))
    measure(weights, 4)
    again.load_state_dict(weights.state_dict())
    measure(weights, 5)
    measure(again, 5)
    assert again.updates == weights.updates == 3
    assert torch.equal(again.logits, weights.logits)
    for state, message in (({}, "not of ExampleWeights"), (weights.state_dict(), "of 2 examples, these are 3")):
        with pytest.raises(ConfigError, match=message):
            ExampleWeights(3).load_state_dict(state)
