"""The safeguard: the referee on made-up losses, and the optimizer that follows it."""

import copy
import itertools
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Regression, flat, minibatches
from safetensors import safe_open
from torch import nn

from l2o_runtime import LearnedOptimizer, load_rule, save_rule
from l2o_runtime.wrappers.guard import REACH
from l2o_runtime.wrappers.koopman import KoopmanAccelerated
from l2o_runtime.wrappers.referee import HISTORY, PATIENCE, WINDOW, Referee, predict
from l2o_runtime.wrappers.safeguard import Safeguard

HORIZON = 200


def play(losses, horizon=HORIZON):
    """The verdicts on a stream of losses; a function of the referee gives losses that depend on who is acting."""
    referee, verdicts = Referee(), []
    for t, loss in enumerate(losses):
        verdicts.append(referee.judge(loss(t, referee) if callable(loss) else loss, horizon))
    return referee, verdicts


def test_adam_acts_first_then_the_rule_is_tried_and_a_bad_one_undone():
    """The loss falls under Adam and rises under the rule; the next trial comes a hundred windows later."""
    level = [100.0]

    def loss(t, referee):
        level[0] += 0.1 if referee.learned else -0.01
        return level[0]

    referee, verdicts = play([loss] * (HISTORY + WINDOW + PATIENCE * WINDOW))
    learned = [v.learned for v in verdicts]
    assert learned.index(True) == HISTORY - 1
    assert verdicts[HISTORY - 1].save
    assert verdicts[HISTORY - 1].restart
    undone = [t for t, v in enumerate(verdicts) if v.restore]
    assert len(undone) == 1
    assert undone[0] == HISTORY - 1 + WINDOW
    assert referee.trials == 2, "the last step begins the second trial"
    assert sum(learned) <= WINDOW + 1
    assert sum(v.restart for v in verdicts) == 2


def test_waits_double_with_every_failure():
    def loss(t, referee):
        return 2.0 if referee.learned else 1.0

    _, verdicts = play([loss] * 8000)
    starts = [t for t, v in enumerate(verdicts) if v.restart]
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert len(gaps) == 3
    assert gaps[0] == pytest.approx(PATIENCE * WINDOW, abs=WINDOW)
    assert gaps[1:] == pytest.approx([2 * gaps[0], 4 * gaps[0]], abs=2 * WINDOW)


def test_a_rule_that_gains_faster_keeps_acting_until_its_horizon():
    level = [100.0]

    def loss(t, referee):
        level[0] *= 0.99 if referee.learned else 0.9999
        return level[0]

    referee, verdicts = play([loss] * (HISTORY + 100), horizon=40)
    run = [v.learned for v in verdicts][HISTORY - 1 :]
    assert run[:40] == [True] * 40
    assert run[40 : 40 + WINDOW - 1] == [False] * (WINDOW - 1), "Adam again, to see how fast it is here"
    assert not any(v.restore for v in verdicts)
    assert referee.failures == 0


def test_a_rule_that_stalls_hands_over_where_it_is():
    level = [100.0]

    def loss(t, referee):
        level[0] -= 1.0 if referee.learned and referee.steps < 2 * WINDOW else 0.01 * (not referee.learned)
        return level[0]

    referee, verdicts = play([loss] * (HISTORY + 4 * WINDOW))
    assert not any(v.restore for v in verdicts[: HISTORY + 3 * WINDOW])
    assert 2 * WINDOW <= referee.learned_steps <= 5 * WINDOW


def test_noise_alone_passes_no_trial():
    """A hundred trials under the same noise: the rule is no better than Adam, and hardly ever believed."""
    rng = torch.Generator().manual_seed(0)
    passed = 0
    for _ in range(100):
        losses = (1 + torch.randn(HISTORY + WINDOW + 1, generator=rng)).tolist()
        _, verdicts = play(losses)
        passed += not any(v.restore for v in verdicts)
    assert passed <= 5


