"""Meta-training: gradients against plain differentiation, determinism, resume, data, tasks, evaluation."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rules import RULES, make_rule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from typer.testing import CliRunner

from l2o_cli.main import app
from l2o_runtime import ArtifactError, ConfigError, load_rule, save_rule
from l2o_runtime.config import DMDConfig, FlagConfig, KAEConfig, NoneConfig, PlaceboConfig, to_dict
from l2o_runtime.files.artifact import read_rule
from l2o_runtime.rules import LSTMConfig, LSTMRule, PlainConfig
from l2o_runtime.solvers import Descent
from l2o_runtime.state import zeros
from l2o_training.compare.baselines import BASELINES
from l2o_training.compare.flat import rollout
from l2o_training.config import TrainConfig, load_preset, preset_names
from l2o_training.errors import RunError
from l2o_training.meta import checkpoints, provenance
from l2o_training.meta.curriculum import VALIDATION_SEED, make_curriculum
from l2o_training.meta.objectives import loss_objectives
from l2o_training.meta.slots import TaskSlot
from l2o_training.meta.steppers import Sample, Sampling
from l2o_training.meta.trainer import Trainer
from l2o_training.meta.unroll import begin, unroll
from l2o_training.meta.validation import RATES, Validation
from l2o_training.ranks.group import ALONE
from l2o_training.tasks import ConvConfig, MLPConfig, QuadraticConfig, make_task
from l2o_training.tasks.data import DataError, load_dataset, read_npz

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TINY = ["epochs=4", "horizon=20", "unroll=10", "batch=2", "validate_every=2", "validation_runs=2"]
TINY_DIGITS = [*TINY, "rule.context.window=5", "rule.hidden=4", "rule.layers=1"]


def task_of(config):
    return make_task(config, load_dataset, CPU)


@pytest.mark.parametrize(
    ("weights", "tail"), [("uniform", None), ("last", None), ("end", None), ("uniform", 0.25), ("last", 1.0)]
)
@pytest.mark.parametrize("name", ["none-log_sign", "dmd-exact-normalized", "kae-log_sign"])
def test_meta_gradient_equals_plain_differentiation(name, weights, tail):
    """⟨∇L, θ⟩ with ∇L held constant has the gradient of Σ w L(θ) with detached optimizee gradients."""
    torch.manual_seed(0)
    rule = make_rule(RULES[name]).requires_grad_()
    task = task_of(MLPConfig(hidden=(4,), batch_size=8))
    solver = Descent(rule)
    inner = begin(solver, task.instances(3, seed=5))
    trace = unroll(solver, inner, 6, loss_objectives(tail=tail), weights)
    trace.objective.backward()
    ours = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in rule.parameters()]
    rule.zero_grad()

    instances = task.instances(3, seed=5)
    shapes = [(4, 64), (4,), (10, 4), (10,)]

    def loss(theta, batch):
        images, labels = batch
        w1, b1, w2, b2 = (x.view(s) for x, s in zip(theta.split([256, 4, 40, 10]), shapes, strict=True))
        return F.cross_entropy(F.linear(F.linear(images.flatten(1), w1, b1).sigmoid(), w2, b2), labels)

    def losses_of(theta):
        images, labels = instances._batches()
        return torch.stack([loss(theta[i], (images[i], labels[i])) for i in range(3)])

    theta = instances.params
    state = zeros(rule.spec.coordinate, tuple(theta.shape)), zeros(rule.spec.model, (3,))
    value, total = losses_of(theta.detach().requires_grad_()), 0.0
    leaf = instances.params.clone().requires_grad_()
    instances = task.instances(3, seed=5)
    value = losses_of(leaf)
    grad = torch.autograd.grad(value.sum(), leaf)[0]
    mean = theta
    for step in range(6):
        delta, *state = rule(theta.detach(), grad, value.detach(), *state)
        theta = theta + delta
        value = losses_of(theta)
        grad = torch.autograd.grad(value.sum(), theta, retain_graph=True)[0].detach()
        point = value
        if tail is not None:
            mean = mean + (theta - mean) / (1 + tail * (step + 1))
            mean_value = losses_of(mean)
            torch.testing.assert_close(trace.mean_losses[step], mean_value.detach(), rtol=1e-4, atol=1e-5)
            point = (value + mean_value) / 2
        if weights == "uniform" or step == 5:
            total = total + point.sum() / 3
        torch.testing.assert_close(trace.losses[step], value.detach(), rtol=1e-4, atol=1e-5)
    total.backward()
    plain = [p.grad if p.grad is not None else torch.zeros_like(p) for p in rule.parameters()]
    assert any(g.abs().sum() > 0 for g in plain)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        QuadraticConfig(size=5),
        MLPConfig(hidden=()),
        MLPConfig(hidden=(7, 3), activation="relu", batch_size=1),
        ConvConfig(data="digits", channels=(3, 2), batch_size=4),
    ],
)
def test_tasks_are_seeded_and_learnable(config):
    task = task_of(config)
    runs = [rollout(BASELINES["adam"].solver(0.03, 150), task.instances(3, seed=1), 150) for _ in range(2)]
    assert torch.equal(*runs)
    assert runs[0].shape == (150, 3)
    assert runs[0][-20:].mean() < runs[0][:20].mean()
    assert not torch.equal(task.instances(3, 1).params[0], task.instances(3, 2).params[0]) or "quadratic" in task.name


def test_stacked_baseline_equals_separate_optimizers():
    task = task_of(MLPConfig(hidden=(5,), batch_size=16))
    together = rollout(BASELINES["adam"].solver(0.01, 30), task.instances(3, seed=0), 30)
    instances = task.instances(3, seed=0)
    params = [nn.Parameter(row.clone()) for row in instances.params]
    optimizers = [torch.optim.Adam([p], lr=0.01) for p in params]
    for step in range(30):
        losses, grads = instances.value_and_grad(torch.stack([p.detach() for p in params]))
        torch.testing.assert_close(together[step], losses, rtol=1e-4, atol=1e-5)
        for p, g, optimizer in zip(params, grads, optimizers, strict=True):
            p.grad = g
            optimizer.step()


def test_meta_training_learns_quadratics(tmp_path):
    trainer = Trainer(load_preset("quadratics", ["epochs=30", "lr=0.01"]), tmp_path / "run")
    first = trainer.validate()
    trainer.run()
    assert trainer.best < 0.7 * first
    rule = load_rule(tmp_path / "run" / "rule.safetensors")
    assert rule.config.horizon == 100
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 31))
    assert (tmp_path / "run" / "learning-curve.png").read_bytes()[:4] == b"\x89PNG"
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_koopman_loss_falls_in_meta_training(tmp_path):
    config = dataclasses.replace(
        load_preset("quadratics", ["epochs=40", "horizon=40", "batch=4", "lr=0.01"]),
        rule=LSTMConfig(context=KAEConfig(window=8)),
    )
    trainer = Trainer(config, tmp_path / "run")
    losses = [trainer.train_epoch().objectives["koopman_loss"] for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_same_seed_same_rule_and_resume_continues(tmp_path):
    def run(folder, epochs, resume=False, seed=3):
        config = load_preset("demo", [*TINY_DIGITS, f"seed={seed}", f"epochs={epochs}"])
        return Trainer(config, tmp_path / folder, resume=resume)

    a, b, other = (run(name, 4, seed=seed).run().read_bytes() for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert a == b
    assert a != other
    stopped = run("d", 4)
    stopped.validate()
    (tmp_path / "d").mkdir()
    for _ in range(2):
        stopped.train_epoch()
    stopped._save()
    stopped.train_epoch()  # past the checkpoint, as a kill would leave it
    assert run("d", 4, resume=True).run().read_bytes() == a


SILENT = {
    "placebo": PlaceboConfig(width=4),
    "flag": FlagConfig(window=20),
    "dmd": DMDConfig(window=20, rank=1),
    "dmd of gradients, sketched": DMDConfig(window=20, rank=1, snapshots="gradient", sketch=16),
    "dmd of losses": DMDConfig(window=11, rank=1, snapshots="loss", delay=10),
}
"""Contexts that say nothing within 20 steps."""


@pytest.mark.parametrize("fused", [True, False])
def test_a_silent_context_is_meta_trained_as_none_at_all(tmp_path, monkeypatch, fused):
    """Bit for bit, and its weights stay as they were drawn: an ablation compares contexts and nothing else."""
    if not fused:
        monkeypatch.setattr("l2o_training.fused.lstm.choose_shape", None)

    def train(context):
        config = load_preset("demo", TINY_DIGITS)
        trainer = Trainer(dataclasses.replace(config, rule=dataclasses.replace(config.rule, context=context)), tmp_path)
        before = {key: value.clone() for key, value in trainer.rule.state_dict().items()}
        for _ in range(2):
            trainer.train_epoch()
        return before, trainer.rule.state_dict()

    initial, expected = train(NoneConfig())
    assert not any(torch.equal(initial[name], value) for name, value in expected.items() if value.numel())
    for kind, context in SILENT.items():
        before, after = train(context)
        assert torch.equal(after.pop("cell.weight_context"), before["cell.weight_context"]), kind
        for name, value in after.items():
            assert torch.equal(value, expected[name]), f"{kind}: {name}"
    _, loud = train(DMDConfig(window=5, rank=1))
    assert not torch.equal(loud["cell.bias.0"], expected["cell.bias.0"]), "a context that speaks is seen"


def test_killed_run_resumes_to_the_same_rule(tmp_path):
    settings = [f"--set={x}" for x in [*TINY_DIGITS, "epochs=6"]]

    def train(folder, *more):
        return ["train", "--preset", "demo", "--threads", "1", *settings, "--out", str(tmp_path / folder), *more]

    assert CliRunner().invoke(app, train("whole")).exit_code == 0
    command = [sys.executable, "-m", "l2o_cli", *train("killed")]
    victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while victim.poll() is None and not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 2):
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert CliRunner().invoke(app, train("killed", "--resume")).exit_code == 0
    whole, killed = (tmp_path / name / "rule.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()


def test_lanes_in_the_middle_of_a_horizon_resume_bit_for_bit(tmp_path):
    """Two tasks of different horizons side by side, sampled and rescaled; stopped after an epoch, then resumed."""
    config = load_preset(
        "demo",
        ["epochs=3", "validate_every=1", "validation_runs=1", "horizon=40", "unroll=10", "shortest=10", "seed=3"],
    )
    tasks = (MLPConfig(hidden=(4,), batch_size=8, norm="batch"), QuadraticConfig(size=30))
    config = dataclasses.replace(
        config, tasks=tasks, lanes=3, batch=2, sample=0.5, rescale=1.0, objective="log_loss", tail=0.1, final_lr=1e-4
    )
    whole = Trainer(config, tmp_path / "whole").run()
    trainer = Trainer(config, tmp_path / "parts")
    trainer.validate()
    trainer.train_epoch()
    assert any(0 < slot.done < slot.episode.horizon for slot in trainer.slots)
    trainer.out.mkdir()
    trainer._save()
    resumed = Trainer(config, tmp_path / "parts", resume=True)
    moved = 0
    for before, after in zip(trainer.slots, resumed.slots, strict=True):
        for inner, again in zip(before.inners if before.under_way else [], after.inners, strict=True):
            assert torch.equal(inner.statistics, again.statistics)
            assert torch.equal(inner.mean_statistics, again.mean_statistics)
            moved += not torch.equal(inner.statistics, inner.instances.statistics)
    assert moved, "else no running statistics were kept"
    assert resumed.run().read_bytes() == whole.read_bytes()


def test_the_mean_goes_on_from_truncation_to_truncation():
    """The mean of all parameters (a tail of 1): over steps done four at a time as over the steps of one truncation."""
    rule, task = Descent(make_rule(RULES["none-log_sign"])), task_of(QuadraticConfig(size=5))
    tail = loss_objectives(tail=1.0)
    whole, parts = (begin(rule, task.instances(2, seed=0)) for _ in range(2))
    expected = unroll(rule, whole, 8, tail).mean_losses
    theta, got = [parts.params], []
    for _ in range(2):
        got.append(unroll(rule, parts, 4, tail).mean_losses)
    torch.testing.assert_close(torch.cat(got), expected)
    stepped = begin(rule, task.instances(2, seed=0))
    for _ in range(8):
        unroll(rule, stepped, 1)
        theta.append(stepped.params)
    torch.testing.assert_close(parts.mean, torch.stack(theta).mean(0))


STARTED = ["start=moments", "rule.kind=moments", "rule.context={kind='none'}"]
STARTED += ["rule.output_scale=0.01", "rule.layers=1", *TINY, "validate_every=1"]


def test_meta_training_starts_from_a_rule_and_keeps_the_average_of_its_weights(tmp_path):
    config = load_preset("demo", [*STARTED, "average=0.75"])
    trainer = Trainer(config, tmp_path / "run")
    bundled, provenance = read_rule("moments")
    expected = {key: value.clone() for key, value in bundled.state_dict().items()}
    assert all(torch.equal(value, expected[key]) for key, value in trainer.rule.state_dict().items())
    update, updates = trainer.learner.update, 0

    def outer_update(gradient):
        nonlocal updates
        taken = update(gradient)
        for key, value in trainer.rule.state_dict().items():
            expected[key] = value.clone() if updates == 0 else torch.lerp(expected[key], value, 0.25)
        updates += 1
        return taken

    trainer.learner.update = outer_update
    trainer.validate()
    for _ in range(2):
        trainer.train_epoch()
    assert updates == 4
    for key, value in trainer.learner.candidate.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7)
        assert not torch.equal(value, trainer.rule.state_dict()[key]) or not value.any()
    trainer.out.mkdir()
    trainer._save()
    resumed = Trainer(config, tmp_path / "run", resume=True)
    whole = Trainer(config, tmp_path / "whole")
    assert resumed.run().read_bytes() == whole.run().read_bytes()
    assert read_rule(tmp_path / "run" / "rule.safetensors")[1]["start"] == provenance


def test_a_rule_of_another_architecture_is_no_start(tmp_path):
    with pytest.raises(ConfigError, match=r"start: moments is moments, 1 × 20.*this run's rule is moments, 1 × 8"):
        Trainer(load_preset("demo", [*STARTED, "rule.hidden=8"]), tmp_path)
    with pytest.raises(ArtifactError, match="nowhere"):
        Trainer(load_preset("demo", [*STARTED, "start=nowhere.safetensors"]), tmp_path)


def test_a_start_may_have_less_than_the_rule_but_not_more(tmp_path):
    """Sizes by place begin as if there were none; a rule without them does not take over one that has some."""
    tiny, places = [*TINY, "rule.kind=directional", "rule.context={kind='none'}"], "rule.places=true"
    begun = Trainer(load_preset("demo", [*tiny, "start=default", places]), tmp_path).rule
    assert begun.places.tolist() == [0.0] * 4
    for key, value in read_rule("default")[0].state_dict().items():
        assert torch.equal(begun.state_dict()[key], value)
    nn.init.normal_(begun.places)
    path = tmp_path / "placed.safetensors"
    save_rule(path, begun)
    placed = [*tiny, f"start={json.dumps(str(path))}"]
    assert torch.equal(Trainer(load_preset("demo", [*placed, places]), tmp_path).rule.places, begun.places)
    with pytest.raises(ConfigError, match=r"placed.safetensors has places, which this run's rule has not: set"):
        Trainer(load_preset("demo", placed), tmp_path)


def test_zoomed_images_have_every_pixel_repeated():
    config = MLPConfig(hidden=(3,), batch_size=5, gain=-0.5, shift=0.75, zoom=2)
    instances = task_of(config).instances(1, seed=0)
    shapes = [(3, 256), (3,), (10, 3), (10,)]
    w1, b1, w2, b2 = (x.view(s) for x, s in zip(instances.params[0].split([768, 3, 30, 10]), shapes, strict=True))
    images, labels = instances._batches()
    larger = images[0].repeat_interleave(2, -1).repeat_interleave(2, -2).flatten(1)
    expected = F.cross_entropy(F.linear(F.linear(larger, w1, b1).sigmoid(), w2, b2), labels[0])
    torch.testing.assert_close(task_of(config).instances(1, seed=0).value_and_grad(instances.params)[0][0], expected)


@pytest.mark.parametrize(("name", "tail"), [("dmd-exact-normalized", None), ("none-scale", None), ("none-scale", 0.2)])
def test_a_sampled_meta_gradient_is_right_on_average(name, tail):
    rule, task = make_rule(RULES[name]).requires_grad_(), task_of(QuadraticConfig(size=12))
    solver, objectives = Descent(rule), loss_objectives("log_loss", tail)

    begun = begin(solver, task.instances(2, seed=3))
    unroll(solver, begun, 8, objectives)  # in the middle of things

    def meta_gradient(sample):
        inner = copy.deepcopy(begun)
        stepper = sample and Sampling(solver, Sample.draw(inner.grad, 0.5, sample))
        objective = unroll(solver, inner, 4, objectives, stepper=stepper).objective
        return torch.cat([g.flatten() for g in torch.autograd.grad(objective, list(rule.parameters()))])

    exact = meta_gradient(None)
    rng = torch.Generator().manual_seed(0)
    samples = torch.stack([meta_gradient(rng) for _ in range(200)])
    error = (samples.mean(0) - exact).norm()
    expected = samples.std(0).norm() / math.sqrt(len(samples))
    assert error < 2 * expected
    assert expected < 0.2 * exact.norm()


RESCALED = {
    "instances": {"rescale": 1.0},
    "tensors": {"rescale": 1.0, "rescale_tensors": 2.0},
    "coordinates": {"rescale_coordinates": 3.0},
}


@pytest.mark.parametrize("kind", RESCALED)
def test_rescaled_instances_are_the_same_problem_in_other_units(kind):
    config = dataclasses.replace(
        load_preset("demo"), tasks=(MLPConfig(hidden=(3,), batch_size=4),), batch=2, **RESCALED[kind]
    )
    task = task_of(config.tasks[0])
    slot = TaskSlot(config, make_curriculum(config), [task], 0)
    slot.tick()
    (inner,) = slot.begun(Descent(make_rule(LSTMConfig(hidden=2, layers=1))))
    other, instances = inner.instances, task.instances(2, slot.episode.seed)
    factor = instances.params / other.params
    spread = [part.std(-1).max() for part in factor.log().split([shape.numel() for shape in instances.shapes], 1)]
    assert factor.log().abs().max() <= sum(RESCALED[kind].values()) + 1e-4
    assert (max(spread) > 0.5) == (kind == "coordinates"), "within a tensor"
    if kind == "coordinates":
        for theta, log in zip(instances.params, factor.log(), strict=True):
            assert abs(torch.corrcoef(torch.stack([theta, log]))[0, 1]) < 0.3, "scales know nothing of weights"
    theta = torch.randn_like(instances.params)
    other.rng.set_state(instances.rng.get_state())
    (loss, grad), (same, scaled) = instances.value_and_grad(theta), other.value_and_grad(theta / factor)
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close(scaled, grad * factor, rtol=1e-4, atol=1e-6)


def test_run_folders_are_guarded(tmp_path):
    def trainer(*more, **options):
        return Trainer(load_preset("demo", [*TINY_DIGITS, *more]), tmp_path / "run", **options)

    with pytest.raises(RunError, match="no run to resume"):
        trainer(resume=True)
    trainer("epochs=1").run()
    with pytest.raises(RunError, match="add --resume"):
        trainer("epochs=1")
    from filelock import FileLock

    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(RunError, match="another run"):
        trainer("epochs=1", resume=True).run()
    (tmp_path / "run" / "checkpoint.pt").touch()
    with pytest.raises(RunError, match="older version"):
        trainer("epochs=1", resume=True)


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid(name):
    config = load_preset(name)
    assert config.description
    plain = {k: v for k, v in to_dict(config).items() if k != "tasks"}
    assert plain["horizon"] == config.trained_rule.horizon


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epoch=3", "did you mean epochs"),
        ("epochs", "expected key=value"),
        ("epochs=many", "epochs: expected int"),
        ("rule.context.window=200", "window: 200 is larger than the horizon"),
        ("rule.context.rank=30", "rank"),
        ("unroll=30", "must divide the horizon"),
        ("epochs.x=1", "not a table"),
        ("average=1", "average: must be in"),
        ('tasks=[{kind="mlp", zoom=9}]', "zoom: must be in 1..8"),
    ],
)
def test_bad_overrides_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_preset("demo", [override])


@pytest.mark.parametrize("overrides", [["kind=kae", "window=30"], ["window=30", "kind=kae"]])
def test_another_kind_leaves_nothing_of_the_former_ones_keys(overrides):
    context = load_preset("demo", [f"rule.context.{override}" for override in overrides]).rule.context
    assert context == KAEConfig(window=30)
    same = load_preset("demo", ["rule.context.kind=dmd"])
    assert same == load_preset("demo"), "nothing is lost where the kind stays"


def test_a_preset_has_all_of_another_but_what_it_has_itself(tmp_path):
    (tmp_path / "mine.toml").write_text('include = "quadratics"\nepochs = 7\n[rule]\nkind = "plain"\n')
    mine, other = load_preset(f"{tmp_path}/mine.toml", ["lr=0.5"]), load_preset("quadratics")
    assert mine == dataclasses.replace(other, epochs=7, lr=0.5, rule=PlainConfig())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("include = 3", "expected a preset, got 3"),
        ('include = "nothing"', "no preset 'nothing'"),
        ('include = "HERE"', "HERE includes HERE"),
    ],
)
def test_a_preset_that_cannot_be_included_is_told(content, message, tmp_path):
    path = f"{tmp_path}/mine.toml"
    Path(path).write_text(content.replace("HERE", path))
    with pytest.raises(ConfigError, match=re.escape(message.replace("HERE", path))):
        load_preset(path)


def test_unknown_presets_name_the_near_ones():
    with pytest.raises(ConfigError, match="mnist-dmd"):
        load_preset("mnist-dmdd")


def test_gain_and_shift_are_of_images_from_0_to_1(tmp_path):
    x, y = np.array([0, 255], dtype=np.uint8).repeat(4).reshape(2, 2, 2), np.array([0, 1])
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y)
    config = MLPConfig(data="mine.npz", hidden=(2,), gain=3.0, shift=-0.5)
    task = make_task(config, lambda name: load_dataset(name, tmp_path), CPU)
    images, _ = task.draw((1, 64), torch.Generator().manual_seed(0))
    assert set(images.unique().tolist()) == {-0.5, 2.5}


def test_validation_shares_no_instance_with_comparisons():
    """PyTorch's CPU generator reads 32 bits of a seed."""
    task = task_of(MLPConfig(hidden=(2,)))
    assert torch.equal(task.instances(2, 5).params, task.instances(2, 2**32 + 5).params), "else the rest tells nothing"
    assert not torch.equal(task.instances(2, 5).params, task.instances(2, VALIDATION_SEED + 5).params)


