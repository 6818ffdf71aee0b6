"""How far do weights go on after their last gradient?

Verdict: with a `noise_floor` little, as Adam's. In a frozen layer 0.005 for `scale` beside Adam's 0.020; the papers'
rules, without one, go on: 6.6 for `l2o` (`l2o_runtime/pretrained/README.md`).

python research/rest.py

Mean distance, for every bundled rule and for Adam at 0.01: of a layer whose gradients are zero after 50 steps, 400
steps later; of the half of a layer that is set to zero after 100 steps, gradients masked from then on, 500 steps later;
of the row of an embedding that occurs in one batch only, 400 steps later.
"""

import warnings
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from l2o_runtime import LearnedOptimizer
from l2o_runtime.files.artifact import bundled_rules
from l2o_training.compare.scripts import advance

Make = Callable[[Iterable[nn.Parameter]], Optimizer]


def points() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    return x, (x @ torch.randn(20, 5)).argmax(1)


def frozen(make: Make) -> float:
    x, y = points()
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5))
    optimizer, layer = make(model.parameters()), model[0]
    for step in range(450):
        if step == 50:
            start = layer.weight.detach().clone()
        index = torch.randint(len(x), (32,))
        loss = F.cross_entropy(model(x[index]), y[index])
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        if step >= 50:
            layer.weight.grad.zero_()
            layer.bias.grad.zero_()
        advance(optimizer, loss)
    return float((layer.weight.detach() - start).abs().mean())


def pruned(make: Make) -> float:
    x, y = points()
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
    optimizer, weight = make(model.parameters()), model[0].weight
    kept = torch.rand(32, 20) > 0.5
    for step in range(600):
        index = torch.randint(len(x), (32,))
        loss = F.cross_entropy(model(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        if step == 100:
            weight.data.mul_(kept)
        if step >= 100:
            weight.grad.mul_(kept)
        advance(optimizer, loss)
    return float(weight.detach()[~kept].abs().mean())


def seen_once(make: Make) -> float:
    torch.manual_seed(0)
    embedding, head = nn.Embedding(50, 8), nn.Linear(8, 50)
    optimizer = make([*embedding.parameters(), *head.parameters()])
    for step in range(500):
        words = torch.randint(1, 50, (64,))
        if step == 100:
            words[0] = 0
        if step == 101:
            start = embedding.weight[0].detach().clone()
        optimizer.zero_grad()
        F.cross_entropy(head(embedding(words)), words).backward()
        optimizer.step()
    return float((embedding.weight[0].detach() - start).abs().mean())


warnings.simplefilter("ignore", UserWarning)  # horizons, and rules that miss the loss in the last setting
torch.set_num_threads(1)
table = Table("optimizer", "frozen layer", "pruned weights", "row seen once")
for name in ("Adam 0.01", *bundled_rules()):

    def make(params: Iterable[nn.Parameter], name: str = name) -> Optimizer:
        return Adam(params, 0.01) if name.startswith("Adam") else LearnedOptimizer(params, rule=name)

    table.add_row(name, *(f"{measure(make):.2g}" for measure in (frozen, pruned, seen_once)))
Console().print(table)
