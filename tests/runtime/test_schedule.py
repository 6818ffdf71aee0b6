"""How long steps are over a run: total_steps, torch's schedulers, neither; and the mean of the latest parameters."""

import copy
import io
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from l2o_runtime import LearnedOptimizer, load_rule, make_rule, save_rule
from l2o_runtime.rules import DirectionalConfig
from l2o_runtime.solvers import Descent, Point


@pytest.fixture(scope="module")
def rule(tmp_path_factory):
    path = tmp_path_factory.mktemp("rules") / "rule.safetensors"
    torch.manual_seed(0)
    save_rule(path, make_rule(DirectionalConfig()))
    return path


@pytest.fixture(autouse=True)
def _as_long_as_they_are(nothing_lengthens):
    """Gradients here go on pointing the same way, which makes steps longer."""


def moves(optimizer, param, steps, after=lambda: None):
    """How far a parameter goes in every step beside its size, under a gradient that stays the same."""
    found = []
    for _ in range(steps):
        before = param.detach().clone()
        size = math.sqrt(2 * max(float(before.square().mean()), 1 / 12 / math.sqrt(before.numel())) + 1e-6)
        param.grad = torch.ones_like(param)
        optimizer.step()
        after()
        found.append(float((param.detach() - before).square().mean().sqrt()) / size / 0.015)
    return found


def fresh():
    return nn.Parameter(torch.full((6,), 3.0))


def driven(lefts, first=1):
    """How far a parameter goes where a scheduler leaves so much of lr, from step `first` on; warm-ups count as none."""
    found, top = [], 0.0
    for step, left in enumerate(lefts, start=first):
        top = max(top, left)
        found.append(left * math.sqrt(min(max(2500 * (1 - left / top) / step, 1), 9)))
    return found


def test_a_run_of_known_length_rises_and_falls(rule):
    param = fresh()
    found = moves(LearnedOptimizer([param], rule, total_steps=100), param, 100)
    assert found == pytest.approx([3 * min(1, t / 2) * (1 - t / 100) for t in range(1, 101)], rel=2e-3, abs=1e-6)


def test_steps_that_were_left_out_do_not_bring_the_end_nearer(rule):
    param = fresh()
    optimizer = LearnedOptimizer([param], rule, total_steps=5)
    for _ in range(3):
        param.grad = torch.full((6,), math.nan)
        optimizer.step()
    assert moves(optimizer, param, 5)[3] > 0  # warnings are errors
    with pytest.warns(UserWarning, match="step 6 of total_steps=5: nothing moves any more"):
        moves(optimizer, param, 1)


@pytest.mark.parametrize(("total", "factor"), [(625, 2.0), (2500, 1.0), (10_000, 1.0)])
def test_short_runs_have_longer_steps(rule, total, factor):
    param = fresh()
    found = moves(LearnedOptimizer([param], rule, total_steps=total), param, 20)
    expected = [factor * min(1, t / (0.02 * total)) * (1 - t / total) for t in range(1, 21)]
    assert found == pytest.approx(expected, rel=2e-3)


def test_past_its_end_nothing_moves_and_one_warning_says_so(rule):
    param = fresh()
    optimizer = LearnedOptimizer([param], rule, total_steps=5)
    moves(optimizer, param, 5)
    with pytest.warns(UserWarning, match="step 6 of total_steps=5: nothing moves any more"):
        assert moves(optimizer, param, 1) == [0.0]
    assert moves(optimizer, param, 3) == [0.0] * 3


def following(lrs):
    """How far a parameter goes that follows steps at these rates: as Defazio et al. 2024 have it, with z and x."""
    found = []
    x = y = z = 3.0
    for t, lr in enumerate(lrs, start=1):
        size = math.sqrt(2 * max(y * y, 1 / 12 / math.sqrt(6)) + 1e-6)
        z -= 0.0225 * lr * min(1, t / 20) / (1 + t / 250) ** 0.75 * size
        x += (z - x) * 4 / (t + 3)
        beta = t / (t + 100)
        before, y = y, (1 - beta) * z + beta * x
        found.append((before - y) / size / 0.015)
    return found


