"""The page of games and searches, in small."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from l2o_cli.main import app
from l2o_runtime import save_rule
from l2o_runtime.learned import make_learned
from l2o_training.compare.papers import contests, synthetic
from l2o_training.compare.papers.lab import Lab
from l2o_training.meta.folder import METRICS, RULE
from l2o_training.meta.provenance import comparable


def kept(lab, config, folder, report):
    """A run of no epochs at all."""
    folder.mkdir(parents=True)
    torch.manual_seed(config.seed)
    provenance = {"config": comparable(config), "validation": 1.0}
    save_rule(folder / RULE, make_learned(config.trained_rule), provenance)
    (folder / METRICS).write_text(json.dumps({"epoch": 1, "seconds": 60.0}) + "\n")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Nothing is trained, and everything measured for a moment."""
    for part, name in (("games", "GAMES"), ("searches", "SEARCHES")):
        brief = contests.PARTS[part]._replace(steps=2, runs=16)
        monkeypatch.setattr(contests, name, brief)
        monkeypatch.setitem(contests.PARTS, part, brief)
    monkeypatch.setattr(synthetic, "train", kept)
    monkeypatch.setattr(contests, "RESTARTS", 1)
    return Lab(tmp_path / "runs", tmp_path)


def test_the_page_has_all_lines_and_nothing_is_measured_twice(small, tmp_path, monkeypatch):
    text = synthetic.reproduce(small, tmp_path / "pages", 1, (), lambda *told: None).read_text()
    for comparison in (contests.GAMES, contests.SEARCHES):
        titles = [*comparison.learned, *(f"{title}, untrained" for title in comparison.learned), *comparison.baselines]
        assert all(f"\n| {title} |" in text for title in titles)
    assert len(re.findall(r"target \S+ (?:met|missed)", text)) == 5
    assert "l2o reproduce synthetic --seeds 1" in text
    assert "| twin-s1 | 1.000 | 1 | 1.0 |" in text
    assert "](pages/synthetic.md)" in (tmp_path / "pages.md").read_text()
    assert str(tmp_path) not in text

    monkeypatch.setattr(contests, "rollout", None)  # all that is needed was kept
    monkeypatch.setattr(synthetic, "train", None)
    part = synthetic.reproduce(small, tmp_path / "pages", 1, ["searches"], lambda *told: None).read_text()
    assert "Not run: `l2o reproduce synthetic --only games`." in part
    assert "## Games" not in part
    assert synthetic.reproduce(small, tmp_path / "pages", 1, (), lambda *told: None).read_text() == text


def test_what_the_plan_does_not_take_is_told(tmp_path):
    told = CliRunner().invoke(app, ["reproduce", "synthetic", "--runs", "3", "--runs-dir", str(tmp_path)])
    assert told.exit_code != 0
    assert "--runs: not with the plan synthetic" in told.output


@pytest.mark.parametrize(("name", "near"), [("sprase", "sparse"), ("synthetik", "synthetic"), ("open-l20", "open-l2o")])
def test_a_plan_that_there_is_not_is_told_with_the_nearest(name, near, tmp_path):
    told = CliRunner().invoke(app, ["reproduce", name, "--runs-dir", str(tmp_path)])
    assert told.exit_code != 0
    assert f"unknown plan '{name}': did you mean {near}" in told.output
