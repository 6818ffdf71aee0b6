"""Curricula and task slots: episodes, stages, and checkpoints in the middle of an episode."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from l2o_runtime.rules import make_rule
from l2o_runtime.solvers import Descent
from l2o_training.config import TrainConfig, load_preset
from l2o_training.meta.checkpoints import flatten, nest
from l2o_training.meta.curriculum import Curriculum, Episode, RandomEpisodes, Stage, make_curriculum
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


class Growing(Curriculum):
    """Horizons grow by a truncation with every validation."""

    def __init__(self, config):
        self.config, self.stage = config, 1

    def draw(self, number):
        return Episode(0, number, self.stage * self.config.unroll, [1.0], [1.0])

    def advance(self, score):
        self.stage += 1
        return Stage(f"stage {self.stage}")


def test_stages_are_recorded_and_a_resumed_run_comes_to_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("l2o_training.meta.trainer.make_curriculum", Growing)
    config = dataclasses.replace(CONFIG, epochs=4, validate_every=1, validation_runs=1)
    whole = Trainer(config, tmp_path / "whole")
    path = whole.run()
    assert [row["stage"] for row in whole.history] == ["stage 2", "stage 3", "stage 4", "stage 5"]
    parts = Trainer(config, tmp_path / "parts")

    class Stop(Exception):
        pass

    def stop(epoch):
        if epoch.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        parts.run(stop)
    assert len({slot.episode.horizon for slot in parts.slots}) == 1
    resumed = Trainer(config, tmp_path / "parts", resume=True)
    assert resumed.curriculum.stage == 3
    assert [slot.episode for slot in resumed.slots] == [slot.episode for slot in parts.slots]
    assert resumed.run().read_bytes() == path.read_bytes()
