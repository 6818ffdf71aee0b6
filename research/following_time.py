"""What does it cost that parameters follow steps where nobody says how long the run is?

Verdict: nothing that shows. docs/decisions/0131-parameters-follow-steps-where-no-length-is-known.md.

    python research/following_time.py --threads 1

A line per network: milliseconds of a step told the length, not told, and of Adam's, medians; they take turns.
"""

import argparse
import statistics

import torch
import torchvision
from torch import nn

from l2o_runtime import LearnedOptimizer
from l2o_training.bench.timing import clock

ROUNDS, WARMUP = 40, 8

NETWORKS = {
    "64-24-10": lambda: nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)),
    "6 layers of 64": lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))),
    "784-1024-400-10": lambda: nn.Sequential(nn.Linear(784, 1024), nn.Linear(1024, 400), nn.Linear(400, 10)),
    "resnet18": torchvision.models.resnet18,
}


def main() -> None:
    """Time all networks."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(found.parse_args().threads)
    torch.manual_seed(0)
    for name, make in NETWORKS.items():
        models = [make() for _ in range(3)]
        for model in models:
            for param in model.parameters():
                param.grad = 0.01 * torch.randn_like(param)
        told, followed, adam = (list(model.parameters()) for model in models)
        optimizers = [
            LearnedOptimizer(told, total_steps=10**6),
            LearnedOptimizer(followed),
            torch.optim.Adam(adam),
        ]
        taken: list[list[float]] = [[] for _ in optimizers]
        for _ in range(ROUNDS):
            for optimizer, times in zip(optimizers, taken, strict=True):
                times.append(clock(optimizer.step, torch.device("cpu")))
        medians = [1000 * statistics.median(times[WARMUP:]) for times in taken]
        ratio = medians[1] / medians[0]
        print(f"{name}\t" + "\t".join(f"{ms:.3f}" for ms in medians) + f"\tnot told ÷ told {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
