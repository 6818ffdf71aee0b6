"""Sparse recovery and the Lasso: their data, their hand-made solvers, and comparisons of learned ones on them."""

import json

import numpy as np
import pytest
import torch

from l2o_runtime import ConfigError, save_rule
from l2o_runtime.solvers import UnrolledConfig, UnrolledSolver
from l2o_training.compare.baselines import BASELINES, find_baselines
from l2o_training.compare.evaluation import Request, finish, start
from l2o_training.compare.flat import rollout
from l2o_training.compare.run import measure
from l2o_training.tasks import SparseConfig, make_task
from l2o_training.tasks.data import load_dataset
from l2o_training.tasks.sparse import dictionary

CPU = torch.device("cpu")


def task_of(**keys):
    return make_task(SparseConfig(**{"rows": 30, "columns": 60, **keys}), load_dataset, CPU)


def test_the_dictionary_is_unit_gaussian_and_as_ill_conditioned_as_asked():
    matrix = dictionary(30, 60, 0)
    torch.testing.assert_close(matrix.norm(dim=0), torch.ones(60))
    assert float(matrix.mean()) == pytest.approx(0, abs=0.02)
    values = torch.linalg.svdvals(dictionary(30, 60, 0, 50.0))
    assert 30 < float(values[0] / values[-1]) < 70
    assert float(torch.linalg.cond(matrix)) < 10
    assert torch.equal(dictionary(30, 60, 3), dictionary(30, 60, 3))
    correlated = dictionary(1000, 60, 0, correlation=0.5)
    products = correlated.T @ correlated
    assert products.diagonal().sub(1).abs().max() < 1e-5
    assert products.diagonal(1).mean() == pytest.approx(0.5, abs=0.02)
    assert products.diagonal(2).mean() == pytest.approx(0.25, abs=0.02)


def test_data_are_as_sparse_and_noisy_as_asked():
    drawn = task_of(sparsity=0.2, snr=10.0).instances(2000, 1).structure
    assert float((drawn.solution != 0).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(drawn.solution[drawn.solution != 0].std()) == pytest.approx(1, abs=0.02)
    clean = drawn.solution @ drawn.matrix.T
    ratio = 20 * torch.log10(clean.std(-1, correction=0) / (drawn.target - clean).norm(dim=-1) * 30**0.5)
    assert float(ratio.mean()) == pytest.approx(10, abs=0.3)
    exact = task_of().instances(5, 1).structure
    torch.testing.assert_close(exact.target, exact.solution @ exact.matrix.T)


def test_what_is_perturbed_is_not_what_solvers_read():
    drawn = task_of(perturbed=0.05).instances(2000, 1).structure
    assert torch.equal(drawn.matrix, task_of().instances(1, 1).structure.matrix)
    rest = drawn.target - drawn.solution @ drawn.matrix.T
    assert float(rest.square().sum() / drawn.target.square().sum()) == pytest.approx(0.05**2, rel=0.2)


def test_scores_are_relative_errors_where_asked():
    instances = task_of(score="nmse").instances(3000, 1)
    seen = instances.look(instances.params, instances.statistics)
    assert float(seen.score.mean()) == pytest.approx(1, abs=0.05)
    exact = instances.look(instances.structure.solution, instances.statistics)
    assert float(exact.score.max()) == 0
    assert float(exact.loss.min()) >= 0
    part = instances.part(5, 9)
    assert torch.equal(part.look(part.params, part.statistics).score, seen.score[5:9])


@pytest.mark.parametrize(("name", "steps", "number"), [("amp", 60, 1.5), ("fista", 200, 0.005), ("ista", 400, 0.02)])
def test_classical_solvers_recover(name, steps, number):
    instances = task_of(rows=60, columns=120, sparsity=0.05, score="nmse").instances(20, 1)
    scores = rollout(BASELINES[name].solver(number, steps), instances, steps).mean(-1)
    assert float(scores[-1]) < 0.02 * float(scores[0])


def test_they_are_for_tasks_with_structure_alone():
    names = [baseline.name for baseline in find_baselines("all", flat=True, structured=True)]
    assert names == ["adam", "ista", "fista", "amp"]
    assert "ista" not in [baseline.name for baseline in find_baselines("all")]
    with pytest.raises(ConfigError, match="fista: for tasks with A and b"):
        find_baselines("adam,fista", flat=True)
    with pytest.raises(ConfigError, match="it is no torch optimizer"):
        BASELINES["amp"].optimizer([], 1.0, 1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"condition": 0.5}, "condition: must be 1"),
        ({"correlation": 1.0}, "correlation: must be"),
        ({"perturbed": -1.0}, "perturbed"),
        ({"sparsity": 0.0}, "sparsity"),
    ],
)
def test_data_that_cannot_be_are_told(keys, message):
    with pytest.raises(ConfigError, match=message):
        SparseConfig(**keys)


def test_a_matrix_of_ones_own(tmp_path):
    own, keys = np.random.default_rng(0).normal(size=(30, 60)), {"matrix": str(tmp_path / "A.npy")}
    np.save(tmp_path / "A.npy", own)
    torch.testing.assert_close(task_of(**keys).instances(1, 0).structure.matrix, torch.from_numpy(own).float())
    with pytest.raises(ConfigError, match=r"A.npy is \(30, 60\); rows and columns are \(30, 61\)"):
        task_of(columns=61, **keys)
    (tmp_path / "A.npy").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"no \.npy file of numbers"):
        task_of(**keys)
    with pytest.raises(ConfigError, match=r"no \.npy file of numbers"):
        task_of(matrix=str(tmp_path / "none.npy"))
    with pytest.raises(ConfigError, match="condition: not with matrix"):
        task_of(condition=5.0, **keys)
    with pytest.raises(ConfigError, match="correlation: not with matrix"):
        task_of(correlation=0.5, **keys)


@pytest.fixture
def solver_file(tmp_path):
    config = UnrolledConfig(cell="step-lista", rows=25, columns=50, layers=4, shrinkage=0.005)
    solver = UnrolledSolver(config)
    solver.fit_to(dictionary(25, 50, 0))
    save_rule(tmp_path / "steps.safetensors", solver, {})
    return tmp_path / "steps.safetensors"


def test_learned_solvers_are_compared_with_classical_ones(solver_file, tmp_path):
    request = Request(
        rules=(str(solver_file),),
        suite="lasso",
        tasks=("lasso-25-50",),
        baselines="adam,ista",
        runs=4,
        thin=7,
        steps=15,
    )
    study = start(request, tmp_path / "eval", tmp_path, device="cpu")
    measure(study)
    finish(study, request, tmp_path / "eval")
    rows = {row["optimizer"]: row for row in json.loads((tmp_path / "eval/results.json").read_text())["results"]}
    assert set(rows) == {"steps", "adam", "ista"}
    instances = make_task(SparseConfig(rows=25, columns=50), load_dataset, CPU).instances(4, 0)
    ista = rollout(BASELINES["ista"].solver(0.005, 15), instances, 5)[-1]
    assert rows["steps"]["train"] == pytest.approx(float(ista.mean()), rel=1e-4), "untrained, it is ISTA of four steps"
    assert np.isfinite(rows["ista"]["train"])


def test_another_matrix_is_told(solver_file, tmp_path):
    study = start(
        Request(rules=(str(solver_file),), suite="lasso", baselines="adam", runs=1, thin=14, steps=2),
        tmp_path / "eval",
        tmp_path,
        device="cpu",
    )
    with pytest.raises(ConfigError, match=r"the task's A is \(5, 10\), the solver's \(25, 50\)"):
        measure(study)
