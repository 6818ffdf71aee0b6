"""RNNprop against NumPy, in the optimizer, in every format, and in meta-training."""

import numpy as np
import pytest
import torch

from l2o_export.export import export_rule
from l2o_runtime import LearnedOptimizer, load_rule, make_rule, save_rule
from l2o_runtime.config import DMDConfig
from l2o_runtime.files.exported import load_exported
from l2o_runtime.rules import RNNPropConfig
from l2o_training.config import load_preset
from l2o_training.meta.trainer import Trainer

pytestmark = pytest.mark.slow


def some_rule(**changes):
    torch.manual_seed(0)
    rule = make_rule(RNNPropConfig(**changes)).requires_grad_(False)
    rule.cell.head.weight.mul_(20)
    return rule


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def plain_steps(rule, grads):
    """Steps (T, n) of RNNprop as its paper has it, in NumPy."""
    w = {name: tensor.double().numpy() for name, tensor in rule.state_dict().items()}
    hidden, n = rule.config.hidden, grads.shape[1]
    m, v, steps = np.zeros(n), np.zeros(n), []
    memory = [(np.zeros((n, hidden)), np.zeros((n, hidden))) for _ in range(rule.config.layers)]
    for t, g in enumerate(grads, 1):
        m, v = 0.95 * m + 0.05 * g, 0.95 * v + 0.05 * g**2
        root = np.sqrt(v / (1 - 0.95**t)) + 1e-8
        x = np.stack([m / (1 - 0.95**t) / root, g / root], axis=-1) @ w["into.weight"].T + w["into.bias"]
        x = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
        for layer, (h, c) in enumerate(memory):
            gates = x @ w[f"cell.weight_ih.{layer}"].T + h @ w[f"cell.weight_hh.{layer}"].T + w[f"cell.bias.{layer}"]
            i, f, u, o = np.split(gates, 4, axis=-1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(u)
            x = sigmoid(o) * np.tanh(c)
            memory[layer] = x, c
        steps.append(rule.config.output_scale * np.tanh(x @ w["cell.head.weight"][0] + w["cell.head.bias"][0]))
    return np.array(steps)


def test_it_has_as_many_weights_as_the_papers():
    assert sum(p.numel() for p in make_rule(RNNPropConfig()).parameters()) == 6641


def test_the_optimizer_takes_the_steps_of_the_paper(tmp_path):
    rule = some_rule()
    save_rule(tmp_path / "rule.safetensors", rule)
    grads = np.random.default_rng(0).normal(size=(12, 7)) * 10.0 ** np.arange(-3, 4)
    param = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))
    optimizer, seen = LearnedOptimizer([param], tmp_path / "rule.safetensors"), []
    for grad in grads:
        before = param.detach().clone()
        param.grad = torch.as_tensor(grad)
        optimizer.step()
        seen.append((param.detach() - before).numpy())
    np.testing.assert_allclose(seen, plain_steps(rule, grads), rtol=1e-3, atol=1e-6)
    assert np.abs(seen).max() <= 0.1


@pytest.mark.parametrize("context", [None, DMDConfig(window=4, sketch=16)], ids=["none", "dmd"])
def test_every_format_does_what_the_rule_does(tmp_path, context):
    rule = some_rule(hidden=6, **({} if context is None else {"context": context}))
    save_rule(tmp_path / "rule.safetensors", rule)
    assert load_rule(tmp_path / "rule.safetensors").config == rule.config
    manifest = export_rule(tmp_path / "rule.safetensors", ["torchscript", "pt2"], tmp_path / "out")
    assert not manifest["failed"]
    for name in manifest["files"]:
        assert load_exported(tmp_path / "out" / name).config == rule.config


def test_its_preset_meta_trains_it(tmp_path):
    changes = ["epochs=30", "tasks=[{kind='quadratic', size=6}]", "validate_every=10", "validation_runs=16", "lr=0.01"]
    trainer = Trainer(load_preset("rnnprop", changes), tmp_path / "run")
    start, before = {name: weight.clone() for name, weight in trainer.rule.state_dict().items()}, trainer.validate()
    rule = load_rule(trainer.run())
    scores = [row["validation"] for row in trainer.history if "validation" in row]
    assert min(scores) < 0.1 * before, "what is drawn varies: not every validation is lower than the one before"
    assert all(not torch.equal(weight, start[name]) for name, weight in rule.state_dict().items() if weight.numel())
