"""Estimators of the meta-gradient: es and pes against differentiation of the smoothed loss; checkpoints; settings."""

import dataclasses

import numpy as np
import pytest
import torch
from resuming import assert_resumes_bit_for_bit
from torch.func import functional_call

from l2o_runtime import ConfigError
from l2o_runtime.config import KAEConfig
from l2o_runtime.rules import LSTMConfig, make_rule
from l2o_runtime.solvers import Descent
from l2o_runtime.state import zeros
from l2o_training.config import TrainConfig, load_preset
from l2o_training.meta.curriculum import make_curriculum
from l2o_training.meta.estimators import make_estimator
from l2o_training.meta.estimators.base import size
from l2o_training.meta.estimators.cem import rank_weights
from l2o_training.meta.estimators.es import antithetic_gradient, draw_perturbation, perturbed
from l2o_training.meta.slots import TaskSlot
from l2o_training.meta.trainer import Trainer
from l2o_training.meta.unroll import unroll
from l2o_training.tasks import QuadraticConfig, make_task
from l2o_training.tasks.data import load_dataset

pytestmark = pytest.mark.slow

PAIRS = 160
SIGMA = 0.03
RULE = LSTMConfig(hidden=2, layers=1, output_scale=0.1)
TINY = TrainConfig(
    rule=RULE, tasks=(QuadraticConfig(size=4),), horizon=12, unroll=3, sigma=SIGMA, particles=2 * PAIRS, epochs=4
)


def setting(estimator, tail=None):
    """Descent along a rule, its only task slot, and the estimator; the problem is the same for all."""
    config = dataclasses.replace(TINY, estimator=estimator, tail=tail)
    torch.manual_seed(0)
    solver, made = Descent(make_rule(config.rule)), make_estimator(config)
    tasks = [make_task(config.tasks[0], load_dataset, torch.device("cpu"))]
    slot = TaskSlot(config, make_curriculum(config), tasks, 0, made.copies)
    return config, solver, made, slot


def samples(estimator, truncations, tail=None):
    """Estimates (PAIRS, P), each the sum over an episode's truncations of what one pair says."""
    _, solver, made, slot = setting(estimator, tail)
    total = 0.0
    for _ in range(truncations):
        slot.tick()
        made.count(solver, [slot])
        differences = made.share(solver, slot).message
        whole = made.gradient(solver, [slot], differences)
        each = [
            antithetic_gradient(made.weight(solver, slot, i)[None], differences[i : i + 1], SIGMA) for i in range(PAIRS)
        ]
        each = torch.stack(each)
        torch.testing.assert_close(each.mean(0), whole)
        total = total + each
    return total


def smoothed(truncations, count=40, tail=None):
    """Gradients (count, P) of Σ L for perturbed parameters, through everything, the optimizee's gradient included."""
    config, solver, _, slot = setting("tbptt")
    slot.tick()
    (inner,), rule = slot.begun(solver), solver.rule
    matrix, target = inner.instances._batches()
    shapes = {name: p.shape for name, p in rule.named_parameters()}
    phi = torch.cat([p.detach().flatten() for p in rule.parameters()])
    rng = torch.Generator().manual_seed(1)

    def value(theta):
        return ((matrix @ theta.unsqueeze(-1)).squeeze(-1) - target).square().sum(-1)

    def gradient():
        leaf = phi.clone().requires_grad_()
        theta, total, steps = inner.instances.params, 0.0, 0
        mean = theta
        state = zeros(rule.spec.coordinate, tuple(theta.shape)), zeros(rule.spec.model, (1,))
        for _ in range(truncations):
            pieces = (leaf + SIGMA * torch.randn(phi.shape, generator=rng)).split([s.numel() for s in shapes.values()])
            named = {name: piece.view(s) for (name, s), piece in zip(shapes.items(), pieces, strict=True)}
            for _ in range(config.unroll):
                residual = (matrix @ theta.unsqueeze(-1)).squeeze(-1) - target
                slope = 2 * (matrix.mT @ residual.unsqueeze(-1)).squeeze(-1)
                delta, *state = functional_call(rule, named, (theta, slope, value(theta), *state))
                theta, steps = theta + delta, steps + 1
                if tail is None:
                    total = total + value(theta).mean()
                else:
                    mean = mean + (theta - mean) / (1 + tail * steps)
                    total = total + (value(theta) + value(mean)).mean() / 2
        return torch.autograd.grad(total, leaf)[0].double()

    return torch.stack([gradient() for _ in range(count)])