def test_without_a_length_parameters_follow_steps_that_fade(rule):
    param = fresh()
    found = moves(LearnedOptimizer([param], rule), param, 60)
    assert found == pytest.approx(following([1.0] * 60), rel=2e-3)


def behind(optimizer, param):
    """e, and where steps have led: z = y + β e."""
    state = optimizer.state[param]
    lag, step = state["lag"], float(state["health"][0])
    return lag, param.detach().float() + min(step / (step + 100), 0.9) * lag


def test_where_lr_is_zero_nothing_moves_towards_what_it_trails_behind(rule):
    for kind in (float, torch.tensor):
        param = fresh()
        optimizer = LearnedOptimizer([param], rule)
        moves(optimizer, param, 10)
        optimizer.param_groups[0]["lr"] = kind(0.0)
        before = behind(optimizer, param)[0].clone()
        assert moves(optimizer, param, 3) == [0.0] * 3
        assert torch.equal(behind(optimizer, param)[0], before)
        assert before.abs().max() > 0


def test_a_scheduler_that_comes_later_ends_the_trailing(rule):
    param = fresh()
    optimizer = LearnedOptimizer([param], rule)
    moves(optimizer, param, 5)
    torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 100)
    assert moves(optimizer, param, 3) == pytest.approx([0.5] * 3, rel=2e-3)
    assert "lag" not in optimizer.state[param]


def test_what_somebody_else_does_to_parameters_is_not_undone(rule):
    """Weights that are clipped, or loaded from elsewhere, take along where steps lead."""
    param = fresh()
    optimizer = LearnedOptimizer([param], rule)
    moves(optimizer, param, 30)
    with torch.no_grad():
        param.fill_(7.0)
    lag, ahead = behind(optimizer, param)
    torch.testing.assert_close(ahead - param, min(30 / 130, 0.9) * lag)
    moves(optimizer, param, 1)
    assert (param - 7.0).abs().max() < 0.3


def test_in_half_precision_steps_are_not_lost(rule):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        param = nn.Parameter(torch.full((64,), 3.0, dtype=dtype))
        optimizer = LearnedOptimizer([param], rule, lr=0.05)  # of which a single one is lost
        moves(optimizer, param, 120)
        found.append(behind(optimizer, param)[1])
    assert (found[0] - 3.0).abs().min() > 0.2
    assert ((found[1] - 3.0) / (found[0] - 3.0)).min() > 0.5


@pytest.mark.parametrize("kernels", ["", "foreach"])
def test_some_groups_trail_and_others_do_not(rule, monkeypatch, kernels):
    found = []
    for chosen in (kernels, "plain"):
        monkeypatch.setenv("L2O_KERNELS", chosen)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        optimizer = LearnedOptimizer(model[0].parameters(), rule, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20)
        optimizer.add_param_group({"params": list(model[2].parameters())})
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
            scheduler.step()
        assert ["lag" in optimizer.state[p] for p in model.parameters()] == [False, False, True, True]
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_what_begins_late_has_no_average_to_follow_yet(rule):
    """Layers that are unfrozen go as fast as the step of the whole run allows, not a tenth of it."""
    first, late = fresh(), fresh()
    optimizer = LearnedOptimizer([first, late], rule)
    moves(optimizer, first, 300)
    step = 1.5 / (1 + 301 / 250) ** 0.75
    first.grad = None
    assert moves(optimizer, late, 1)[0] == pytest.approx(step, rel=0.02)


