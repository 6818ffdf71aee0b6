"""The suite `unseen`: workloads, the training loop, figures against plain formulas, cells, the command."""

import json
import math
import types
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rules import RULES, make_rule
from scipy import integrate, stats
from typer.testing import CliRunner

from l2o_cli.main import app
from l2o_runtime import ConfigError, LearnedOptimizer, save_rule
from l2o_runtime.files.artifact import find_rule, read_rule
from l2o_training import metrics
from l2o_training.benchmark.memory import state_bytes
from l2o_training.cells import read_cell, write_cell
from l2o_training.compare.baselines import GRID_SIZE
from l2o_training.config import load_preset
from l2o_training.results import write_results
from l2o_training.tasks.data import DataError, Dataset
from l2o_training.workloads import WORKLOADS, find_workloads
from l2o_training.workloads import study as studies
from l2o_training.workloads.base import code_version
from l2o_training.workloads.entrants import BASELINES, Entrant, find_baselines, find_rules, thinned
from l2o_training.workloads.study import Study, measure, read_run, read_times
from l2o_training.workloads.summary import Incomplete, summarise
from l2o_training.workloads.train import Run, looks, tracking, train, validate_by_batches
from l2o_training.workloads.words import cautions, lags, loss

SMALL = ("least-squares", "tabular")