def along(estimates, direction):
    """Mean and standard error of estimates (N, P) along a direction (P,)."""
    values = estimates @ (direction / direction.norm())
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def test_es_is_unbiased_for_the_smoothed_truncation():
    truth = smoothed(truncations=1)
    expected = truth.mean(0)
    estimates = samples("es", truncations=1)
    mean, error = along(estimates, expected)
    target, own = along(truth, expected)
    assert error < 0.15 * target, "the test could not tell"
    assert abs(mean - target) < 3 * (error**2 + own**2) ** 0.5
    across = (estimates.mean(0) - expected).norm()
    assert across < 2 * estimates.std(0).norm() / PAIRS**0.5


@pytest.mark.parametrize("tail", [None, 0.5])
def test_pes_is_unbiased_for_the_whole_horizon_where_es_is_not(tail):
    truth = smoothed(truncations=4, tail=tail)
    expected = truth.mean(0)
    target, own = along(truth, expected)
    mean, error = along(samples("pes", 4, tail), expected)
    assert error < 0.2 * target, "the test could not tell"
    assert abs(mean - target) < 3 * (error**2 + own**2) ** 0.5
    short, short_error = along(samples("es", 4, tail), expected)
    assert target - short > 5 * (short_error**2 + own**2) ** 0.5
    _, solver, made, slot = setting("tbptt", tail)
    backward = 0.0
    for _ in range(4):
        slot.tick()
        backward = backward + made.share(solver, slot).message.double()
    assert target - float(backward @ (expected / expected.norm())) > 5 * own


@pytest.mark.parametrize("share", [0.01, 1.0, 100.0])
def test_slots_are_clipped_one_by_one(share):
    """No slot says more than clip / lanes; what it says keeps its direction, and is left out where it is not finite."""

    def message(change=lambda inner: None, **settings):
        config = dataclasses.replace(TINY, lanes=4, **settings)
        torch.manual_seed(0)
        solver, made = Descent(make_rule(config.rule)), make_estimator(config)
        tasks = [make_task(config.tasks[0], load_dataset, torch.device("cpu"))]
        slot = TaskSlot(config, make_curriculum(config), tasks, 0)
        slot.tick()
        change(slot.begun(solver)[0])
        return made.share(solver, slot).message

    plain = message()
    clip = float(plain.norm()) * 4 * share
    clipped = message(clip=clip, clip_lanes=True)
    torch.testing.assert_close(clipped, plain * min(1.0, share))
    torch.testing.assert_close(message(clip=clip), plain)
    broken = message(lambda inner: inner.params.fill_(torch.inf), clip=clip, clip_lanes=True)
    assert torch.equal(broken, torch.zeros_like(plain))


def mixed_up(change=lambda message: message):
    """What slots say each to tbptt and to es (4, P), and the mixture of it, its message changed."""
    made = {}
    for name in ("tbptt", "es", "mixed"):
        config = dataclasses.replace(TINY, estimator=name, lanes=4, particles=6)
        torch.manual_seed(0)
        solver, made[name] = Descent(make_rule(config.rule)), make_estimator(config)
        tasks = [make_task(config.tasks[0], load_dataset, torch.device("cpu"))]
        slots = [TaskSlot(config, make_curriculum(config), tasks, index) for index in range(4)]
        for slot in slots:
            slot.tick()
        messages = [made[name].share(solver, slot).message for slot in slots]
        if name == "tbptt":
            through = torch.stack(messages) * 4
        if name == "es":
            around = torch.stack(list(made[name].gradients(solver, slots, sum(messages))))
    return through, around, made["mixed"].gradient(solver, slots, change(sum(messages)))


