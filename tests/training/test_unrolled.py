"""Unrolled solvers: the published recurrence, meta-training through layers, and their files."""

import dataclasses

import pytest
import torch

from l2o_runtime import ConfigError
from l2o_runtime.files.artifact import ArtifactError, read_learned, read_rule
from l2o_runtime.solvers import UnrolledConfig, UnrolledSolver
from l2o_training.config import TrainConfig
from l2o_training.curricula import LayerwiseConfig
from l2o_training.meta.curriculum import make_curriculum
from l2o_training.meta.objectives import Loss, SquaredError
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


LAYERWISE = dataclasses.replace(
    CONFIG,
    rule=UnrolledConfig(cell="alista", rows=10, columns=20, layers=3, start="analytic"),
    horizon=3,
    unroll=0,
    epochs=100,
    lr=0.01,
    weights="last",
    objective="squared_error",
    validate_every=1,
    curriculum=LayerwiseConfig(updates=3, patience=1, longest=2),
)


def test_layers_are_trained_one_after_the_other():
    curriculum = make_curriculum(LAYERWISE)
    names, trained = [curriculum.stage.name], [curriculum.stage.trained]
    for score in (3, 2, 2, 2, 1, float("nan"), 5, 4, 3, 2, 1, 0, 1, 0, 1, 0, 1, 0, 1):
        if curriculum.advance(score) is not None:
            names.append(curriculum.stage.name)
            trained.append(curriculum.stage.trained)
        if curriculum.over:
            break
    assert curriculum.over
    assert names[:4] == ["layer 1", "layers 1 to 1, lr × 0.2", "layers 1 to 1, lr × 0.02", "layer 2"]
    assert trained[3:5] == [(".1",), (".0", ".1")]
    assert len(names) == 9
    assert curriculum.stage.horizon == curriculum.stage.validated == 3


def test_layerwise_training_leaves_what_is_not_trained_and_ends_below_fista(tmp_path):
    trainer, seen = Trainer(LAYERWISE, tmp_path), []

    def watch(epoch):
        seen.append((trainer.curriculum.stage.name, [float(p.detach()) for p in trainer.rule.threshold]))

    path = trainer.run(watch)
    starts = [index for index, (name, _) in enumerate(seen) if name == "layer 2"]
    for index in starts[1:]:
        assert seen[index][1][0] == seen[starts[0]][1][0], "the layer before stays as it is"
    assert seen[starts[0]][1][1] == seen[starts[0]][1][0], "a new layer begins with what the one before has learned"
    assert trainer.adam["name"] == "FISTA"
    assert trainer.best < trainer.adam["loss"]
    solver, provenance = read_learned(path)
    assert provenance["adam"]["name"] == "FISTA"
    instances = make_task(TASK, load_dataset, torch.device("cpu")).instances(8, 2**31)
    error = (solver(instances.structure.target) - instances.structure.solution).square().sum(-1)
    assert float(error.mean()) == pytest.approx(trainer.best, rel=1e-4), "and is what was validated last"


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    whole = Trainer(LAYERWISE, tmp_path / "whole").run().read_bytes()
    for stopped in (2, 9):
        folder = tmp_path / f"{stopped}"

        def stop(epoch, stopped=stopped):
            if epoch.epoch == stopped:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Trainer(LAYERWISE, folder).run(stop)
        assert Trainer(LAYERWISE, folder, resume=True).run().read_bytes() == whole


def test_blind_solvers_are_asked_for_the_last_step_alone():
    instances, solver, looks = instances_of(TASK), UnrolledSolver(CONFIG.rule), []
    solver.fit(instances)
    look = instances.look
    instances.look = lambda *arguments: looks.append(1) or look(*arguments)
    fast = unroll(solver, begin(solver, instances), 4, (SquaredError(),), "last")
    assert len(looks) == 1
    assert fast.losses.shape == (1, 4)
    solver.blind = False
    slow = unroll(solver, begin(solver, instances), 4, (SquaredError(),), "last")
    assert len(looks) == 6
    assert torch.equal(fast.losses[-1], slow.losses[-1])
    grads = [torch.autograd.grad(trace.objective, list(solver.parameters())) for trace in (fast, slow)]
    error = solver(instances.structure.target) - instances.structure.solution
    expected = torch.autograd.grad(error.square().sum(-1).mean(), list(solver.parameters()))
    for one, other, wanted in zip(*grads, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-6)


def test_the_squared_error_needs_a_solution():
    instances = instances_of(QuadraticConfig(size=4))
    with pytest.raises(ConfigError, match="needs tasks whose solutions are known"):
        SquaredError().measure(instances, instances.params, torch.zeros(4))
    assert torch.equal(Loss().measure(instances, instances.params, torch.ones(4)), torch.ones(4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 2}, "horizon: must be rule.layers, 3, with layerwise, got 2"),
        ({"unroll": 3}, "unroll: must be 0"),
        ({"final_lr": 1e-4}, "final_lr: not with layerwise"),
        ({"tail": 0.5}, "tail: not with objective = squared_error"),
    ],
)
def test_what_does_not_go_with_layers_is_told(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(LAYERWISE, **changes)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"patience": 0}, "patience"),
        ({"decays": (1.0,)}, "decays: must be between 0 and 1"),
        ({"updates": 0}, "updates"),
    ],
)
def test_curricula_that_cannot_be_are_told(keys, message):
    with pytest.raises(ConfigError, match=message):
        LayerwiseConfig(**keys)


@pytest.mark.parametrize("changes", [{"sample": 0.5}, {"expert": "adam"}])
def test_what_only_rules_can_is_told(changes):
    with pytest.raises(ConfigError, match="only"):
        dataclasses.replace(CONFIG, **changes)
