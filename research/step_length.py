"""Are a rule's steps of the right length for networks that are larger than those of its meta-training?

Verdict: they were too long; shortened in networks of more than 30,000 parameters they are right. `scale` is below tuned
Adam on eight of ten networks, and within half a per cent on two (`docs/evaluation.md`, decision 0081).

python research/step_length.py --data data --rules scale --shapes 64x2 256x8 512x3 --kinds batch layer plain

Residual networks on Fashion-MNIST, whose blocks of two layers have BatchNorm or LayerNorm in front, and plain networks
without either, `WIDTHxDEPTH`. A row per network: the training loss (mean of the last 20 of `--steps`, and over
`--runs` seeds) of a rule whose steps are multiplied by every factor of `--lr`, and of Adam at its best of `--adam`. All
start from the same weights and see the same minibatches of 128. A rule that knows the network's size is best at 1.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from ordinary_loop import MakeOptimizer, fashion_mnist, mean_loss
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Adam

from l2o_runtime import HorizonWarning, LearnedOptimizer
from l2o_training.tasks.modules import Residual
from l2o_training.tasks.scripts.images import cross_entropy

NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


def block(width: int, norm: Callable[[int], nn.Module]) -> Residual:
    return Residual(norm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def network(width: int, depth: int, kind: str) -> nn.Sequential:
    """A classifier of 784 pixels."""
    if kind == "plain":
        hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(nn.Linear(784, width), nn.ReLU(), *hidden, nn.Linear(width, 10))
    norm = NORMS[kind]
    blocks = [block(width, norm) for _ in range(depth)]
    return nn.Sequential(nn.Linear(784, width), *blocks, norm(width), nn.Linear(width, 10))


def classify(model: nn.Module) -> Tensor:
    index = torch.randint(len(images), (128,))
    return cross_entropy(model, (images[index], labels[index]))


def measure(make_optimizer: MakeOptimizer) -> float:
    return mean_loss(make_optimizer, make_model, classify, args.steps, args.runs)


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
images, labels = fashion_mnist(args.data)
table = Table("network", *(f"{rule} × {lr:g}" for rule in args.rules for lr in args.lr), "Adam, best lr")
for kind, shape in product(args.kinds, args.shapes):
    make_model = partial(network, *map(int, shape.split("x")), kind)
    ours = [measure(partial(LearnedOptimizer, rule=rule, lr=lr)) for rule in args.rules for lr in args.lr]
    best, lr = min((measure(partial(Adam, lr=lr)), lr) for lr in args.adam)
    table.add_row(f"{kind} {shape}", *(f"{loss:.3f}" for loss in ours), f"{best:.3f}, {lr:g}")
    Console(stderr=True).print(f"{kind} {shape}: done", highlight=False)
Console().print(table)
