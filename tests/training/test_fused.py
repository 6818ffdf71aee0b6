"""The cell that meta-training uses on CPUs, against the plain one."""

import copy

import pytest
import torch
from rules import RULES, first_state

pytest.importorskip("llvmlite", reason="llvmlite is not installed: pip install '.[fast]'")

from l2o_runtime import rules
from l2o_runtime.layout import Layout
from l2o_runtime.rules import LSTMConfig, MomentsConfig, RNNPropConfig, make_rule
from l2o_runtime.rules import make_rule as new_rule
from l2o_runtime.rules.coordinate_lstm import CoordinateLSTM
from l2o_runtime.solvers import Descent
from l2o_runtime.state import zeros
from l2o_training.compare.flat import rollout
from l2o_training.fused import lstm as fused
from l2o_training.fused import pieces
from l2o_training.fused import tiered as fused_scale
from l2o_training.meta.objectives import Loss, loss_objectives
from l2o_training.meta.steppers import Recomputing, Stepper
from l2o_training.meta.unroll import begin, unroll
from l2o_training.tasks import MLPConfig, make_task
from l2o_training.tasks.base import Seen
from l2o_training.tasks.data import load_dataset

pytestmark = pytest.mark.slow


def pair(name):
    torch.manual_seed(0)
    plain = new_rule(RULES[name])
    return plain, fused.fuse(copy.deepcopy(plain))


def meta_loss(rule, instances, steps, *objectives):
    solver = Descent(rule)
    return unroll(solver, begin(solver, instances), steps, objectives or (Loss(),)).objective


def instances(count=3, hidden=4):
    task = make_task(MLPConfig(hidden=(hidden,), batch_size=8), load_dataset, torch.device("cpu"))
    return task.instances(count, seed=5)


@pytest.mark.parametrize("rule", ["none-normalized", "none-scale"])
def test_it_is_turned_off_with_the_other_kernels(monkeypatch, rule):
    monkeypatch.setenv("L2O_KERNELS", "plain")
    plain = make_rule(RULES[rule])
    kinds = [type(module) for module in plain.modules()]
    assert fused.fuse(plain) is plain
    assert [type(module) for module in plain.modules()] == kinds


@pytest.mark.parametrize("most", [70, 150, 2048])
@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
@pytest.mark.parametrize("name", ["none-normalized", "placebo-log_sign", "kae-normalized"])
def test_one_step_and_its_gradients(monkeypatch, name, lead, most):
    """Outputs, new states, and the derivatives by all parameters, old states and the context; in several ranges."""
    monkeypatch.setattr(fused, "RANGE", most)
    check_step([rule.cell for rule in pair(name)], lead)


@pytest.mark.parametrize(
    "config",
    [MomentsConfig(layers=1), LSTMConfig(hidden=7, layers=3), LSTMConfig(hidden=33), LSTMConfig(hidden=1)],
    ids=str,
)
def test_other_sizes_of_network(config):
    """Four outputs, rows of weights that do not fill vectors, one layer and more than two."""
    torch.manual_seed(0)
    plain = rules.make_rule(config)
    torch.nn.init.normal_(plain.cell.head.weight)
    check_step([plain.cell, fused.fuse(copy.deepcopy(plain)).cell], (2,))


@pytest.mark.parametrize("most", [70, 2048])
@pytest.mark.parametrize("lead", [(), (2, 2)])
@pytest.mark.parametrize("config", [RNNPropConfig(), RNNPropConfig(hidden=7, layers=1)], ids=str)
def test_features_that_are_learned_have_gradients(monkeypatch, config, lead, most):
    """The last tile of 200 coordinates begins before the one before it ends."""
    monkeypatch.setattr(fused, "RANGE", most)
    torch.manual_seed(0)
    plain = make_rule(config)
    check_step([plain.cell, fused.fuse(copy.deepcopy(plain)).cell], lead, learned=True)


