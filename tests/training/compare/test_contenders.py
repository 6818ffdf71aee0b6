"""Who is compared: what rules have seen, names, grids, schedules."""

import numpy as np
import pytest
import torch
from comparing import run, script_of
from rules import RULES, make_rule

from l2o_runtime import ConfigError, save_rule
from l2o_runtime.files.artifact import find_rule, read_rule
from l2o_training.compare import contenders
from l2o_training.compare.baselines import BASELINES, GRID_SIZE
from l2o_training.config import load_preset
from l2o_training.tasks.scripts import RECIPES


def test_the_bundled_rule_has_not_seen_the_data():
    assert len(RECIPES) >= 12
    used = {recipe.data for recipe in RECIPES.values()} - {None}
    assert used == {"fashion-mnist", "cifar10"}
    (rule,) = contenders.rules(["default"])
    assert rule.seen == set(), "it was not meta-trained"
    assert "cifar10" in {task.data for task in load_preset("cifar-dmd").tasks}, "so reports have to tell of it"


def test_data_of_a_rules_ancestor_and_of_its_validation_are_not_new_to_it(tmp_path):
    rule, _ = read_rule(find_rule("mnist"))
    ancestor = {"config": {"tasks": [{"kind": "mlp", "data": "fashion-mnist"}]}}
    own = {"tasks": [{"kind": "mlp", "data": "digits"}], "validation_tasks": [{"kind": "mlp", "data": "cifar10"}]}
    save_rule(tmp_path / "own.safetensors", rule, {"config": own, "start": ancestor})
    (contender,) = contenders.rules([str(tmp_path / "own.safetensors")])
    assert contender.seen == {"digits", "cifar10", "fashion-mnist"}


def test_a_rule_may_be_entered_under_a_cosine_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, (constant, falling) = script_of("least-squares"), contenders.rules(["scale"], [None, "cosine"])
    losses, annealed = (run(script, contender, 1.0, 0, 20).train for contender in (constant, falling))
    assert losses[:2] == annealed[:2]  # lr is 1 in the first step
    assert losses[2:] != annealed[2:]
    assert constant.identity != falling.identity
    save_rule("directional-cosine.safetensors", make_rule(RULES["none-normalized"]))
    with pytest.raises(ConfigError, match="'directional-cosine' is taken"):
        contenders.rules(["default", "directional-cosine.safetensors"], [None, "cosine"])


def test_grids_are_log_spaced():
    everyone = contenders.baselines("all")
    for contender in everyone:
        if len(contender.lrs) > 1:
            assert len(contender.lrs) == GRID_SIZE == 14
            np.testing.assert_allclose(np.diff(np.log10(contender.lrs)), 1 / 3, atol=2e-3)
    assert {contender.name for contender in everyone} == {
        name for name, b in BASELINES.items() if b.installed and b.scripts and not b.extra
    }
    assert contenders.baselines("adam", thin=7)[0].lrs == BASELINES["adam"].grid[::7]
    with pytest.raises(ConfigError, match="did you mean rmsprop"):
        contenders.baselines("adam,rmspop")
    with pytest.raises(ConfigError, match="adam sets the target"):
        contenders.baselines("momentum")


def test_rules_may_decay_weights():
    param = torch.nn.Parameter(torch.ones(2, 2))
    for decay in (0.0, 0.5):
        (rule,) = contenders.rules(["default"], ["total"], decay)
        assert ("weight decay 0.5" in rule.label) == ("weight decay 0.5" in rule.identity) == bool(decay)
        optimizer, _ = rule.optimizer([param], 1.0, 100)
        assert optimizer.param_groups[0]["weight_decay"] == decay


@pytest.mark.parametrize(("rule", "factor"), [("directional", 2.0), ("scale", 1.0)])
def test_told_a_rule_takes_the_steps_on_flat_tasks_that_its_optimizer_takes(rule, factor):
    """In short runs a rule that leaves its size to a schedule has longer steps; another has not."""
    (told,) = contenders.rules([rule], ["total"])
    steps = told.solver(1.0, 625)
    assert [steps.factor(done) for done in (12, 499)] == pytest.approx([factor * (1 - 13 / 625), factor / 5])