def test_noise_that_the_rule_itself_brings_passes_no_trial():
    """Adam's losses hardly vary, the rule's do, around a higher mean."""
    rng = torch.Generator().manual_seed(0)
    passed = 0
    for _ in range(100):
        calm = (2.3 + 0.05 * torch.randn(HISTORY, generator=rng)).tolist()
        _, verdicts = play(calm + (2.35 + 0.15 * torch.randn(WINDOW + 1, generator=rng)).tolist())
        passed += not any(v.restore for v in verdicts)
    assert passed <= 5


def test_a_step_that_is_not_finite_undoes_a_trial_and_is_skipped_under_adam():
    referee, _ = play([1.0] * (HISTORY - 1))
    assert not referee.fail().restore
    assert referee.judge(1.0, HORIZON).learned
    verdict = referee.fail()
    assert verdict.restore
    assert not referee.learned


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=150))
def test_any_losses_are_judged_and_the_referee_survives_a_state_dict(losses):
    referee, _ = play(losses)
    twin = Referee.from_tensor(referee.to_tensor())
    assert twin == referee
    for loss in losses:
        assert twin.judge(loss, HORIZON) == referee.judge(loss, HORIZON)


def test_the_prediction_is_that_of_least_squares():
    import numpy as np

    losses = np.random.default_rng(0).normal(size=30) + np.linspace(3, 1, 30)
    mean, slope, error = predict(losses.tolist())
    x = np.arange(30)
    (b, a), covariance = np.polyfit(x, losses, 1, cov="unscaled")
    residual = losses - a - b * x
    ahead = np.array([x[-1] + WINDOW - (WINDOW // 2 - 1) / 2, 1.0])
    assert slope == pytest.approx(b)
    assert mean == pytest.approx(a + b * ahead[0])
    assert error == pytest.approx(math.sqrt(residual @ residual / 28 * (ahead @ covariance @ ahead)))


def run(model, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        optimizer.step(loss=loss)


@pytest.fixture
def climbing(tmp_path):
    """A bundled rule with its output negated."""
    rule = load_rule("normalized-dmd")
    rule.cell.head.weight.neg_()
    rule.cell.head.bias.neg_()
    save_rule(tmp_path / "climbing.safetensors", rule)
    return tmp_path / "climbing.safetensors"


def test_while_adam_acts_it_is_torchs_adam():
    """Before the first trial: the same parameters, bit for bit, weight decay apart."""
    models = Regression(), Regression()
    run(
        models[0],
        LearnedOptimizer(models[0].parameters(), safeguard="adam", safeguard_lr=0.01),
        minibatches(HISTORY - 1),
    )
    adam = torch.optim.Adam(models[1].parameters(), lr=0.01)
    for batch in minibatches(HISTORY - 1):
        adam.zero_grad()
        models[1](*batch).backward()
        adam.step()
    assert torch.equal(flat(models[0]), flat(models[1]))


def test_an_undone_trial_leaves_no_trace_but_the_lost_steps(climbing):
    """After it, parameters and Adam's state are those at its start."""
    model = Regression()
    optimizer = LearnedOptimizer(model.parameters(), rule=climbing, safeguard="adam", safeguard_lr=0.01)
    batches = minibatches(HISTORY + WINDOW + 5)
    run(model, optimizer, batches[: HISTORY - 1])
    start = flat(model)
    first = next(model.parameters())
    averages = optimizer.state[first]["exp_avg"].clone(), optimizer.state[first]["exp_avg_sq"].clone()
    for batch in batches[HISTORY - 1 :]:
        run(model, optimizer, [batch])
        if optimizer.health()["undone"]:
            break
    assert optimizer.health() | {"trials": 1, "undone": 1} == optimizer.health()
    assert torch.equal(flat(model), start)
    assert torch.equal(optimizer.state[first]["exp_avg"], averages[0])
    assert torch.equal(optimizer.state[first]["exp_avg_sq"], averages[1])


def test_what_is_not_stepped_is_left_alone(climbing):
    """A second parameter has no gradient in the trial, and the script moves it: an undo is no reason to move it back,
    but the rule forgets what it knew of it.
    """
    model, other = Regression(), nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([*model.parameters(), other], rule=climbing, safeguard="adam", safeguard_lr=0.01)
    batches = minibatches(HISTORY + WINDOW + 5)
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        other.grad = torch.ones(3) if step < 5 else None
        if step == HISTORY - 2:
            kept = {key for key in optimizer.state[other] if key in ("m", "v", "h0", "c0", "step")}
            for key in kept:
                optimizer.state[other][key].fill_(1)
        optimizer.step(loss=loss)
        if step >= HISTORY - 1:
            with torch.no_grad():
                other += 1
        if optimizer.health()["trials"]:
            assert not any(optimizer.state[other][key].any() for key in kept)
        if optimizer.health()["undone"]:
            break
    assert kept
    assert optimizer.health()["undone"] == 1
    assert (other > step - HISTORY).all()


def test_health_counts_the_steps_that_were_taken(climbing):
    model = Regression()
    optimizer = LearnedOptimizer(model.parameters(), rule=climbing, safeguard="adam", safeguard_lr=0.01)
    batches = minibatches(HISTORY + 2 * WINDOW)
    model(*batches[0]).backward()
    with pytest.raises(ValueError, match=r"step\(loss=loss\)"):
        optimizer.step()
    run(model, optimizer, batches)
    health = optimizer.health()
    assert health["undone"] == 1
    assert health["steps"] == health["learned_steps"] + health["adam_steps"] == len(batches) - 1


@pytest.mark.parametrize("stop", [3, HISTORY - 1, HISTORY, HISTORY + 4, HISTORY + WINDOW + 2])
def test_a_guarded_run_resumes_bit_for_bit(stop):
    batches = minibatches(HISTORY + 3 * WINDOW, size=256)
    model = Regression()
    optimizer = LearnedOptimizer(model.parameters(), "scale", safeguard="adam", safeguard_lr=0.001, weight_decay=1e-5)
    run(model, optimizer, batches[:stop])
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, batches[stop:])
    assert optimizer.health()["learned_steps"] > WINDOW, "the rule is at work here"

    twin = Regression(seed=3)
    twin.load_state_dict(weights)
    resumed = LearnedOptimizer(twin.parameters(), "scale", safeguard="adam")
    resumed.load_state_dict(state)
    run(twin, resumed, batches[stop:])
    assert torch.equal(flat(model), flat(twin))
    assert resumed.health() == optimizer.health()


def test_every_rule_is_guarded(rule_file):
    """Untrained rules of all contexts: the end is no worse than Adam's by more than the steps that trials cost."""
    finals = []
    for make in (
        lambda p: LearnedOptimizer(p, rule=rule_file, safeguard="adam", safeguard_lr=0.01),
        lambda p: torch.optim.Adam(p, lr=0.01),
    ):
        model = Regression()
        optimizer = make(model.parameters())
        for batch in minibatches(150):
            optimizer.zero_grad()
            loss = model(*batch)
            loss.backward()
            optimizer.step(**({"loss": loss} if isinstance(optimizer, LearnedOptimizer) else {}))
        with torch.no_grad():
            finals.append(sum(model(*batch).item() for batch in minibatches(40, seed=9)))
    assert finals[0] <= 1.1 * finals[1]


def test_learned_steps_are_cut_to_adams_scale(climbing):
    model = Regression()
    optimizer = LearnedOptimizer(model.parameters(), safeguard="adam", safeguard_lr=1e-4)
    for batch in minibatches(HISTORY + WINDOW):
        before, learned = flat(model), optimizer.health()["learned_steps"]
        run(model, optimizer, [batch])
        if optimizer.health()["learned_steps"] > learned:
            assert (flat(model) - before).abs().max() <= 1.01 * REACH * 1e-4
    assert optimizer.health()["learned_steps"] > 0


def test_weight_decay_is_that_of_the_group_whoever_acts():
    decayed, plain = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    for p, decay in ((decayed, 250.0), (plain, 0.0)):
        optimizer = LearnedOptimizer([p], "scale", safeguard="adam", weight_decay=decay, lr=0.5)
        p.grad = torch.ones(4)
        optimizer.step(loss=1.0)
    torch.testing.assert_close(plain - decayed, torch.full((4,), 0.125))


def test_a_missing_loss_is_refused_and_a_bad_step_skipped():
    p = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([p], safeguard="adam")
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"step\(loss=loss\)"):
        optimizer.step()
    for loss, value in ((math.nan, 1.0), (1.0, math.inf)):
        p.grad = torch.full((3,), value)
        optimizer.step(loss=loss)
    assert torch.equal(p, torch.ones(3))
    p.grad = torch.ones(3)
    assert optimizer.step(lambda: torch.tensor(1.0)) == 1.0
    assert optimizer.health()["adam_steps"] == 1


@pytest.mark.parametrize("arguments", [{"safeguard": "sgd"}, {"safeguard": "adam", "safeguard_lr": -1.0}])
def test_unknown_safeguards_are_refused(arguments):
    with pytest.raises(ValueError, match="safeguard"):
        LearnedOptimizer([nn.Parameter(torch.ones(2))], **arguments)


# States from before the safeguard was a wrapper

GOLDEN = Path(__file__).parents[1] / "golden" / "v1-safeguard-state.safetensors"
"""The fifth step of a trial of `normalized-dmd`, and the end of that run: minibatches(80, size=256), of which 54 are
done, with safeguard_lr = 0.001 and weight_decay = 1e-5.
"""


@pytest.mark.parametrize("wrapped", [False, True], ids=["sugar", "wrapper"])
def test_a_state_from_before_the_wrapper_goes_on_in_its_trial(wrapped):
    with safe_open(GOLDEN, "pt") as file:
        kept = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        groups, before, after = (json.loads(file.metadata()[k]) for k in ("param_groups", "health", "end_health"))
    saved = {"state": {}, "param_groups": groups}
    for key, value in kept.items():
        if key.startswith("state."):
            _, index, name = key.split(".", 2)
            saved["state"].setdefault(int(index), {})[name] = value
    model = Regression()
    model.load_state_dict({key.removeprefix("weights."): kept[key] for key in kept if key.startswith("weights.")})
    if wrapped:
        optimizer = Safeguard(LearnedOptimizer(model.parameters(), rule="normalized-dmd"))
    else:
        optimizer = LearnedOptimizer(model.parameters(), rule="normalized-dmd", safeguard="adam")
    optimizer.load_state_dict(saved)
    assert optimizer.health() == before
    run(model, optimizer, minibatches(80, size=256)[54:])
    assert optimizer.health() == after
    torch.testing.assert_close(flat(model), kept["end"], rtol=1e-4, atol=1e-5)


# The wrapper around other optimizers


def with_wrapper(model):
    return Safeguard(LearnedOptimizer(model.parameters(), "scale", weight_decay=1e-5), lr=0.001)


def test_the_wrapper_is_what_the_argument_asks_for():
    """Bit for bit, states and counters too."""
    models = Regression(), Regression()
    sugar = LearnedOptimizer(models[0].parameters(), "scale", safeguard="adam", safeguard_lr=0.001, weight_decay=1e-5)
    wrapper = with_wrapper(models[1])
    for model, optimizer in zip(models, (sugar, wrapper), strict=True):
        run(model, optimizer, minibatches(HISTORY + 2 * WINDOW, size=256))
    assert sugar.health()["learned_steps"] > WINDOW
    assert torch.equal(flat(models[0]), flat(models[1]))
    assert sugar.health() == wrapper.health()
    torch.testing.assert_close(sugar.state_dict()["state"], wrapper.state_dict()["state"], rtol=0, atol=0)


def test_a_rule_without_a_safeguard_knows_nothing_of_it():
    model = Regression()
    optimizer = LearnedOptimizer(model.parameters())
    run(model, optimizer, minibatches(3))
    assert "safeguard_lr" not in optimizer.param_groups[0]
    assert not any("safeguard" in key or "adam" in key for state in optimizer.state.values() for key in state)
    assert optimizer.guard is None


class Climbing(torch.optim.SGD):
    """SGD the wrong way."""

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            param += self.param_groups[0]["lr"] * param.grad


OTHERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.3, momentum=0.9),
    "climbing": lambda params: Climbing(params, lr=0.3),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.03),
    "LearnedOptimizer": lambda params: LearnedOptimizer(params, rule="normalized-dmd"),
}
"""Some of them have states of the same names as the guard."""


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_optimizers_are_guarded(make):
    """Adam's steps first, then a trial: what climbs is undone, what is better than Adam goes on."""
    model = Regression()
    optimizer = Safeguard(make(model.parameters()), lr=1e-3)
    assert isinstance(optimizer, torch.optim.Optimizer)
    run(model, optimizer, minibatches(HISTORY + 3 * WINDOW, size=256))
    health = optimizer.health()
    assert health["trials"] == 1
    assert health["steps"] == health["learned_steps"] + health["adam_steps"]
    climbing = isinstance(optimizer.optimizer, Climbing)
    assert health["undone"] == climbing
    assert (health["learned_steps"] <= WINDOW) == climbing


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_steps_of_others_are_cut_too(make):
    model = Regression()
    optimizer = Safeguard(make(model.parameters()), lr=1e-5)
    for batch in minibatches(HISTORY + 5, size=256):
        before, learned = flat(model), optimizer.health()["learned_steps"]
        run(model, optimizer, [batch])
        if optimizer.health()["learned_steps"] > learned:
            assert (flat(model) - before).abs().max() <= 1.01 * REACH * 1e-5
    assert optimizer.health()["learned_steps"] == 6