def test_updates_that_are_dropped_are_told(tmp_path):
    trainer = Trainer(TrainConfig(tasks=(QuadraticConfig(size=3),), horizon=20, unroll=10), tmp_path / "run")
    assert trainer.train_epoch().dropped is None
    gradients, right = iter([torch.nan, 1.0]), trainer.meta_gradient
    trainer.meta_gradient = lambda: (right()[0] * next(gradients), torch.zeros(1))
    assert trainer.train_epoch().dropped == 1
    assert [row.get("dropped") for row in trainer.history] == [None, 1]


@pytest.mark.parametrize("estimator", ["tbptt", "es", "pes", "mixed"])
def test_an_optimization_that_is_lost_costs_one_update(tmp_path, estimator):
    """The others go on, and so does its slot, with the next episode."""
    config = TrainConfig(
        tasks=(QuadraticConfig(size=3),), horizon=100, unroll=10, lanes=2, batch=2, epochs=2, estimator=estimator
    )
    trainer = Trainer(config, tmp_path / "run")
    assert trainer.meta_gradient()[0].isfinite().all()
    lost, other = trainer.slots
    lost.inners[0].params[0] = torch.nan
    lost.inners[0].loss[0] = torch.nan
    assert not trainer.meta_gradient()[0].isfinite().all()
    assert [slot.under_way for slot in trainer.slots] == [False, True]
    assert not lost.state_dict(), "nothing of it is kept"
    gradient, record = trainer.meta_gradient()
    assert gradient.isfinite().all()
    assert record.isfinite().all()
    assert (lost.number, lost.done) == (2, 10)
    assert (other.number, other.done) == (1, 30)
    assert all(inner.params.isfinite().all() for slot in trainer.slots for inner in slot.inners)