def check_step(cells, lead, n=200, learned=False):
    assert isinstance(cells[1], fused.FusedLSTM)
    assert n >= cells[1].shape.tile
    hidden, keys = cells[0].hidden, [f"{name}{layer}" for layer in range(cells[0].layers) for name in "hc"]
    width = cells[0].weight_context.shape[1]
    context = torch.randn(*lead, width, requires_grad=True)
    features = 2 * torch.randn(*lead, n, cells[0].weight_ih[0].shape[1])
    features.requires_grad_(learned)
    state = {key: torch.randn(*lead, n, hidden, requires_grad=True) for key in keys}
    results = []
    for cell in cells:
        output, new = cell(features, context, state)
        loss = (output * torch.arange(n).unsqueeze(-1)).sum() + sum(
            (k + 1) * new[key].sin().sum() for k, key in enumerate(state)
        )
        wanted = [p for p in cell.parameters() if p.numel()] + list(state.values())
        wanted += [context] * bool(width) + [features] * learned
        results.append([output, *(new[key] for key in state), *torch.autograd.grad(loss, wanted)])
    for ours, expected in zip(reversed(results[1]), reversed(results[0]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize(
    "name", ["none-log_sign", "dmd-exact-normalized", "kae-log_sign", "none-moments", "dmd-sketch-rnnprop"]
)
def test_the_meta_gradient_of_a_truncation(name):
    grads = []
    for rule in pair(name):
        meta_loss(rule, instances(), 8).backward()
        grads.append(torch.cat([p.grad.flatten() for p in rule.parameters() if p.grad is not None]))
    assert (grads[1] - grads[0]).norm() <= 1e-5 * grads[0].norm()


class Bowls:
    """½‖θ‖², written down with its gradient: torch.func allows no hooks on what is kept."""

    params = torch.linspace(-1, 1, 3 * 400).view(3, 400)
    shapes, steps = [torch.Size([400])], None
    statistics = torch.zeros(3, 0)

    def look(self, params, statistics):
        losses = params.square().sum(-1) / 2
        return Seen(losses, params.clone(), losses, statistics)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", ["none-log_sign", "dmd-sketch-normalized", "kae-log_sign", "none-rnnprop"])
def test_recomputing_gives_the_same_gradient_with_less_memory(name, fast):
    grads, kept = [], []
    for kind in (Stepper, Recomputing):
        solver, sizes = Descent(pair(name)[fast]), []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            objective = unroll(solver, begin(solver, Bowls()), 8, stepper=kind(solver)).objective
        kept.append(sum(sizes))
        objective.backward()
        grads.append(torch.cat([p.grad.flatten() for p in solver.parameters() if p.grad is not None]))
    assert (grads[1] - grads[0]).norm() <= 1e-6 * grads[0].norm()
    assert fast or kept[1] < kept[0] / 4


@pytest.mark.parametrize("name", ["dmd-sketch-normalized", "dmd-sketch-rnnprop"])
def test_without_gradients_it_does_the_same(name):
    plain, ours = pair(name)
    losses = [rollout(Descent(rule), instances(), 12) for rule in (ours, plain)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_few_coordinates_take_the_plain_path():
    plain, ours = pair("none-normalized")
    n = ours.cell.shape.tile - 1
    state = {key: torch.zeros(2, n, 20) for key in ("h0", "c0", "h1", "c1")}
    features = torch.randn(2, n, 2)
    outputs = [rule.cell(features, torch.zeros(2, 0), state)[0] for rule in (plain, ours)]
    assert torch.equal(*outputs)


def test_the_number_of_threads_changes_nothing(monkeypatch):
    """Sums over coordinates are of the same ranges in the same order, whoever computes them."""
    monkeypatch.setattr(fused, "RANGE", 100)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            _, rule = pair("none-normalized")
            meta_loss(rule, Bowls(), 4).backward()
            results.append([p.grad for p in rule.parameters() if p.grad is not None])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


SHAPES = [(12, 5), (12,), (3, 12), (3,), (1,), (40, 10), ()]
"""Tensors of fewer coordinates than a vector, of more, of a whole number of vectors, and of some more."""


def two_tiers(name="none-scale", seed=0):
    """The plain rule and the compiled one, with weights that are far from those of a rule that was not trained."""
    torch.manual_seed(seed)
    plain = make_rule(RULES[name])
    for head in (plain.out, plain.cell.head):
        torch.nn.init.normal_(head.weight, std=0.3)
        torch.nn.init.normal_(head.bias, std=0.3)
    return plain, fused.fuse(copy.deepcopy(plain))


def some_steps(rule, lead, steps=4):
    """Steps of a rule that is shown gradients of very different sizes, zeros among them."""
    rng = torch.Generator().manual_seed(1)
    (coordinates, optimization), (layout,) = first_state(rule, lead, SHAPES)
    n, deltas = len(layout.owner), []
    for _ in range(steps):
        param, grad, size = torch.randn(3, *lead, n, generator=rng).unbind()
        grad = grad * (4 * size).exp() * (torch.rand(*lead, n, generator=rng) > 0.1)
        loss = torch.rand(lead, generator=rng) + 0.1
        delta, coordinates, optimization = rule(param, grad, loss, coordinates, optimization, layout)
        deltas.append(delta)
    return torch.stack(deltas), coordinates, optimization


@pytest.mark.parametrize("most", [7, 100, 8192])
@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
@pytest.mark.parametrize("name", [name for name in RULES if name.endswith("scale")])
def test_two_tiers_step_by_step(monkeypatch, name, lead, most):
    """Steps, states and the derivatives by all parameters, of tensors in one piece and in several."""
    monkeypatch.setattr(pieces, "PIECE", most)
    pieces._pieces.cache_clear()
    results = []
    for rule in two_tiers(name):
        deltas, *states = some_steps(rule, lead)
        weights = torch.linspace(-1, 1, deltas.numel()).view_as(deltas)
        parameters = [p for p in rule.parameters() if p.numel()]
        grads = torch.autograd.grad((weights * deltas).sum(), parameters, allow_unused=True)
        results.append([deltas, *(state[key] for state in states for key in sorted(state)), *grads])
    pieces._pieces.cache_clear()
    assert isinstance(rule, fused_scale.FusedTieredRule)
    for ours, expected in zip(reversed(results[1]), reversed(results[0]), strict=True):
        if expected is None:
            assert ours is None
        else:
            tolerance = 1e-5 * float(expected.detach().abs().max())
            torch.testing.assert_close(ours, expected, rtol=2e-5, atol=tolerance)


@pytest.mark.parametrize("bias", [-5.0, 5.0])
def test_a_size_beyond_its_bound_has_no_derivative(bias):
    """e^(2 o₁) is clamped; all coordinates are beyond."""
    for rule in two_tiers():
        torch.nn.init.constant_(rule.out.bias, 0.0)
        torch.nn.init.zeros_(rule.out.weight)
        rule.out.bias.data[0] = bias
        (some_steps(rule, (2,))[0]).sum().backward()
        assert rule.out.bias.grad[0] == 0
        assert rule.out.bias.grad[1:].abs().min() > 0


def test_the_meta_gradient_of_two_tiers():
    grads = []
    for rule in two_tiers():
        meta_loss(rule, instances(hidden=30), 8, *loss_objectives("log_loss", 0.1)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in rule.parameters() if p.grad is not None]))
    assert (grads[1] - grads[0]).norm() <= 1e-5 * grads[0].norm()


def test_two_tiers_need_no_gradient_and_no_one_thread(monkeypatch):
    """Threads are ours alone: with other numbers of its own, torch's products may round otherwise."""
    monkeypatch.setattr(pieces, "PIECE", 50)
    plain, ours = two_tiers()
    results = []
    try:
        for threads in (1, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            pieces._pieces.cache_clear()
            results.append(rollout(Descent(ours), instances(), 12))
    finally:
        pieces._pieces.cache_clear()
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], rollout(Descent(plain), instances(), 12), rtol=1e-5, atol=0)


