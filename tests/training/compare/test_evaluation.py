"""`l2o eval`: every suite with the same options, files and words."""

import json

import pytest
import torch
from rules import RULES, make_rule
from typer.testing import CliRunner

from l2o_cli.main import app
from l2o_runtime import load_rule, save_rule
from l2o_runtime.solvers import Descent
from l2o_training.compare.flat import rollout
from l2o_training.tasks import QuadraticConfig, make_task
from l2o_training.tasks.data import Datasets

pytestmark = pytest.mark.slow


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
    names = ["directional", "directional-cosine", "own<b>", "own<b>-cosine", "adam"]
    assert [row["optimizer"] for row in content["overall"]] == 2 * names
    assert {row["steps"] for row in content["results"]} == {10, 20}
    again = cli(*command, "--json")
    assert json.loads(again.stdout)["results"] == content["results"]
    page = (tmp_path / "r.html").read_text()
    assert "own<b>" not in page
    assert "own&lt;b&gt;" in page


def test_flat_tasks_take_the_same_options_and_give_the_same_files(cli, tmp_path):
    both = {}
    for suite, task in (("quadratics", "quadratic-10"), ("unseen", "tabular")):
        out = tmp_path / suite
        options = (*TINY[:-2], "--seed", 3, "--cosine", "--out", out, "--report", tmp_path / f"{suite}.html")
        result = cli("eval", "default", "--suite", suite, "--task", task, *options)
        assert result.exit_code == 0, result.output
        text = " ".join(result.stdout.split())
        assert "1 task, 20 steps, ratios to tuned Adam" in text
        assert "(1 task, too few for an interval)" in text
        assert "…" not in result.stdout
        both[suite] = json.loads((out / "results.json").read_text())
        assert {path.name for path in out.iterdir()} == {
            *("cache", "results.json", "results.csv", "losses-10.png", "losses-20.png")
        }
        page = (tmp_path / f"{suite}.html").read_text()
        assert f"l2o eval default --suite {suite} --baselines adam --steps 10 --horizons 1,2 --runs 1 --seed 3" in page
    flat, script = both["quadratics"], both["unseen"]
    assert flat.keys() == script.keys()
    for part in ("overall", "results"):
        assert [row.keys() for row in flat[part]] == [row.keys() for row in script[part]]
    (row, *_) = flat["results"]
    assert (row["validation"], row["ms_step"], row["state_bytes"], row["parameters"]) == (None, None, None, 10)


def test_a_rule_on_flat_tasks_gives_the_losses_of_its_rollout(cli, tmp_path):
    assert cli("eval", "default", "--suite", "quadratics", *TINY).exit_code == 0
    rows = json.loads((tmp_path / "ev" / "results.json").read_text())["results"]
    task = make_task(QuadraticConfig(size=20), Datasets("none"), torch.device("cpu"))
    expected = rollout(Descent(load_rule("default")), task.instances(1, 0), 20)[-10:].mean().item()
    (found,) = [r for r in rows if (r["workload"], r["optimizer"], r["steps"]) == ("quadratic-20", "directional", 20)]
    assert found["train"] == pytest.approx(expected, rel=1e-5)
    (adam,) = [r for r in rows if (r["workload"], r["optimizer"], r["steps"]) == ("quadratic-20", "adam", 20)]
    assert found["train_ratio"] == pytest.approx(found["train"] / adam["train"])


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
        (["--device", "cuda"], "these tasks run on the CPU"),
        (["--data-root", "none"], "--download"),
        (["--out", "a-file/x", "--task", "tabular"], "a-file"),
        (["--suite", "digits", "--task", "digits-3L"], "did you mean digits-2L"),
        (["--suite", "digits", "--report", "none/r.html"], "none"),
        (["--suite", "table1", "--data-root", "none"], "--download"),
        (["--suite", "unsen"], "did you mean unseen"),
        (["--suite", "digits", "--tune-on", "validation"], "has a training loss only"),
        (["--suite", "digits", "--weight-decay", "0.1"], "--weight-decay: for training scripts, and digits has none"),
        (["--weight-decay", "inf"], "--weight-decay: must be finite, got inf"),
        (["--suite", "everyday", "--task", "diamond-cuts", "--data-root", "none"], "put diamonds.csv there"),
        (["--suite", "digits", "--baselines", "adam,muon-linear"], "muon-linear runs on training scripts only"),
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
