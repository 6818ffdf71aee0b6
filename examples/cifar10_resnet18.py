"""Train torchvision's ResNet-18 on CIFAR-10 with a learned rule, or with Adam at several learning rates.

python examples/cifar10_resnet18.py data/cifar10.npz --rule scale --adam 0.0003 0.001 0.003 --steps 200

The file holds x_train (N, 32, 32, 3), y_train, x_test and y_test. All optimizers start from the same weights and see
the same minibatches, random crops and flips included.
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
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR
from torchvision.models import resnet18
from torchvision.transforms import v2

from l2o_runtime import HorizonWarning, LearnedOptimizer

warnings.simplefilter("ignore", HorizonWarning)  # the table shows what comes of more steps than in meta-training

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", type=Path)
parser.add_argument("--rule", nargs="*", default=["default"], help="bundled names or files")
parser.add_argument("--lr", type=float, default=1.0, help="the rules' learning rate")
parser.add_argument("--adam", type=float, nargs="*", default=[0.0003, 0.001, 0.003], help="Adam's learning rates")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--cosine", action="store_true", help="all learning rates fall to zero, as a cosine")
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--runs", type=int, default=1, help="seeds 0, 1, …; the table has means ± standard deviations")
args = parser.parse_args()

with np.load(args.data) as file:
    images, labels = torch.from_numpy(file["x_train"]).permute(0, 3, 1, 2), torch.from_numpy(file["y_train"]).long()
    held_out, answers = torch.from_numpy(file["x_test"]).permute(0, 3, 1, 2), torch.from_numpy(file["y_test"]).long()
normalize = v2.Compose(
    [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])]
)
augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), normalize])


def train(make_optimizer, seed: int) -> tuple[float, float, float, float]:
    """An ordinary training loop: last losses, accuracy, and milliseconds per step, all of it and the optimizer's."""
    torch.manual_seed(seed)
    model = resnet18(num_classes=10)
    optimizer = make_optimizer(model.parameters())
    schedule = CosineAnnealingLR(optimizer, args.steps) if args.cosine else ConstantLR(optimizer, 1.0)
    losses, stepping, started = [], 0.0, time.perf_counter()
    for _ in range(args.steps):
        index = torch.randint(len(images), (args.batch_size,))
        loss = F.cross_entropy(model(augment(images[index])), labels[index])
        optimizer.zero_grad()
        loss.backward()
        before = time.perf_counter()
        optimizer.step()
        stepping += time.perf_counter() - before
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        guesses = torch.cat([model(normalize(part)).argmax(-1) for part in held_out.split(500)])
    accuracy = 100 * (guesses == answers).float().mean().item()
    return float(np.mean(losses[-20:])), accuracy, 1e3 * seconds / args.steps, 1e3 * stepping / args.steps


contestants = {rule: lambda params, rule=rule: LearnedOptimizer(params, rule=rule, lr=args.lr) for rule in args.rule}
contestants |= {f"adam {lr:g}": lambda params, lr=lr: torch.optim.Adam(params, lr=lr) for lr in args.adam}
table = Table("optimizer", "loss, last 20 steps", "held-out accuracy", "ms per training step", "of it the optimizer's")
for name, make_optimizer in contestants.items():
    results = np.array([train(make_optimizer, seed) for seed in range(args.runs)])
    (loss, accuracy, whole, own), (loss_std, accuracy_std, *_) = results.mean(axis=0), results.std(axis=0)
    table.add_row(
        name, f"{loss:.3f} ± {loss_std:.3f}", f"{accuracy:.1f} ± {accuracy_std:.1f} %", f"{whole:.0f}", f"{own:.0f}"
    )
    Console(stderr=True).print(
        f"{name}: losses {results[:, 0].round(3)}, accuracies {results[:, 1].round(1)}", highlight=False
    )
Console().print(table)