def test_a_mixture_weighs_by_what_varies_less():
    through, around, mixture = mixed_up()
    first, second = (np.var(each.numpy(), axis=0, ddof=1).sum() for each in (through, around))
    weight = second / (first + second)
    assert 0.01 < weight < 0.99, "the test could not tell"
    torch.testing.assert_close(mixture, weight * through.mean(0) + (1 - weight) * around.mean(0))


def test_a_mixture_does_without_gradients_that_exploded():
    through, _, _ = mixed_up()
    broken = torch.tensor([3, through.shape[1]])  # a sum over slots, and that of the squares
    _, around, mixture = mixed_up(lambda message: message.index_fill(0, broken, torch.nan))
    torch.testing.assert_close(mixture, around.mean(0))
    through, _, mixture = mixed_up(lambda message: message.index_fill(0, torch.tensor([-1]), torch.inf))
    torch.testing.assert_close(mixture, through.mean(0))


def test_perturbations_are_the_same_whoever_draws_them():
    config, _, _, slot = setting("es")
    drawn = [draw_perturbation(config, slot, 3, pair, 1000) for pair in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], draw_perturbation(config, slot, 6, 0, 1000))
    assert drawn[0].std().item() == pytest.approx(SIGMA, rel=0.1)


@pytest.mark.parametrize("estimator", ["es", "pes", "mixed", "cem"])
def test_perturbed_rules_are_put_back_and_learn(estimator, tmp_path):
    few = ["lr=1", "trained=['head.bias']", "sigma=0.5", "unroll=0", "rule.output_scale=1"]
    changes = few if estimator == "cem" else ["lr=0.02"]
    config = load_preset(
        "quadratics",
        [*changes, f"estimator={estimator}", "particles=4", "horizon=40", "validation_runs=5", "lanes=2"],
    )
    trainer = Trainer(config, tmp_path)
    first = trainer.validate()
    before = {key: value.clone() for key, value in trainer.rule.state_dict().items()}
    trainer.meta_gradient()
    for key, value in trainer.rule.state_dict().items():
        assert torch.equal(value, before[key])
    for _ in range(12):
        trainer.train_epoch()
    assert trainer.validate() < 0.9 * first


@pytest.mark.parametrize("estimator", ["es", "pes", "mixed"])
def test_stopped_in_the_middle_of_an_episode_resumes_bit_for_bit(estimator, tmp_path):
    config = dataclasses.replace(
        load_preset("demo", ["epochs=3", "validate_every=1", "validation_runs=1", "horizon=40", "unroll=10"]),
        tasks=(QuadraticConfig(size=5), QuadraticConfig(size=3)),
        rule=LSTMConfig(hidden=2, layers=1, context=KAEConfig(window=4)),
        **{"shortest": 10, "lanes": 3, "estimator": estimator, "particles": 2},
    )
    assert_resumes_bit_for_bit(config, tmp_path)


