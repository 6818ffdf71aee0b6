"""Train a small CNN on MNIST or CIFAR-10 with SGD and momentum, with TALT around it and without.

python examples/talt_cifar10.py --data-root data --data cifar10 --seeds 1 2 3

Learning rates are tuned for both on seed 0. Both train on the same images in the same order. A line has the accuracy on
held-out images and the loss of the last tenth of the steps, means over seeds. `--ablation` switches parts of TALT off
or changes them; `--picture` draws eigenvalues and what directions were found to be.
"""

import argparse
import functools
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from l2o_runtime.wrappers.talt import TALT
from l2o_training.tasks.data import Datasets
from l2o_training.tasks.scripts.images import examples


class SimpleCNN(nn.Module):
    """Two convolutions, and two linear layers."""

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Sequential(nn.Linear(16 * (side // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x):
        """(B, c, side, side) → (B, 10)."""
        return self.classifier(self.features(x).flatten(1))


momentum = functools.partial(SGD, momentum=0.9)
OPTIMIZERS = {
    "momentum": lambda p, lr: SGD(p, lr, momentum=0.9),
    "TALT": functools.partial(TALT, momentum),
}
ABLATION = {
    "valley_strength 0": {"valley_strength": 0.0},
    "valley_strength 0.5": {"valley_strength": 0.5},
    "projection_dim 8": {"projection_dim": 8},
    "projection_dim 256": {"projection_dim": 256},
    "smoothing_factor 1": {"smoothing_factor": 1.0},
    "smoothing_factor 0.05": {"smoothing_factor": 0.05},
}


def train(data, make, lr: float, seed: int, steps: int, watch=None) -> tuple[float, float, dict]:
    """An ordinary training loop: accuracy on held-out images, loss of the last tenth, counters."""
    (images, labels), (held_out, answers) = data
    torch.manual_seed(seed)
    model = SimpleCNN(images.shape[1], images.shape[2])
    optimizer = make(model.named_parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        index = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if watch is not None:
            watch(optimizer)
    with torch.no_grad():
        accuracy = (model(held_out).argmax(1) == answers).float().mean().item()
    return accuracy, statistics.fmean(losses[-steps // 10 :]), getattr(optimizer, "health", dict)()


def draw(data, lr: float, steps: int, path: Path) -> None:
    """Leading eigenvalues over time, and where directions were valleys or between walls."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seen = []

    def watch(optimizer) -> None:
        seen.append((optimizer.health()["updates"], *optimizer.spectrum()))

    train(data, OPTIMIZERS["TALT"], lr, 0, steps, watch)
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 4.5), sharex=True, height_ratios=(3, 1))
    floor = 1e-6 * max(max(values) for _, values, _ in seen)  # the first gradients have fewer directions
    above.semilogy([[value if value > floor else float("nan") for value in values] for _, values, _ in seen])
    above.set_ylabel("eigenvalues of the\nsketched gradients' covariance")
    scales = torch.tensor([scales for *_, scales in seen]) - 1
    names = [*(f"eigenvector {k + 1}" for k in range(scales.shape[1] - 1)), "mean gradient"]
    for row in range(len(names)):
        for sign, colour in ((1, "tab:green"), (-1, "tab:red")):
            steps_there = (scales[:, row].sign() == sign).nonzero().flatten()
            below.scatter(steps_there, [row] * len(steps_there), s=6, marker="s", color=colour)
    below.set_yticks(range(len(names)), names)
    below.set_ylim(-0.5, len(names) - 0.5)
    below.set_xlabel("step; green: valley, red: to and fro between walls")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Tune, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--data", choices=["mnist", "cifar10"], default="cifar10")
    parser.add_argument("--train", type=int, default=4096, help="images")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1], help="rates to tune over")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ablation", action="store_true", help="parts of TALT, at its tuned rate")
    parser.add_argument("--picture", type=Path, help="write a picture there as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = examples(Datasets(args.data_root), args.data, 1, args.train, 1024)
    rates = {}
    makes = dict(OPTIMIZERS)
    for who, make in OPTIMIZERS.items():
        rates[who] = min(args.lr, key=lambda lr, make=make: train(data, make, lr, 0, args.steps)[1])
    if args.ablation:
        makes |= {what: functools.partial(TALT, momentum, **changed) for what, changed in ABLATION.items()}
    for who, make in makes.items():
        lr = rates.get(who, rates["TALT"])
        runs = [train(data, make, lr, seed, args.steps) for seed in args.seeds]
        figures = {
            "lr": lr,
            "accuracy": round(statistics.fmean(run[0] for run in runs), 4),
            "loss": round(statistics.fmean(run[1] for run in runs), 4),
            "losses": [round(run[1], 4) for run in runs],
        }
        print(json.dumps({"data": args.data, "optimizer": who} | figures | {"first run": runs[0][2]}), flush=True)
    if args.picture:
        draw(data, rates["TALT"], args.steps, args.picture)


if __name__ == "__main__":
    main()