@pytest.mark.parametrize("kernels", ["", "plain"])
def test_a_lag_of_another_type_becomes_float32(rule, monkeypatch, kernels):
    monkeypatch.setenv("L2O_KERNELS", kernels)
    param = fresh()
    optimizer = LearnedOptimizer([param], rule)
    moves(optimizer, param, 5)
    saved = optimizer.state_dict()
    saved["state"][0]["lag"] = saved["state"][0]["lag"].bfloat16()
    other = LearnedOptimizer([param], rule)
    other.load_state_dict(saved)
    assert other.state[param]["lag"].dtype == torch.float32
    other.state[param]["lag"] = other.state[param]["lag"].bfloat16()  # by hand: no kernel may read it
    assert 0 < moves(other, param, 1)[0] < 2


@pytest.mark.filterwarnings("ignore:lr has been at most")
def test_late_decay_is_as_exact_as_without_kernels(rule, monkeypatch):
    """What a step takes off is less than float32 can take off 1."""
    found = []
    for kernels in ("", "foreach", "plain"):
        monkeypatch.setenv("L2O_KERNELS", kernels)
        param = nn.Parameter(torch.full((64,), 1000.0))
        optimizer = LearnedOptimizer([param], rule, lr=1e-3, weight_decay=0.005)
        rng = torch.Generator().manual_seed(0)
        for _ in range(200):
            param.grad = torch.randn(64, generator=rng)
            optimizer.step()
        found.append(optimizer.state[param]["lag"])
    torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[1], found[2], rtol=1e-3, atol=1e-5)


def test_flat_tasks_see_the_same(rule):
    """`Descent`, which meta-training and comparisons run, follows steps as the optimizer does."""
    param = nn.Parameter(torch.linspace(1, 2, 6))
    optimizer, solver = LearnedOptimizer([param], rule), Descent(load_rule(rule))
    theta = param.detach().clone()[None]
    state = solver.init(SimpleNamespace(params=theta, shapes=[torch.Size([6])], steps=None, structure=None))
    for _ in range(30):
        param.grad = param.detach() - 1.5
        point = Point(theta, torch.zeros(1), theta - 1.5)
        optimizer.step()
        theta, state = solver.step(point, state)
        torch.testing.assert_close(theta[0], param.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "factor"),
    [
        (
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
            lambda t: (1 + math.cos(math.pi * t / 20)) / 2,
        ),
        (lambda o: torch.optim.lr_scheduler.StepLR(o, 5, 0.1), lambda t: 0.1 ** (t // 5)),
        (
            lambda o: torch.optim.lr_scheduler.SequentialLR(
                o,
                [
                    torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 4),
                    torch.optim.lr_scheduler.ConstantLR(o, 1.0, 1),
                ],
                [4],
            ),
            lambda t: min(1.0, 0.1 + 0.9 * t / 4),
        ),
    ],
)
def test_a_scheduler_takes_the_place_of_the_fading(rule, make, factor):
    param = fresh()
    optimizer = LearnedOptimizer([param], rule)
    found = moves(optimizer, param, 20, make(optimizer).step)
    assert found == pytest.approx(driven(map(factor, range(20))), rel=2e-3, abs=1e-5)  # θ is rounded to 1e-7


@pytest.mark.parametrize("total", [400, 2500, 40_000])
def test_beside_a_scheduler_short_runs_have_longer_steps_too(rule, total):
    """A fall along a line says how long the run is; long ones are what the scheduler makes of them."""
    param = fresh()
    optimizer = LearnedOptimizer([param], rule)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total)
    found = moves(optimizer, param, 40, scheduler.step)
    told = [math.sqrt(max(2500 / total, 1)) * (1 - t / total) for t in range(40)]
    assert found[20:] == pytest.approx(told[20:], rel=0.03)
    assert all(one <= 1.001 * other for one, other in zip(found, told, strict=True))


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_steps_of_a_warm_up_are_no_longer_than_those_after_it(rule, kind):
    """As long as lr says, on the way up; warm restarts fall as they did before, and a new scheduler begins anew."""
    param = fresh()
    optimizer = LearnedOptimizer([param], rule, lr=kind(1.0))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 1.0, 5)
    rising = [1 / 3 + 2 / 3 * t / 5 for t in range(5)]
    assert moves(optimizer, param, 8, scheduler.step) == pytest.approx([*rising, 1, 1, 1], rel=2e-3)
    falling = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    found = moves(optimizer, param, 8, falling.step)
    assert found == pytest.approx(driven([0.9**t for t in range(8)], first=9), rel=2e-3)
    for group in optimizer.param_groups:
        group["lr"] = kind(0.5)
        del group["initial_lr"]
    torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 1)
    assert moves(optimizer, param, 3) == pytest.approx([0.5] * 3, rel=2e-3)


