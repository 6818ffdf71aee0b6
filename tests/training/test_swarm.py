"""Swarms: functions with many minima, particles that hear of each other, and what is scored of them."""

import dataclasses
import math

import pytest
import torch

from l2o_runtime import ArtifactError, ConfigError, load_rule
from l2o_runtime.files.artifact import read_learned
from l2o_runtime.rules import LSTMConfig
from l2o_runtime.solvers import Point, SwarmConfig, SwarmSolver
from l2o_runtime.solvers.swarm import attraction
from l2o_training.compare.baselines import BASELINES
from l2o_training.compare.flat import rollout
from l2o_training.config import TrainConfig, load_preset
from l2o_training.meta.objectives import Entropy
from l2o_training.meta.trainer import Trainer
from l2o_training.meta.unroll import begin, unroll
from l2o_training.tasks import QuadraticConfig, RastriginConfig, make_task
from l2o_training.tasks.data import load_dataset
from l2o_training.tasks.rastrigin import best_known, rastrigin

CPU = torch.device("cpu")
TASK = RastriginConfig(size=3, particles=4, spread=0.1)
CONFIG = TrainConfig(
    rule=SwarmConfig(hidden=4, layers=1),
    tasks=(TASK,),
    entropy=0.1,
    horizon=8,
    unroll=4,
    batch=8,
    epochs=2,
    validate_every=2,
    validation_runs=8,
)


def instances_of(task=TASK, count=8, seed=1):
    return make_task(task, load_dataset, CPU).instances(count, seed)


def loud(config=CONFIG.rule, seed=0):
    """A swarm whose network says something."""
    torch.manual_seed(seed)
    solver = SwarmSolver(config)
    solver.says.weight.data.normal_(std=0.3)
    solver.attends.data.normal_()
    return solver


def test_rastrigins_own_function():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, -0.5]])
    eye, zero, one = torch.eye(2), torch.zeros(2), torch.ones(2)
    expected = [0.5 * float(p @ p) + sum(10 - 10 * math.cos(2 * math.pi * float(c)) for c in p) for p in x]
    torch.testing.assert_close(rastrigin(x, eye, zero, one), torch.tensor(expected))
    assert best_known(eye[None], zero[None], one[None], restarts=4, seed=0).abs().max() < 1e-9


@pytest.mark.parametrize("spread", [None, 0.1])
def test_nothing_is_lower_than_the_best_known_value(spread):
    instances = instances_of(dataclasses.replace(TASK, size=2, spread=spread), count=16)
    lowest = instances.structure.lowest(restarts=100)
    grid = torch.cartesian_prod(*2 * [torch.linspace(-6, 6, 481)]).double()
    for problem, value in enumerate(lowest):
        parts = [part[4 * problem].double() for part in instances._batches()]
        assert rastrigin(grid, *parts).min() >= value - 1e-9
    scores = rollout(BASELINES["sgd"].solver(0.001, 100), instances, 100)
    assert (scores[-1, ::4] >= lowest - 1e-4).all()


def test_particles_of_a_swarm_search_one_function():
    instances = instances_of()
    for part in instances._batches():
        assert all(torch.equal(part[4 * p], part[4 * p + k]) for p in range(2) for k in range(4))
    assert len(instances.params.unique(dim=0)) == 8, "each from a point of its own"


def test_the_best_of_the_swarm_so_far_is_scored():
    instances = instances_of()
    params, statistics, seen = instances.params, instances.statistics, []
    for step in range(6):
        found = instances.look(params + step % 3, statistics)
        statistics = found.statistics
        seen.append(found.loss.view(2, 4).amin(1))
        expected = torch.stack(seen).amin(0).repeat_interleave(4)
        assert torch.equal(found.score, expected)


def test_a_particle_that_is_lost_does_not_count():
    instances = instances_of()
    params = instances.params.clone()
    params[1] = torch.nan
    score = instances.look(params, instances.statistics).score
    assert score.isfinite().all()
    with torch.no_grad():
        solver, inner = loud(), begin(loud(), instances)
        inner.params = params
        unroll(solver, inner, 3)
    others = [row for row in range(8) if row != 1]
    assert inner.state["lowest"][others].isfinite().all()


