"""LearnedOptimizer as a torch optimizer: one table of invariants over all rules and contexts."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from problems import flat
from rules import RULES, first_state, make_rule
from torch import nn

from l2o_runtime import ArtifactError, LearnedOptimizer, save_rule
from l2o_runtime.config import DMDConfig
from l2o_runtime.rules import LSTMConfig


def problem(seed: int = 0):
    """A small regression: model, and a function that gives the loss of its next minibatch."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    rng = torch.Generator().manual_seed(seed)

    def loss() -> torch.Tensor:
        x = torch.randn(16, 6, generator=rng)
        return (model(x) - x[:, :1].sin()).square().mean()

    return model, loss, rng


def steps(model, optimizer, loss_of, count, pass_loss=True):
    for _ in range(count):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step(loss=loss if pass_loss else None)


def test_equals_the_rule_on_the_flat_vector(rule, rule_file):
    """Chunks and separate tensors change nothing: the optimizer is θ ← θ + lr Δ of the rule itself."""
    model, loss_of, _ = problem()
    optimizer = LearnedOptimizer(model.parameters(), rule=rule_file, lr=0.5, schedule="constant")
    theta = flat(model)
    state, layout = first_state(rule, (), [param.shape for param in model.parameters()])
    for _ in range(12):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        grad = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        delta, *state = rule(theta, grad, loss.detach(), *state, *layout)
        theta = theta + 0.5 * delta
        optimizer.step(loss=loss)
        torch.testing.assert_close(flat(model), theta, rtol=1e-4, atol=1e-5)
        theta = flat(model)


@pytest.mark.parametrize("name", ["dmd-sketch-normalized", "dmd-sketch-scale"])
def test_large_parameters_are_chunked_exactly(tmp_path, monkeypatch, name):
    path = tmp_path / "rule.safetensors"
    save_rule(path, make_rule(RULES[name]))
    results = []
    for chunk in (7, 10_000):
        monkeypatch.setattr("l2o_runtime.stepping.parts.CHUNK", chunk)
        model, loss_of, _ = problem()
        steps(model, LearnedOptimizer(model.parameters(), rule=path), loss_of, 10)
        results.append(flat(model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_closure_and_loss_argument_agree(rule_file):
    results = []
    for use_closure in (True, False):
        model, loss_of, _ = problem()
        optimizer = LearnedOptimizer(model.parameters(), rule=rule_file)
        for _ in range(8):

            def closure(optimizer=optimizer, loss_of=loss_of):
                optimizer.zero_grad()
                loss = loss_of()
                loss.backward()
                return loss

            if use_closure:
                assert optimizer.step(closure).requires_grad
            else:
                optimizer.step(loss=closure())
        results.append(flat(model))
    assert torch.equal(*results)


def test_resume_is_bit_exact(rule_file):
    """Through torch.save and weights_only loading, in the middle of a window."""
    model, loss_of, rng = problem()
    optimizer = LearnedOptimizer(model.parameters(), rule=rule_file, lr=0.3, weight_decay=0.01)
    steps(model, optimizer, loss_of, 7)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng.get_state()}, buffer)
    steps(model, optimizer, loss_of, 7)

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    model2, loss_of2, rng2 = problem(1)
    model2.load_state_dict(saved["model"])
    rng2.set_state(saved["rng"])
    optimizer2 = LearnedOptimizer(model2.parameters(), rule=rule_file)
    optimizer2.load_state_dict(saved["optimizer"])
    optimizer2.load_state_dict(saved["optimizer"])  # the first load left its argument alone
    steps(model2, optimizer2, loss_of2, 7)
    assert torch.equal(flat(model), flat(model2))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_continue_alike(rule_file, copier):
    model, loss_of, _ = problem()
    optimizer = LearnedOptimizer(model.parameters(), rule=rule_file)
    steps(model, optimizer, loss_of, 4)
    params, twin = copier((list(model.parameters()), optimizer))
    for p, q in zip(model.parameters(), params, strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    optimizer.step(loss=0.5)
    twin.step(loss=0.5)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), params, strict=True))