def test_a_resumed_fall_knows_how_high_lr_has_been(rule):
    """A transformer's schedule stays far below the initial lr."""
    param = fresh()
    optimizer = LearnedOptimizer([param], rule)
    lefts = [0.1 * min(t / 4, (4 / t) ** 0.5) for t in range(1, 20)]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: lefts[t])
    moves(optimizer, param, 9, scheduler.step)
    again = nn.Parameter(param.detach().clone())
    resumed = LearnedOptimizer([again], rule)
    other = torch.optim.lr_scheduler.LambdaLR(resumed, lambda t: lefts[t])
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(scheduler.state_dict())
    assert moves(resumed, again, 9, other.step) == pytest.approx(driven(lefts)[9:18], rel=2e-3)


@pytest.mark.parametrize(("initial", "kind"), [(0.0, float), (0.1, float), (0.1, torch.tensor)])
def test_what_a_scheduler_leaves_is_beside_the_initial_learning_rate(rule, initial, kind):
    """Zero, as groups of frozen layers have it, and a tensor, as graphs ask for."""
    param = fresh()
    optimizer = LearnedOptimizer([param], rule, lr=kind(initial))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    found = moves(optimizer, param, 8, scheduler.step)
    assert found == pytest.approx([initial * x for x in driven(0.9**t for t in range(8))], rel=4e-3, abs=1e-6)


def test_one_cycle_and_plateau_run(rule):
    param = fresh()
    optimizer = LearnedOptimizer([param], rule)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=21)
    lrs = [optimizer.param_groups[0]["lr"]]

    def after():
        scheduler.step()
        lrs.append(optimizer.param_groups[0]["lr"])

    found = moves(optimizer, param, 20, after)
    assert found == pytest.approx(driven(lrs[:20]), rel=2e-3, abs=1e-5), "beside the highest lr, not the initial one"
    param = fresh()
    optimizer = LearnedOptimizer([param], rule)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    halved = moves(optimizer, param, 4, lambda: plateau.step(1.0))
    assert halved == pytest.approx(following((1, 1, 0.5, 0.25)), rel=2e-3)


def test_both_multiply_and_are_told_of(rule):
    param = fresh()
    optimizer = LearnedOptimizer([param], rule, total_steps=10)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    with pytest.warns(UserWarning, match="total_steps has a schedule of its own"):
        found = moves(optimizer, param, 10)
    assert found == pytest.approx([1.5 * (1 - t / 10) for t in range(1, 11)], rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("before", [True, False], ids=["saved under a scheduler", "saved without one"])
def test_a_scheduler_drives_whether_it_is_made_before_or_after_a_state_is_loaded(rule, before):
    param, found = fresh(), []
    optimizer = LearnedOptimizer([param], rule)
    if before:
        torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 1)
    moves(optimizer, param, 200)
    saved, value = copy.deepcopy(optimizer.state_dict()), param.detach().clone()
    for first in (True, False):
        param = nn.Parameter(value.clone())
        optimizer = LearnedOptimizer([param], rule)
        made = lambda optimizer=optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)  # noqa: E731
        scheduler = made() if first else None
        optimizer.load_state_dict(saved)
        found.append(moves(optimizer, param, 8, (scheduler or made()).step))
    assert found[0] == found[1]
    lefts = [(1 + math.cos(math.pi * t / 10)) / 2 for t in range(8)]
    assert found[0] == pytest.approx(driven(lefts, first=201), rel=2e-3)


