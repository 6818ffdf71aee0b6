"""What the command line prints fits the terminal: no figure and no name is cut off."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from l2o_cli import bench, console, evaluate
from l2o_cli.main import app
from l2o_training.bench.racers import racers
from l2o_training.bench.run import Result as Timing
from l2o_training.compare import contenders
from l2o_training.compare.report.words import digits
from l2o_training.compare.study import Study
from l2o_training.compare.suites import SUITES, workloads
from l2o_training.compare.summary import Findings, Overall, Row
from l2o_training.compare.versus import BEST_SCHEDULE, Comparison, Versus
from l2o_training.tasks.data import Datasets

WIDTHS = [80, 120]


@pytest.fixture
def printed(monkeypatch):
    """What a function prints on a terminal of some width."""

    def run(width: int, function, *arguments, wide: bool = False) -> str:
        terminal = Console(width=width, highlight=False, emoji=False, markup=False)
        for module in (console, bench, evaluate):
            monkeypatch.setattr(module, "out", terminal)
        with terminal.capture() as text:
            function(*arguments, wide=wide)
        return text.get()

    return run


def assert_fits(text: str, width: int) -> None:
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


# bench


def timings(names=()) -> list[dict]:
    """Figures as long as those of 86.6 million parameters on a busy machine."""
    made = Timing("vit", 86_567_656, "", 20, 12.345, 10.0, 23.456, 142.6, 99.9, 123.4, 234.5, 0.4812, 9**9, 326.4)
    made = replace(made, transient_bytes=27_701_649_920, resident_bytes=28_701_649_920, gemm_floor_ns=110.3)
    made = replace(made, copy_floor_ns=17.5)
    return [asdict(replace(made, optimizer=name)) for name in names or (c.name for c in racers("default"))]


RATES = {"gemm_flops_per_s": 9.2e10, "copy_bytes_per_s": 8.04e10}


@pytest.mark.parametrize("width", WIDTHS)
def test_times_fit(printed, width):
    rows = timings()
    text = printed(width, bench.tell, rows, RATES, "rule default")
    assert_fits(text, width)
    assert all(row["optimizer"] in text for row in rows)
    assert all(figure in text for figure in ("12,345", "234", "123", "326", "27,701.6"))


def test_wide_prints_all_times_on_any_terminal(printed):
    rows = timings()
    text = printed(80, bench.tell, rows, RATES, "rule default", wide=True)
    assert "…" not in text
    assert all(word in text for title in bench.FIGURES for word in title.split("\n"))
    assert all(figure(rows[0]) in text for figure in bench.FIGURES.values())


def test_the_cost_of_the_rule_is_said_in_words(printed):
    text = " ".join(printed(80, bench.tell, timings(), RATES, "rule default").split())
    assert "vit: the step of rule default takes 12,345 ms, 99.9 × that of Adam, 123 × that of" in text
    alone = [{**row, **dict.fromkeys(("ratio_adam", "ratio_foreach", "ratio_fused"))} for row in timings()]
    assert "takes 12,345 ms." in printed(80, bench.tell, alone, RATES, "rule default")


def test_long_names_fold_and_narrow_terminals_cut_nothing(printed):
    name = "own_optimizers.experiments.second_try:MyVeryOwnOptimizerWithALongName" * 2
    text = printed(80, bench.tell, timings([name]), {}, "")
    assert_fits(text, 80)
    assert name in "".join(text.replace("│", " ").split()).replace("12,345", "").replace("99.9", "").replace(
        "234", "", 1
    )
    text = printed(30, bench.tell, timings(), RATES, "rule default")
    assert "…" not in text
    assert "12,345" in text


# eval


def findings(
    tasks: int = 13, interval=(1.09, 1.02, 1.46), suite: str = "unseen", train: float | None = 0.00464
) -> Findings:
    """Figures of a suite's first tasks, made up: nothing is measured."""
    everyone = [*contenders.rules(["default"], [None, "cosine"]), *contenders.baselines("all")]
    chosen = replace(SUITES[suite], tasks=SUITES[suite].tasks[:tasks])
    on = workloads(chosen, Datasets("none"))
    study = Study(suite=suite, workloads=on, contenders=everyone, horizons=(1, 25), cache=Path("none"))
    scripts = chosen.scripts
    held, times = (interval, (0.11, 30.09, 180.0)) if scripts else (None, (None, None, None))
    made = Overall("", 1, interval, held, 11, len(on), 0.0256, 0.81, times[0], 0.0, *times[1:])
    overall = [replace(made, optimizer=c.name, horizon=h) for h in study.horizons for c in everyone]
    ends = (train, 0.001, *((train, 0.001) if scripts else (None, None)), None, None)
    row = Row("", "", 1, 100, 0.00464, False, *ends, 12.34, None, 0, 3, 0.0, None, None, 0.0, *times, 100)
    places = [(h, w.name, c.name) for h in study.horizons for w in on for c in everyone]
    rows = [replace(row, horizon=h, workload=task, optimizer=name) for h, task, name in places]
    beside = Comparison(interval, interval, 11, len(on), on[-1].name, 12.34)
    names = [*(c.name for c in everyone), BEST_SCHEDULE]
    pairs = [(c.name, name) for c in everyone if c.learned for name in names if name != c.name]
    versus = [Versus(*pair, h, beside, beside if scripts else None) for h in study.horizons for pair in pairs]
    return Findings(study, {}, rows, overall, versus)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("interval", [(1.09, 1.02, 1.46), (12.34, 10.56, 45.67), (0.0123, 0.00512, 100.0)])