def test_groups_have_their_own_lr_and_weight_decay(rule, rule_file):
    torch.manual_seed(0)
    values = torch.randn(4)  # the same for all: a rule may look at them
    a, b, c = (nn.Parameter(values.clone()) for _ in range(3))
    start, unit = [p.detach().clone() for p in (a, b, c)], rule.config.decay_unit
    optimizer = LearnedOptimizer(
        [{"params": [a]}, {"params": [b], "lr": 0.0}, {"params": [c], "lr": 0.25, "weight_decay": 0.5 / unit}],
        rule=rule_file,
        lr=1.0,
        schedule="constant",
    )
    for p in (a, b, c):
        p.grad = torch.full_like(p, 0.3)
    optimizer.step()
    assert torch.equal(b, start[1]), "lr = 0 moves nothing"
    torch.testing.assert_close(c - start[2] * (1 - 0.25 * 0.5), 0.25 * (a - start[0]))


def test_schedulers_scale_the_step(rule_file):
    p = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([p], rule=rule_file, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    p.grad = torch.ones(3)
    optimizer.step()
    scheduler.step()
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)


def test_frozen_and_unused_parameters_stay(rule_file):
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    frozen, empty = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(0))
    optimizer = LearnedOptimizer([frozen, unused, used, empty], rule=rule_file)
    optimizer.step()  # no gradients at all
    for _ in range(8):
        optimizer.zero_grad()
        used.square().sum().backward()
        optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    assert torch.equal(frozen, torch.ones(2))
    assert not torch.equal(used, torch.ones(3))


def test_parameters_may_join_later(rule_file):
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    optimizer = LearnedOptimizer([a], rule=rule_file)
    for step in range(8):
        if step == 4:
            optimizer.add_param_group({"params": [b], "lr": 0.5})
        for p in (a, b):
            p.grad = torch.full_like(p, 0.1)
        optimizer.step(loss=1.0)
    assert optimizer.state[a]["step"] == 8
    assert optimizer.state[b]["step"] == 4
    assert not torch.equal(b, torch.ones(2, 2))
    assert b.isfinite().all()


def test_gradients_are_left_alone_and_dtypes_kept(rule_file):
    for dtype in (torch.float64, torch.bfloat16):
        p = nn.Parameter(torch.ones(3, 4, dtype=dtype).T)
        p.grad = torch.full_like(p, 0.5)
        optimizer = LearnedOptimizer([p], rule=rule_file)
        optimizer.step()
        assert p.dtype == dtype
        assert (p.grad == 0.5).all()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        for key, value in optimizer.state[p].items():
            assert value.dtype == saved["state"][0][key].dtype, key


def test_the_loss_may_be_a_number_or_not_finite():
    p = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([p])
    for loss in (1.0, torch.tensor([2.0]), float("nan"), torch.tensor(float("inf")), None):
        p.grad = torch.ones(3)
        optimizer.step(loss=loss)
    assert p.isfinite().all()
    with pytest.raises(ValueError, match="expected one number"):
        optimizer.step(loss=torch.ones(2))


def test_a_rule_that_needs_the_loss_says_so_once(tmp_path):
    path = tmp_path / "rule.safetensors"
    save_rule(path, make_rule(LSTMConfig(context=DMDConfig(window=3), needs_loss=True)))
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = LearnedOptimizer([p], rule=path)
    with pytest.warns(UserWarning, match=r"step\(loss=loss\)"):
        optimizer.step()
    optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"lr": torch.ones(2)}, "one element"),
        ({"lr": "0.1"}, "lr: expected a finite number"),
    ],
)
def test_bad_hyper_parameters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer([nn.Parameter(torch.ones(2))], **arguments)


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(torch.nan)])
def test_a_number_that_becomes_none_moves_nothing(key, value):
    param = nn.Parameter(torch.ones(2))
    optimizer = LearnedOptimizer([param])
    param.grad = torch.ones(2)
    optimizer.step()
    before, optimizer.param_groups[0][key] = param.detach().clone(), value
    with pytest.raises(ValueError, match=rf"{key}: expected a finite number, got .*, as a script"):
        optimizer.step()
    assert torch.equal(param, before)