def test_a_finished_rule_keeps_its_versions_and_its_place(tmp_path, monkeypatch):
    config = TrainConfig(tasks=(QuadraticConfig(size=3),), horizon=20, epochs=1)
    path = Trainer(config, tmp_path / "run").run()
    before = path.read_bytes()
    monkeypatch.setattr("l2o_training.meta.provenance.versions", lambda: {"torch": "9.9"})
    assert Trainer(config, tmp_path / "run", resume=True).run().read_bytes() == before
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    for resume in (False, True):
        with pytest.raises(RunError, match="is there without a checkpoint"):
            Trainer(config, tmp_path / "run", resume=resume)


def test_what_another_run_wrote_meanwhile_is_not_overwritten(tmp_path):
    config = TrainConfig(tasks=(QuadraticConfig(size=3),), horizon=20, epochs=1)
    late = Trainer(config, tmp_path / "run")
    before = Trainer(config, tmp_path / "run").run().read_bytes()
    with pytest.raises(RunError, match="was written by another run just now"):
        late.run()
    assert (tmp_path / "run" / "rule.safetensors").read_bytes() == before


def short(*settings):
    return load_preset("demo", [*TINY_DIGITS, "epochs=5", *settings])


@pytest.mark.parametrize(("done", "goes_on_after"), [(5, 4), (3, 2)])
def test_a_run_that_is_extended_equals_one_that_was_begun_longer(tmp_path, done, goes_on_after):
    """Also where it had ended, with a validation that the longer run has not, and that may be the best."""

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.epoch == done < 5:
            raise Stop

    longer = dataclasses.replace(short(), epochs=9)
    whole, run = tmp_path / "whole", tmp_path / "run"
    Trainer(longer, whole).run()
    with contextlib.suppress(Stop):
        Trainer(short(), run).run(stop)
    extended = Trainer(longer, run, resume=True)
    assert extended.epoch == goes_on_after
    extended.run()
    for name in ("rule.safetensors", "config.json", "learning-curve.png"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert scalars(run) == scalars(whole)
    rows = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (run, whole)]
    for row in rows[0] + rows[1]:
        del row["seconds"]
    assert rows[0] == rows[1]
    assert checkpoints.find(run).keys() == checkpoints.find(whole).keys()
    state, expected = (checkpoints.flatten(checkpoints.read(checkpoints.find(path)[9])[0]) for path in (run, whole))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def scalars(folder):
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_a_rule_of_fewer_epochs_does_not_stay_though_no_later_one_is_better(tmp_path, monkeypatch):
    monkeypatch.setattr("l2o_training.meta.validation.Validation.score", lambda self, rule: 1.0)
    for epochs in (5, 7):
        path = Trainer(short(f"epochs={epochs}"), tmp_path, resume=epochs == 7).run()
        assert read_rule(path)[1]["config"]["epochs"] == epochs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["epochs=4"], r"epochs: 5 there, 4 here \(only epochs may differ, and only grow\)"),
        (["epochs=9", "lr=0.5"], r"epochs: 5 there, 9 here; lr: 0.0.* there, 0.5 here \(only epochs may"),
        (["final_lr=0.1"], r"final_lr: 0.001 there, 0.1 here"),
        (["epochs=9"], r"epochs: 5 there, 9 here \(with final_lr, the learning rate"),
        (["rule.context.kind=flag"], r'kind: "dmd" there, "flag" here.*rule.context.rank: 1 there, nothing here'),
    ],
)
def test_another_configuration_is_told_key_by_key(tmp_path, settings, message):
    begun = Trainer(short("final_lr=0.001"), tmp_path)
    begun.validate()
    begun._save()
    with pytest.raises(RunError, match=message):
        Trainer(short("final_lr=0.001", *settings), tmp_path, resume=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_revision_is_not_that_of_the_project_around(tmp_path, monkeypatch):
    package = tmp_path / "package.py"
    package.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(package))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init"], ["commit", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    assert provenance.git_revision() == ""
    for words in (["add", "package.py"], ["commit", "-m", "y"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    assert len(provenance.git_revision()) >= 7


def test_npz_files_of_ones_own(tmp_path):
    x, y = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4), np.arange(6) % 3
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y)
    data = load_dataset("mine.npz", tmp_path)
    assert data.shape == (1, 4, 4)
    assert data.classes == 3
    images, labels = data.batch(torch.tensor([1]))
    torch.testing.assert_close(images[0, 0], torch.tensor(x[1] / 255, dtype=torch.float32))
    assert labels.item() == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": np.zeros((3, 2, 2))}, "lacks y_train"),
        ({"x_train": np.zeros((3, 2, 2)), "y_train": np.arange(4)}, "x_train has 3 rows, y_train 4"),
        ({"x_train": np.zeros(3), "y_train": np.arange(3)}, r"x_train is \(3,\); expected"),
        ({"x_train": np.zeros((0, 4)), "y_train": np.zeros(0, int)}, r"x_train is \(0, 4\); expected"),
        ({"x_train": np.zeros((3, 0)), "y_train": np.arange(3)}, r"x_train is \(3, 0\); expected"),
        ({"x_train": np.zeros((9, 3, 32, 32)), "y_train": np.arange(9)}, "channels come last"),
        ({"x_train": np.zeros((3, 2, 2), int), "y_train": np.arange(3)}, "x_train must be uint8.*got int64"),
        ({"x_train": np.array([["1.5", "2"]] * 3), "y_train": np.arange(3)}, "x_train must be uint8.*got <U3"),
        ({"x_train": np.array([[1, 2], [3, np.nan]]), "y_train": np.arange(2)}, r"1 of 4 values .*first at \[1, 1\]"),
        ({"x_train": np.array([[-np.inf], [1e300]]), "y_train": np.arange(2)}, r"2 of 2 values .*first at \[0, 0\]"),
        ({"x_train": np.zeros((3, 2)), "y_train": np.arange(3.0)}, "y_train must be integers.*got float64.*np.unique"),
        ({"x_train": np.zeros((3, 2)), "y_train": np.array(["cat", "dog", "cat"])}, "y_train.*got <U3.*np.unique"),
        ({"x_train": np.zeros((2, 2)), "y_train": np.array([True, False])}, "y_train must be integers.*got bool"),
        ({"x_train": np.zeros((3, 2)), "y_train": np.array([-1, 0, 1])}, "y_train .*got 3, from -1 to 1"),
        ({"x_train": np.zeros((3, 2)), "y_train": np.array([1, 2, 3])}, "y_train .*got 3, from 1 to 3"),
        ({"x_train": np.zeros((3, 2)), "y_train": np.array([0, 2, 10**12])}, "y_train .*got 3, from 0 to 10"),
        ({"x_train": np.zeros((3, 2)), "y_train": np.zeros(3, int)}, "y_train must have 2 classes"),
        ({"x_train": np.zeros((3, 2)), "y_train": np.eye(3, dtype=int)}, r"y_train is \(3, 3\); .*argmax"),
        ({"x_train": np.zeros((3, 2)), "y_train": np.int64(3)}, r"y_train is \(\); expected"),
        ({"x_train": np.array([object()]), "y_train": np.arange(1)}, "x_train holds Python objects"),
        ({"x_train": np.zeros((2, 2)), "y_train": np.array(["a", None])}, "y_train holds Python objects"),
    ],
)
def test_npz_files_of_the_wrong_kind_are_told_what_is_wrong(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message) as told:
        read_npz(tmp_path / "bad.npz")
    assert str(told.value).startswith(str(tmp_path / "bad.npz"))


