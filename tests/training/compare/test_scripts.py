"""Training scripts: deterministic, trainable, as people write them; and the loop that trains them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from comparing import BASELINES, pushing, run, script_of, scripts

from l2o_runtime import LearnedOptimizer
from l2o_training.bench.memory import state_bytes
from l2o_training.compare import contenders, statistics
from l2o_training.compare.scripts import tracking, validate_by_batches
from l2o_training.compare.workloads import looks
from l2o_training.tasks.data import Datasets
from l2o_training.tasks.networks import CharGRU, CharTransformer
from l2o_training.tasks.scripts import RECIPES, everyday
from l2o_training.tasks.scripts.everyday import networks

pytestmark = pytest.mark.slow

SMALL = RECIPES | everyday.RECIPES
Languages = CharTransformer | CharGRU | networks.CharLSTM | networks.Decoder


@pytest.mark.parametrize("name", SMALL)
def test_scripts_are_deterministic_and_trainable(name):
    script = script_of(name)
    lr = {"least-squares": 0.1, "logistic": 0.1}.get(name, 0.01)
    slow = {"matrix-factorisation": 100, "word-vectors": 100, "diabetes": 100, "bandit": 200, "units": 400}
    first, second = (run(script, BASELINES["adam"], lr, 3, slow.get(name, 25)) for _ in range(2))
    assert first == second
    assert first.train[:3] != run(script, BASELINES["adam"], lr, 4, 3).train, "another seed"
    assert np.mean(first.train[-5:]) < 0.995 * np.mean(first.train[:5])
    assert all(map(math.isfinite, first.validation))
    assert (4 if name == "oscillation" else 30) <= first.parameters <= (110_000 if name in RECIPES else 830_000)
    assert script_of(name).train[0].equal(script.train[0])


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient_and_validation_leaves_no_trace(name):
    script = script_of(name)
    torch.manual_seed(0)
    model = script.make_model()
    script.loss(model, next(script.batches(0))).backward()
    silent = [key for key, param in model.named_parameters() if param.grad is None or not param.grad.any()]
    assert silent == []
    # A run that looks at the validation loss takes the same steps as one that does not.
    found = run(script, BASELINES["adam"], 1e-3, 0, 4)
    other = replace(script, validation=tuple(tensor[: 2 * script.batch_size] for tensor in script.train))
    assert found.train == run(other, BASELINES["adam"], 1e-3, 0, 4).train


@pytest.mark.parametrize("name", SMALL)
def test_no_example_is_trained_and_validated_on(name):
    script = script_of(name)
    train_rows, validation_rows = (
        {row.numpy().tobytes() for row in parts[0].flatten(1)} for parts in (script.train, script.validation)
    )
    if name == "matrix-factorisation":  # the same pair may be rated twice, with other noise
        train_rows, validation_rows = ({float(x) for x in parts[1]} for parts in (script.train, script.validation))
        assert len(train_rows & validation_rows) < 10
    elif not isinstance(script.make_model(), Languages | networks.NGrams):  # a short piece may come twice
        assert not train_rows & validation_rows
    assert len(script.train[0]) >= script.batch_size
    assert {len(tensor) for tensor in script.train} == {len(script.train[0])}


def test_an_epoch_shows_every_example_once():
    script = script_of("least-squares")
    batches = script.batches(0)
    epoch = [next(batches)[1] for _ in range(len(script.train[0]) // script.batch_size)]
    seen = torch.cat(epoch).sort().values
    assert len(seen) == len(seen.unique())
    assert not next(batches)[1].equal(epoch[0])


@pytest.mark.parametrize("kind", ["adam", "adamw-cosine", "default"])
def test_the_loop_is_the_one_that_a_script_would_write(kind):
    script, steps, lr = script_of("vae"), 12, 0.003
    contender = contenders.rules(["default"])[0] if kind == "default" else BASELINES[kind]
    torch.manual_seed(5)
    model, expected = script.make_model(), []
    if kind == "default":
        optimizer = LearnedOptimizer(model.parameters())
    else:
        optimizer = (torch.optim.Adam if kind == "adam" else torch.optim.AdamW)(model.parameters(), lr=lr)
    for step, batch in zip(range(steps), script.batches(5), strict=False):
        if kind == "adamw-cosine":
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss = script.loss(model, batch)
        loss.backward()
        optimizer.step(**({"loss": loss} if kind == "default" else {}))
        expected.append(loss.item())
    found = run(script, contender, 1.0 if kind == "default" else lr, 5, steps)
    np.testing.assert_allclose(found.train, expected, rtol=1e-5 if kind == "adamw-cosine" else 0)
    assert found.state_bytes == state_bytes(optimizer) / found.parameters
    assert (found.state_bytes > 10) == (kind == "default")


def test_networks_are_as_people_write_them():
    kinds = [type(layer) for layer in script_of("convnet-batchnorm").make_model()]
    assert kinds == 2 * [torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.ReLU] + [torch.nn.Flatten, torch.nn.Linear]
    biases = [name for name, _ in script_of("convnet-batchnorm").make_model().named_parameters() if "bias" in name]
    assert biases == ["0.bias", "1.bias", "3.bias", "4.bias", "7.bias"]
    for name in RECIPES:
        for layer in script_of(name).make_model().modules():
            assert getattr(layer, "track_running_stats", True), name


def test_biases_in_front_of_batch_norm_that_run_away_are_seen():
    """They change nothing in training mode, so that only running statistics tell."""
    script = script_of("convnet-batchnorm")
    still, moving = (run(script, contender, 1e-3, 0, 60) for contender in (BASELINES["adam-0.001"], pushing()))
    np.testing.assert_allclose(moving.train, still.train, rtol=0.05)
    np.testing.assert_allclose(moving.batch_validation, still.batch_validation, rtol=0.05)
    assert still.validation[-1] < 1.25 * still.batch_validation[-1]
    assert moving.validation[-1] > 2 * moving.batch_validation[-1]
    assert run(script_of("convnet"), BASELINES["adam"], 1e-3, 0, 4).batch_validation == []


def test_validation_with_the_statistics_of_minibatches_leaves_the_running_ones():
    script = script_of("convnet-batchnorm")
    torch.manual_seed(0)
    model = script.make_model()
    for batch, _ in zip(script.batches(0), range(5), strict=False):
        script.loss(model, batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = validate_by_batches(script, model, tracking(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(layer.training for layer in model.modules())
    images, labels = (part.split(script.batch_size) for part in script.validation)
    plain = [script.loss(model, batch).item() for batch in zip(images, labels, strict=True)]
    assert found == pytest.approx(np.mean(plain))
    assert not torch.equal(model[1].running_mean, before["1.running_mean"]), "else nothing was to be left"


def test_all_optimizers_start_alike():
    script = script_of("vae")
    everyone = [*BASELINES.values(), *contenders.rules(["default"])]
    assert len({run(script, contender, contender.lrs[0], 1, 1).train[0] for contender in everyone}) == 1


def test_a_run_that_blows_up_ends_there_and_counts_as_diverged():
    found = run(script_of("least-squares"), BASELINES["momentum"], 100.0, 0, 60)
    assert math.isnan(found.train[-1])
    assert math.isnan(found.validation[-1])
    assert len(found.train) == 60
    assert len(found.validation) == len(looks(60))
    assert statistics.diverged(np.array(found.train))


def test_real_data(data_root):
    """The files of Fashion-MNIST and CIFAR-10 have the shapes that scripts ask for."""
    for workload in scripts(("deep-mlp", "convnet"), Datasets(data_root)):
        assert len(workload.script.train[0]) == 8192
