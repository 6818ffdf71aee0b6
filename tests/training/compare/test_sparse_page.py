"""What the page on sparse recovery measures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from l2o_runtime import ConfigError, LearnedSolver, save_rule
from l2o_runtime.solvers import AMP, FISTA, ISTA, UnrolledConfig, UnrolledSolver
from l2o_training.compare.papers import recovery, sparse
from l2o_training.compare.papers.numbers import NOT_RUN
from l2o_training.compare.papers.panels import PANELS
from l2o_training.config import load_preset
from l2o_training.tasks import SparseConfig
from l2o_training.tasks.sparse import dictionary

SMALL = SparseConfig(rows=30, columns=60, sparsity=0.05, weight=0.01)


def test_both_definitions_of_the_error():
    solution = torch.tensor([[3.0, 0.0], [0.0, 0.1], [0.0, 0.0]])
    found = recovery.errors(solution + torch.tensor([[0.3, 0.0], [0.0, 0.1], [0.0, 0.0]]), solution)
    assert found.ratio == pytest.approx(10 * torch.tensor(0.1 / 9.01).log10().item(), abs=1e-4)
    assert found.mean == pytest.approx((-20 + 0) / 2, abs=1e-4), "a signal of zeros has no relative error"
    assert recovery.errors(solution, solution).mean == pytest.approx(-100), "and none is below the floor"


def test_errors_over_layers_end_where_the_solver_does():
    solver = UnrolledSolver(UnrolledConfig(cell="alista", rows=30, columns=60, layers=4, start="analytic"))
    solver.fit_to(dictionary(30, 60, 0))
    instances = recovery.draw(SMALL, 8)
    curve = recovery.over_layers(solver, instances, 4)
    with torch.no_grad():
        end = recovery.errors(solver(instances.structure.target), instances.structure.solution)
    assert len(curve) == 4
    assert curve[-1] == pytest.approx(end, abs=1e-3)


def test_steps_to_an_error():
    instances = recovery.draw(SMALL, 8)
    number, steps = recovery.fewest(AMP, (1.2, 1.5, 1.8), instances, -20.0, 200)
    assert steps == recovery.steps_to(AMP(number), instances, -20.0, 200)
    assert steps == min(recovery.steps_to(AMP(a), instances, -20.0, 200) or 999 for a in (1.2, 1.5, 1.8))
    assert recovery.steps_to(ISTA(0.01), instances, -20.0, 3) is None
    curve = recovery.over_layers(AMP(number), instances, steps)
    assert curve[-1].ratio <= -20 < curve[-2].ratio


def test_the_oracle_is_the_lowest():
    instances = recovery.draw(SMALL, 5)
    gaps = recovery.gaps(FISTA(), instances, recovery.oracle(instances), (1, 10, 3000))
    assert gaps[1] > gaps[10] > gaps[3000]
    assert abs(gaps[3000]) < 1e-4


def test_all_are_timed():
    solver = UnrolledSolver(UnrolledConfig(cell="step-lista", rows=30, columns=60, layers=900, shrinkage=0.01))
    solver.fit_to(dictionary(30, 60, 0))
    learned = LearnedSolver.__new__(LearnedSolver)
    learned.solver, learned.provenance = solver.eval().requires_grad_(False), {}
    found = recovery.durations(learned, 2, target=-10.0, repeats=1)
    assert set(found) == {"learned", "FISTA", "FISTA, λ = 0.003", "coordinate descent"}
    assert all(each.milliseconds > 0 for each in found.values())


def test_variants_that_there_are_not_are_told(tmp_path):
    with pytest.raises(ConfigError, match="unknown variant 'lisa': did you mean lista"):
        sparse.train(sparse.Runs(tmp_path), ["lisa"])


def test_a_panel_changes_the_signals_and_the_size_of_a_preset_alone():
    runs = sparse.Runs(Path("runs"))
    for end, panel in PANELS.items():
        for preset in panel.published:
            config, plain = runs.config(f"{preset}{end}"), load_preset(preset)
            assert config.tasks == (panel.task,)
            rule = replace(plain.rule, rows=panel.task.rows, columns=panel.task.columns)
            assert replace(config, tasks=plain.tasks, rule=plain.rule) == plain
            assert config.rule == rule


def test_how_far_a_stopped_run_is(tmp_path):
    runs = sparse.Runs(tmp_path)
    assert sparse._state(runs, "alista-snr-20") == NOT_RUN
    runs.path("alista-snr-20").mkdir()
    rows = [{"validation": value, "seconds": 60.0} for value in (5.0, 6.0, 5.0, 5.5, 4.0)]
    (runs.path("alista-snr-20") / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sparse._state(runs, "alista-snr-20") == "stopped in layers 1 to 1, lr × 0.02"
    row = "| alista-snr-20 | stopped in layers 1 to 1, lr × 0.02 | 1,000 | 5 |"
    assert row in sparse._trainings(runs)
    assert runs.solver("alista-snr-20") is None
    save_rule(runs.path("alista-snr-20") / "rule.safetensors", UnrolledSolver(UnrolledConfig(rows=3, columns=4)), {})
    assert runs.solver("alista-snr-20").layers == 16
