"""Learning-rate schedulers and weight averaging: what a scheduler sets is what multiplies the step."""

from functools import partial

import pytest
import torch
from problems import Regression, assert_same_state, flat, minibatches, train
from rules import RULES, make_rule
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from l2o_runtime import LearnedOptimizer, save_rule

CYCLES = {
    "one-cycle": lambda o, **kw: lrs.OneCycleLR(o, max_lr=1.0, total_steps=30, **kw),
    "cyclic": lambda o, **kw: lrs.CyclicLR(o, 0.2, 1.0, step_size_up=4, **kw),
}
SCHEDULERS = {
    **{name: partial(cycle, cycle_momentum=False) for name, cycle in CYCLES.items()},  # SGD has one that would count
    "cosine": lambda o: lrs.CosineAnnealingLR(o, T_max=24),
    "warm-restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=5, T_mult=2),
    "warm-up-then-cosine": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=6), lrs.CosineAnnealingLR(o, T_max=18)], milestones=[6]
    ),
    "lambda": lambda o: lrs.LambdaLR(o, lambda step: 1 / (1 + step)),
    "plateau": lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=2),
    "swa": lambda o: SWALR(o, swa_lr=0.1, anneal_epochs=8),
}


@pytest.fixture(params=SCHEDULERS)
def schedule(request):
    return SCHEDULERS[request.param]


@pytest.fixture
def file_of(tmp_path):
    def save(name: str):
        path = tmp_path / f"{name}.safetensors"
        save_rule(path, make_rule(RULES[name]))
        return path

    return save


def advance(scheduler) -> None:
    """A metric that never improves makes ReduceLROnPlateau act."""
    scheduler.step(*[1.0] if isinstance(scheduler, lrs.ReduceLROnPlateau) else [])


def moves(optimizer_of, schedule=None) -> torch.Tensor:
    """What each of 24 steps on fixed gradients adds to a weight, in float64."""
    rng = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = optimizer_of(p)
    scheduler = schedule(optimizer) if schedule else None
    seen = []
    for _ in range(24):
        before = p.detach().clone()
        p.grad = torch.rand(5, generator=rng, dtype=torch.float64) + 0.5
        optimizer.step()
        if scheduler:
            advance(scheduler)
        seen.append(p.detach() - before)
    return torch.stack(seen)


@pytest.mark.parametrize("features", ["log_sign", "normalized"])
@pytest.mark.parametrize("tensor", [False, True])
def test_a_schedule_scales_the_learned_step_as_it_scales_that_of_sgd(schedule, tensor, features, file_of):
    """Without a context nothing but the gradients decides Δ, so the steps at lr = 1 tell what to expect."""
    path = file_of(f"none-{features}")

    def lr():
        return torch.tensor(1.0, dtype=torch.float64) if tensor else 1.0

    unscaled = moves(lambda p: LearnedOptimizer([p], rule=path))
    scaled = moves(lambda p: LearnedOptimizer([p], rule=path, lr=lr()), schedule)
    factors = moves(lambda p: torch.optim.SGD([p], lr=lr()), schedule) / moves(lambda p: torch.optim.SGD([p], lr=1.0))
    assert factors.std(dim=0).min() > 0.05, "the schedule does something"
    torch.testing.assert_close(scaled, factors * unscaled, rtol=1e-9, atol=1e-15)


def test_each_group_follows_its_own_schedule(rule_file):
    """A group whose schedule is zero stays where it is; the other moves."""
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([{"params": [a]}, {"params": [b]}], rule=rule_file)
    scheduler = lrs.LambdaLR(optimizer, [lambda _: 1.0, lambda step: float(step >= 3)])
    for step in range(6):
        before = a.detach().clone(), b.detach().clone()
        for p in (a, b):
            p.grad = torch.full_like(p, 0.3)
        optimizer.step(loss=1.0)
        scheduler.step()
        assert not torch.equal(a, before[0])
        assert torch.equal(b, before[1]) == (step < 3)


