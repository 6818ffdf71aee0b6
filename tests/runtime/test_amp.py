"""Mixed precision: loss scaling, skipped steps, clipping, accumulation, autocast."""

import copy

import pytest
import torch
from problems import Regression, assert_same_state, context_state, flat, minibatches, train
from rules import RULES, make_rule

from l2o_runtime import LearnedOptimizer, save_rule

pytestmark = pytest.mark.slow

PRECISIONS = [None, torch.bfloat16, torch.float16]


@pytest.fixture
def window_file(tmp_path):
    """A rule that looks at the loss through a window of 7."""
    path = tmp_path / "window.safetensors"
    save_rule(path, make_rule(RULES["dmd-sketch-normalized"]))
    return path


def scaler_of(scale: float = 1024.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale)


def test_a_skipped_step_is_as_if_its_minibatch_had_never_been(rule_file):
    """Weights, window and step counts, bit for bit, through an overflow in the middle of a full window."""
    batches = minibatches(15)
    overflowing = (torch.full((16, 6), torch.inf), torch.zeros(16, 1))
    finished = []
    for spoilt in (True, False):
        model, scaler = Regression(), scaler_of()
        optimizer = LearnedOptimizer(model.parameters(), rule=rule_file)
        train(model, optimizer, batches[:9], scaler=scaler, autocast=torch.float16)
        if spoilt:
            before, weights = copy.deepcopy(optimizer.state_dict()), flat(model)
            train(model, optimizer, [overflowing], scaler=scaler, autocast=torch.float16)
            assert_same_state(optimizer.state_dict(), before)
            assert torch.equal(flat(model), weights)
        else:
            # Gradients in half precision are rounded differently at another scale.
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        train(model, optimizer, batches[9:], scaler=scaler, autocast=torch.float16)
        assert scaler.get_scale() == 512
        assert all(state["step"] == 15 for state in optimizer.state.values())
        finished.append((optimizer.state_dict(), flat(model)))
    assert_same_state(finished[0][0], finished[1][0])
    assert torch.equal(finished[0][1], finished[1][1])


def test_a_scale_that_is_too_large_costs_only_the_skipped_steps(window_file):
    model, scaler = Regression(), scaler_of(2.0**30)
    optimizer = LearnedOptimizer(model.parameters(), rule=window_file)
    train(model, optimizer, minibatches(30), scaler=scaler, autocast=torch.float16)
    skipped = round(torch.tensor(2.0**30 / scaler.get_scale()).log2().item())
    assert 0 < skipped < 30
    assert context_state(optimizer)["context_count"] == 30 - skipped
    assert all(state["step"] == 30 - skipped for state in optimizer.state.values())


def test_a_first_step_that_is_skipped_makes_no_state(rule_file):
    model, scaler = Regression(), scaler_of()
    optimizer = LearnedOptimizer(model.parameters(), rule=rule_file)
    train(model, optimizer, [(torch.full((4, 6), torch.inf), torch.zeros(4, 1))], scaler=scaler)
    assert scaler.get_scale() == 512
    assert not optimizer.state


def test_the_scaler_hands_the_loss_to_the_context(window_file):
    """The loss itself, not the scaled one."""
    model = Regression()
    optimizer = LearnedOptimizer(model.parameters(), rule=window_file)
    losses = train(model, optimizer, minibatches(9), scaler=scaler_of())
    seen = context_state(optimizer)["context_losses"]
    torch.testing.assert_close(seen, torch.tensor(losses[-7:]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_scaling_by_a_power_of_two_changes_nothing(rule_file, clip):
    """`unscale_` before clipping, as the plain loop has it: a forgotten one clips everything away."""
    finished = []
    for scaler in (None, scaler_of(), torch.amp.GradScaler("cpu", enabled=False)):
        model = Regression()
        train(model, LearnedOptimizer(model.parameters(), rule=rule_file), minibatches(12), scaler=scaler, clip=clip)
        finished.append(flat(model))
    assert torch.equal(finished[0], finished[1])
    assert torch.equal(finished[0], finished[2])


def test_clipped_gradients_are_the_ones_that_count(tmp_path):
    """Clipping to nothing leaves a rule that looks at sizes with other steps than the gradient itself."""
    path = tmp_path / "rule.safetensors"
    save_rule(path, make_rule(RULES["none-log_sign"]))
    finished = []
    for clip in (None, 1e-4):
        model = Regression()
        train(model, LearnedOptimizer(model.parameters(), rule=path), minibatches(5), clip=clip)
        finished.append(flat(model))
    assert (finished[0] - finished[1]).abs().max() > 1e-3


def test_accumulated_gradients_equal_the_large_batch(rule_file):
    batches = minibatches(12)
    pieces = [piece for x, y in batches for piece in zip(x.split(4), y.split(4), strict=True)]
    finished = []
    for work, accumulate in ((batches, 1), (pieces, 4)):
        model = Regression()
        optimizer = LearnedOptimizer(model.parameters(), rule=rule_file)
        # Without the loss: that of the last piece is not that of the whole batch.
        train(model, optimizer, work, accumulate=accumulate, scaler=scaler_of(), pass_loss=False)
        assert all(state["step"] == 12 for state in optimizer.state.values())
        finished.append(flat(model))
    torch.testing.assert_close(*finished, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_changes_gradients_but_not_the_arithmetic_of_the_step(rule_file, precision):
    """The same gradients without mixed precision give the same weights, bit for bit; state stays float32."""
    model, twin, scaler = Regression(), Regression(), scaler_of()
    optimizer = LearnedOptimizer(model.parameters(), rule=rule_file)
    second = LearnedOptimizer(twin.parameters(), rule=rule_file)
    for x, y in minibatches(9):
        with torch.autocast("cpu", precision):
            loss = model(x, y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        rounded = [p.grad.clone() for p in model.parameters()]
        exact = torch.autograd.grad(twin(x, y), list(twin.parameters()))
        assert not any(torch.equal(*pair) for pair in zip(rounded, exact, strict=True))
        for p, grad in zip(twin.parameters(), rounded, strict=True):
            p.grad = grad
        scaler.step(optimizer, loss=loss)
        scaler.update()
        second.step(loss=loss.item())
        optimizer.zero_grad()
    assert torch.equal(flat(model), flat(twin))
    assert_same_state(optimizer.state_dict(), second.state_dict())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bundled_rule_learns_in_every_precision(precision):
    model = Regression()
    scaler = scaler_of() if precision == torch.float16 else None
    losses = train(
        model, LearnedOptimizer(model.parameters()), minibatches(100), autocast=precision, scaler=scaler, clip=10.0
    )
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_run_with_a_scaler_resumes_bit_for_bit(window_file, tmp_path):
    batches = minibatches(20)
    batches[5] = (torch.full((16, 6), torch.inf), batches[5][1])

    def start(seed):
        model, scaler = Regression(seed), torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)
        return model, LearnedOptimizer(model.parameters(), rule=window_file), scaler

    first = start(0)
    train(first[0], first[1], batches[:8], scaler=first[2], autocast=torch.float16)
    torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
    train(first[0], first[1], batches[8:], scaler=first[2], autocast=torch.float16)
    second = start(1)
    for part, saved in zip(second, torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=True):
        part.load_state_dict(saved)
    train(second[0], second[1], batches[8:], scaler=second[2], autocast=torch.float16)
    assert torch.equal(flat(first[0]), flat(second[0]))
    assert first[2].get_scale() == second[2].get_scale() != 2.0**12