def test_a_tensor_of_two_tiers_that_is_not_finite_stays_so():
    """Its own steps are NaN, and what is seen of it counts as zero, as in the plain rule."""
    outcomes = []
    for rule in two_tiers():
        layout = Layout.of([torch.Size(shape) for shape in SHAPES])
        n = len(layout.owner)
        state = (
            zeros(rule.spec.coordinate, (n,)),
            zeros(rule.spec.model, ()) | zeros(rule.spec.tensor, (len(SHAPES),)),
        )
        grad = torch.linspace(-1, 1, n)
        grad[3] = float("nan")
        delta, coordinates, _ = rule(torch.ones(n), grad, torch.tensor(1.0), *state, layout)
        assert coordinates["m10"][3].isnan()
        outcomes.append(delta)
    assert torch.equal(outcomes[0].isnan(), outcomes[1].isnan())
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-5, atol=1e-7, equal_nan=True)


def test_a_fused_rule_is_saved_like_any_other(tmp_path):
    plain, ours = pair("kae-normalized")
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))


def test_what_is_not_finite_stays_so():
    """A diverged instance must not come back with numbers that look right."""
    _, ours = pair("none-log_sign")
    state = {key: torch.zeros(200, 20, requires_grad=True) for key in ("h0", "c0", "h1", "c1")}
    features = torch.zeros(200, 2)
    features[2] = float("nan")
    output, _ = ours.cell(features, torch.zeros(0), state)
    assert output[2].isnan()
    assert output[torch.arange(200) != 2].isfinite().all()


