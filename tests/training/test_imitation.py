"""Imitation of an expert: what it is at both ends of the hand-over, that it teaches, and that it resumes."""

import dataclasses

import pytest
import torch
from resuming import assert_resumes_bit_for_bit

from l2o_runtime import ConfigError, make_rule
from l2o_runtime.rules import DirectionalConfig, LSTMConfig
from l2o_runtime.solvers import Descent
from l2o_training.compare.baselines import BASELINES
from l2o_training.config import TrainConfig, load_preset
from l2o_training.meta.imitation import Imitation, make_expert
from l2o_training.meta.trainer import Trainer
from l2o_training.meta.unroll import begin, unroll
from l2o_training.tasks import MLPConfig, QuadraticConfig, make_task
from l2o_training.tasks.data import load_dataset

EXPERTS = ["adam", "adamw-linear", "directional"]
TINY = TrainConfig(
    rule=LSTMConfig(hidden=4, layers=1),
    tasks=(QuadraticConfig(size=4),),
    validation_runs=1,
    validate_every=1,
    horizon=20,
    unroll=10,
    expert="adamw-linear",
    expert_lr=0.03,
    handed_over=4,
)


def task_of(config):
    return make_task(config, load_dataset, torch.device("cpu"))


def losses(solver, steps=12):
    instances = task_of(MLPConfig(hidden=(5,), batch_size=8)).instances(2, seed=3)
    instances.steps = steps
    with torch.no_grad():
        return unroll(solver, begin(solver, instances), steps).losses


@pytest.mark.parametrize("name", EXPERTS)
def test_it_is_the_expert_at_first_and_the_learner_at_last(name):
    torch.manual_seed(0)
    learner = Descent(make_rule(DirectionalConfig(hidden=3, rank=2)))
    torch.nn.init.normal_(learner.rule.head.weight)
    solver = Imitation(learner, make_expert(name), 0.01)
    assert list(solver.parameters()) == list(learner.parameters())
    expert = BASELINES[name].solver(0.01, 12) if name in BASELINES else make_expert(name)
    torch.testing.assert_close(losses(solver), losses(expert), rtol=1e-5, atol=1e-6)
    solver.share = 1.0
    torch.testing.assert_close(losses(solver), losses(learner), rtol=1e-5, atol=1e-6)
    solver.share = 0.5
    between = losses(solver)[-1]
    assert not torch.equal(between, losses(learner)[-1])


@pytest.mark.parametrize("estimator", ["tbptt", "mixed"])
def test_a_rule_comes_to_say_what_its_expert_says(estimator, tmp_path):
    config = dataclasses.replace(
        TINY,
        estimator=estimator,
        particles=4,
        sigma=0.05,
        lr=0.02,
        epochs=60,
        handed_over=10**6,
        expert="adam",
        lanes=2,
    )
    trainer = Trainer(config, tmp_path)
    apart = [trainer.train_epoch().objectives["imitation"] for _ in range(60)]
    assert sum(apart[-10:]) < 0.7 * sum(apart[:10])


def test_the_share_of_the_rule_grows_and_the_objectives_follow(tmp_path):
    trainer = Trainer(TINY, tmp_path)
    for epoch in range(6):
        trainer.train_epoch()
        share = min(1.0, epoch / 4)
        assert trainer.learner.solver.share == share
        assert [objective.weight for objective in trainer.estimator.objectives] == [share, 1 - share]
    assert load_preset("demo").share(0) == 1.0


def test_stopped_in_the_middle_of_an_episode_resumes_bit_for_bit(tmp_path):
    config = dataclasses.replace(TINY, epochs=4, horizon=40, shortest=10, lanes=3, seed=1)
    assert_resumes_bit_for_bit(config, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["expert=adam", "sample=0.5"], "not with sample"),
        (["expert=adam", 'rule.context={kind="kae", window=5}'], "Koopman"),
        (["expert_lr=0"], "expert_lr"),
        (["handed_over=-1"], "handed_over"),
    ],
)
def test_bad_settings_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_preset("demo", overrides)


@pytest.mark.parametrize(("name", "message"), [("muon-linear", "flat tasks"), ("muom", "no rule at muom")])
def test_experts_that_cannot_teach_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        make_expert(name)