def fake_data(name: str) -> Dataset:
    """Images of the right shape that can be learned: each class has a mean of its own."""
    shape = (1, 28, 28) if name == "fashion-mnist" else (3, 32, 32)
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (2600,), generator=rng)
    means = torch.randint(256, (10, *shape), generator=rng)
    noise = torch.randint(256, (2600, *shape), generator=rng)
    return Dataset(((means[labels] + noise) // 2).to(torch.uint8), labels, 10)


def problem_of(name: str):
    return WORKLOADS[name].build(fake_data)


def study_in(folder: Path, **changes) -> Study:
    settings = {
        "workloads": find_workloads(SMALL),
        "entrants": [thinned(entrant, 7) for entrant in find_baselines("adam-0.001,adam,momentum")],
        "steps": 12,
        "horizons": (1, 2),
        "seeds": 2,
        "cells": folder / "cells",
        "data_root": folder / "data",
    }
    return Study(**settings | changes)


def test_the_bundled_rule_has_not_seen_the_data():
    assert len(WORKLOADS) >= 12
    used = {workload.data for workload in WORKLOADS.values()} - {None}
    assert used == {"fashion-mnist", "cifar10"}
    (rule,) = find_rules(["default"])
    assert rule.seen == {"digits", "mnist"}
    assert "cifar10" in {task.data for task in load_preset("cifar-dmd").tasks}, "so reports have to tell of it"


def test_data_of_a_rules_ancestor_and_of_its_validation_are_not_new_to_it(tmp_path):
    rule, _ = read_rule(find_rule("mnist"))
    ancestor = {"config": {"tasks": [{"kind": "mlp", "data": "fashion-mnist"}]}}
    own = {"tasks": [{"kind": "mlp", "data": "digits"}], "validation_tasks": [{"kind": "mlp", "data": "cifar10"}]}
    save_rule(tmp_path / "own.safetensors", rule, {"config": own, "start": ancestor})
    (entrant,) = find_rules([str(tmp_path / "own.safetensors")])
    assert entrant.seen == {"digits", "cifar10", "fashion-mnist"}


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_deterministic_and_trainable(name):
    problem = problem_of(name)
    lr = 0.1 if name == "least-squares" else 0.01
    steps = 100 if name == "matrix-factorisation" else 25
    first, second = (train(problem, BASELINES["adam"], lr, 3, steps) for _ in range(2))
    assert first == second
    assert first.train != train(problem, BASELINES["adam"], lr, 4, steps).train
    assert np.mean(first.train[-5:]) < 0.995 * np.mean(first.train[:5])
    assert all(map(math.isfinite, first.validation))
    assert 100 <= first.parameters <= 110_000
    assert problem_of(name).train[0].equal(problem.train[0])


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_parameter_gets_a_gradient_and_validation_leaves_no_trace(name):
    problem = problem_of(name)
    torch.manual_seed(0)
    model = problem.make_model()
    problem.loss(model, next(problem.batches(0))).backward()
    silent = [key for key, param in model.named_parameters() if param.grad is None or not param.grad.any()]
    assert silent == []
    # A run that looks at the validation loss takes the same steps as one that does not.
    run = train(problem, BASELINES["adam"], 1e-3, 0, 4)
    assert run.train == train(replace(problem, validation=problem.train), BASELINES["adam"], 1e-3, 0, 4).train


@pytest.mark.parametrize("name", WORKLOADS)
def test_no_example_is_trained_and_validated_on(name):
    problem = problem_of(name)
    train_rows, validation_rows = (
        {row.numpy().tobytes() for row in parts[0].flatten(1)} for parts in (problem.train, problem.validation)
    )
    if name == "matrix-factorisation":  # the same pair may be rated twice, with other noise
        train_rows, validation_rows = ({float(x) for x in parts[1]} for parts in (problem.train, problem.validation))
        assert len(train_rows & validation_rows) < 10
    elif not name.startswith("char-"):  # a sentence of a small grammar may come twice
        assert not train_rows & validation_rows
    assert len(problem.train[0]) >= problem.batch_size
    assert {len(tensor) for tensor in problem.train} == {len(problem.train[0])}


def test_an_epoch_shows_every_example_once():
    problem = problem_of("least-squares")
    batches = problem.batches(0)
    epoch = [next(batches)[1] for _ in range(len(problem.train[0]) // problem.batch_size)]
    seen = torch.cat(epoch).sort().values
    assert len(seen) == len(seen.unique())
    assert not next(batches)[1].equal(epoch[0])


@pytest.mark.parametrize("kind", ["adam", "adamw-cosine", "default"])
def test_the_loop_is_the_one_that_a_script_would_write(kind):
    problem, steps, lr = problem_of("vae"), 12, 0.003
    entrant = find_rules(["default"])[0] if kind == "default" else BASELINES[kind]
    torch.manual_seed(5)
    model, expected = problem.make_model(), []
    if kind == "default":
        optimizer = LearnedOptimizer(model.parameters())
    else:
        optimizer = (torch.optim.Adam if kind == "adam" else torch.optim.AdamW)(model.parameters(), lr=lr)
    for step, batch in zip(range(steps), problem.batches(5), strict=False):
        if kind == "adamw-cosine":
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss = problem.loss(model, batch)
        loss.backward()
        optimizer.step(**({"loss": loss} if kind == "default" else {}))
        expected.append(loss.item())
    found = train(problem, entrant, 1.0 if kind == "default" else lr, 5, steps)
    np.testing.assert_allclose(found.train, expected, rtol=1e-5 if kind == "adamw-cosine" else 0)
    assert found.state_bytes == state_bytes(optimizer) / found.parameters
    assert (found.state_bytes > 10) == (kind == "default")


def test_a_rule_may_be_entered_under_a_cosine_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problem, (constant, falling) = problem_of("least-squares"), find_rules(["default"], cosine=True)
    losses, annealed = (train(problem, entrant, 1.0, 0, 20).train for entrant in (constant, falling))
    assert losses[:2] == annealed[:2]  # lr is 1 in the first step
    assert losses[2:] != annealed[2:]
    assert constant.identity != falling.identity
    save_rule("scale-cosine.safetensors", make_rule(RULES["none-normalized"]))
    with pytest.raises(ConfigError, match="'scale-cosine' is taken"):
        find_rules(["default", "scale-cosine.safetensors"], cosine=True)


class Pushing(torch.optim.Adam):
    """Adam that carries the biases of convolutions away, which are parameters 1 and 5 of `convnet-batchnorm`."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for index in (1, 5):
                self.param_groups[0]["params"][index].add_(2.0)


def pushing() -> Entrant:
    return replace(BASELINES["adam-0.001"], name="pushing", identity="pushing", make=Pushing)


def test_networks_are_as_people_write_them():
    kinds = [type(layer) for layer in problem_of("convnet-batchnorm").make_model()]
    assert kinds == 2 * [torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.ReLU] + [torch.nn.Flatten, torch.nn.Linear]
    biases = [name for name, _ in problem_of("convnet-batchnorm").make_model().named_parameters() if "bias" in name]
    assert biases == ["0.bias", "1.bias", "3.bias", "4.bias", "7.bias"]
    for name in WORKLOADS:
        for layer in problem_of(name).make_model().modules():
            assert getattr(layer, "track_running_stats", True), name


def test_biases_in_front_of_batch_norm_that_run_away_are_seen():
    """They change nothing in training mode, so that only running statistics tell."""
    problem = problem_of("convnet-batchnorm")
    still, moving = (train(problem, entrant, 1e-3, 0, 60) for entrant in (BASELINES["adam-0.001"], pushing()))
    np.testing.assert_allclose(moving.train, still.train, rtol=0.05)
    np.testing.assert_allclose(moving.batch_validation, still.batch_validation, rtol=0.05)
    assert still.validation[-1] < 1.25 * still.batch_validation[-1]
    assert moving.validation[-1] > 2 * moving.batch_validation[-1]
    assert train(problem_of("convnet"), BASELINES["adam"], 1e-3, 0, 4).batch_validation == []


def test_validation_with_the_statistics_of_minibatches_leaves_the_running_ones():
    problem = problem_of("convnet-batchnorm")
    torch.manual_seed(0)
    model = problem.make_model()
    for batch, _ in zip(problem.batches(0), range(5), strict=False):
        problem.loss(model, batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = validate_by_batches(problem, model, tracking(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(layer.training for layer in model.modules())
    images, labels = (part.split(problem.batch_size) for part in problem.validation)
    plain = [problem.loss(model, batch).item() for batch in zip(images, labels, strict=True)]
    assert found == pytest.approx(np.mean(plain))
    assert not torch.equal(model[1].running_mean, before["1.running_mean"]), "else nothing was to be left"


def test_a_gap_is_in_the_results_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr("l2o_training.workloads.study.Datasets", lambda *_, **__: fake_data)
    workloads, entrants = find_workloads(["convnet-batchnorm", "tabular"]), [BASELINES["adam-0.001"], pushing()]
    adam = replace(BASELINES["adam"], lrs=(1e-3,))
    study = study_in(tmp_path, workloads=workloads, entrants=[adam, *entrants], steps=60, horizons=(1,), seeds=1)
    measure(study)
    findings = summarise(study)
    still, moving = (findings.row(1, "convnet-batchnorm", entrant.name) for entrant in entrants)
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


def test_all_optimizers_start_alike():
    problem = problem_of("vae")
    entrants = [*BASELINES.values(), *find_rules(["default"])]
    assert len({train(problem, entrant, entrant.lrs[0], 1, 1).train[0] for entrant in entrants}) == 1


def test_a_run_that_blows_up_ends_there_and_counts_as_diverged():
    run = train(problem_of("least-squares"), BASELINES["momentum"], 100.0, 0, 60)
    assert math.isnan(run.train[-1])
    assert math.isnan(run.validation[-1])
    assert len(run.train) == 60
    assert len(run.validation) == len(looks(60))
    assert metrics.diverged(np.array(run.train))


def test_grids_are_log_spaced():
    for entrant in BASELINES.values():
        if len(entrant.lrs) > 1:
            assert len(entrant.lrs) == GRID_SIZE == 14
            np.testing.assert_allclose(np.diff(np.log10(entrant.lrs)), 1 / 3, atol=2e-3)
    assert {e.name for e in find_baselines("all")} == set(BASELINES)
    with pytest.raises(ConfigError, match="did you mean rmsprop"):
        find_baselines("adam,rmspop")
    with pytest.raises(ConfigError, match="adam sets the target"):
        find_baselines("momentum")


LOSSES = arrays(float, st.integers(1, 40), elements=st.floats(1e-3, 1e3))


@given(LOSSES, st.floats(1e-3, 1e3))
def test_steps_to_a_target(losses, target):
    width = min(10, len(losses))
    reached = [t for t in range(width, len(losses) + 1) if losses[t - width : t].mean() <= target * (1 + 1e-9)]
    assert metrics.steps_to(target, losses) == (reached[0] if reached else math.inf)
    assert metrics.steps_to(float(metrics.final(losses)), losses) <= len(losses), "each reaches its own end"
    assert metrics.steps_to(math.inf, losses) == math.inf, "no target, nothing reached"


@given(arrays(float, st.integers(1, 30), elements=st.floats(1, 1e3) | st.just(math.inf)))
def test_the_score_is_the_area_under_the_profile(ratios):
    taus = np.unique([1.0, *ratios[ratios <= 4], 4.0])
    area = sum(metrics.profile(ratios, taus[:-1]) * np.diff(taus))  # a step function, exactly
    assert metrics.score(ratios) == pytest.approx(area / 3)
    fine = np.linspace(1, 4, 2001)
    assert metrics.score(ratios) == pytest.approx(
        integrate.trapezoid(metrics.profile(ratios, fine), fine) / 3, abs=2e-3
    )


def test_slowdowns():
    costs = np.array([[10.0, math.inf, math.inf], [5.0, 8.0, math.inf]])
    np.testing.assert_array_equal(metrics.slowdowns(costs), [[2, math.inf, math.inf], [1, 1, math.inf]])


def test_the_interquartile_mean_and_its_interval():
    values = np.random.default_rng(0).normal(size=13)
    centre, low, high = metrics.iqm(values)
    assert centre == pytest.approx(np.sort(values)[3:-3].mean())
    assert low < centre < high
    assert metrics.iqm(values) == (centre, low, high), "seeded"
    rng = np.random.default_rng(1)
    plain = [stats.trim_mean(rng.choice(values, 13), 0.25) for _ in range(4000)]
    np.testing.assert_allclose((low, high), np.quantile(plain, [0.025, 0.975]), atol=0.06)
    assert [math.isnan(metrics.iqm(values[:n])[1]) for n in (1, 2, 4, 5)] == [True, True, True, False]
    worse = np.append(values[:-1], math.log(metrics.CAP))
    assert metrics.iqm(worse)[0] >= centre


def test_ratios_are_capped_and_divergence_is_never_dropped():
    found = np.exp(metrics.log_ratio(np.array([1.0, 1e9, math.inf, math.nan, 0.0]), np.full(5, 2.0)))
    np.testing.assert_allclose(found, [0.5, 100, 100, 100, 0.01])
    ended = np.array([[1.0] * 12, [1.0] + [2.5] * 11, [1.0] * 11 + [math.nan]])
    np.testing.assert_array_equal(metrics.diverged(ended), [False, True, True])
    np.testing.assert_array_equal(metrics.settled(ended), [1, math.inf, math.inf])


def fabricate(monkeypatch, curves) -> None:
    """Runs whose loss falls from 1 to curves(optimizer, lr, seed)."""

    def read(study, workload, entrant, lr, seed, horizon):
        end = curves(entrant.name, lr, seed)
        steps = study.steps * horizon
        return Run([1.0] + [end] * (steps - 1), [end] * len(looks(steps)), [], 8.0, 100)

    monkeypatch.setattr("l2o_training.workloads.summary.read_run", read)
    monkeypatch.setattr(
        "l2o_training.workloads.summary.read_times", lambda study, _: {e.name: (0.01, 0.001) for e in study.entrants}
    )


def test_a_baseline_takes_the_best_rate_on_the_runs_that_are_scored(tmp_path, monkeypatch):
    entrants = find_baselines("adam,momentum")
    best = {"adam": 0.01, "momentum": 0.1}

    def curves(name, lr, seed):
        if name == "momentum" and lr < 0.1:
            return 0.0001 if seed else math.nan  # lower, but with one diverged run
        return 0.5 + abs(math.log(lr / best[name])) / 100 + 0.01 * seed

    fabricate(monkeypatch, curves)
    findings = summarise(study_in(tmp_path, entrants=entrants, steps=30, horizons=(1,)))
    rows = [findings.row(1, "tabular", name) for name in best]
    assert [row.lr for row in rows] == [0.01, 0.1]
    assert [row.diverged for row in rows] == [0, 0]
    assert rows[1].grid_diverged == pytest.approx(6 / 28)
    assert rows[0].train == pytest.approx(0.505)
    assert rows[1].train_ratio == pytest.approx(1)


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
    study = study_in(tmp_path_factory.mktemp("unseen"))
    measure(study)
    return study


def test_what_is_there_is_not_measured_again(done):
    told = []
    measure(done, lambda *what: told.append(what))
    assert told == []
    total = sum(len(list(done.runs(entrant))) for entrant in done.entrants) * 4  # two workloads, two lengths
    assert len(list(done.cells.rglob("*-s?.json"))) == total


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
    measured = len(list(study.cells.rglob("*-s?.json")))
    assert 0 < measured < 9
    measure(study)
    ours, theirs = (
        [replace(row, ms_step=0, ms_optimizer=0, seconds_to_target=None) for row in summarise(s).rows]
        for s in (study, done)
    )
    assert ours == theirs


@pytest.mark.parametrize("damage", ["cut", "other", "text", "short", "row", "nothing"])
def test_damaged_cells_are_measured_again(done, damage):
    workload, entrant = done.workloads[0], done.entrants[0]
    path, key = done.cell(workload, entrant, 0.001, 0, 1)
    before = path.read_text()
    content = json.loads(before)
    changed = {
        "cut": before[:50],
        "other": json.dumps({**content, "of": {**key, "code": "older"}}),
        "text": json.dumps({**content, "train": ["a"] * 12}),
        "short": json.dumps({**content, "train": content["train"][:-1]}),
        "row": json.dumps({**content, "state_bytes": None}),
        "nothing": "",
    }
    path.write_text(changed[damage])
    assert read_run(done, workload, entrant, 0.001, 0, 1) is None
    told = []
    measure(done, lambda *what: told.append(what))
    assert len(told) == 1
    assert path.read_text() == before


def test_times_belong_to_those_who_took_turns(done):
    workload = done.workloads[0]
    times = read_times(done, workload)
    assert times.keys() == {entrant.name for entrant in done.entrants}
    assert all(0 < optimizer < step for step, optimizer in times.values())
    assert read_times(replace(done, entrants=done.entrants[:2]), workload) is None


def test_cells_keep_what_is_not_finite(tmp_path):
    write_cell(tmp_path / "a" / "cell.json", {"x": 1}, {"values": [1.5, None]})
    found = read_cell(tmp_path / "a" / "cell.json", {"x": 1}, "values")["values"]
    assert found[0] == 1.5
    assert math.isnan(found[1])
    assert read_cell(tmp_path / "a" / "cell.json", {"x": 2}, "values") is None


def test_code_versions_follow_code_only(tmp_path, monkeypatch):
    def version(source: str) -> str:
        module = types.ModuleType("m")
        monkeypatch.setattr("inspect.getsource", lambda _: source)
        return code_version(module)

    plain = version("def f(x):\n    return x + 1\n")
    assert version('"""Text."""\n# why\ndef f(x):\n    """Text."""\n    return (x + 1)\n') == plain
    assert version("def f(x):\n    return x + 2\n") != plain


def test_missing_data_is_told_first(tmp_path):
    with pytest.raises(DataError, match="--download"):
        measure(study_in(tmp_path, workloads=find_workloads([])))
    assert list(tmp_path.iterdir()) == []


def test_real_data(data_root, tmp_path):
    """The files of Fashion-MNIST and CIFAR-10 have the shapes that workloads ask for."""
    study = study_in(tmp_path, workloads=find_workloads(["deep-mlp", "convnet"]), data_root=data_root)
    for workload in study.workloads:
        assert len(study.problem(workload).train[0]) == 8192


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


TINY = ("--steps", 10, "--horizons", "2,1", "--runs", 1, "--thin", 14, "--baselines", "adam", "--out", "ev")


def test_the_command(cli, tmp_path):
    save_rule(tmp_path / "own<b>.safetensors", make_rule(RULES["none-normalized"]))
    rules = ("default", "own<b>.safetensors")
    command = ("eval", *rules, "--suite", "unseen", "--task", "tabular", "--cosine", *TINY)
    result = cli(*command, "--report", "r.html")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().endswith("r.html")
    content = json.loads((tmp_path / "ev" / "results.json").read_text())
    names = ["scale", "scale-cosine", "own<b>", "own<b>-cosine", "adam"]
    assert [row["optimizer"] for row in content["overall"]] == 2 * names
    assert {row["steps"] for row in content["results"]} == {10, 20}
    again = cli(*command, "--json")
    assert json.loads(again.stdout)["results"] == content["results"]
    page = (tmp_path / "r.html").read_text()
    assert "own<b>" not in page
    assert "own&lt;b&gt;" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "tabulr"], "did you mean tabular"),
        (["--horizons", "1,x"], "--horizons: expected whole numbers"),
        (["--horizons", "0"], "--horizons: expected whole numbers"),
        (["--baselines", "momentum"], "adam sets the target"),
        (["--report", "none/r.html"], "none"),
        (["--report", "."], "is a folder"),
        (["--report", "a-file/r.html"], "a-file"),
        (["--seed", "1"], "--runs says how many"),
        (["--device", "cuda"], "runs on the CPU"),
        (["--data-root", "none"], "--download"),
        (["--out", "a-file/x", "--task", "tabular"], "a-file"),
        (["--suite", "digits", "--report", "r.html"], "--report: only the suite unseen takes it"),
        (["--suite", "digits", "--task", "tabular"], "--task: only the suite unseen"),
        (["--suite", "digits", "--cosine"], "--cosine: only the suite unseen"),
        (["--suite", "unsen"], "did you mean unseen"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(cli, tmp_path, arguments, message):
    (tmp_path / "a-file").write_text("")
    result = cli("eval", "default", "--suite", "unseen", *arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"], "nothing half-written is left"


@pytest.mark.parametrize("arguments", [["--runs", "0"], ["--steps", "0"], ["--thin", "15"]])
def test_numbers_out_of_range_are_refused(cli, arguments):
    result = cli("eval", "default", "--suite", "unseen", *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr


def test_names_are_unique(cli, tmp_path):
    save_rule(tmp_path / "adam.safetensors", make_rule(RULES["none-normalized"]))
    result = cli("eval", "adam.safetensors", "--suite", "unseen")
    assert result.exit_code == 2
    assert "'adam' is taken" in result.stderr


def test_studies_refuse_nonsense(tmp_path):
    for change, message in (({"steps": 0}, "--steps"), ({"seeds": 0}, "--runs"), ({"horizons": (0,)}, "--horizons")):
        with pytest.raises(ConfigError, match=message):
            study_in(tmp_path, **change)
    assert studies.ROUNDS >= 3