@pytest.mark.parametrize("schedule", (SCHEDULERS | CYCLES).values(), ids=SCHEDULERS)
def test_a_scheduled_run_resumes_bit_for_bit(schedule, file_of, tmp_path):
    path = file_of("dmd-exact-normalized")
    batches = minibatches(16)

    def start(seed):
        model = Regression(seed)
        optimizer = LearnedOptimizer(model.parameters(), rule=path)
        return model, optimizer, schedule(optimizer)

    def go(model, optimizer, scheduler, work):
        for batch in work:
            train(model, optimizer, [batch])
            advance(scheduler)

    first = start(0)
    go(*first, batches[:7])
    for part, name in zip(first, ("model", "optimizer", "schedule"), strict=True):
        torch.save(part.state_dict(), tmp_path / f"{name}.pt")
    go(*first, batches[7:])
    second = start(1)
    for part, name in zip(second, ("model", "optimizer", "schedule"), strict=True):
        # A function is part of what SWALR keeps in torch 2.9.
        part.load_state_dict(torch.load(tmp_path / f"{name}.pt", weights_only=name != "schedule"))
    go(*second, batches[7:])
    assert torch.equal(flat(first[0]), flat(second[0]))
    assert_same_state(first[1].state_dict(), second[1].state_dict())


@pytest.mark.parametrize("cycle", CYCLES.values(), ids=CYCLES)
def test_a_cycled_momentum_is_written_and_changes_nothing(cycle, rule_file):
    """People write these schedulers for Adam without `cycle_momentum=False`; a learned rule has nothing to cycle."""
    runs, written = [], set()
    for cycle_momentum in (True, False):
        model = Regression()
        optimizer = LearnedOptimizer(model.parameters(), rule=rule_file)
        scheduler = cycle(optimizer, cycle_momentum=cycle_momentum)
        for batch in minibatches(24):
            train(model, optimizer, [batch], scheduler=scheduler)
            written.add(optimizer.param_groups[0]["momentum"])
        runs.append((flat(model), optimizer.state_dict()["state"]))
    assert len(written) > 5, "the scheduler writes"
    assert_same_state(*runs)


def test_checkpoints_from_before_schedulers_could_cycle_load():
    model = Regression()
    optimizer = LearnedOptimizer(model.parameters())
    train(model, optimizer, minibatches(2))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["momentum"]
    fresh = LearnedOptimizer(model.parameters())
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["momentum"] == 0
    train(model, fresh, minibatches(3), scheduler=lrs.OneCycleLR(fresh, max_lr=1.0, total_steps=9))
    assert fresh.param_groups[0]["momentum"] > 0


def test_one_cycle_around_one_learns():
    model = Regression()
    optimizer = LearnedOptimizer(model.parameters())
    scheduler = lrs.OneCycleLR(optimizer, max_lr=1.0, total_steps=300)
    losses = train(model, optimizer, minibatches(300), scheduler=scheduler)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize(
    ("keywords", "average"),
    [
        ({}, lambda seen: sum(seen) / len(seen)),
        (
            {"multi_avg_fn": get_ema_multi_avg_fn(0.8)},
            lambda seen: (
                0.8 ** (len(seen) - 1) * seen[0]
                + sum(0.2 * 0.8**k * theta for k, theta in enumerate(reversed(seen[1:])))
            ),
        ),
    ],
    ids=["swa", "ema"],
)
def test_averages_are_of_the_weights_passed_through_and_leave_training_alone(rule_file, keywords, average):
    finished = []
    for averaging in (False, True):
        model = Regression()
        optimizer = LearnedOptimizer(model.parameters(), rule=rule_file)
        averaged, seen = AveragedModel(model, **keywords), []
        for batch in minibatches(10):
            train(model, optimizer, [batch])
            if averaging:
                averaged.update_parameters(model)
                seen.append(flat(model))
        finished.append(flat(model))
    assert torch.equal(*finished)
    torch.testing.assert_close(flat(averaged), average(seen), rtol=1e-5, atol=1e-6)
    assert not torch.equal(flat(averaged), finished[-1])


def test_averaged_weights_beat_the_last_ones_under_noise():
    """What averaging is for: at a constant lr the last weights jitter about their mean."""
    x, y = minibatches(1, size=2048, seed=1)[0]
    model = Regression()
    optimizer = LearnedOptimizer(model.parameters())
    averaged, last = AveragedModel(model), []
    rng = torch.Generator().manual_seed(0)
    noisy = [(a, b + 0.5 * torch.randn(b.shape, generator=rng)) for a, b in minibatches(200)]
    train(model, optimizer, noisy[:100])
    for batch in noisy[100:]:
        train(model, optimizer, [batch])
        averaged.update_parameters(model)
        with torch.no_grad():
            last.append(model.eval()(x, y).item())
        model.train()
    with torch.no_grad():
        assert averaged.eval()(x, y) < sum(last) / len(last)