OTHERS = ("SGD", "AdamW", "RMSprop", "ASGD", "Adafactor", "LBFGS", "Rprop", "Adagrad", "Adadelta", "Muon")


@pytest.mark.parametrize("name", OTHERS)
def test_states_of_others_without_a_step_are_refused_too(name):
    param = nn.Parameter(torch.ones(2, 2))
    optimizer, other = LearnedOptimizer([param]), getattr(torch.optim, name)([param], lr=0.1)
    states = name == "Adagrad"  # whose states are there before the first step
    text = r"state .* is missing" if states else r"param_groups: they have .*: saved with another optimizer"
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1.0
    kept = LearnedOptimizer([{"params": [param], "betas": (0.9, 0.99)}])  # a key that somebody left in their groups
    kept.load_state_dict(kept.state_dict())


def test_rules_are_read_whatever_the_default_device_is():
    param = nn.Parameter(torch.ones(3))
    with torch.device("meta"):
        optimizer = LearnedOptimizer([param])
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.health()["steps"] == 1


def test_kernels_that_there_are_not_are_told(monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", "Plain")
    param = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([param])
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match="L2O_KERNELS: expected plain, foreach, compiled, triton or nothing"):
        optimizer.step()


def test_habits_from_other_optimizers_are_answered():
    parameters = [nn.Parameter(torch.ones(2))]
    with pytest.raises(TypeError, match="lr="):
        LearnedOptimizer(parameters, 0.01)
    with pytest.raises(TypeError, match=r"step\(loss=loss\)"):
        LearnedOptimizer(parameters).step(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"a real loss, got one of torch\.complex64"):
        LearnedOptimizer(parameters).step(lambda: torch.tensor(1j))


def test_unsupported_parameters_and_gradients_are_refused():
    with pytest.raises(ValueError, match="complex"):
        LearnedOptimizer([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = LearnedOptimizer(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


def test_a_missing_rule_names_the_bundled_ones(tmp_path):
    with pytest.raises(ArtifactError, match="default"):
        LearnedOptimizer([nn.Parameter(torch.ones(2))], rule=tmp_path / "none.safetensors")


def test_state_of_another_rule_is_refused(tmp_path):
    for name in ("none-log_sign", "dmd-exact-normalized"):
        save_rule(tmp_path / f"{name}.safetensors", make_rule(RULES[name]))
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizers = [LearnedOptimizer([p], rule=path) for path in sorted(tmp_path.iterdir())]
    sgd = torch.optim.SGD([p], momentum=0.9)
    for optimizer in (*optimizers, sgd):
        optimizer.step()
    for own, others in zip(optimizers, ([optimizers[1], sgd], [optimizers[0], sgd]), strict=True):
        for other in others:
            with pytest.raises(ValueError, match="another rule"):
                own.load_state_dict(other.state_dict())


def test_numbers_of_numpy_become_pythons():
    """Else a state dict could not be read with `weights_only`."""
    optimizer = LearnedOptimizer([nn.Parameter(torch.ones(2))], lr=np.float32(0.5))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "weight_decay": np.float32(0.25)})
    assert [type(group["lr"]) for group in optimizer.param_groups] == [float, float]
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.0), (0.5, 0.25)]


def test_the_bundled_default_optimizes():
    model, loss_of, _ = problem()
    before = sum(loss_of().item() for _ in range(10))
    steps(model, LearnedOptimizer(model.parameters()), loss_of, 100, pass_loss=False)
    assert sum(loss_of().item() for _ in range(10)) < 0.5 * before
