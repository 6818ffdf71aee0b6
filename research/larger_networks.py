"""Is a rule of use for networks of other kinds that are larger than those of its meta-training?

Verdict: mostly. `scale` is ahead of Adam at the better of two rates on six of ten, and behind on four, on the
transformer by far: 2.197 beside 1.771 (`docs/evaluation.md`).

python research/larger_networks.py --data data --rules scale --networks vit-4x96 transformer-3x128

The training scripts of the suite `larger`. A row per network: the training loss (mean of the last 20 of `--steps`, and
over `--runs` seeds) of every rule, at each of `--lr`, and of Adam at each of `--adam`. All start from the same weights
and see the same minibatches.
"""

import argparse
import warnings
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.optim import Adam

from l2o_runtime import HorizonWarning, LearnedOptimizer
from l2o_training.compare.scripts import train
from l2o_training.tasks.data import Datasets
from l2o_training.tasks.scripts.larger import RECIPES

LAST = 20
"""Steps at the end of a run whose losses are averaged."""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10, Fashion-MNIST and Shakespeare")
parser.add_argument("--rules", nargs="+", default=["scale"])
parser.add_argument("--lr", type=float, nargs="+", default=[1.0], help="factors on the rules' steps")
parser.add_argument("--networks", nargs="+", choices=RECIPES, default=list(RECIPES))
parser.add_argument("--adam", type=float, nargs="*", default=[0.003, 0.001, 0.0003])
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--runs", type=int, default=2)
args = parser.parse_args()

warnings.simplefilter("ignore", HorizonWarning)
torch.set_num_threads(1)
load = Datasets(args.data)
optimizers = {
    f"{rule} × {lr:g}": (partial(LearnedOptimizer, rule=rule), lr) for rule, lr in product(args.rules, args.lr)
} | {f"Adam {lr:g}": (Adam, lr) for lr in args.adam}
table = Table("network", "parameters", *optimizers)
for name in args.networks:
    script, row = RECIPES[name].build(load), []
    for make, lr in optimizers.values():
        runs = [
            train(script, lambda p, lr, _, m=make: (m(p, lr=lr), None), lr, s, args.steps) for s in range(args.runs)
        ]
        row.append(np.mean([run.train[0, -LAST:] for run in runs]))
    table.add_row(name, f"{runs[0].parameters:,}", *(f"{loss:.3f}" for loss in row))
    Console(stderr=True).print(f"{name}: done", highlight=False)
Console().print(table)
