"""Unrolled solvers: the published recurrence, meta-training through layers, and their files."""

import dataclasses

import pytest
import torch

from l2o_runtime import ConfigError
from l2o_runtime.files.artifact import ArtifactError, read_learned, read_rule
from l2o_runtime.solvers import UnrolledConfig, UnrolledSolver
from l2o_training.config import TrainConfig
from l2o_training.meta.trainer import Trainer
from l2o_training.meta.unroll import begin, unroll
from l2o_training.tasks import QuadraticConfig, SparseConfig, make_task
from l2o_training.tasks.data import load_dataset

TASK = SparseConfig(rows=10, columns=20, weight=0.05)
CONFIG = TrainConfig(
    rule=UnrolledConfig(rows=10, columns=20, layers=4, shrinkage=0.05),
    tasks=(TASK,),
    horizon=4,
    unroll=4,
    batch=16,
    epochs=5,
    validate_every=5,
    validation_runs=8,
)


def instances_of(task, count=4, seed=1):
    return make_task(task, load_dataset, torch.device("cpu")).instances(count, seed)


def test_untrained_it_is_ista():
    instances = instances_of(TASK)
    solver = UnrolledSolver(CONFIG.rule)
    solver.fit(instances)
    with torch.no_grad():
        inner = begin(solver, instances)
        unroll(solver, inner, 4)
    matrix, target = instances.structure.matrix.double().numpy(), instances.structure.target.double().numpy()
    scale = 1.001 * float(torch.linalg.matrix_norm(instances.structure.matrix, 2)) ** 2
    x = torch.zeros(4, 20).numpy()
    for _ in range(4):
        z = x + (target - x @ matrix.T) @ matrix / scale
        x = (abs(z) > 0.05 / scale) * (z - 0.05 / scale * (2 * (z > 0) - 1))
    torch.testing.assert_close(inner.params.double(), torch.from_numpy(x), rtol=1e-4, atol=1e-6)


def test_the_meta_gradient_goes_through_all_layers():
    solver = UnrolledSolver(CONFIG.rule)
    instances = instances_of(TASK)
    solver.fit(instances)
    trace = unroll(solver, begin(solver, instances), 4, weights="last")
    grads = torch.autograd.grad(trace.objective, list(solver.parameters()))
    x, structure = torch.zeros(4, 20), instances.structure
    for weight, threshold in zip(solver.weight, solver.threshold, strict=True):
        z = x + (structure.target - x @ structure.matrix.T) @ weight
        x = torch.sign(z) * torch.relu(z.abs() - threshold)
    loss = (x @ structure.matrix.T - structure.target).square().sum(-1) / 2 + 0.05 * x.abs().sum(-1)
    expected = torch.autograd.grad(loss.mean(), list(solver.parameters()))
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_it_is_meta_trained_kept_and_read_back(tmp_path):
    trainer = Trainer(CONFIG, tmp_path)
    path = trainer.run()
    assert trainer.best < trainer.validation.losses(trainer.rule)[0].max(), "and the best is kept"
    solver, provenance = read_learned(path)
    assert isinstance(solver, UnrolledSolver)
    assert solver.config == dataclasses.replace(CONFIG.rule, horizon=4)
    assert torch.equal(solver.matrix, instances_of(TASK).structure.matrix)
    assert provenance["inner_steps"] == 5 * 4 * 16
    with pytest.raises(ArtifactError, match="a learned solver of kind unrolled, not a rule"):
        read_rule(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": (SparseConfig(rows=9, columns=20),)}, r"the task's A is \(9, 20\), the solver's \(10, 20\)"),
        ({"tasks": (QuadraticConfig(size=4),)}, "have no A and b"),
        ({"rescale": 1.0}, "rescale: not with problems whose structure"),
    ],
)
def test_what_does_not_fit_is_told(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        Trainer(dataclasses.replace(CONFIG, **changes), tmp_path).run()


@pytest.mark.parametrize("changes", [{"sample": 0.5}, {"expert": "adam"}])
def test_what_only_rules_can_is_told(changes):
    with pytest.raises(ConfigError, match="only"):
        dataclasses.replace(CONFIG, **changes)