def test_untrained_it_descends_and_its_state_goes_on():
    instances, solver = instances_of(), SwarmSolver(CONFIG.rule).requires_grad_(False)
    state, states = solver.init(instances), []
    params = instances.params
    for _ in range(3):
        loss, grad = instances.value_and_grad(params)
        before, (params, state) = params, solver.step(Point(params, loss, grad), state)
        states.append(state)
    for key in states[0]:
        assert not torch.equal(states[0][key], states[-1][key]), f"{key} has to change"
    torch.testing.assert_close(states[0]["average"], 0.1 * instances.value_and_grad(instances.params)[1])
    away = params - before + solver.config.rate * grad
    sigma = 1 / (1 + math.exp(3))
    pulled = attraction(*(x.view(2, 4, *x.shape[1:]) for x in (before, state["found"], state["lowest"]))).view(8, 3)
    torch.testing.assert_close(away, sigma * (state["found"] - before + pulled), rtol=1e-3, atol=1e-5)


def test_problems_and_particles_do_not_mix():
    """Another order of particles, or of problems, is the same search in another order."""
    instances, solver = instances_of(), loud().requires_grad_(False)
    order = torch.tensor([6, 4, 7, 5, 1, 0, 3, 2])

    def moved(rows):
        state, params = solver.init(instances), instances.params[rows]
        state["found"] = params
        parts = [part[rows] for part in instances._batches()]
        for _ in range(4):
            leaf = params.clone().requires_grad_()
            loss = rastrigin(leaf, *parts)
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
            params, state = solver.step(Point(params, loss.detach(), grad), state)
        return params

    torch.testing.assert_close(moved(order), moved(torch.arange(8))[order], rtol=1e-4, atol=1e-5)


def test_the_best_particle_is_attracted_by_none():
    found = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    lowest = torch.rand(5, 4, generator=torch.Generator().manual_seed(1))
    pulls = attraction(found, found, lowest)
    best = lowest.argmin(1)
    assert not pulls[torch.arange(5), best].any()
    assert pulls.abs().sum(-1).count_nonzero() == 15, "all others are"


def test_the_slope_of_the_entropy_is_its_gradient():
    instances = instances_of()
    x = instances.params.double().requires_grad_()
    loss = rastrigin(x, *(part.double() for part in instances._batches())) / 100
    p = loss.view(2, 4).neg().softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    (gradient,) = torch.autograd.grad(entropy.sum(), x, retain_graph=True)
    (slope_of_loss,) = torch.autograd.grad(loss.sum(), x)
    value, slope = Entropy(particles=4).at(instances, Point(x.detach(), loss.detach(), slope_of_loss))
    torch.testing.assert_close(value.view(2, 4).sum(1), entropy.detach())
    torch.testing.assert_close(4 * slope, gradient)


def test_all_weights_get_a_meta_gradient():
    instances, solver = instances_of(), loud()
    trace = unroll(solver, begin(solver, instances), 4)
    grads = torch.autograd.grad(trace.objective, [p for p in solver.parameters() if p.numel()])
    assert all(grad.any() for grad in grads)


def test_it_is_meta_trained_kept_read_back_and_runs_in_other_dimensions(tmp_path):
    path = Trainer(CONFIG, tmp_path).run()
    solver, _ = read_learned(path)
    assert isinstance(solver, SwarmSolver)
    scores = rollout(solver, instances_of(dataclasses.replace(TASK, size=5)), 5)
    assert scores.isfinite().all()
    assert (scores.diff(dim=0) <= 0).all()
    with pytest.raises(ArtifactError, match="a learned solver of kind swarm, not a rule"):
        load_rule(path)


def test_a_particle_swarm_searches():
    instances = instances_of(count=80)
    pso = rollout(BASELINES["pso"].solver(0.729, 60), instances, 60)
    assert pso[-1].mean() < 0.5 * pso[0].mean()
    assert torch.equal(pso, rollout(BASELINES["pso"].solver(0.729, 60), instances_of(count=80), 60))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks": (dataclasses.replace(TASK, particles=2),)},
            "the task gives 2 points per problem, the solver moves 4",
        ),
        ({"tasks": (QuadraticConfig(size=4),)}, "the task gives 1 points per problem, the solver moves 4"),
        ({"batch": 6}, "6 instances are no whole swarms: take a multiple of 4 particles"),
        ({"rule": LSTMConfig()}, "entropy: only with a rule of kind swarm"),
    ],
)
def test_what_does_not_fit_is_told(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        Trainer(dataclasses.replace(CONFIG, **changes), tmp_path).run()


def test_swarms_are_not_cut_up():
    with pytest.raises(ConfigError, match="no whole swarms"):
        instances_of().part(0, 6)


def test_a_particle_swarm_needs_particles():
    with pytest.raises(ConfigError, match="pso: this task has one point per problem"):
        BASELINES["pso"].solver(0.7, 10).init(instances_of(dataclasses.replace(TASK, particles=1)))


@pytest.mark.parametrize("name", ["swarm", "rastrigin-dm"])
def test_presets_are_read(name):
    assert load_preset(name).tasks[0].kind == "rastrigin"
