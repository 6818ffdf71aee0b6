"""Curricula and task slots: episodes, stages, and checkpoints in the middle of an episode."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from resuming import assert_resumes_bit_for_bit

from l2o_runtime import ConfigError
from l2o_runtime.rules import make_rule
from l2o_runtime.solvers import Descent
from l2o_training.config import TrainConfig, load_preset
from l2o_training.curricula import GrowingConfig
from l2o_training.meta.checkpoints import flatten, nest
from l2o_training.meta.curriculum import RandomEpisodes, make_curriculum
from l2o_training.meta.slots import TaskSlot
from l2o_training.meta.trainer import Trainer
from l2o_training.meta.unroll import unroll
from l2o_training.tasks import QuadraticConfig, make_task
from l2o_training.tasks.data import load_dataset

CONFIG = TrainConfig(
    tasks=(QuadraticConfig(size=4), QuadraticConfig(size=3)), **{"horizon": 30, "unroll": 5, "shortest": 5, "lanes": 3}
)
TASKS = [make_task(task, load_dataset, torch.device("cpu")) for task in CONFIG.tasks]


def test_horizons_are_log_uniform_multiples_of_the_truncation():
    config = dataclasses.replace(load_preset("demo"), horizon=1000, shortest=20, unroll=20)
    horizons = [RandomEpisodes(config).draw(number).horizon for number in range(2000)]
    assert min(horizons) == 20
    assert max(horizons) == 1000
    assert all(horizon % 20 == 0 for horizon in horizons)
    halves = np.mean(np.array(horizons) < math.sqrt(20 * 1000))
    assert 0.45 < halves < 0.55


def test_episodes_depend_on_their_number_alone():
    config = dataclasses.replace(CONFIG, hide_loss=0.5, rescale=1.0, batch=8)
    one, other = RandomEpisodes(config), RandomEpisodes(config)
    drawn = [one.draw(number) for number in range(20)]
    assert drawn == [other.draw(number) for number in reversed(range(20))][::-1]
    assert {episode.task for episode in drawn} == {0, 1}
    assert {shown for episode in drawn for shown in episode.shown} == {0.0, 1.0}
    assert all(math.exp(-1) <= scale <= math.exp(1) for episode in drawn for scale in episode.scale)
    assert RandomEpisodes(dataclasses.replace(config, seed=1)).draw(0) != drawn[0]
    assert one.advance(0.5) is None, "it has no stages"


def test_slots_share_the_episodes_out():
    slots = [TaskSlot(CONFIG, make_curriculum(CONFIG), TASKS, index) for index in range(3)]
    numbers = [[slot.number for _ in range(40) if slot.tick()] for slot in slots]
    for index, found in enumerate(numbers):
        assert found == list(range(index, index + 3 * len(found), 3))


@pytest.mark.parametrize("older", [False, True])
def test_a_slot_goes_on_from_its_state(older):
    """Older versions kept the states of rules beside all else, and no episode with the position."""
    torch.manual_seed(0)
    solver = Descent(make_rule(CONFIG.rule))
    config = dataclasses.replace(CONFIG, hide_loss=0.5, rescale=1.0, batch=2)
    slot = TaskSlot(config, make_curriculum(config), TASKS, 1)
    while not (slot.under_way and slot.done):
        slot.tick()
        unroll(solver, slot.begun(solver)[0], 5)
    position, state = json.loads(json.dumps(slot.position())), slot.state_dict()
    if older:
        del position["episode"]
        (inner,) = state["inners"]
        kept = inner.pop("state")
        inner |= {key: value for key, value in kept.items() if not key.startswith("layout/")}
    again = TaskSlot(config, make_curriculum(config), TASKS, 1)
    again.go_to(position)
    again.load_state_dict(nest(flatten(state)), solver)
    assert again.episode == slot.episode
    ends = []
    for each in (slot, again):
        each.tick()
        trace = unroll(solver, each.begun(solver)[0], 5)
        ends.append([trace.losses, each.inners[0].params, *each.inners[0].state.values()])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


GROWING = dataclasses.replace(
    CONFIG,
    horizon=15,
    shortest=None,
    epochs=9,
    validate_every=1,
    validation_runs=1,
    average=0.5,
    curriculum=GrowingConfig(horizons=(5, 10), patience=2),
)


def scored(curriculum, scores):
    """The stages that begin with scores."""
    return [stage.name if (stage := curriculum.advance(score)) else None for score in scores]


def test_horizons_grow_where_the_latest_score_is_not_the_best():
    growing = make_curriculum(GROWING)
    assert [(stage.horizon, stage.validated) for stage in growing.stages] == [(5, 10), (10, 15), (15, 15)]
    assert scored(growing, [3.0, 2.0, 1.0, 1.5]) == [None, None, None, "horizon 10"]
    assert growing.draw(7).horizon == 10
    assert scored(growing, [2.0, math.nan]) == [None, "horizon 15"], "a score that is not finite is no better"
    assert scored(growing, [1.0, 1.0, 2.0]) == [None, None, None]
    assert growing.over


def test_a_growing_run_ends_with_its_last_stage(tmp_path, monkeypatch):
    """Scores rise in every second validation, so that stages end, whatever is learned."""
    scores = iter([5.0, 1.0, 2.0, *[7.0, 3.0, 4.0] * 20])
    told = []

    def score(self, losses):
        told.append(self.horizon)
        return next(scores)

    monkeypatch.setattr("l2o_training.meta.validation.Validation.score", score)
    monkeypatch.setattr("l2o_training.meta.validation.Validation.beside", lambda self: {"lr": None, "loss": None})
    whole = Trainer(GROWING, tmp_path / "whole")
    whole.run()
    stages = [row.get("stage") for row in whole.history]
    assert [stage for stage in stages if stage] == ["horizon 10", "horizon 15"]
    assert whole.curriculum.over
    assert whole.epoch < GROWING.epochs
    assert sorted(set(told)) == [10, 15]
    assert {row["steps"] for row in whole.history} == {15, 30, 45}, "of three slots"


def test_a_stage_begins_with_the_best_of_the_one_before(tmp_path):
    trainer = Trainer(GROWING, tmp_path)
    best = {key: value.clone() for key, value in trainer.best_state.items()}
    trainer.train_epoch()
    assert not all(torch.equal(value, best[key]) for key, value in trainer.rule.state_dict().items())
    trainer.best_state = best
    trainer._begin(trainer.curriculum.stages[1])
    for state in (trainer.rule.state_dict(), trainer.learner.candidate_state()):
        assert all(torch.equal(value, best[key]) for key, value in state.items())
    assert not trainer.learner.optimizer.state
    assert not any(slot.under_way for slot in trainer.slots)


def test_a_growing_run_resumes_bit_for_bit(tmp_path):
    growing = dataclasses.replace(GROWING.curriculum, patience=1)
    config = dataclasses.replace(GROWING, lr=0.5, curriculum=growing)  # so large that validations become worse
    for epoch in (1, 2, 3):
        assert_resumes_bit_for_bit(config, tmp_path / f"{epoch}", epoch, midway=False)
    stages = Trainer(config, tmp_path / "1" / "parts", resume=True).curriculum.stage.number
    assert stages > 0, "it has to come to another stage"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 5}, "must be longer than the curriculum's first, 5, without shortest; got 5"),
        ({"shortest": 5}, "without shortest; got 15 with shortest"),
        ({"curriculum": GrowingConfig(horizons=(4, 10))}, "unroll 5 must divide"),
        ({"imitated": (0.1,)}, "needs an expert"),
        ({"imitated": (1.5,), "expert": "adam"}, r"must be in \[0, 1\]"),
    ],
)
def test_curricula_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(GROWING, **changes)


@pytest.mark.parametrize("horizons", [(), (5, 5), (10, 5), (0, 5)])
def test_horizons_that_cannot_be(horizons):
    with pytest.raises(ConfigError, match="or more that increase"):
        GrowingConfig(horizons=horizons)


def test_an_expert_carries_some_epochs_by_stage():
    config = dataclasses.replace(GROWING, expert="adam", imitated=(0.0, 0.3), seed=4)
    shares = [[config.share(epoch, stage) for epoch in range(500)] for stage in range(3)]
    assert set(shares[0]) == {1.0}
    assert shares[1] == shares[2], "the last probability holds from then on"
    assert set(shares[1]) == {0.0, 1.0}
    assert 0.25 < 1 - np.mean(shares[1]) < 0.35
