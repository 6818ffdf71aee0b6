"""HALO: slopes of squared gradients against Hessians, layer-wise updates, and where neither can be."""

import dataclasses

import pytest
import torch
from resuming import assert_resumes_bit_for_bit
from rules import RULES, make_rule
from torch import nn

from l2o_runtime import ConfigError
from l2o_runtime.config import to_dict
from l2o_runtime.solvers import Descent, Point, Solver
from l2o_training.config import load_preset
from l2o_training.meta.objectives import Jacobian, LogLoss, Loss, make_objectives
from l2o_training.meta.partial import PartialUpdates
from l2o_training.meta.steppers import Recomputing, Stepper
from l2o_training.meta.trainer import Trainer
from l2o_training.meta.unroll import begin, unroll
from l2o_training.tasks import (
    AutoencoderConfig,
    ConvConfig,
    MLPConfig,
    QuadraticConfig,
    RegressionConfig,
    TextConfig,
    make_task,
)
from l2o_training.tasks.data import load_dataset

KINDS = {
    "quadratic": QuadraticConfig(size=4),
    "mlp": MLPConfig(hidden=(3,), batch_size=8),
    "layer": MLPConfig(hidden=(3,), batch_size=8, norm="layer", activation="tanh"),
    "batch": MLPConfig(hidden=(3,), batch_size=8, norm="batch", activation="gelu"),
    "conv": ConvConfig(data="digits", channels=(2, 3), batch_size=8, activation="silu"),
    "autoencoder": AutoencoderConfig(hidden=(4, 2), batch_size=8),
    "gru": TextConfig(cell="gru", characters=4, length=4, width=4, batch_size=4),
    "transformer": TextConfig(cell="transformer", characters=4, length=4, width=4, batch_size=4),
    "regression": RegressionConfig(size=3, hidden=(3,), batch_size=8),
}


def instances_of(kind, count=2, seed=0):
    return make_task(KINDS[kind], load_dataset, torch.device("cpu")).instances(count, seed)


def in_float64(instances):
    """The same problems on one minibatch, in float64."""
    batch = tuple(x.double() if x.is_floating_point() else x for x in instances._batches())
    instances.params, instances.statistics = instances.params.double(), instances.statistics.double()
    instances._batches = lambda: batch
    return instances, batch