def through_state_dict(model, optimizer, make):
    twin = copy.deepcopy(model)
    resumed = Safeguard(make(twin.parameters()))
    resumed.load_state_dict(optimizer.state_dict())
    return twin, resumed


COPIES = {
    "state_dict": through_state_dict,
    "deepcopy": lambda model, optimizer, _: copy.deepcopy((model, optimizer)),
    "pickle": lambda model, optimizer, _: pickle.loads(pickle.dumps((model, optimizer))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("copier", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_copies_of_a_wrapper_go_on_alike(make, copier, dtype):
    """In the middle of a trial; no number of the referee is rounded to the parameters' dtype."""
    model = Regression().to(dtype)
    optimizer = Safeguard(make(model.parameters()), lr=1e-3)
    batches = [(x.to(dtype), y) for x, y in minibatches(HISTORY + 2 * WINDOW, size=256)]
    run(model, optimizer, batches[: HISTORY + 4])
    assert optimizer.health()["trials"] == 1
    twin, resumed = copier(model, optimizer, make)
    run(model, optimizer, batches[HISTORY + 4 :])
    run(twin, resumed, batches[HISTORY + 4 :])
    assert torch.equal(flat(model), flat(twin))
    assert optimizer.health() == resumed.health()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 100.0])
def test_adam_steps_parameters_in_half_precision(dtype, size):
    """Squares of gradients are 0 in float16, and so is ε; steps are those of float32, rounded once."""
    found = []
    for kind in (dtype, torch.float32):
        param = nn.Parameter(torch.linspace(-2, 2, 7).to(kind))
        optimizer = LearnedOptimizer([param], safeguard="adam", weight_decay=0.1)
        for step in range(5):
            param.grad = (size * torch.linspace(-1, 2, 7) * (1 + step)).to(kind)
            optimizer.step(loss=1.0)
        found.append(param.detach().float())
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-3 if size > 1e-5 else 5e-3)


