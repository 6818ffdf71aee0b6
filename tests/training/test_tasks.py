"""Tasks of meta-training: their networks side by side, their examples, and that they can be learned."""

from functools import partial

import pytest
import torch

from l2o_runtime import ConfigError
from l2o_training.compare.baselines import BASELINES
from l2o_training.compare.flat import rollout
from l2o_training.tasks import AutoencoderConfig, ConvConfig, MLPConfig, RegressionConfig, TextConfig, make_task
from l2o_training.tasks.data import load_dataset
from l2o_training.tasks.networks import CharGRU, CharTransformer, convnet, flat_parameters, flat_statistics, is_mlp, mlp
from l2o_training.tasks.supervised import Labelled, Numbers, Text, cross_entropy, losses_of, squared_error

NETWORKS = {
    "logistic": partial(mlp, 12, (), 5, "gelu"),
    "mlp": partial(mlp, 12, (7, 3), 5, "gelu"),
    "layer-norm": partial(mlp, 12, (7, 3), 5, "silu", norm="layer"),
    "batch-norm": partial(mlp, 12, (7, 3), 5, "relu", norm="batch"),
    "conv": partial(convnet, (1, 3, 4), (3, 2), 5, "tanh"),
    "conv-layer": partial(convnet, (1, 3, 4), (3, 2), 5, "relu", "layer"),
    "conv-batch": partial(convnet, (1, 3, 4), (3, 2), 5, "relu", "batch"),
    "gru": partial(CharGRU, 5, 6, 4),
    "transformer": partial(CharTransformer, 5, 6, 4, 2, 1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_side_by_side_are_those_of_every_network(name):
    """Values and gradients: as batched products, by torch.func, one by one."""
    torch.manual_seed(0)
    models = [NETWORKS[name]().double() for _ in range(3)]  # norms of few numbers amplify rounding
    for model in models:  # norms begin with ones and zeros, which would hide a mistake
        for p in model.parameters():
            p.data += 0.3 * torch.randn_like(p)
    texts = name in ("gru", "transformer")
    assert is_mlp(models[0]) == (not texts and "conv" not in name)
    inputs = torch.randint(5, (3, 8, 6)) if texts else torch.randn(3, 8, 1, 3, 4, dtype=torch.float64)
    labels = torch.randint(5, (3, 8, 6) if texts else (3, 8))
    params = torch.stack([flat_parameters(other) for other in models]).requires_grad_()
    statistics = torch.stack([flat_statistics(other) for other in models]).to(params.dtype)
    assert (statistics.shape[1] > 0) == ("batch" in name)
    losses_in = losses_of(NETWORKS[name]().double(), cross_entropy)
    losses, after = losses_in(params, (inputs, labels), statistics, True)
    (grads,) = torch.autograd.grad(losses.sum(), params)
    scores, same = losses_in(params.detach(), (inputs, labels), after, False)
    assert torch.equal(same, after)
    for index, (other, x, y) in enumerate(zip(models, inputs, labels, strict=True)):
        expected = torch.nn.functional.cross_entropy(other(x).flatten(0, -2), y.flatten())
        expected.backward()
        torch.testing.assert_close(losses[index], expected)
        torch.testing.assert_close(grads[index], torch.cat([p.grad.flatten() for p in other.parameters()]))
        torch.testing.assert_close(after[index], flat_statistics(other).to(params.dtype))
        expected = torch.nn.functional.cross_entropy(other.eval()(x).flatten(0, -2), y.flatten())
        torch.testing.assert_close(scores[index], expected.detach())


@pytest.mark.parametrize("kind", [MLPConfig, ConvConfig])
def test_running_statistics_and_scores_are_those_of_modules_trained_one_by_one(kind):
    """In training mode but for the scores, which `model.eval()` has just before each step; no instance sees another."""
    widths = {"hidden": (8, 5)} if kind is MLPConfig else {"channels": (4, 3)}
    task = make_task(kind(data="digits", norm="batch", batch_size=16, **widths), load_dataset, torch.device("cpu"))
    together, batches = task.instances(3, 4), task.instances(3, 4)._batches
    models = [task.make_model() for _ in range(3)]
    for model, values in zip(models, together.params, strict=True):
        torch.nn.utils.vector_to_parameters(values, model.parameters())
        assert all(layer.bias is not None for layer in model if hasattr(layer, "bias"))
        assert all(layer.track_running_stats for layer in model if hasattr(layer, "running_mean"))
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    params, statistics = together.params, together.statistics
    for _ in range(12):
        loss, grad, score, statistics = together.look(params, statistics)
        params = params - 0.1 * grad
        for index, (model, x, y) in enumerate(zip(models, *batches(), strict=True)):
            expected = torch.nn.functional.cross_entropy(model.eval()(x), y)
            torch.testing.assert_close(score[index], expected.detach(), rtol=1e-4, atol=1e-5)
            optimizers[index].zero_grad()
            found = torch.nn.functional.cross_entropy(model.train()(x), y)
            found.backward()
            torch.testing.assert_close(loss[index], found.detach(), rtol=1e-4, atol=1e-5)
            optimizers[index].step()
    expected = torch.stack([flat_statistics(model) for model in models])
    torch.testing.assert_close(statistics, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(statistics, together.statistics)
    whole, some = task.instances(3, 4), task.instances(3, 4).part(1, 3)
    seen = zip(whole.look(whole.params, whole.statistics), some.look(some.params, some.statistics), strict=True)
    for values, part in seen:
        torch.testing.assert_close(part, values[1:])


def test_squared_errors_are_means_of_every_instance():
    outputs, targets = torch.randn(2, 3, 4, 5)
    each = [torch.nn.functional.mse_loss(a, b) for a, b in zip(outputs, targets, strict=True)]
    torch.testing.assert_close(squared_error(outputs, targets), torch.stack(each))


TASKS = [
    MLPConfig(hidden=(8,), label_noise=0.2, norm="batch", batch_size=16),
    ConvConfig(data="digits", channels=(4,), norm="layer", batch_size=16),
    AutoencoderConfig(hidden=(12, 3), batch_size=16),
    TextConfig(cell="gru", width=8, length=6),
    TextConfig(cell="transformer", width=8, length=6),
    RegressionConfig(size=6, condition=10.0),
    RegressionConfig(size=6, hidden=(8,), norm="layer"),
]


@pytest.mark.parametrize("config", TASKS, ids=lambda config: f"{config.kind}-{getattr(config, 'cell', '')}")
def test_tasks_can_be_learned_and_repeat(config):
    """Two hundred steps of Adam; instances and minibatches depend on the seed alone."""
    task = make_task(config, load_dataset, torch.device("cpu"))
    one, again = task.instances(2, 5), task.instances(2, 5)
    assert torch.equal(one.params, again.params)
    assert torch.equal(one.value_and_grad(one.params)[1], again.value_and_grad(again.params)[1])
    assert sum(shape.numel() for shape in one.shapes) == one.params.shape[1]
    losses = rollout(BASELINES["adam"].solver(0.01, 200), task.instances(2, 6), 200)
    assert (losses[-20:].mean(0) < 0.9 * losses[:5].mean(0)).all(), losses.mean(1)


def test_text_depends_on_the_two_characters_before():
    """Frequencies of what follows a pair are those of another passage of the text, and far from even."""
    text = Text(4, 50, torch.device("cpu"))
    before, after = text((1, 400), torch.Generator().manual_seed(0))
    assert torch.equal(before[..., 1:], after[..., :-1])
    counts = torch.zeros(2, 4, 4, 4)
    for half in (0, 1):
        x, y = before[0, half::2], after[0, half::2]
        index = (x[:, :-1] * 16 + x[:, 1:] * 4 + y[:, 1:]).flatten()
        counts[half] = torch.bincount(index, minlength=64).view(4, 4, 4)
    seen = counts.sum(-1).amin(0) > 200
    chances = counts[:, seen] / counts[:, seen].sum(-1, keepdim=True)
    assert seen.sum() >= 4
    assert (chances[0] - chances[1]).abs().max() < 0.15
    assert chances.amax(-1).mean() > 0.6


def test_numbers_have_the_condition_that_was_asked_for():
    x, y = Numbers(5, 100.0, 0.5, torch.device("cpu"))((1, 20_000), torch.Generator().manual_seed(0))
    values = torch.linalg.eigvalsh(torch.cov(x[0].T))
    assert 80 < values[-1] / values[0] < 125
    assert 1.0 < y.var() < 1.3
    plain, rng = Numbers(5, 100.0, 0.0, torch.device("cpu")), torch.Generator().manual_seed(0)
    x, y = (values[0].double() for values in plain((1, 20_000), rng))
    assert 0.009 < (y - x @ torch.linalg.lstsq(x, y).solution).var() < 0.011  # nothing but ε


def test_label_noise_changes_that_share_of_labels():
    data = load_dataset("digits")
    size, rng = (4, 2000), torch.Generator()
    clean, noisy = (Labelled(data, noise)(size, rng.manual_seed(0))[1] for noise in (0.0, 0.3))
    assert 0.24 < (clean != noisy).float().mean() < 0.30  # a tenth of the others is right by chance


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ConvConfig, {"norm": "batch", "batch_size": 1}, "batch_size: must be 2 or more with norm = batch"),
        (MLPConfig, {"label_noise": 1.0}, "label_noise"),
        (AutoencoderConfig, {"hidden": ()}, "hidden: needs one width"),
        (TextConfig, {"width": 3}, "width: must be even"),
        (TextConfig, {"characters": 1}, "characters"),
        (RegressionConfig, {"condition": 0.5}, "condition"),
        (RegressionConfig, {"wave": -1.0}, "wave"),
        (RegressionConfig, {"hidden": (0,)}, "hidden: widths must be 1 or more"),
    ],
)
def test_bad_tasks_are_refused(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        kind(**settings)
