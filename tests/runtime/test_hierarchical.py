"""The hierarchical rule against NumPy, its tiers, and what it is before meta-training."""

import dataclasses

import numpy as np
import pytest
import torch
from rules import first_state, make_rule
from torch import nn

from l2o_runtime import ConfigError, LearnedOptimizer, save_rule
from l2o_runtime.rules import HierarchicalConfig
from l2o_runtime.rules import make_rule as untrained
from l2o_runtime.rules.gru import GRU
from l2o_runtime.solvers import Descent
from l2o_training.config import load_preset
from l2o_training.meta.trainer import Trainer
from l2o_training.meta.unroll import begin, unroll
from l2o_training.tasks import QuadraticConfig, make_task
from l2o_training.tasks.data import load_dataset

SMALL = HierarchicalConfig(hidden=3, tensor_hidden=4, model_hidden=2, output_scale=0.01)
SHAPES = [(3, 2), (5,), ()]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def plain_gru(w, name, x, h, bias):
    i = x @ w[f"{name}.weight_ih"].T + w[f"{name}.bias_ih"] + bias
    m = h @ w[f"{name}.weight_hh"].T + w[f"{name}.bias_hh"]
    (i_r, i_z, i_n), (m_r, m_z, m_n) = np.split(i, 3, axis=-1), np.split(m, 3, axis=-1)
    r, z = sigmoid(i_r + m_r), sigmoid(i_z + m_z)
    return (1 - z) * np.tanh(i_n + r * m_n) + z * h


def plain_steps(rule, grads, sizes):
    """Steps (T, n) of L2O-Scale as the paper has it, tensor by tensor, in NumPy."""
    w = {name: tensor.double().numpy() for name, tensor in rule.state_dict().items()}
    config, gamma = rule.config, sigmoid(w["trailing"])
    halves, steps = 0.5 ** np.arange(4), []
    h, g, v, rate = ([np.zeros((n, *size)) for n in sizes] for size in ((config.hidden,), (4,), (4,), ()))
    tensors, model = [np.zeros(config.tensor_hidden) for _ in sizes], np.zeros(config.model_hidden)
    for grad in grads:
        for s in range(len(sizes)):
            above = model @ w["model_to_tensor.weight"].T
            tensors[s] = plain_gru(w, "tensor_cell", h[s].mean(0), tensors[s], above)
        model = plain_gru(w, "model_cell", np.mean(tensors, axis=0), model, 0.0)
        moves = []
        for s, own in enumerate(np.split(grad, np.cumsum(sizes)[:-1])):
            logits = h[s] @ w["decays.weight"].T + w["decays.bias"]
            momentum, scaling = (sigmoid(logits[:, k, None]) ** halves for k in (0, 1))
            g[s] = momentum * g[s] + (1 - momentum) * own[:, None]
            v[s] = scaling * v[s] + (1 - scaling) * g[s] ** 2
            m, size = np.arcsinh(g[s] / np.sqrt(v[s])), np.log(v[s])
            seen = [m, m[:, :-1] * m[:, 1:], size - size.mean(1, keepdims=True), (rate[s] - rate[s].mean())[:, None]]
            bias = tensors[s] @ w["tensor_to_coordinate.weight"].T + model @ w["model_to_coordinate.weight"].T
            h[s] = plain_gru(w, "coordinate_cell", np.concatenate(seen, axis=1), h[s], bias)
            d = (h[s] @ w["direction.weight"].T + m @ w["shortcut.weight"].T)[:, 0]
            ahead = rate[s] + (h[s] @ w["length.weight"].T + w["length.bias"])[:, 0]
            moves.append(-config.output_scale * np.exp(ahead) * d / np.sqrt(np.mean(d**2)))
            rate[s] = gamma * rate[s] + (1 - gamma) * ahead
        steps.append(np.concatenate(moves))
    return np.array(steps)


def test_the_optimizer_takes_the_steps_of_the_paper(tmp_path):
    rule = make_rule(SMALL)
    save_rule(tmp_path / "rule.safetensors", rule)
    sizes = [int(np.prod(shape)) for shape in SHAPES]
    grads = np.random.default_rng(0).normal(size=(12, sum(sizes))) * 10.0 ** np.linspace(-3, 3, sum(sizes))
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    optimizer, seen = LearnedOptimizer(params, tmp_path / "rule.safetensors"), []
    for grad in grads:
        before = torch.cat([param.detach().reshape(-1).clone() for param in params])
        for param, own in zip(params, np.split(grad, np.cumsum(sizes)[:-1]), strict=True):
            param.grad = torch.as_tensor(own).view(param.shape)
        optimizer.step()
        seen.append((torch.cat([param.detach().reshape(-1) for param in params]) - before).numpy())
    wanted = plain_steps(rule, grads, sizes)
    np.testing.assert_allclose(seen, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def test_the_cell_is_that_of_torch_with_biases():
    torch.manual_seed(0)
    ours, theirs = GRU(4, 3), nn.GRUCell(4, 3)
    x, h, bias = torch.randn(2, 5, 4), torch.randn(2, 5, 3), torch.randn(9)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        theirs.bias_ih.add_(bias)
    wanted = theirs(x.flatten(0, 1), h.flatten(0, 1)).view(2, 5, 3)
    torch.testing.assert_close(ours(x, h, bias), wanted)


def run(rule, grads, shapes=SHAPES):
    """Steps (T, n) of constant parameters."""
    (coordinates, optimization), (layout,) = first_state(rule, (), shapes)
    steps = []
    for grad in grads:
        delta, coordinates, optimization = rule(
            torch.zeros_like(grad), grad, torch.zeros(()), coordinates, optimization, layout
        )
        steps.append(delta)
    return torch.stack(steps)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e6])
