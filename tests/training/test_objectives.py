"""Objectives: slopes against differentiation, what they say of truncations, and how runs record them."""

import dataclasses
import json
import math

import pytest
import torch
from rules import RULES
from torch import nn

from l2o_runtime.config import KAEConfig
from l2o_runtime.rules import LSTMConfig, make_rule
from l2o_runtime.solvers import Descent, Point, Solver
from l2o_training.config import TrainConfig, load_preset
from l2o_training.meta.objectives import KoopmanLoss, LogLoss, Loss, loss_objectives, make_objectives
from l2o_training.meta.steppers import Stepper
from l2o_training.meta.trainer import Trainer
from l2o_training.meta.unroll import begin, unroll
from l2o_training.tasks import QuadraticConfig, make_task
from l2o_training.tasks.data import load_dataset

TASK = make_task(QuadraticConfig(size=4), load_dataset, torch.device("cpu"))
AT = {"loss": Loss(), "log-loss": LogLoss(), "tail": LogLoss(span=0.5)}


class Learned(Solver):
    """θ ← θ − a ∇L: a solver with one parameter."""

    def __init__(self, rate=0.01):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate))

    def init(self, problems):
        return {"seen": torch.zeros(len(problems.params))}

    def step(self, point, state):
        return point.params - self.rate * point.grad, {"seen": state["seen"] + point.loss}


@pytest.mark.parametrize("name", AT)
def test_slopes_are_the_derivatives_of_values(name):
    instances = TASK.instances(3, seed=0)
    matrix, target = instances._batches()
    theta = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = (torch.einsum("bij,bj->bi", matrix, theta) - target).square().sum(-1)
    wanted = losses if name == "loss" else losses.log()
    loss, grad = instances.value_and_grad(theta.detach())
    value, slope = AT[name].at(instances, Point(theta.detach(), loss, grad))
    assert value.dtype == torch.float64
    torch.testing.assert_close(value.float(), wanted.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(wanted.sum(), theta)[0])


@pytest.mark.parametrize("weights", ["uniform", "last"])
@pytest.mark.parametrize("objectives", [*((each,) for each in AT.values()), loss_objectives("log_loss", 0.3)])
def test_a_truncations_gradient_is_that_of_its_value(objectives, weights):
    """For a solver with one parameter, whose derivative is known from differences of float64 values."""

    def trace(rate):
        solver, instances = Learned(rate).double(), TASK.instances(2, seed=1)
        instances.params = instances.params.double()
        matrix, target = instances._batches()
        instances._batches = lambda: (matrix.double(), target.double())
        return solver, unroll(solver, begin(solver, instances), 1, objectives, weights)

    solver, found = trace(0.01)
    found.objective.backward()
    ahead, behind = (trace(0.01 + sign * 1e-5)[1].value for sign in (1, -1))
    expected = (ahead - behind) / 2e-5
    assert solver.rate.grad.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_tail_needs_one_span():
    solver = Learned()
    tails = [Loss(span=span) for span in (0.1, 0.2)]
    with pytest.raises(ValueError, match=r"one span.*\[0\.1, 0\.2\].*the same"):
        unroll(solver, begin(solver, TASK.instances(1, seed=0)), 2, tails)


def test_losses_that_are_gone_have_finite_logarithms():
    value, slope = LogLoss().at(None, Point(torch.zeros(1, 2), torch.zeros(1), torch.ones(1, 2)))
    assert value.item() == pytest.approx(math.log(1e-10))
    assert slope.isfinite().all()


def test_the_koopman_loss_is_of_what_the_autoencoder_saw():
    torch.manual_seed(0)
    solver, objective = Descent(make_rule(RULES["kae-log_sign"])), KoopmanLoss(weight=0.5)
    trace = unroll(solver, begin(solver, TASK.instances(2, seed=0)), 6, [objective])
    (features,) = trace.states.values()
    assert features.shape[:2] == (6, 2)
    expected = solver.rule.context.koopman_loss(features)
    assert trace.terms == {"koopman_loss": expected}
    torch.testing.assert_close(trace.objective, 0.5 * expected)
    plain = Descent(make_rule(RULES["none-log_sign"]))
    assert unroll(plain, begin(plain, TASK.instances(2, seed=0)), 6, [objective]).terms == {}


def test_a_hidden_loss_is_not_shown_but_counts():
    solver, seen = Learned(), []

    class Watching(Stepper):
        def step(self, point, state):
            seen.append(point.loss)
            return super().step(point, state)

    inner = begin(solver, TASK.instances(2, seed=0), torch.tensor([1.0, 0.0]))
    trace = unroll(solver, inner, 3, stepper=Watching(solver))
    assert (torch.stack(seen)[:, 0] > 0).all()
    assert (torch.stack(seen)[:, 1] == 0).all()
    assert (trace.losses > 0).all()


def test_a_configuration_names_its_objectives():
    def kinds(**changes):
        return make_objectives(dataclasses.replace(TrainConfig(), **changes))

    assert kinds() == (Loss(),)
    assert kinds(objective="log_loss", tail=0.1) == (
        LogLoss(weight=0.5),
        LogLoss(weight=0.5, span=0.1),
    )
    kae = LSTMConfig(context=KAEConfig(window=5))
    assert kinds(rule=kae, koopman=2.0) == (Loss(), KoopmanLoss(weight=2.0))


@pytest.mark.parametrize("context", [KAEConfig(window=4), None])
def test_runs_record_objectives_by_their_names(tmp_path, context):
    rule = LSTMConfig(hidden=2, layers=1) if context is None else LSTMConfig(hidden=2, layers=1, context=context)
    config = dataclasses.replace(
        load_preset("quadratics", ["epochs=2", "horizon=20", "validate_every=1", "validation_runs=1"]), rule=rule
    )
    Trainer(config, tmp_path / "run").run()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    named = [] if context is None else ["koopman_loss"]
    assert list(rows[0]) == ["epoch", "meta_loss", *named, "validation", "steps", "seconds"]
    assert all(row[name] > 0 for row in rows for name in named)
