"""Baselines with a formula or a schedule of their own: Muon beside AdamW, schedule-free AdamW, rises and falls."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from comparing import run, script_of
from torch import nn
from torch.optim import AdamW, Muon

from l2o_runtime import ConfigError
from l2o_training.bench.memory import state_bytes
from l2o_training.compare import baselines
from l2o_training.compare.baselines import BASELINES, find_baselines, warm_cosine, warm_linear
from l2o_training.compare.contenders import baselines as contenders_of
from l2o_training.compare.contenders import of_baseline
from l2o_training.compare.muon import MuonAdamW, is_matrix
from l2o_training.compare.scripts import judged, train
from l2o_training.compare.suites import find_suite, workloads
from l2o_training.tasks.data import Datasets

free = pytest.mark.skipif(not BASELINES["schedule-free"].installed, reason="needs schedulefree")
SCHEDULED = ["adamw-cosine", "adamw-linear", "muon-linear", pytest.param("schedule-free", marks=free)]


class Network(nn.Module):
    """Parameters of every shape that matters."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 3, 3), nn.Linear(12, 4)
        self.head, self.norm, self.channels = nn.Linear(4, 1), nn.LayerNorm(4), nn.Conv2d(3, 3, 1, groups=3)

    def forward(self, x):
        return self.head(self.norm(self.linear(self.channels(self.conv(x)).flatten(1))))


def test_muon_steps_matrices_as_torch_does_and_adamw_the_rest():
    torch.manual_seed(0)
    model, reference = Network(), Network()
    reference.load_state_dict(model.state_dict())
    ours = MuonAdamW(model.parameters(), lr=0.01)
    matrices = {name for name, param in model.named_parameters() if is_matrix(param)}
    assert matrices == {"conv.weight", "linear.weight"}
    named = dict(reference.named_parameters())
    flat = nn.Parameter(reference.conv.weight.detach().flatten(1).clone())
    muon = Muon([reference.linear.weight, flat], 0.01, 0.01, adjust_lr_fn="match_rms_adamw")
    adamw = AdamW([named[name] for name in named if name not in matrices], 0.01, weight_decay=0.01)
    for step in range(5):
        ours.param_groups[0]["lr"] = muon.param_groups[0]["lr"] = adamw.param_groups[0]["lr"] = 0.01 / (1 + step)
        x = torch.randn(6, 2, 4, 4)
        for each in (model, reference):
            each.zero_grad()
            (each(x) - 1).square().mean().backward()
        flat.grad = reference.conv.weight.grad.flatten(1)
        for optimizer in (ours, muon, adamw):
            optimizer.step()
        with torch.no_grad():
            reference.conv.weight.copy_(flat.view_as(reference.conv.weight))
        for name, param in model.named_parameters():
            assert torch.equal(param, named[name]), name
    assert state_bytes(ours) == state_bytes(muon) + state_bytes(adamw)


def test_muon_takes_networks_of_one_kind_and_tensors_without_a_gradient():
    for model in (nn.Linear(100, 1), nn.Embedding(5, 3)):
        before = model.weight.clone()
        optimizer = MuonAdamW(model.parameters(), lr=0.1)
        optimizer.step()
        assert torch.equal(model.weight, before)
        model.weight.square().sum().backward()
        optimizer.step()
        assert not torch.equal(model.weight, before)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: None)


@free
def test_schedule_free_is_the_formula_of_its_paper():
    """Gradients are taken at y = (1 − β) z + β x; x, the average of z, is what is judged."""
    torch.manual_seed(0)
    curvature, start, lr, decay, beta = torch.rand(5, dtype=torch.float64) + 0.1, torch.ones(5).double(), 0.1, 0.01, 0.9
    param = nn.Parameter(start.clone())
    optimizer, schedule = BASELINES["schedule-free"].optimizer([param], lr, 100)
    x, z, v, weights = start.clone(), start.clone(), torch.zeros(5).double(), 0.0
    peak = 0.0
    for step in range(1, 9):
        param.grad = curvature * param.detach()
        optimizer.step()
        schedule.step()
        rate = lr * min(1, step / 2)
        y = (1 - beta) * z + beta * x
        grad = curvature * y
        v = 0.999 * v + 0.001 * grad.square()
        direction = grad / ((v / (1 - 0.999**step)).sqrt() + 1e-8) + decay * y
        z = z - rate * direction
        peak = max(peak, rate)
        weights += peak**2
        x = x + (peak**2 / weights) * (z - x)
        with judged(optimizer):
            torch.testing.assert_close(param.detach(), x)
        torch.testing.assert_close(param.detach(), (1 - beta) * z + beta * x)


