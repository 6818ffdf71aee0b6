"""Steps of the directional rule in meta-training, compiled, against the plain rule and against the optimizer's."""

import copy
from dataclasses import replace

import pytest
import torch
from rules import RULES, first_state
from torch import nn

pytest.importorskip("llvmlite", reason="llvmlite is not installed: pip install '.[fast]'")

from l2o_runtime import LearnedOptimizer
from l2o_runtime.files.artifact import save_rule
from l2o_runtime.layout import Layout
from l2o_runtime.rules import make_rule
from l2o_runtime.solvers import Descent
from l2o_training.compare.flat import rollout
from l2o_training.fused import directional, pieces
from l2o_training.fused.lstm import fuse
from l2o_training.meta.unroll import begin, unroll
from l2o_training.tasks import MLPConfig, make_task
from l2o_training.tasks.data import load_dataset

pytestmark = pytest.mark.slow

SHAPES = [torch.Size(shape) for shape in [(12, 5), (12,), (3, 12), (3,), (1,), (40, 10), (), (4, 3, 3, 3), (1, 7)]]
"""Matrices that are tall and wide, of no more rows than the rank and of more, a kernel, and what is no matrix."""

COMPILED = ["directional", "directional-adam", "directional-places"]
NAMES = [name for name in RULES if name.startswith("directional")]


def pair(name="directional"):
    """The plain rule and the compiled one, with weights that are far from those of a rule that was not trained."""
    torch.manual_seed(0)
    plain = make_rule(RULES[name])
    nn.init.normal_(plain.head.weight, std=0.5)
    nn.init.normal_(plain.head.bias, std=0.5)
    if plain.places is not None:
        nn.init.normal_(plain.places)
    return plain, fuse(copy.deepcopy(plain))