@pytest.mark.parametrize("options", [{"total_steps": 12}, {}, {"averaging": True}])
def test_resumption_keeps_the_place(rule, options):
    param = fresh()
    optimizer = LearnedOptimizer([param], rule, **options)
    moves(optimizer, param, 7)
    saved = io.BytesIO()
    torch.save((param.detach().clone(), optimizer.state_dict()), saved)
    wanted = moves(optimizer, param, 5)
    saved.seek(0)
    value, state = torch.load(saved, weights_only=True)
    again = nn.Parameter(value)
    resumed = LearnedOptimizer([again], rule, **options)
    resumed.load_state_dict(state)
    assert moves(resumed, again, 5) == wanted
    assert torch.equal(param, again)
    if "averaging" in options:
        with optimizer.averaged(), resumed.averaged():
            assert torch.equal(param, again)


def test_a_run_that_is_resumed_past_its_end_is_told_of_it(rule):
    param = fresh()
    optimizer = LearnedOptimizer([param], rule, total_steps=9)
    moves(optimizer, param, 7)
    resumed = LearnedOptimizer([param], rule, total_steps=4)
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match="step 8 of total_steps=4: nothing moves any more"):
        assert moves(resumed, param, 2) == [0.0, 0.0]


def test_a_safeguards_adam_follows_a_run_of_known_length(rule):
    plain, falling = fresh(), fresh()
    for p, options in ((plain, {}), (falling, {"total_steps": 4})):
        optimizer = LearnedOptimizer([p], rule, safeguard="adam", **options)
        p.grad = torch.ones(6)
        optimizer.step(loss=1.0)
    torch.testing.assert_close(falling - 3, 0.75 * (plain - 3))


def test_old_rules_keep_their_steps_and_may_be_scheduled():
    param, free = fresh(), fresh()
    for optimizer, p in (
        (LearnedOptimizer([param], "scale", total_steps=4), param),
        (LearnedOptimizer([free], "scale"), free),
    ):
        p.grad = torch.ones_like(p)
        optimizer.step()
    torch.testing.assert_close(param - 3, 0.75 * (free - 3))


def test_weight_decay_is_in_proportion_to_the_step(rule):
    ends = []
    for decay in (0.0, 0.1):
        param = fresh()
        optimizer = LearnedOptimizer([param], rule, weight_decay=decay, total_steps=10)
        param.grad = torch.ones_like(param)
        optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(ends[0] - ends[1], torch.full((6,), 3 * 0.1 * 0.005 * 3 * 0.9), rtol=1e-3, atol=1e-6)


def test_the_mean_of_the_latest_parameters(rule):
    torch.manual_seed(0)
    param = fresh()
    optimizer = LearnedOptimizer([param], rule, averaging=True)
    mean = None
    for step in range(1, 31):
        param.grad = torch.randn(6)
        optimizer.step()
        now = param.detach().clone()
        mean = now if mean is None else mean + (now - mean) / (1 + 0.1 * (step - 1))
    with optimizer.averaged():
        torch.testing.assert_close(param, mean)
        with pytest.raises(RuntimeError, match=r"step\(\) within averaged"):
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"averaged\(\) within averaged"), optimizer.averaged():
            pass
    assert torch.equal(param, now)
    with pytest.raises(ZeroDivisionError), optimizer.averaged():
        raise ZeroDivisionError
    assert torch.equal(param, now), "restored after an error, too"


def test_a_step_that_is_not_taken_does_not_count(rule):
    param = fresh()
    optimizer = LearnedOptimizer([param], rule, total_steps=10, averaging=True)
    moves(optimizer, param, 2)
    mean = optimizer.state[param]["averaged"].clone()
    param.grad = torch.full((6,), math.nan)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["averaged"], mean)
    assert moves(optimizer, param, 1) == pytest.approx([2.1], rel=2e-3)