def test_schedules_and_new_groups_reach_whoever_steps():
    """Adam's learning rate follows that of the optimizer inside."""
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Safeguard(torch.optim.SGD([first], lr=0.5), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    optimizer.add_param_group({"params": [second], "lr": 0.1})
    moved = []
    for _ in range(2):
        before = first.detach().clone(), second.detach().clone()
        first.grad, second.grad = torch.ones(3), torch.ones(3)
        optimizer.step(loss=1.0)
        moved.append([(b - p).abs().max().item() for b, p in zip(before, (first, second), strict=True)])
        optimizer.param_groups[0]["lr"] = 0.05
    assert moved[0] == pytest.approx([0.01, 0.01], rel=1e-3)
    assert moved[1] == pytest.approx([0.001, 0.01], rel=1e-3)
    assert scheduler.optimizer is optimizer


def test_a_wrapper_skips_what_is_not_finite_and_works_with_a_scaler():
    param = nn.Parameter(torch.ones(3))
    optimizer = Safeguard(torch.optim.SGD([param], lr=0.1, weight_decay=0.5), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    for value, taken in ((math.inf, 0), (1.0, 1)):
        optimizer.zero_grad()
        loss = (param * value).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer, loss=loss)
        scaler.update()
        assert optimizer.health()["steps"] == taken
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.995 - 0.01))
    param.grad = torch.full((3,), math.nan)
    optimizer.step(loss=1.0)
    assert optimizer.health()["nonfinite_gradient"] == 1
    assert optimizer.step(lambda: 1.0) == 1.0
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"step\(loss=loss\)"):
        optimizer.step()


