"""Are a rule's steps of the right length for networks that are larger than those of its meta-training?

python benchmarks/step_length.py --data data --rules scale --shapes 64x2 256x8 512x3 --kinds batch layer plain

Residual networks on Fashion-MNIST, whose blocks of two layers have BatchNorm or LayerNorm in front, and plain networks
without either, `WIDTHxDEPTH`. A row per network: the training loss (mean of the last 20 of `--steps`, and over
`--runs` seeds) of a rule whose steps are multiplied by every factor of `--lr`, and of Adam at its best of `--adam`. All
start from the same weights and see the same minibatches of 128. A rule that knows the network's size is best at 1.
"""

import argparse
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from l2o_runtime import HorizonWarning, LearnedOptimizer
from l2o_training.data import load_dataset

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]
NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class Block(nn.Module):
    """x + f(norm(x)), f of two layers."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.f = nn.Sequential(norm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def network(width: int, depth: int, kind: str) -> nn.Sequential:
    """A classifier of 784 pixels."""
    if kind == "plain":
        hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(nn.Linear(784, width), nn.ReLU(), *hidden, nn.Linear(width, 10))
    norm = NORMS[kind]
    blocks = [Block(width, norm) for _ in range(depth)]
    return nn.Sequential(nn.Linear(784, width), *blocks, norm(width), nn.Linear(width, 10))


def mean_loss(make_optimizer: MakeOptimizer, make_model: Callable[[], nn.Module]) -> float:
    """Mean of the last 20 losses of ordinary training loops, over seeds."""
    finals = []
    for seed in range(args.runs):
        torch.manual_seed(seed)
        model = make_model()
        optimizer = make_optimizer(model.parameters())
        losses = []
        for _ in range(args.steps):
            index = torch.randint(len(images), (128,))
            loss = F.cross_entropy(model(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        finals.append(mean(losses[-20:]))
    return mean(finals)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, required=True, help="folder with Fashion-MNIST in torchvision's layout")
parser.add_argument("--rules", nargs="+", default=["scale"])
parser.add_argument("--shapes", nargs="+", default=["64x2", "64x8", "256x2", "256x8"])
parser.add_argument("--kinds", nargs="+", choices=["plain", *NORMS], default=["batch", "layer"])
parser.add_argument("--lr", type=float, nargs="+", default=[2.0, 1.0, 0.5, 0.25, 0.125])
parser.add_argument("--adam", type=float, nargs="+", default=[0.01, 0.003, 0.001, 0.0003, 0.0001])
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--runs", type=int, default=2)
args = parser.parse_args()

warnings.simplefilter("ignore", HorizonWarning)
torch.set_num_threads(1)
data = load_dataset("fashion-mnist", args.data)
images, labels = ((data.images.float() / 255 - 0.286) / 0.353).flatten(1), data.labels
table = Table("network", *(f"{rule} × {lr:g}" for rule in args.rules for lr in args.lr), "Adam, best lr")
for kind, shape in product(args.kinds, args.shapes):
    make_model = partial(network, *map(int, shape.split("x")), kind)
    ours = [mean_loss(partial(LearnedOptimizer, rule=rule, lr=lr), make_model) for rule in args.rules for lr in args.lr]
    best, lr = min((mean_loss(partial(Adam, lr=lr), make_model), lr) for lr in args.adam)
    table.add_row(f"{kind} {shape}", *(f"{loss:.3f}" for loss in ours), f"{best:.3f}, {lr:g}")
    Console(stderr=True).print(f"{kind} {shape}: done", highlight=False)
Console().print(table)