def test_steps_do_not_change_with_the_scale_of_gradients(scale):
    grads = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    rule = make_rule(SMALL)
    torch.testing.assert_close(run(rule, grads * scale), run(rule, grads), rtol=1e-3, atol=1e-6)


def test_before_meta_training_steps_are_of_momentum_and_have_one_size():
    torch.manual_seed(0)
    rule = untrained(SMALL).requires_grad_(False)
    grads = torch.randn(30, 12) + 3 * torch.arange(-6.0, 6.0)
    steps = run(rule, grads)
    for part in steps.split([6, 5, 1], dim=-1):
        torch.testing.assert_close(part.square().mean(-1).sqrt(), torch.full((30,), 0.01), rtol=1e-3, atol=0)
    assert (steps[-1, 1:6] * grads.mean(0)[1:6] < 0).all()


def test_to_rescale_a_problem_is_to_begin_at_another_learning_rate():
    """Exactly: so `rescale` draws initial learning rates as the paper does."""
    task, losses = make_task(QuadraticConfig(size=5), load_dataset, torch.device("cpu")), []
    for rate, scale in ((0.01, 1.0), (0.00125, 8.0)):
        instances, solver = task.instances(2, seed=0), Descent(make_rule(dataclasses.replace(SMALL, output_scale=rate)))
        instances.rescale(torch.full((2, 1), scale))
        losses.append(unroll(solver, begin(solver, instances), 20).losses)
    assert losses[0][-1].max() < losses[0][0].max()
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


@pytest.mark.parametrize("tier", ["tensor_to_coordinate", "model_to_coordinate", "model_to_tensor"])
def test_every_tier_has_a_say(tier):
    grads = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    rule = make_rule(SMALL)
    before = run(rule, grads)
    getattr(rule, tier).weight.mul_(-3)
    assert not torch.allclose(run(rule, grads), before, rtol=1e-3)


def test_a_tensor_hears_of_the_others_through_the_model_alone():
    grads = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    other = torch.cat([grads[:, :6], -grads[:, 6:].abs()], dim=-1)
    rule = make_rule(SMALL)
    assert not torch.equal(run(rule, grads)[:, :6], run(rule, other)[:, :6])
    for name in ("model_to_coordinate", "model_to_tensor"):
        getattr(rule, name).weight.zero_()
    torch.testing.assert_close(run(rule, grads)[:, :6], run(rule, other)[:, :6], rtol=0, atol=0)


def test_log_learning_rates_stay_within_bounds():
    rule = make_rule(SMALL)
    rule.length.bias.fill_(1e4)
    steps = run(rule, torch.randn(40, 12, generator=torch.Generator().manual_seed(0)))
    assert steps.isfinite().all()
    assert steps.abs().max() > 1e10


def test_tensors_without_gradients_have_no_gradient_that_is_not_finite():
    """Meta-gradients go through divisions by what is zero there."""
    torch.manual_seed(0)
    rule = untrained(SMALL)
    grads = torch.randn(5, 12)
    grads[:, 6:11] = 0
    run(rule, grads).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in rule.parameters())


@pytest.mark.parametrize("key", ["tensor_hidden", "model_hidden"])
def test_sizes_are_checked(key):
    with pytest.raises(ConfigError, match=rf"{key}: must be in 1\.\.512, got 0"):
        HierarchicalConfig(**{key: 0})


@pytest.mark.slow
def test_its_preset_meta_trains_it(tmp_path):
    changes = ["epochs=10", "horizon=20", "tasks=[{kind='quadratic', size=6}]", "validation_tasks=[]", "lr=0.02"]
    changes += ["validate_every=5", "validation_runs=2", "lanes=1", "rescale=0.5"]
    trainer = Trainer(load_preset("l2o-scale", changes), tmp_path / "run")
    start = {name: weight.clone() for name, weight in trainer.rule.state_dict().items()}
    trainer.run()
    scores = [row["validation"] for row in trainer.history if "validation" in row]
    assert scores[-1] < scores[0]
    assert all(
        not torch.equal(weight, start[name]) for name, weight in trainer.rule.state_dict().items() if weight.numel()
    )
