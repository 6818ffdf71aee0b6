"""Train one digits classifier with every exported file of a rule, and with Adam and SGD.

python examples/compare_formats.py runs/demo/export
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn

from l2o_runtime import HorizonWarning, LearnedOptimizer
from l2o_training.plots import loss_curves

warnings.simplefilter("ignore", HorizonWarning)  # twice as long as in meta-training: that is what the demo shows

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="what `l2o export` wrote")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--runs", type=int, default=3)
parser.add_argument("--out", type=Path, default=Path("comparison.png"))
args = parser.parse_args()

images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
held_out = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:300]
training = torch.ones(len(images), dtype=torch.bool)
training[held_out] = False
train_images, train_labels = images[training], labels[training]


def train(make_optimizer, seed: int) -> tuple[list[float], float]:
    """An ordinary training loop; gives the losses and the accuracy on held-out digits."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 24), nn.Sigmoid(), nn.Linear(24, 10))
    optimizer = make_optimizer(model.parameters())
    losses = []
    for _ in range(args.steps):
        index = torch.randint(len(train_images), (64,))
        loss = F.cross_entropy(model(train_images[index]), train_labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        accuracy = (model(images[held_out]).argmax(-1) == labels[held_out]).float().mean().item()
    return losses, accuracy


contestants = {
    file.name: lambda params, file=file: LearnedOptimizer(params, rule=file)
    for file in sorted(args.folder.glob("rule.*"))
}
contestants["adam 0.001"] = lambda params: torch.optim.Adam(params, lr=0.001)
contestants["adam 0.01"] = lambda params: torch.optim.Adam(params, lr=0.01)
contestants["adam 0.03"] = lambda params: torch.optim.Adam(params, lr=0.03)
contestants["sgd 1.0"] = lambda params: torch.optim.SGD(params, lr=1.0)

table = Table("optimizer", "loss, last 10 steps", "held-out accuracy", "ms per training step")
curves = {}
for name, make_optimizer in contestants.items():
    started = time.perf_counter()
    runs = [train(make_optimizer, seed) for seed in range(args.runs)]
    milliseconds = (time.perf_counter() - started) * 1000 / (args.runs * args.steps)
    curves[name] = np.array([losses for losses, _ in runs])
    last = curves[name][:, -10:].mean(1)
    accuracy = np.mean([accuracy for _, accuracy in runs])
    table.add_row(name, f"{last.mean():.4f} ± {last.std():.4f}", f"{accuracy:.1%}", f"{milliseconds:.1f}")

title = f"digits, 64-24-10 network, {args.steps} steps, {args.runs} runs"
loss_curves(title, curves, args.out)
Console().print(table, f"loss curves: {args.out}", soft_wrap=True)