@pytest.mark.parametrize("content", ["npy", "cut", "flipped"])
def test_damaged_npz_files_are_named(tmp_path, content):
    path = tmp_path / "mine.npz"
    x, y = np.zeros((40, 8, 8), dtype=np.uint8), np.arange(40)
    if content == "npy":
        with path.open("wb") as file:
            np.save(file, x)
    else:
        np.savez_compressed(path, x_train=x, y_train=y)
        whole = path.read_bytes()
        middle = whole.index(b"x_train.npy") + 40
        flipped = whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 20]) + whole[middle + 20 :]
        path.write_bytes(whole[:-30] if content == "cut" else flipped)
    with pytest.raises(DataError, match=r"mine\.npz"):
        read_npz(path)


@pytest.mark.parametrize("damage", ["labels of others", "no labels", "no header"])
def test_damaged_torchvision_files_are_named(tmp_path, damage):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    count = 3 if damage == "no labels" else 4
    labels = bytes([200] * count if damage == "labels of others" else [1] * count)
    header = b"\0" * 4 if damage == "no header" else struct.pack(">4B3I", 0, 0, 8, 3, 4, 28, 28)
    files = {
        "train-images-idx3-ubyte": header + bytes(4 * 28 * 28),
        "train-labels-idx1-ubyte": struct.pack(">4BI", 0, 0, 8, 1, count) + labels,
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (folder / name).write_bytes(b"")
    with pytest.raises(DataError, match="add --download"):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_missing_data_names_the_folder_and_the_flag(tmp_path, name):
    with pytest.raises(DataError, match=rf"{tmp_path.name}.*--download"):
        load_dataset(name, tmp_path)


REAL = {"mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


@pytest.mark.parametrize(("name", "shape"), REAL.items())
def test_real_data_is_read(data_root, name, shape):
    data = load_dataset(name, data_root)
    assert data.shape == shape
    assert data.classes == 10
    assert len(data.images) == len(data.labels) >= 10_000


class Pushing(LSTMRule):
    """Gradient descent that pushes parameters, as well."""

    push: torch.Tensor

    def forward(self, params, grad, loss, coordinates, optimization, layout=None):
        return self.push - 0.3 * grad, coordinates, optimization


@pytest.mark.parametrize("tail", [None, 0.1])
@pytest.mark.parametrize("kind", [MLPConfig, ConvConfig])
def test_biases_in_front_of_batch_norm_that_run_away_are_seen(kind, tail):
    """In training mode they change nothing; meta-validation and `l2o eval` score in evaluation mode."""
    widths = {"hidden": (8,)} if kind is MLPConfig else {"channels": (4,)}
    task = task_of(kind(data="digits", norm="batch", activation="relu", batch_size=16, **widths))
    weight, bias, *_ = task.instances(1, 0).shapes
    still, rule = torch.zeros_like(task.instances(1, 0).params[0]), Pushing(LSTMConfig(hidden=3, layers=1))
    moving = still.clone()
    moving[weight.numel() :][: bias.numel()] = 1.0
    config = TrainConfig(horizon=60, unroll=10, validation_runs=2, tail=tail)
    solver, losses, scores, ends = Descent(rule), [], [], []
    for rule.push in (still, moving):
        with torch.no_grad():
            losses.append(unroll(solver, begin(solver, task.instances(2, 0)), 60, loss_objectives(tail=tail)).losses)
        validation = Validation(config, config.horizon, [task], ALONE, CPU)
        scores.append(validation.score(validation.losses(solver)))
        ends.append(rollout(solver, task.instances(2, 0), 60)[-10:].mean())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)
    assert scores[1] > 1.5 * scores[0]
    assert ends[1] > 2 * ends[0]


def test_the_default_configuration_is_valid():
    assert TrainConfig().horizon % TrainConfig().unroll == 0


def test_validation_tasks_decide_which_rule_is_the_best(tmp_path):
    """The score is that of these tasks alone, whatever is meta-trained on."""
    judge = QuadraticConfig(size=3)
    config = TrainConfig(tasks=(QuadraticConfig(size=5),), horizon=20, validation_runs=4, validation_tasks=(judge,))
    other = dataclasses.replace(config, tasks=(judge,), validation_tasks=())
    score, expected, plain = (
        Trainer(each, tmp_path / name).validate()
        for name, each in {"a": config, "b": other, "c": dataclasses.replace(config, validation_tasks=())}.items()
    )
    assert score == expected != plain


@pytest.mark.parametrize("changes", [{}, {"objective": "log_loss", "tail": 0.1}])
def test_adam_stands_beside_the_rule_on_the_same_instances(tmp_path, changes):
    config = dataclasses.replace(
        load_preset("demo", [*TINY_DIGITS, "epochs=2"]), tasks=(QuadraticConfig(), MLPConfig(hidden=(4,))), **changes
    )
    trainer = Trainer(config, tmp_path)
    path = trainer.run()
    found = trainer.adam
    ends = found["ends"]
    assert read_rule(path)[1]["adam"] == {"lr": found["lr"], "loss": found["loss"]}
    scores = {}
    for lr in RATES:  # θ after each of T steps, on the minibatches that the rule sees
        losses = [
            rollout(BASELINES["adam"].solver(lr, 21), task.instances(2, VALIDATION_SEED + config.seed + index), 21)[1:]
            for index, task in enumerate(trainer.tasks)
        ]
        scores[lr] = torch.stack(losses).double().mean().item(), [each[-2:].double().mean().item() for each in losses]
    if not changes:
        best = min(scores, key=scores.get)
        loss, expected = scores[best]
        assert found == {"lr": best, "loss": pytest.approx(loss, rel=1e-5), "ends": ends}
        assert ends == pytest.approx(expected, rel=1e-5)
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "other" / "checkpoints")
    resumed = Trainer(config, tmp_path / "other", resume=True)
    resumed.validation.beside = None  # it is kept
    resumed.run()
    assert resumed.adam == found