def test_the_overview_fits(printed, width, interval):
    text = printed(width, evaluate.tell, findings(interval=interval))
    assert_fits(text, width)
    assert all(contender.name in text for contender in findings().study.contenders)
    centre, low, high = map(digits, interval)
    assert f"{centre} [{low}, {high}] │" in text, "on one line"


def test_the_overview_says_in_words_what_the_report_says(printed):
    text = " ".join(printed(80, evaluate.tell, findings()).split())
    assert "directional: After 100 steps its training loss is 1.09 times that of tuned Adam (95 % interval" in text
    assert "1.02 to 1.46: worse), and lower on 11 of 13 tasks." in text
    assert "takes 30.09 times Adam's time." in text
    assert "directional-cosine: After 100 steps" in text
    assert "not reached" in " ".join(printed(120, evaluate.tell, findings()).split())


def test_few_runs_and_few_tasks_are_said(printed):
    found = findings(1, (0.5, math.nan, math.nan))
    text = " ".join(printed(80, evaluate.tell, replace(found, study=replace(found.study, runs=1))).split())
    assert "1 task, 100 steps" in text
    assert "(1 task, too few for an interval)" in text
    assert "Runs per setting: 1. Fewer than three say little." in text
    assert "[" not in text


@pytest.mark.parametrize("wide", [False, True])
def test_columns_go_from_the_right(printed, wide):
    text = printed(80, evaluate.tell, findings(), wide=wide)
    assert ("profile" in text) == wide
    assert "validation loss" in text


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("train", [0.00464, 1.23e-5, None])
def test_tables_of_every_suite_fit(printed, width, suite, train):
    found = findings(suite=suite, train=train)
    text = printed(width, evaluate.tell, found)
    assert_fits(text, width)
    assert all(f" {workload.name} " in text for workload in found.study.workloads)
    assert "ratios to tuned Adam" in text
    assert f"{'diverged' if train is None else f'{train:#.3g}'} (12.34)" in text
    scripts = SUITES[suite].scripts
    assert ("validation loss" in text) == scripts
    assert ("takes 30.09 times" in " ".join(text.split())) == scripts
    assert ("training loss only" in " ".join(text.split())) != scripts


@pytest.mark.parametrize("suite", SUITES)
def test_wide_prints_all_optimizers_side_by_side(printed, suite):
    found = findings(suite=suite)
    text = printed(80, evaluate.tell, found, wide=True)
    names = [contender.name for contender in found.study.contenders]
    assert any(all(name in line for name in names) for line in text.splitlines())


# --help


def test_the_help_tells_defaults_and_has_no_ragged_lines():
    text = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["eval", "--help"]).stdout
    assert "[default: (1; scripts: 1,5,25)]" in " ".join(text.replace("│", "").split())
    assert "results.csv and pictures; --report writes" in " ".join(text.split())