@pytest.mark.parametrize("kind", ["quadratic", "mlp"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_slope_is_that_of_the_whole_hessian(kind, scaled):
    instances, batch = in_float64(instances_of(kind))
    scale = torch.tensor([0.5, 3.0], dtype=torch.float64)
    if scaled:
        instances.rescale(scale.unsqueeze(-1))
    theta = instances.params + 0.1
    seen = instances.look(theta, instances.statistics)
    slope = instances.slope_of_square(theta)
    unscaled = seen.grad / scale.unsqueeze(-1) ** 2 if scaled else seen.grad  # once for ∇L, once for its square's slope
    for i in range(2):
        alone = [x[i : i + 1] for x in (*batch, instances.statistics)]

        def loss(x, alone=alone, factor=scale[i] if scaled else 1.0):
            return instances._losses((x * factor).unsqueeze(0), tuple(alone[:-1]), alone[-1], True)[0].sum()

        # The losses of a network go through a module that has as many copies as there are instances.
        if kind == "quadratic":
            hessian = torch.autograd.functional.hessian(loss, theta[i])
            torch.testing.assert_close(slope[i], 2 * hessian @ unscaled[i])
    rows = torch.autograd.functional.jacobian(lambda x: _gradient(instances, x, batch), theta, create_graph=False)
    for i in range(2):
        torch.testing.assert_close(slope[i], 2 * rows[i, :, i].mT @ unscaled[i])


def test_a_rescaled_problem_is_as_flat_as_it_was():
    """Or λ would be worth s² of itself."""
    found = []
    for scale in (1.0, 0.01, 100.0):
        instances = instances_of("quadratic")
        batch = instances._batches()
        instances._batches = lambda batch=batch: batch
        instances.rescale(torch.full((len(instances.params), 1), scale))
        seen = instances.look(instances.params, instances.statistics)
        value, slope = Jacobian(weight=1.0).at(instances, Point(instances.params, seen.loss, seen.grad))
        found.append((value.float(), slope / scale))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def _gradient(instances, theta, batch):
    inner = theta if instances._scale is None else theta * instances._scale
    losses, _ = instances._losses(inner, batch, instances.statistics, True)
    return torch.autograd.grad(losses.sum(), theta, create_graph=True)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_has_a_slope(kind):
    """Against differences of squared gradients, in a direction of chance."""
    instances = instances_of(kind)
    batch = instances._batches()
    instances._batches = lambda: batch
    theta, statistics = instances.params + 0.05, instances.statistics
    along = torch.randn(theta.shape, generator=torch.Generator().manual_seed(1))
    ends = [instances.look(theta + sign * 3e-3 * along, statistics).grad.double().square().sum(-1) for sign in (1, -1)]
    seen = instances.look(theta, statistics)
    slope = instances.slope_of_square(theta)
    wanted = (ends[0] - ends[1]) / 6e-3
    length = (slope.norm(dim=-1) * along.norm(dim=-1)).double()
    assert ((slope * along).sum(-1) - wanted).abs().le(0.01 * length + 1e-4).all()
    again = instances.look(theta, statistics)
    assert torch.equal(seen.grad, again.grad), "the statistics stay as they were"


class Momentum(Solver):
    """θ ← θ − a m, m ← b m + ∇L."""

    def __init__(self):
        super().__init__()
        self.rate, self.decay = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (0.02, 0.7))

    def init(self, problems):
        return {"m": torch.zeros_like(problems.params)}

    def step(self, point, state):
        momentum = self.decay * state["m"] + point.grad
        return point.params - self.rate * momentum, {"m": momentum}


def test_a_truncations_gradient_is_that_of_autograd_through_all_of_it():
    """Over four steps; gradients are constants of the solver, as everywhere in first order."""
    instances, (matrix, target) = in_float64(instances_of("quadratic"))
    solver, weight = Momentum(), 0.3
    found = unroll(solver, begin(solver, instances), 4, [Loss(), Jacobian(weight=weight)])
    found.objective.backward()
    twin = Momentum()
    theta, momentum, total = instances.params, 0.0, 0.0
    for _ in range(4):
        residual = torch.einsum("bij,bj->bi", matrix, theta.detach()) - target
        momentum = twin.decay * momentum + 2 * torch.einsum("bij,bi->bj", matrix, residual)
        theta = theta - twin.rate * momentum
        residual = torch.einsum("bij,bj->bi", matrix, theta) - target
        gradient = 2 * torch.einsum("bij,bi->bj", matrix, residual)
        total = total + (residual.square().sum(-1) + weight * gradient.square().sum(-1)).mean()
    total.backward()
    torch.testing.assert_close(found.value, total.detach())
    for ours, theirs in zip(solver.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_it_is_of_the_minibatch_that_was_looked_at():
    """With a tail, a second minibatch is looked at in every step."""
    seen = []

    class Watching(Jacobian):
        def at(self, instances, point):
            batch, statistics = instances._latest
            seen.append((instances._losses(point.params, batch, statistics, True)[0], point.loss))
            return super().at(instances, point)

    solver = Descent(make_rule(RULES["none-log_sign"]))
    for objectives in ([Watching(), LogLoss(span=0.5)], [LogLoss(span=0.5), Watching(span=0.5), Watching()]):
        unroll(solver, begin(solver, instances_of("mlp")), 3, objectives)
    assert len(seen) == 9
    for pair in seen:
        torch.testing.assert_close(*pair)


def steps(solver, instances, count):
    """Parameters (count + 1, B, n) of a run, and the last state."""
    state, params = solver.init(instances), [instances.params]
    with torch.no_grad():
        for _ in range(count):
            theta, state = solver.step(Point(params[-1], *instances.value_and_grad(params[-1])), state)
            params.append(theta)
    return torch.stack(params), state


def test_tensors_that_are_not_drawn_stay_where_they_are():
    instances = instances_of("mlp", count=3)
    solver = PartialUpdates(make_rule(RULES["none-log_sign"]), 0.3)
    params, _ = steps(solver, instances, 60)
    sizes = [shape.numel() for shape in instances.shapes]
    moved = torch.stack([(part != 0).any(-1) for part in params.diff(dim=0).split(sizes, dim=-1)], dim=-1)
    assert moved.shape == (60, 3, 4)
    assert 0.25 < moved.double().mean() < 0.35
    assert all(not torch.equal(moved[..., i], moved[..., j]) for i in range(4) for j in range(i))
    assert not torch.equal(moved[:, 0], moved[:, 1]), "each instance has its own"


def test_the_states_of_all_tensors_go_on():
    """And a step in which all are drawn is that of plain descent."""
    rule = make_rule(RULES["none-hierarchical"])
    some, all_of_them, plain = PartialUpdates(rule, 0.3), PartialUpdates(rule, 1.0), Descent(rule)
    runs = [steps(solver, instances_of("mlp"), 1) for solver in (some, all_of_them, plain)]
    assert torch.equal(runs[1][0], runs[2][0])
    assert all(torch.equal(runs[0][1][key], value) for key, value in runs[2][1].items())


def test_draws_depend_on_the_seed_of_the_instances_and_nothing_else():
    solver = PartialUpdates(make_rule(RULES["none-log_sign"]), 0.5)
    one, again, other = (steps(solver, instances_of("mlp", seed=seed), 5)[0] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    changed = [(x.diff(dim=0) != 0) for x in (one, other)]
    assert not torch.equal(*changed)


@pytest.mark.parametrize(
    "name",
    [
        *("none-log_sign", "dmd-exact-normalized", "kae-log_sign", "dmd-sketch-moments", "none-rnnprop"),
        *("none-scale", "directional", "dmd-sketch-hierarchical"),
    ],
)
def test_every_rule_can_be_meta_trained_so(name, tmp_path):
    config = load_preset("demo", ["unroll=4", "jacobian=0.001", "partial=0.5", "validation_runs=1"])
    config = dataclasses.replace(config, rule=RULES[name], tasks=(KINDS["mlp"],))
    trainer = Trainer(config, tmp_path)
    assert Jacobian(weight=0.001) in make_objectives(config)
    for _ in range(2):
        gradient, _ = trainer.meta_gradient()
    assert gradient.isfinite().all()
    assert gradient.any()


def test_steps_that_are_computed_again_draw_the_same():
    gradients = []
    for kind in (Stepper, Recomputing):
        solver = PartialUpdates(make_rule(RULES["none-log_sign"]).requires_grad_(), 0.5)
        trace = unroll(solver, begin(solver, instances_of("mlp")), 4, [Loss()], stepper=kind(solver))
        gradients.append(torch.autograd.grad(trace.objective, solver.rule.cell.head.weight)[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_resumed_runs_go_on_bit_for_bit(tmp_path):
    changes = ["epochs=3", "horizon=16", "shortest=4", "unroll=4", "lanes=3", "validate_every=1", "validation_runs=1"]
    config = load_preset("halo", [*changes, "partial=0.5", "rule.kind=lstm", "rule.hidden=4"])
    tasks = (KINDS["batch"], KINDS["quadratic"])
    config = dataclasses.replace(config, tasks=tasks, validation_tasks=tasks[1:])
    assert_resumes_bit_for_bit(config, tmp_path)


@pytest.mark.parametrize("key", ["jacobian=0.001", "partial=0.3"])
@pytest.mark.parametrize(
    ("change", "got"),
    [
        ("estimator=es", "estimator = es"),
        ("estimator=pes", "estimator = pes"),
        ("estimator=mixed", "estimator = mixed"),
        ("sample=0.5", "estimator = tbptt and sample = 0.5"),
    ],
)
def test_what_does_not_go_with_them_is_refused(key, change, got):
    name = key.partition("=")[0]
    message = rf"{name}: only with estimator = tbptt and without sample, got {got}"
    with pytest.raises(ConfigError, match=message):
        load_preset("demo", [key, change, "lanes=2"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["jacobian=-1"], "jacobian: must be 0 or more, got -1"),
        (["partial=0"], r"partial: must be in \(0, 1\] or absent, got 0"),
        (["partial=1.5"], "partial: must be in"),
        (["jacobian=1", "tasks=[{kind='python', make='mine.py:make'}]"], "jacobian: not with tasks of one's own"),
        (["partial=0.3", "expert=adam"], "partial: not with an expert"),
    ],
)
def test_bad_values_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_preset("demo", changes)


def test_the_preset_is_l2o_scale_and_nothing_else():
    halo, plain = (to_dict(load_preset(name)) for name in ("halo", "l2o-scale"))
    assert {key: halo[key] for key in halo.keys() - plain.keys()} == {"jacobian": 0.001, "partial": 0.3}
    assert {key for key in plain if plain[key] != halo[key]} == {"description"}