def test_whole_optimizations_are_one_truncation_whatever_their_length(tmp_path):
    """Every update has a new one; all particles of a pair have its problem, its minibatches and its scales."""
    config = dataclasses.replace(
        TINY, unroll=0, horizon=30, shortest=5, particles=2, estimator="es", weights="end", rescale_tensors=1.0, lanes=2
    )
    trainer = Trainer(config, tmp_path)
    lengths = set()
    for _ in range(6):
        trainer.meta_gradient()
        assert not any(slot.under_way for slot in trainer.slots)
        lengths |= {slot.span for slot in trainer.slots}
    assert len(lengths) > 4
    assert all(5 <= length <= 30 for length in lengths)
    solver, slot = trainer.learner.solver, trainer.slots[0]
    slot.tick()
    message = trainer.estimator.share(solver, slot).message
    epsilon = draw_perturbation(config, slot, slot.done, 0, size(solver))
    ends = []
    for signed in (epsilon, -epsilon):
        slot.inners = []
        (inner,) = slot.begun(solver)
        with torch.no_grad(), perturbed(solver, signed):
            losses = unroll(solver, inner, slot.span).losses
        ends.append(losses[-max(1, slot.span // 10) :].double().mean())
    torch.testing.assert_close(message[0], ends[0] - ends[1])


@pytest.mark.parametrize("sigma", [0.3, 3.0])
def test_cem_goes_to_the_better_half_of_what_it_tried(tmp_path, sigma):
    """Losses of all particles by hand; all slots try the same; what is not trained stays. No step is cut."""
    few = ("head.bias",)
    config = dataclasses.replace(TINY, unroll=0, horizon=20, particles=6, estimator="cem", weights="end", lanes=2)
    config = dataclasses.replace(config, trained=few, sigma=sigma, lr=1.0, clip=1.0)
    trainer = Trainer(config, tmp_path)
    solver, before = trainer.learner.solver, {key: value.clone() for key, value in trainer.rule.state_dict().items()}
    gradient, _ = trainer.meta_gradient()
    epsilons, losses = trainer.estimator.perturbations(solver, trainer.slots[0]), []
    others = trainer.estimator.perturbations(solver, trainer.slots[1])
    assert all(torch.equal(*pair) for pair in zip(epsilons, others, strict=True))
    assert all(torch.equal(plus, -minus) for plus, minus in zip(epsilons[::2], epsilons[1::2], strict=True))
    for epsilon in epsilons:
        ends = []
        for slot in trainer.slots:
            slot.inners = []
            (inner,) = slot.begun(solver)
            with torch.no_grad(), perturbed(solver, epsilon):
                ends.append(unroll(solver, inner, 20).losses[-2:].double().mean())
        losses.append(sum(ends))
    order = torch.stack(losses).argsort()
    best = sum(w * epsilons[i].double() for w, i in zip(rank_weights(6)[:3], order[:3], strict=True))
    torch.testing.assert_close(gradient, -best)
    assert trainer.learner.update(gradient)
    for key, value in trainer.rule.state_dict().items():
        moved = best.float() if key.endswith(few) else torch.zeros(())
        torch.testing.assert_close(value, before[key] + moved.view(-1).expand(value.numel()).view_as(value))


def test_cem_takes_what_is_not_finite_for_the_worst():
    config = dataclasses.replace(TINY, unroll=0, particles=4, estimator="cem", lanes=1, trained=("head.bias",))
    _, solver, _, slot = setting("es")
    solver.requires_grad_(False)
    solver.rule.cell.head.bias.requires_grad_(True)
    made = make_estimator(config)
    slot.config = config
    slot.number = 0
    first = made.gradient(solver, [slot], torch.tensor([1.0, torch.inf, 2.0, 3.0]).double())
    second = made.gradient(solver, [slot], torch.tensor([1.0, 9.0, 2.0, 3.0]).double())
    assert torch.equal(first, second)
    assert first.isfinite().all()
    before = made.perturbations(solver, slot)
    slot.number = 1
    assert not torch.equal(before[0], made.perturbations(solver, slot)[0])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("estimator=cem", "unroll: must be 0 with estimator = cem"),
        ("particles=3", "even"),
        ("unroll=-1", "0 for whole optimizations"),
        ("rescale_tensors=11", "rescale_tensors"),
        ("sigma=0", "sigma"),
        ("estimator=nes", "estimator"),
        ("estimator=mixed", "lanes: must be 2 or more"),
    ],
)
def test_bad_settings_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_preset("demo", [override])


def test_names_that_are_not_the_rule_s_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"trained: no parameter ends with nothing: .*head\.bias"):
        Trainer(dataclasses.replace(TINY, trained=("nothing",)), tmp_path)