def test_the_end_says_what_the_loss_is_and_what_comes_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["train", "--preset=demo", "--out=a run", *(f"--set={x}" for x in [*TINY_DIGITS, "epochs=1"])]
    first = CliRunner().invoke(app, line)
    again = CliRunner().invoke(app, [*line, "--resume"])
    for result in (first, again):
        assert re.fullmatch(
            r"a run/rule\.safetensors\nloss over 20 steps on 2 fresh instances of each task: \d\.\d+\n"
            r"Adam at its best rate, 0\.\d+: \d\.\d+; the rule's is \d\.\d\d of it\n",
            result.stdout,
        )
        assert "mean over tasks and steps; Adam on the same instances, at the best rate of 0.0003," in result.stderr
        assert "next: l2o eval 'a run/rule.safetensors'\n" in result.stderr
        assert "rule='a run/rule.safetensors')" in result.stderr
    assert first.stdout == again.stdout


def test_validation_is_of_the_mean_over_runs(tmp_path):
    """With log-losses too: a run that goes wrong counts in full; tasks and steps are averaged by their logarithms."""
    tasks = (QuadraticConfig(size=3), QuadraticConfig(size=5))
    config = TrainConfig(tasks=tasks, horizon=20, validation_runs=4, objective="log_loss", tail=0.1)
    trainer = Trainer(config, tmp_path / "run")
    logs = []
    for index, task in enumerate(trainer.tasks):
        solver = trainer.learner.solver
        inner = begin(solver, task.instances(4, VALIDATION_SEED + index))
        with torch.no_grad():
            trace = unroll(solver, inner, 20, loss_objectives(tail=0.1))
        assert trace.mean_losses is not None
        logs += [losses.double().mean(1).log().mean() for losses in (trace.losses, trace.mean_losses)]
    assert trainer.validate() == pytest.approx(float(torch.stack(logs).mean().exp()), rel=1e-9)
