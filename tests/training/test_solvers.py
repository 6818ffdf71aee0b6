"""Solvers: what all of them must do, learned and hand-made, in one table; and the list of baselines."""

import pytest
import torch
from rules import RULES, make_rule
from torch import nn

from l2o_runtime import ConfigError
from l2o_runtime.solvers import Descent, Point
from l2o_training.compare.baselines import BASELINES, GRID, TorchSolver, best_lr, find_baselines
from l2o_training.compare.flat import rollout
from l2o_training.meta.unroll import begin, unroll
from l2o_training.tasks import MLPConfig, make_task
from l2o_training.tasks.data import load_dataset

STEPS = 12
TASK = make_task(MLPConfig(hidden=(3,), batch_size=8), load_dataset, torch.device("cpu"))
LEARNED = ("none-log_sign", "dmd-exact-normalized", "kae-log_sign", "none-scale")
STACKING = [name for name, baseline in BASELINES.items() if baseline.stacks and baseline.scripts]
ALL = [*LEARNED, *STACKING]


def make(name):
    torch.manual_seed(0)
    if name in BASELINES:
        return BASELINES[name].solver(BASELINES[name].lr, STEPS)
    return Descent(make_rule(RULES[name]).eval())


def steps(solver, instances, count=STEPS):
    inner = begin(solver, instances)
    with torch.no_grad():
        unroll(solver, inner, count, ())
    return inner


@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_optimized_as_its_instances_alone(name):
    solver = make(name)
    together = steps(solver, TASK.instances(3, seed=0)).params
    alone = [steps(solver, TASK.instances(3, seed=0).part(i, i + 1)).params for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_the_same_steps_come_again_and_nothing_given_is_changed(name):
    solver, instances = make(name), TASK.instances(2, seed=0)
    with torch.no_grad():
        state = solver.init(instances)
        for _ in range(3):
            point = Point(instances.params, *instances.value_and_grad(instances.params))
            before = [x.clone() for x in (*point, *state.values())]
            first, new = solver.step(point, state)
            again, same = solver.step(point, state)
            assert all(torch.equal(*pair) for pair in zip(before, (*point, *state.values()), strict=True))
            assert torch.equal(first, again)
            assert new.keys() == same.keys()
            assert all(torch.equal(new[key], same[key]) for key in new)
            state = new


@pytest.mark.parametrize("name", ALL)
def test_states_keep_their_shapes_and_parameters_theirs(name):
    solver, instances = make(name), TASK.instances(2, seed=0)
    early, late = (steps(solver, TASK.instances(2, seed=0), count) for count in (1, 5))
    shapes = [{key: (value.shape, value.dtype) for key, value in each.state.items()} for each in (early, late)]
    assert shapes[0] == shapes[1]
    assert early.params.shape == instances.params.shape
    if name not in BASELINES:
        first = {key: (value.shape, value.dtype) for key, value in solver.init(instances).items()}
        assert first == shapes[0], "torch optimizers lay theirs out with the first step"


@pytest.mark.parametrize("name", ALL)
def test_a_solver_goes_on_from_a_copied_state(name):
    solver = make(name)
    whole, parts = (begin(solver, TASK.instances(2, seed=0)) for _ in range(2))
    with torch.no_grad():
        unroll(solver, whole, STEPS, ())
        for _ in range(3):
            unroll(solver, parts, STEPS // 3, ())
            parts.state = {key: value.clone() for key, value in parts.state.items()}
    assert torch.equal(whole.params, parts.params)


@pytest.mark.parametrize("name", STACKING)
def test_a_stack_is_optimized_as_a_script_would(name):
    """To the bit, schedule included."""
    baseline, instances = BASELINES[name], TASK.instances(2, seed=0)
    param = nn.Parameter(instances.params.clone())
    optimizer, schedule = baseline.optimizer([param], baseline.lr, STEPS)
    losses = []
    for _ in range(STEPS):
        loss, param.grad = instances.value_and_grad(param.detach())
        losses.append(loss)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    found = rollout(baseline.solver(baseline.lr, STEPS), TASK.instances(2, seed=0), STEPS)
    assert (baseline.schedule is None) == (schedule is None)
    torch.testing.assert_close(found, torch.stack(losses), rtol=0, atol=0)


def test_descent_shows_a_rule_no_loss_that_is_not_finite():
    solver, instances = make("kae-log_sign"), TASK.instances(1, seed=0)
    _, grad = instances.value_and_grad(instances.params)
    state, ends = solver.init(instances), []
    for loss in (0.0, torch.nan):
        ends.append(solver.step(Point(instances.params, torch.tensor([loss]), grad), state)[0])
    assert torch.equal(*ends)


def test_baselines_are_one_list():
    optimizers = [baseline for baseline in BASELINES.values() if baseline.scripts and not baseline.extra]
    assert find_baselines("all") == [baseline for baseline in optimizers if baseline.installed]
    assert [found.name for found in find_baselines(" rmsprop, adam,")] == ["rmsprop", "adam"]
    assert find_baselines("") == []
    with pytest.raises(ConfigError, match="unknown baseline 'rmspop': did you mean rmsprop"):
        find_baselines("adam,rmspop")
    for baseline in BASELINES.values():
        assert baseline.grid[0] <= baseline.lr <= baseline.grid[-1]
        torch_made = baseline.stacks and baseline.scripts
        assert not torch_made or isinstance(baseline.solver(baseline.lr, 1), TorchSolver)


def test_the_grid_is_wide_and_a_diverged_rate_never_wins():
    assert len(GRID) >= 7
    assert best_lr([(0.1, float("nan")), (0.2, 3.0), (0.3, float("inf")), (0.4, 2.0)]) == 0.4