def test_hooks_of_the_state_dict_are_those_of_the_optimizer_inside():
    model = Regression()
    optimizer = Safeguard(torch.optim.SGD(model.parameters(), lr=0.1))
    run(model, optimizer, minibatches(HISTORY + 2))
    seen = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("load"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save", "load"]


def test_what_cannot_be_guarded_is_told():
    param = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="optimizer: expected"):
        Safeguard([param])
    with pytest.raises(TypeError, match="LBFGS calls the closure itself"):
        Safeguard(torch.optim.LBFGS([param]))
    for guarded in (LearnedOptimizer([param], safeguard="adam"), Safeguard(torch.optim.SGD([param], lr=0.1))):
        with pytest.raises(ValueError, match="already"):
            Safeguard(guarded)
    with pytest.raises(ValueError, match=r"need the loss: write KoopmanAccelerated\(Safeguard"):
        Safeguard(KoopmanAccelerated(torch.optim.SGD([param], lr=0.1)))
    with pytest.raises(ValueError, match="lr of the optimizer inside is 0"):
        Safeguard(torch.optim.SGD([param], lr=0.0))
    for lr in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="lr: expected a finite number"):
            Safeguard(torch.optim.SGD([param], lr=0.1), lr=lr)
    adam = torch.optim.Adam([param])
    param.grad = torch.ones(3)
    adam.step()
    with pytest.raises(ValueError, match="unknown state step"):
        Safeguard(torch.optim.Adam([param])).load_state_dict(adam.state_dict())
    assert repr(Safeguard(torch.optim.SGD([param], lr=0.1))).startswith("Safeguard around SGD (")


def test_what_is_frozen_after_its_gradient_was_made_is_stepped():
    """As without a safeguard: whoever sets gradients of frozen parameters wants them to move."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = LearnedOptimizer(params, safeguard="adam")
    params[0].requires_grad_(False)
    for _ in range(HISTORY + WINDOW):
        for param in params:
            param.grad = param.detach().clone()
        optimizer.step(loss=sum(float(param.detach().square().sum()) for param in params))
    assert all((param < 1).all() for param in params)