@free
@pytest.mark.slow
def test_validation_is_of_the_weights_that_an_optimizer_wants_to_be_judged_by():
    script, baseline = script_of("friedman-mlp"), BASELINES["schedule-free"]
    found = train(script, baseline.optimizer, 0.01, 0, 40)

    def blind(params, lr, steps):
        optimizer, schedule = baseline.optimizer(params, lr, steps)
        optimizer.eval = optimizer.train = lambda: None
        return optimizer, schedule

    other = train(script, blind, 0.01, 0, 40)
    np.testing.assert_allclose(found.train, other.train, rtol=1e-3)
    assert np.abs(found.validation - other.validation).min() > 1e-3


@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize("steps", [100, 2500])
def test_schedules_span_the_runs_own_length(name, steps):
    optimizer, schedule = BASELINES[name].optimizer([nn.Parameter(torch.ones(3, 3))], 0.5, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    rise = steps // 50
    np.testing.assert_allclose(rates[0], 0.5 / rise, rtol=0.02)
    assert max(rates) == pytest.approx(0.5, rel=0.021)
    assert int(np.argmax(rates)) == rise - 1
    if name == "schedule-free":
        assert rates[-1] == 0.5
    else:
        assert rates[-1] <= 0.501 / steps
        falling = warm_cosine if name == "adamw-cosine" else warm_linear
        assert rates[steps // 2] == pytest.approx(0.25, rel=1e-9)
        assert falling(steps, steps) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULED)
def test_they_train_convolutions_and_recurrent_networks(name):
    for task in ("resnet-groupnorm", "char-lstm"):
        found = run(script_of(task), of_baseline(BASELINES[name]), 0.01, 0, 40)
        assert np.mean(found.train[-10:]) < 0.95 * np.mean(found.train[:10])
        assert all(map(math.isfinite, found.validation))
        assert 4 <= found.state_bytes <= 9


def test_a_peak_may_be_fixed_under_a_schedule():
    fixed = replace(BASELINES["adamw-cosine"], name="adamw-cosine-0.003", lr=0.003, grid=(0.003,))
    contender = of_baseline(fixed)
    assert contender.lrs == (0.003,)
    assert contender.lrs[::7] == (0.003,)
    assert contender.identity == of_baseline(BASELINES["adamw-cosine"]).identity, "the same runs, measured once"
    _, schedule = contender.optimizer([nn.Parameter(torch.ones(2))], 0.003, 100)
    assert schedule.get_last_lr() == [0.0015]


@pytest.mark.parametrize("name", ["talt-sgd", "talt-adam"])
def test_talt_runs_where_it_is_named(name):
    """It acts, after an interval, on what is inside; "all" leaves it out."""
    script, baseline = script_of("friedman-mlp"), BASELINES[name]
    inside = BASELINES[{"talt-sgd": "momentum", "talt-adam": "adam"}[name]]
    (found,), (plain,) = (train(script, each.optimizer, baseline.lr, 0, 60).train for each in (baseline, inside))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[:20], plain[:20], "no directions are known in the first interval")
    assert not np.array_equal(found, plain)
    assert name not in [each.name for each in find_baselines("all")]
    assert name in [each.name for each in find_baselines(f"adam,{name}")]
    with pytest.raises(ConfigError, match=f"{name} runs on training scripts only"):
        find_baselines(name, flat=True)


def test_flat_tasks_leave_out_what_is_not_elementwise():
    optimizers = {name: baseline for name, baseline in BASELINES.items() if baseline.scripts and not baseline.extra}
    assert {name for name, baseline in optimizers.items() if not baseline.stacks} == {"muon-linear", "schedule-free"}
    names = [contender.name for contender in contenders_of("all", flat=True)]
    assert names == [name for name, baseline in optimizers.items() if baseline.stacks]
    for refuse in (
        lambda: contenders_of("adam,muon-linear", flat=True),
        lambda: BASELINES["muon-linear"].solver(0.1, 10),
    ):
        with pytest.raises(ConfigError, match=r"muon-linear runs on training scripts only: .*leave it out"):
            refuse()


def test_what_is_not_installed_is_left_out_or_told(monkeypatch):
    monkeypatch.setattr(baselines, "find_spec", lambda name: None)
    assert "schedule-free" not in [baseline.name for baseline in find_baselines("all")]
    with pytest.raises(ConfigError, match="schedule-free needs the package schedulefree: pip install schedulefree"):
        find_baselines("adam,schedule-free")


def test_results_belong_to_the_code_of_schedules_and_of_muon():
    (workload,) = workloads(find_suite("unseen", ("least-squares",)), Datasets("none"))
    found = {name: of_baseline(baseline) for name, baseline in BASELINES.items()}
    assert found["muon-linear"].code == (
        "l2o_training.compare.muon:MuonAdamW",
        "l2o_training.compare.baselines:warm_linear",
    )
    assert found["adam"].code == ()
    keys = [str(workload.key(contender)) for contender in found.values() if contender.name != "adam-0.001"]
    assert len(set(keys)) == len(keys)
