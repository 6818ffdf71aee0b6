"""The cell that meta-training uses on CPUs, against the plain one."""

import copy

import pytest
import torch
from rules import RULES

pytest.importorskip("llvmlite", reason="llvmlite is not installed: pip install 'l2o-runtime[fast]'")

from l2o_runtime.rule import Rule
from l2o_training import fused, gates
from l2o_training.data import load_dataset
from l2o_training.tasks import MLPConfig, make_task
from l2o_training.unroll import begin, rollout, unroll


def pair(name):
    torch.manual_seed(0)
    plain = Rule(RULES[name])
    return plain, fused.fuse(copy.deepcopy(plain))


def instances(count=3, hidden=4):
    task = make_task(MLPConfig(hidden=(hidden,), batch_size=8), load_dataset, torch.device("cpu"))
    return task.instances(count, seed=5)


@pytest.mark.parametrize("block", [30, 50, 2048])
@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
@pytest.mark.parametrize("name", ["none-normalized", "placebo-log_sign", "kae-normalized"])
def test_one_step_and_its_gradients(monkeypatch, name, lead, block):
    """Outputs, new states, and the derivatives by all parameters, old states and the context."""
    monkeypatch.setattr(fused, "BLOCK", block)
    cells = [rule.cell for rule in pair(name)]
    assert isinstance(cells[1], fused.FusedLSTM)
    width = cells[0].weight_context.shape[1]
    context = torch.randn(*lead, width, requires_grad=True)
    features = 2 * torch.randn(*lead, 50, 2)
    state = {key: torch.randn(*lead, 50, 20, requires_grad=True) for key in ("h0", "c0", "h1", "c1")}
    results = []
    for cell in cells:
        output, new = cell(features, context, state)
        loss = (output.squeeze(-1) * torch.arange(50)).sum() + sum(
            (k + 1) * new[key].sin().sum() for k, key in enumerate(state)
        )
        wanted = [p for p in cell.parameters() if p.numel()] + list(state.values()) + ([context] if width else [])
        results.append([output, *(new[key] for key in state), *torch.autograd.grad(loss, wanted)])
    for ours, expected in zip(reversed(results[1]), reversed(results[0]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("name", ["none-log_sign", "dmd-exact-normalized", "kae-log_sign"])
def test_the_meta_gradient_of_a_truncation(name):
    grads = []
    for rule in pair(name):
        unroll(rule, begin(rule, instances()), 8).objective.backward()
        grads.append(torch.cat([p.grad.flatten() for p in rule.parameters() if p.grad is not None]))
    assert (grads[1] - grads[0]).norm() <= 1e-5 * grads[0].norm()


class Bowls:
    """½‖θ‖², written down with its gradient: torch.func allows no hooks on what is kept."""

    params = torch.linspace(-1, 1, 3 * 400).view(3, 400)

    def value_and_grad(self, params):
        return params.square().sum(-1) / 2, params.clone()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", ["none-log_sign", "dmd-sketch-normalized", "kae-log_sign"])
def test_recomputing_gives_the_same_gradient_with_less_memory(name, fast):
    grads, kept = [], []
    for recompute in (False, True):
        rule, sizes = pair(name)[fast], []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            objective = unroll(rule, begin(rule, Bowls()), 8, recompute=recompute).objective
        kept.append(sum(sizes))
        objective.backward()
        grads.append(torch.cat([p.grad.flatten() for p in rule.parameters() if p.grad is not None]))
    assert (grads[1] - grads[0]).norm() <= 1e-6 * grads[0].norm()
    assert fast or kept[1] < kept[0] / 4


def test_without_gradients_it_does_the_same():
    plain, ours = pair("dmd-sketch-normalized")
    torch.testing.assert_close(rollout(ours, instances(), 12), rollout(plain, instances(), 12), rtol=1e-5, atol=0)


def test_few_coordinates_take_the_plain_path():
    plain, ours = pair("none-normalized")
    state = {key: torch.zeros(2, gates.LEAST - 1, 20) for key in ("h0", "c0", "h1", "c1")}
    features = torch.randn(2, gates.LEAST - 1, 2)
    outputs = [rule.cell(features, torch.zeros(2, 0), state)[0] for rule in (plain, ours)]
    assert torch.equal(*outputs)


def test_a_fused_rule_is_saved_like_any_other(tmp_path):
    plain, ours = pair("kae-normalized")
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))


def test_what_is_not_finite_stays_so():
    """A diverged instance must not come back with numbers that look right."""
    _, ours = pair("none-log_sign")
    state = {key: torch.zeros(20, 20, requires_grad=True) for key in ("h0", "c0", "h1", "c1")}
    features = torch.zeros(20, 2)
    features[2] = float("nan")
    output, _ = ours.cell(features, torch.zeros(0), state)
    assert output[2].isnan()
    assert output[torch.arange(20) != 2].isfinite().all()


@pytest.mark.parametrize("m", [16, 17, 33, 100])
def test_gates_are_close_everywhere(m):
    """σ and tanh of any size of argument, and the derivatives, with a block in the middle of the coordinates."""
    torch.manual_seed(m)
    hidden, n, start = 3, m + 9, 5
    sums = 10 ** torch.empty(4 * hidden, m).uniform_(-3, 3) * torch.randn(4 * hidden, m).sign()
    c, grad_h, grad_c = torch.randn(3, hidden, n).unbind()
    down = torch.randn(hidden, m)
    h, new_c, old = torch.zeros(3, hidden, n).unbind()
    pre = torch.zeros(4 * hidden, m)
    gates.forward(start, sums, c, h, new_c)
    gates.backward(start, sums, down, pre, c, new_c, grad_h, grad_c, old)
    block = slice(start, start + m)
    exact, before = sums.double().requires_grad_(), c[:, block].double().requires_grad_()
    i, f, g, o = exact.chunk(4)
    cell = f.sigmoid() * before + i.sigmoid() * g.tanh()
    expected = [o.sigmoid() * cell.tanh(), cell]
    torch.autograd.backward(expected, [grad_h[:, block].double() + down, grad_c[:, block].double()])
    for ours, wanted in zip([h, new_c], expected, strict=True):
        torch.testing.assert_close(ours[:, block].double(), wanted, rtol=1e-6, atol=2e-6)
        assert not ours[:, :start].any()
        assert not ours[:, start + m :].any()
    torch.testing.assert_close(old[:, block].double(), before.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pre.double(), exact.grad, rtol=1e-5, atol=1e-5)
