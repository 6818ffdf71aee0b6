"""Studies: what is measured, kept, resumed and summed up."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from comparing import BASELINES, FakeDatasets, pushing, scripts, study_in

from l2o_runtime import ConfigError
from l2o_training.compare import contenders
from l2o_training.compare.cache import read_result, write_result
from l2o_training.compare.report.words import cautions, lags, loss
from l2o_training.compare.run import measure
from l2o_training.compare.scripts import ROUNDS
from l2o_training.compare.study import Study, read_times, read_trial
from l2o_training.compare.summary import Incomplete, summarise
from l2o_training.compare.versus import BEST_SCHEDULE
from l2o_training.compare.workloads import Curves, looks
from l2o_training.results import write_results
from l2o_training.tasks.data import DataError, Datasets

pytestmark = pytest.mark.slow


def test_a_gap_is_in_the_results_and_told(tmp_path):
    workloads = scripts(("convnet-batchnorm", "tabular"), FakeDatasets(tmp_path))
    pair = [BASELINES["adam-0.001"], pushing()]
    adam = replace(BASELINES["adam"], lrs=(1e-3,))
    study = study_in(tmp_path, workloads=workloads, contenders=[adam, *pair], steps=60, horizons=(1,), runs=1)
    measure(study)
    findings = summarise(study)
    still, moving = (findings.row(1, "convnet-batchnorm", contender.name) for contender in pair)
    assert moving.gap == pytest.approx(moving.validation - moving.batch_validation)
    assert moving.gap > moving.batch_validation > 2 * abs(still.gap)
    other = findings.row(1, "tabular", "pushing")
    assert (other.gap, other.batch_validation) == (None, None)
    (line,) = lags(findings)
    assert line.startswith("convnet-batchnorm, 60 steps: ")
    assert f"pushing {loss(moving.validation)} ({loss(moving.batch_validation)})" in line
    assert "adam" not in line
    assert line in cautions(findings)
    exploded = [replace(row, validation=None, gap=None) if row is still else row for row in findings.rows]
    assert "adam-0.001 diverged (" in lags(replace(findings, rows=exploded))[0]


def fabricate(monkeypatch, curves) -> None:
    """Runs whose loss falls from 1 to curves(optimizer, lr, seed)."""

    def read(study, workload, contender, lr, horizon):
        ends = np.array([[curves(contender.name, lr, seed)] for seed in range(study.runs)])
        steps = study.steps * horizon
        train = np.hstack([np.ones_like(ends), ends.repeat(steps - 1, 1)])
        return Curves(train, ends.repeat(len(looks(steps)), 1), np.empty((study.runs, 0)), 100, 8.0)

    monkeypatch.setattr("l2o_training.compare.summary.read_curves", read)
    monkeypatch.setattr(
        "l2o_training.compare.summary.read_times", lambda study, _: {c.name: (0.01, 0.001) for c in study.contenders}
    )


def test_a_baseline_takes_the_best_rate_on_the_runs_that_are_scored(tmp_path, monkeypatch):
    pair = contenders.baselines("adam,momentum")
    best = {"adam": 0.01, "momentum": 0.1}

    def curves(name, lr, seed):
        if name == "momentum" and lr < 0.1:
            return 0.0001 if seed else math.nan  # lower, but with one diverged run
        return 0.5 + abs(math.log(lr / best[name])) / 100 + 0.01 * seed

    fabricate(monkeypatch, curves)
    findings = summarise(study_in(tmp_path, contenders=pair, steps=30, horizons=(1,)))
    rows = [findings.row(1, "tabular", name) for name in best]
    assert [row.lr for row in rows] == [0.01, 0.1]
    assert [row.diverged for row in rows] == [0, 0]
    assert rows[1].grid_diverged == pytest.approx(6 / 28)
    assert rows[0].train == pytest.approx(0.505)
    assert rows[1].train_ratio == pytest.approx(1)


def test_rates_may_be_tuned_on_validation(tmp_path, monkeypatch):
    best = {"training": 0.01, "validation": 0.1}

    def read(study, workload, contender, lr, horizon):
        train, held = (np.full((study.runs, 1), 0.5 + abs(math.log(lr / best[kind])) / 100) for kind in best)
        whole = np.hstack([np.ones_like(train), train.repeat(study.steps - 1, 1)])
        return Curves(whole, held.repeat(len(looks(study.steps)), 1), np.empty((study.runs, 0)), 100, 8.0)

    fabricate(monkeypatch, None)
    monkeypatch.setattr("l2o_training.compare.summary.read_curves", read)
    for tuned, lr in best.items():
        study = study_in(tmp_path, contenders=contenders.baselines("adam"), horizons=(1,), tune_on=tuned)
        assert {row.lr for row in summarise(study).rows} == {lr}


def test_lengths_are_runs_of_their_own(tmp_path):
    """A schedule spans its own run, and whoever makes an optimizer is told how long that is."""
    told, adam = [], BASELINES["adam"]

    def optimizer(params, lr, steps):
        told.append(steps)
        return adam.optimizer(params, lr, steps)

    spy = replace(adam, lrs=(0.01,), optimizer=optimizer)
    study = study_in(tmp_path, workloads=scripts(("least-squares",), FakeDatasets(tmp_path)), contenders=[spy])
    study = replace(study, steps=2, horizons=(1, 5, 25, 100), runs=1)
    measure(study)
    assert sorted(told)[:3] == [2, 10, 35], "35 is the number of steps whose times are taken"
    assert sorted(told)[3:] == [50, 200]
    assert [row.steps for row in summarise(study).rows] == [2, 10, 50, 200]


def test_a_rule_is_compared_with_each_other(tmp_path, monkeypatch):
    (rule,) = contenders.rules(["default"])
    ends = {  # by task
        "directional": {"least-squares": 0.4, "tabular": 0.6},
        "adam": {"least-squares": 0.8, "tabular": 0.3},
        "adamw-cosine": {"least-squares": 0.5, "tabular": 0.9},
        "adamw-linear": {"least-squares": 0.7, "tabular": 0.4},
        "momentum": {"least-squares": 0.5, "tabular": math.nan},
    }

    def read(study, workload, contender, lr, horizon):
        end = np.full((study.runs, 1), ends[contender.name][workload.name])
        train = np.hstack([np.ones_like(end), end.repeat(study.steps - 1, 1)])
        return Curves(train, 2 * end.repeat(len(looks(study.steps)), 1), np.empty((study.runs, 0)), 100, 8.0)

    fabricate(monkeypatch, None)
    monkeypatch.setattr("l2o_training.compare.summary.read_curves", read)
    others = contenders.baselines("adam,adamw-cosine,adamw-linear,momentum", thin=14)
    found = summarise(study_in(tmp_path, contenders=[rule, *others], horizons=(1,))).versus
    rows = {row.against: row.train for row in found}
    assert list(rows) == ["adam", "adamw-cosine", "adamw-linear", "momentum", BEST_SCHEDULE]
    assert {row.optimizer for row in found} == {"directional"}
    assert (rows["adam"].worst, rows["adam"].lower, rows["adam"].workloads) == ("tabular", 1, 2)
    assert rows["adam"].worst_ratio == pytest.approx(2)
    assert rows["adam"].mean[0] == pytest.approx(math.sqrt(0.5 * 2))
    assert math.isnan(rows["adam"].mean[1]), "two tasks are too few for an interval"
    assert rows[BEST_SCHEDULE].mean[0] == pytest.approx(math.sqrt(0.8 * 1.5))
    assert rows["momentum"].mean[0] == pytest.approx(math.sqrt(0.8 * 0.01)), "who diverged is a hundred times behind"
    assert all(row.train.mean[0] == pytest.approx(row.validation.mean[0]) for row in found)


def test_divergence_everywhere_is_the_worst_result(tmp_path, monkeypatch):
    fabricate(monkeypatch, lambda name, lr, seed: math.nan if name == "momentum" else 0.5)
    study = study_in(tmp_path, horizons=(1,))
    findings = summarise(study)
    row = findings.row(1, "tabular", "momentum")
    assert (row.train, row.diverged, row.steps_to_target, row.speedup) == (None, 2, None, 0)
    assert row.train_ratio == pytest.approx(100)
    overall = next(row for row in findings.overall if row.optimizer == "momentum")
    assert (overall.diverged, overall.score_steps) == (1, 0)
    settings = {"overall": [asdict(row) for row in findings.overall]}
    write_results(tmp_path, settings, [asdict(row) for row in findings.rows])
    assert json.loads((tmp_path / "results.json").read_text())["overall"][0]["diverged"] == 0


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Study:
    study = study_in(tmp_path_factory.mktemp("study"))
    measure(study)
    return study


def test_what_is_there_is_not_measured_again(done):
    told = []
    measure(done, lambda *what: told.append(what))
    assert told == []
    total = sum(done.runs * len(contender.lrs) for contender in done.contenders) * 4  # two scripts, two lengths
    assert len(list(done.cache.rglob("*-s?x1.json"))) == total


def test_a_stopped_study_is_resumed_to_the_same_figures(done, tmp_path):
    study, told = study_in(tmp_path), []

    def stop(what, detail, index, total):
        told.append(what)
        if len(told) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(study, stop)
    with pytest.raises(Incomplete):
        summarise(study)
    measured = len(list(study.cache.rglob("*-s?x1.json")))
    assert 0 < measured < 9
    measure(study)
    ours, theirs = (
        [replace(row, ms_step=0, ms_optimizer=0, seconds_to_target=None) for row in summarise(s).rows]
        for s in (study, done)
    )
    assert ours == theirs


@pytest.mark.parametrize("damage", ["cut", "other", "text", "short", "row", "nothing"])
def test_damaged_results_are_measured_again(done, damage):
    trial = next(done.trials(done.workloads[0], done.contenders[0], 1))
    path, key = done.place(trial)
    before = path.read_text()
    content = json.loads(before)
    changed = {
        "cut": before[:50],
        "other": json.dumps({**content, "of": {**key, "code": "older"}}),
        "text": json.dumps({**content, "train": [["a"] * 12]}),
        "short": json.dumps({**content, "train": [content["train"][0][:-1]]}),
        "row": json.dumps({**content, "state_bytes": "many"}),
        "nothing": "",
    }
    path.write_text(changed[damage])
    assert read_trial(done, trial) is None
    told = []
    measure(done, lambda *what: told.append(what))
    assert len(told) == 1
    assert path.read_text() == before


def test_times_belong_to_those_who_took_turns(done):
    workload = done.workloads[0]
    times = read_times(done, workload)
    assert times.keys() == {contender.name for contender in done.contenders}
    assert all(0 < optimizer < step for step, optimizer in times.values())
    assert read_times(replace(done, contenders=done.contenders[:2]), workload) is None


def test_the_cache_keeps_what_is_not_finite(tmp_path):
    write_result(tmp_path / "a" / "cell.json", {"x": 1}, {"values": [1.5, None]})
    found = read_result(tmp_path / "a" / "cell.json", {"x": 1}, "values")["values"]
    assert found[0] == 1.5
    assert math.isnan(found[1])
    assert read_result(tmp_path / "a" / "cell.json", {"x": 2}, "values") is None


def test_missing_data_is_told_first(tmp_path):
    with pytest.raises(DataError, match="--download"):
        measure(study_in(tmp_path, workloads=scripts((), Datasets(tmp_path / "data"))))
    assert list(tmp_path.iterdir()) == []


def test_studies_refuse_nonsense(tmp_path):
    for change, message in (({"steps": 0}, "--steps"), ({"runs": 0}, "--runs"), ({"horizons": (0,)}, "--horizons")):
        with pytest.raises(ConfigError, match=message):
            study_in(tmp_path, **change)
    with pytest.raises(ConfigError, match="--tune-on: must be training or validation, got 'test'"):
        study_in(tmp_path, tune_on="test")
    assert ROUNDS >= 3