@pytest.mark.parametrize("n", [64, 65, 129, 200])
def test_gates_are_close_everywhere(n):
    """σ and tanh of any size of argument, and the derivatives by every pre-activation."""
    torch.manual_seed(n)
    hidden = 3
    cell = CoordinateLSTM(1, 0, hidden, 1)
    ours = object.__new__(fused.FusedLSTM)
    ours.__dict__ = cell.__dict__
    torch.nn.init.zeros_(cell.bias[0])
    x = 10 ** torch.empty(n, 1).uniform_(-3, 3) * torch.randn(n, 1).sign()
    c, grad_h, grad_c = torch.randn(3, n, hidden).unbind()
    grad_output = torch.randn(n, 1)
    exact = (x.double() @ cell.weight_ih[0].detach().double().T).requires_grad_()
    before = c.double().requires_grad_()
    i, f, g, o = exact.chunk(4, -1)
    new_c = f.sigmoid() * before + i.sigmoid() * g.tanh()
    expected = [o.sigmoid() * new_c.tanh(), new_c]
    down = grad_output.double() @ cell.head.weight.detach().double()
    torch.autograd.backward(expected, [grad_h.double() + down, grad_c.double()])
    for gate in range(4):  # h is zero; with these weights its derivative is that by one gate's pre-activations
        torch.nn.init.zeros_(cell.weight_hh[0])
        torch.nn.init.eye_(cell.weight_hh[0].data[gate * hidden : (gate + 1) * hidden])
        state = {"h0": torch.zeros(n, hidden, requires_grad=True), "c0": c.clone().requires_grad_()}
        output, new = ours(x, torch.zeros(0), state)
        for key, wanted in zip(("h0", "c0"), expected, strict=True):
            torch.testing.assert_close(new[key].double(), wanted, rtol=1e-6, atol=2e-6)
        torch.autograd.backward([output, new["h0"], new["c0"]], [grad_output, grad_h, grad_c])
        torch.testing.assert_close(state["c0"].grad.double(), before.grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state["h0"].grad.double(), exact.grad.chunk(4, -1)[gate], rtol=1e-5, atol=1e-5)