@pytest.mark.parametrize("taken", [0, 3])
def test_parameters_that_were_not_finite_leave_the_mean_alone(rule, taken):
    """Where the first step was left out too."""
    param, clean = fresh(), fresh()
    optimizer, other = (LearnedOptimizer([p], rule, averaging=True) for p in (param, clean))
    moves(optimizer, param, taken)
    moves(other, clean, taken)
    good = param.detach().clone()
    param.data[2] = math.nan
    param.grad = torch.ones(6)
    optimizer.step()
    param.data.copy_(good)
    moves(optimizer, param, 2)
    moves(other, clean, 2)
    with optimizer.averaged(), other.averaged():
        assert torch.equal(param, clean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_means_follow_in_late_steps_too(rule, dtype):
    """In bfloat16 a mean of 3 does not change by less than 1/128."""
    param = nn.Parameter(fresh().detach().to(dtype))
    optimizer = LearnedOptimizer([param], rule, averaging=True)
    moves(optimizer, param, 1)
    state = optimizer.state[param]
    state["health"][0] = 10_000
    before = state["averaged"].clone()
    param.data.add_(1.0)
    moves(optimizer, param, 1)
    share = 1 / (1 + 0.1 * 10_000)
    torch.testing.assert_close(state["averaged"] - before, share * (param.detach() - before), rtol=1e-2, atol=0)
    with optimizer.averaged():
        assert torch.equal(param, state["averaged"].to(dtype))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_keep_schedule_and_mean_and_go_on(rule, copier):
    param = fresh()
    optimizer = LearnedOptimizer([param], rule, total_steps=10, averaging=True)
    moves(optimizer, param, 3)
    other, twin = copier((param, optimizer))
    assert moves(twin, other, 3) == moves(optimizer, param, 3)
    with optimizer.averaged(), twin.averaged():
        assert torch.equal(param, other)
    with optimizer.averaged():
        other, twin = copier((param, optimizer))
    assert moves(twin, other, 1) != [0.0], "a copy has its parameters to itself"


def test_parameters_that_come_later_are_averaged_from_then_on(rule):
    first, later = fresh(), fresh()
    optimizer = LearnedOptimizer([first], rule, averaging=True)
    moves(optimizer, first, 5)
    optimizer.add_param_group({"params": [later]})
    first.grad = None
    moves(optimizer, later, 1)
    now = later.detach().clone()
    with optimizer.averaged():
        assert torch.equal(later, now)


def test_a_state_with_means_is_loaded_by_whoever_keeps_none(rule):
    param = fresh()
    optimizer = LearnedOptimizer([param], rule, averaging=True)
    moves(optimizer, param, 3)
    plain = LearnedOptimizer([param], rule)
    plain.load_state_dict(optimizer.state_dict())
    moves(plain, param, 30)
    back = LearnedOptimizer([param], rule, averaging=True)
    back.load_state_dict(plain.state_dict())
    moves(back, param, 1)
    now = param.detach().clone()
    with back.averaged():
        assert torch.equal(param, now), "nobody went on with the mean meanwhile: it begins anew"


def test_a_length_may_be_a_number_of_numpys(rule):
    import numpy as np

    found = []
    for total in (5, np.int64(5)):
        param = fresh()
        found.append(moves(LearnedOptimizer([param], rule, total_steps=total), param, 5))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps: expected a whole number, 1 or more, or None; got 0"),
        ({"total_steps": 2.5}, "total_steps: expected a whole number"),
        ({"total_steps": True}, "total_steps: expected a whole number"),
        ({"schedule": "cosine"}, "schedule: expected 'auto' or 'constant', got 'cosine'"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer([fresh()], **options)


def test_without_averaging_there_is_no_mean(rule):
    optimizer = LearnedOptimizer([fresh()], rule)
    with pytest.raises(RuntimeError, match="make the optimizer with averaging=True"), optimizer.averaged():
        pass
