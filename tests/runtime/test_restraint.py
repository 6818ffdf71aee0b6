"""What has no gradient any more comes to rest, and what has only rounding for one goes nowhere: beside Adam."""

import functools
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_runtime import LearnedOptimizer, load_rule
from l2o_runtime.stepping.advice import HorizonWarning

pytestmark = pytest.mark.slow

RESTRAINED = ("scale", "mnist", "moments", "normalized-dmd")


def optimizer(name: str, params, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr) if name == "adam" else LearnedOptimizer(params, rule=name)


def train(steps: int, one: torch.optim.Optimizer, losses: Iterator[Tensor], look: Callable[[int], None]) -> None:
    """Steps with `look` before each, when its gradients are there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HorizonWarning)
        for step, loss in zip(range(steps), losses, strict=False):
            one.zero_grad(set_to_none=False)
            loss.backward()
            look(step)
            one.step()


def classified(model: nn.Module, inputs: int, classes: int) -> Iterator[Tensor]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(512, inputs, generator=rng)
    y = (x @ torch.randn(inputs, classes, generator=rng)).argmax(1)
    while True:
        index = torch.randint(len(x), (32,), generator=rng)
        yield F.cross_entropy(model(x[index]), y[index])


@functools.cache
def after_freezing(name: str) -> float:
    """How far a layer goes on whose gradients are zero from step 50 on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5))
    frozen, start = model[0].weight, []

    def look(step: int) -> None:
        if step >= 50:
            start.append(frozen.detach().clone())
            model[0].weight.grad.zero_()
            model[0].bias.grad.zero_()

    train(300, optimizer(name, model.parameters(), 1e-2), classified(model, 20, 5), look)
    return float((frozen.detach() - start[0]).abs().mean())


@functools.cache
def after_pruning(name: str) -> float:
    """How large weights become that are set to zero in step 100 and have no gradient from then on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
    weight = model[0].weight
    kept = torch.rand(weight.shape) > 0.5

    def look(step: int) -> None:
        if step == 100:
            weight.data.mul_(kept)
        if step >= 100:
            weight.grad.mul_(kept)

    train(400, optimizer(name, model.parameters(), 1e-2), classified(model, 20, 5), look)
    return float(weight.detach()[~kept].abs().mean())


@functools.cache
def after_one_look(name: str) -> list[float]:
    """How far the row of a word that occurs in step 100 alone moves in that step and in those after it."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(50, 8), nn.Linear(8, 50)
    rows = []

    def losses() -> Iterator[Tensor]:
        for step in range(300):
            words = torch.randint(1, 50, (64,))
            words[0] = 0 if step == 100 else words[0]
            yield F.cross_entropy(head(embedding(words)), words)

    one = optimizer(name, [*embedding.parameters(), *head.parameters()], 1e-2)
    train(300, one, losses(), lambda step: rows.append(embedding.weight[0].detach().clone()))
    return [float((after - before).abs().mean()) for before, after in pairwise(rows[100:])]


@pytest.mark.parametrize("name", RESTRAINED)
def test_a_frozen_layer_comes_to_rest_as_under_adam(name):
    assert after_freezing(name) < 2 * after_freezing("adam")


@pytest.mark.parametrize("name", RESTRAINED)
def test_pruned_weights_stay_pruned_as_under_adam(name):
    assert after_pruning(name) < 2 * after_pruning("adam")


@pytest.mark.parametrize("name", RESTRAINED)
def test_a_row_that_was_seen_once_comes_to_rest_as_fast_as_under_adam(name):
    """In steps until it moves by a hundredth of what it moved when it was seen, within twice as many."""

    def until_rest(steps: list[float]) -> int:
        return max((index for index, step in enumerate(steps) if step > steps[0] / 100), default=0)

    assert until_rest(after_one_look(name)) < 2 * until_rest(after_one_look("adam"))


@functools.cache
def biases_in_front_of_norms(name: str, seed: int) -> tuple[float, float]:
    """How far biases move that BatchNorm takes out again, and how much evaluation mode changes the outputs."""
    torch.manual_seed(seed)
    first = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), first, second, nn.Flatten(), nn.Linear(32, 5))
    biases = [first[0].bias, second[0].bias]
    start = torch.cat([bias.detach().clone() for bias in biases])
    train(400, optimizer(name, model.parameters(), 1e-3), classified(model, 64, 5), lambda step: None)
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        batch, evaluation = model(x).softmax(1), model.eval()(x).softmax(1)
    return float((torch.cat(biases).detach() - start).norm()), float((batch - evaluation).abs().mean())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", RESTRAINED)
def test_biases_in_front_of_batch_norm_go_no_further_than_twice_as_under_adam(name, seed):
    moved, gap = biases_in_front_of_norms(name, seed)
    assert moved < 2 * biases_in_front_of_norms("adam", seed)[0]
    assert gap < 0.05


@functools.cache
def key_biases(name: str) -> float:
    """How far key biases of attention move, to which softmax is blind."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    embed, head = nn.Embedding(16, 16), nn.Linear(16, 16)
    keys = block.self_attn.in_proj_bias
    start = keys[16:32].detach().clone()

    def losses() -> Iterator[Tensor]:
        while True:
            words = torch.randint(16, (8, 12))
            yield F.cross_entropy(head(block(embed(words))).flatten(0, 1), words.roll(1, 1).flatten())

    params = [*embed.parameters(), *block.parameters(), *head.parameters()]
    train(200, optimizer(name, params, 1e-3), losses(), lambda step: None)
    return float((keys[16:32].detach() - start).norm())


@pytest.mark.parametrize("name", RESTRAINED)
def test_key_biases_of_attention_go_no_further_than_twice_as_under_adam(name):
    assert key_biases(name) < 2 * key_biases("adam")


def test_the_papers_rules_stay_as_published():
    for name in ("l2o", "l2o-dmd", "l2o-kae"):
        assert load_rule(name).config.noise_floor is None
    for name in RESTRAINED:
        assert load_rule(name).config.noise_floor is not None