@torch.no_grad()
def some_steps(rule, lead, steps=4, spoil=None):
    """Steps of a rule that is shown gradients of very different sizes, zeros among them."""
    rng = torch.Generator().manual_seed(1)
    (coordinates, optimization), (layout,) = first_state(rule, lead, SHAPES)
    n, deltas = len(layout.owner), []
    for _ in range(steps):
        param, grad, size = torch.randn(3, *lead, n, generator=rng).unbind()
        grad = grad * (2 * size).exp() * (torch.rand(*lead, n, generator=rng) > 0.1)
        if spoil is not None:
            grad[spoil] = torch.nan
        delta, coordinates, optimization = rule(param, grad, torch.ones(lead), coordinates, optimization, layout)
        deltas.append(delta)
    return torch.stack(deltas), coordinates, optimization


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_there_may_be_fewer_matrices_than_threads(monkeypatch, threads):
    """Compiled code does not take none: it reads past its table, and mostly crashes."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    dealt, deal = [], directional.share
    monkeypatch.setattr(directional, "share", lambda work, rows: (dealt.extend(map(len, rows)), deal(work, rows)))
    (plain, ours), shapes = pair(), [torch.Size([4, 3]), torch.Size([4])]
    (coordinates, optimization), (layout,) = first_state(plain, (1,), shapes)
    with torch.no_grad():
        param, grad = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
        steps = [
            rule(param, grad, torch.ones(1), dict(coordinates), dict(optimization), layout) for rule in (plain, ours)
        ]
    torch.testing.assert_close(steps[1][0], steps[0][0], rtol=2e-4, atol=5e-5 * float(steps[0][0].abs().max()))
    assert dealt == [1]


@pytest.fixture
def small(monkeypatch):
    """Pieces are cut anew."""
    pieces._pieces.cache_clear()
    yield lambda most: monkeypatch.setattr(pieces, "PIECE", most)
    pieces._pieces.cache_clear()


@pytest.mark.parametrize("most", [7, 8192])
@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_step_by_step(small, name, lead, most):
    """Steps and states, of tensors in one piece and in several; rules with a context take the plain path."""
    small(most)
    plain, ours = pair(name)
    assert isinstance(ours, directional.FusedDirectionalRule)
    assert directional._known(ours.config) == (name in COMPILED)
    found, expected = some_steps(ours, lead), some_steps(plain, lead)
    # What is orthogonalised differs by more than the rest; the optimizer's steps are matched more closely, below.
    torch.testing.assert_close(found[0], expected[0], rtol=2e-4, atol=5e-5 * float(expected[0].abs().max()))
    for own, other in zip(found[1:], expected[1:], strict=True):
        assert own.keys() == other.keys()
        for key, value in other.items():
            assert own[key].shape == value.shape, key
            torch.testing.assert_close(own[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=key)


def test_it_takes_the_steps_of_the_optimizer(tmp_path):
    """To rounding: the code is the same, and only what surrounds it is not."""
    plain, ours = pair()
    save_rule(tmp_path / "rule.safetensors", plain)
    torch.manual_seed(2)
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = LearnedOptimizer(params, rule=tmp_path / "rule.safetensors")
    optimizer.param_groups[0]["initial_lr"] = 1.0  # no schedule of its own
    flat = torch.cat([p.detach().flatten() for p in params])
    (coordinates, optimization), (layout,) = first_state(ours, (), SHAPES)
    for _ in range(6):
        for param in params:
            param.grad = torch.randn_like(param)
        grad = torch.cat([p.grad.flatten() for p in params])
        optimizer.step()
        with torch.no_grad():
            delta, coordinates, optimization = ours(flat, grad, torch.zeros(()), coordinates, optimization, layout)
        flat = flat + delta
    expected = torch.cat([p.detach().flatten() for p in params])
    torch.testing.assert_close(flat, expected, rtol=1e-6, atol=1e-6)


def test_what_it_is_given_stays_as_it_was():
    """Perturbed rules all begin with the same state."""
    _, ours = pair()
    state, (layout,) = first_state(ours, (2,), SHAPES)
    n = len(layout.owner)
    given = [torch.randn(2, n), torch.randn(2, n), torch.ones(2), *state, layout]
    before = copy.deepcopy(given)
    with torch.no_grad():
        first, second = ours(*given), ours(*given)
    torch.testing.assert_close(given, before, rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_neither_threads_nor_pieces_change_anything(small):
    """Sums of one thread and of three are of the same pieces in the same order."""
    before, results = torch.get_num_threads(), []
    small(50)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(some_steps(pair()[1], (3,)))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_an_instance_that_is_not_finite_leaves_others_alone():
    _, ours = pair()
    good, spoilt = some_steps(ours, (3,))[0], some_steps(ours, (3,), spoil=1)[0]
    assert torch.equal(spoilt[:, [0, 2]], good[:, [0, 2]])
    assert spoilt[:, 1].isnan().any()


def test_longer_steps_need_no_other_code():
    """The search for a length tries many, and each would be compiled, and kept on disk."""
    short, long = RULES["directional"], replace(RULES["directional"], output_scale=7.0)
    assert directional._architecture(short) == directional._architecture(long)


def test_a_gradient_is_that_of_the_plain_rule():
    task = make_task(MLPConfig(hidden=(4,), batch_size=8), load_dataset, torch.device("cpu"))
    grads, losses = [], []
    for rule in pair():
        solver, instances = Descent(rule), task.instances(3, seed=5)
        unroll(solver, begin(solver, instances), 4).objective.backward()
        grads.append(torch.cat([p.grad.flatten() for p in rule.parameters() if p.grad is not None]))
        losses.append(rollout(solver, task.instances(3, seed=5), 12))
    assert torch.equal(*grads)
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


def test_layouts_are_told_apart():
    """Two of the same sizes, whose matrices are not."""
    _, ours = pair()
    wide, tall = (directional.Tensors.of(ours.layout([torch.Size(s)])) for s in [(3, 4), (4, 3)])
    assert wide.matrices.tolist() == [[0, 3, 4, 1]]
    assert tall.matrices.tolist() == [[0, 3, 4, 0]]
    assert directional.Tensors.of(Layout(*ours.layout([torch.Size((3, 4))]))) is wide
