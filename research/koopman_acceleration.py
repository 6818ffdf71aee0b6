"""Does it save steps to jump to where the last steps lead?

Verdict: on least squares by factors of 1.1 and 1.3, on logistic regression of 1.3, on a SIREN of 1.6 and 2.2, on a PINN
of 1.4, where the placebo saves none; none on an autoencoder and on matrix factorisation (`docs/howto/dynamics.md`).

Six losses without noise, and ordinary scripts on minibatches. Adam is tuned for the lowest mean of twenty losses within
the steps, on seed 0, over three rates around what a longer search found; on other seeds the lowest that it reaches is
the target. Counted are evaluations until the mean of twenty losses is at the target, tries included. Each contender has
the rate, of the same three, with which it is there first on seed 0. The placebo jumps to the mean of the window.

    python research/koopman_acceleration.py --steps 600 --seeds 1 2
    python research/koopman_acceleration.py --noisy --data-root data --steps 400 --seeds 1 2
    python research/koopman_acceleration.py --cost
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_digits, load_sample_images
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from l2o_runtime.wrappers.koopman import KoopmanAccelerated
from l2o_training.compare.scripts import train
from l2o_training.tasks.data import Datasets
from l2o_training.tasks.scripts import everyday
from l2o_training.tasks.scripts.everyday.fields import residuals

SMOOTH = 20
"""Losses whose mean counts."""

Task = Callable[[int], tuple[list[nn.Parameter], Callable[[], Tensor]]]


class WindowMean(KoopmanAccelerated):
    """The placebo: jumps to the mean of the same window."""

    def _go(self, ridge: float) -> None:
        super()._go(1e8)


def least_squares(seed: int):
    """100 unknowns, singular values from 1 to 0.01: a condition of 10⁴."""
    rng = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, 100, generator=rng))[0] for n in (200, 100))
    matrix = 3 * left * torch.logspace(0, -2, 100) @ right.T
    target = matrix @ torch.randn(100, generator=rng)
    x = nn.Parameter(torch.zeros(100))
    return [x], lambda: (matrix @ x - target).square().mean()


def cancer() -> tuple[Tensor, Tensor]:
    """Breast cancer: standardised features, and labels."""
    inputs, labels = (torch.tensor(a, dtype=torch.float32) for a in load_breast_cancer(return_X_y=True))
    return (inputs - inputs.mean(0)) / inputs.std(0), labels


def digits() -> tuple[Tensor, nn.Sequential]:
    """All images, and an autoencoder for them, 64-32-8-32-64."""
    images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    layers = [nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8), nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 64)]
    return images, nn.Sequential(*layers)


def logistic(seed: int):
    """Breast cancer, with a little weight decay."""
    inputs, labels = cancer()
    line = nn.Linear(30, 1)
    return list(
        line.parameters()
    ), lambda: F.binary_cross_entropy_with_logits(line(inputs)[:, 0], labels) + 1e-4 * line.weight.square().sum()


def factorisation(seed: int):
    """A 40 × 30 matrix of rank 8, 60 % of it seen."""
    rng = torch.Generator().manual_seed(seed)
    matrix = torch.randn(40, 8, generator=rng) * torch.logspace(0, -1.5, 8) @ torch.randn(8, 30, generator=rng)
    seen = (torch.rand(40, 30, generator=rng) < 0.6).float()
    a, b = (nn.Parameter(0.1 * torch.randn(n, 8, generator=rng)) for n in (40, 30))
    return [a, b], lambda: ((a @ b.T - matrix) * seen).square().sum() / seen.sum()


def autoencoder(seed: int):
    """600 digits."""
    images, net = digits()
    images = images[:600]
    return list(net.parameters()), lambda: F.mse_loss(net(images), images)


def pinn(seed: int):
    """Heat equation on 256 fixed points."""
    points = torch.rand(256, 2, generator=torch.Generator().manual_seed(seed))
    net = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    return list(net.parameters()), lambda: residuals(net, (points,))


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(15 * x)


def siren(seed: int):
    """24 × 24 pixels of a photograph."""
    image = torch.tensor(load_sample_images().images[seed % 2]).float().mean(-1) / 127.5 - 1
    rng = torch.Generator().manual_seed(seed)
    top, left = (int(torch.randint(side - 96, (), generator=rng)) for side in image.shape)
    pixels = image[top : top + 96 : 4, left : left + 96 : 4].reshape(-1, 1)
    places = torch.cartesian_prod(*[torch.linspace(-1, 1, 24)] * 2)
    net = nn.Sequential(nn.Linear(2, 32), Sine(), nn.Linear(32, 32), Sine(), nn.Linear(32, 1))
    for layer, bound in zip(net[::2], (1 / 2, (6 / 32) ** 0.5 / 15, (6 / 32) ** 0.5 / 15), strict=True):
        nn.init.uniform_(layer.weight, -bound, bound)
    return list(net.parameters()), lambda: (net(places) - pixels).square().mean()


TASKS: dict[str, Task] = {
    "least squares": least_squares,
    "logistic regression": logistic,
    "matrix factorisation": factorisation,
    "autoencoder": autoencoder,
    "PINN": pinn,
    "SIREN": siren,
}

BEST = {
    "least squares": 0.3,
    "logistic regression": 0.3,
    "matrix factorisation": 0.1,
    "autoencoder": 0.02,
    "PINN": 0.01,
    "SIREN": 0.002,
}
"""Rates of Adam about which is searched, by half a decade."""

CONTENDERS: dict[str, Callable[..., Optimizer]] = {
    "Adam": Adam,
    "window mean": lambda p, lr: WindowMean(Adam(p, lr)),
    "accelerated Adam": lambda p, lr: KoopmanAccelerated(Adam(p, lr)),
    "momentum": lambda p, lr: SGD(p, lr, momentum=0.9),
    "accelerated momentum": lambda p, lr: KoopmanAccelerated(SGD(p, lr, momentum=0.9)),
}
LARGER = 30.0
"""Rates of momentum are so many times Adam's."""


def curve(task: Task, make: Callable[..., Optimizer], lr: float, seed: int, steps: int) -> list[float]:
    """The losses of all evaluations; those of a try count as one that the lower of both came from."""
    torch.manual_seed(seed)
    params, loss = task(seed)
    optimizer, seen = make(params, lr=lr), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        seen.append(value.item())
        return value

    while len(seen) < steps and (not seen or math.isfinite(seen[-1])):
        before = len(seen)
        optimizer.step(closure)
        seen[before:] = [min(seen[before:])] * (len(seen) - before)
    return seen[:steps]


def smoothed(losses: list[float]) -> Tensor:
    return torch.tensor(losses, dtype=torch.float64).unfold(0, SMOOTH, 1).mean(1)


def arrival(losses: list[float], target: float) -> float:
    """Evaluations until losses are at the target, inf if they never are."""
    if len(losses) < SMOOTH:
        return math.inf
    there = (smoothed(losses) <= target * (1 + 1e-6)).nonzero()
    return float(there[0] + SMOOTH) if len(there) else math.inf


def quiet(name: str, seeds: list[int], steps: int, contenders: list[str]) -> dict[str, object]:
    """Contender → rate, and evaluations to the target on every seed; `Adam` is at the rate that gets lowest."""
    task, rates = TASKS[name], [BEST[name] * factor for factor in (10**-0.5, 1.0, 10**0.5)]

    def run(who: str, lr: float, seed: int) -> list[float]:
        return curve(task, CONTENDERS[who], lr * (LARGER if "momentum" in who else 1), seed, steps)

    tuning = {who: {lr: run(who, lr, 0) for lr in rates} for who in contenders}
    lowest = {lr: float(smoothed(c).min()) for lr, c in tuning["Adam"].items() if len(c) == steps}
    best = min(lowest, key=lambda lr: lowest[lr])
    adam = {seed: run("Adam", best, seed) for seed in seeds}
    targets = {seed: float(smoothed(c).min()) for seed, c in adam.items()}
    found: dict[str, object] = {
        "targets": list(targets.values()),
        "Adam": [best, *(arrival(adam[seed], targets[seed]) for seed in seeds)],
    }
    for who in contenders:
        first = min(rates, key=lambda lr: (arrival(tuning[who][lr], lowest[best]), min(tuning[who][lr][-SMOOTH:])))
        ways = [run(who, first, seed) for seed in seeds]
        key = "Adam, first" if who == "Adam" else who
        found[key] = [first, *(arrival(way, targets[seed]) for way, seed in zip(ways, seeds, strict=True))]
        found[f"{key}, lowest"] = [float(smoothed(way).min()) for way in ways]
    return found


def noisy(name: str, seeds: list[int], steps: int, root: Path) -> dict[str, float]:
    """Mean training loss of the last tenth, over that of Adam, at Adam's best of three rates; and jumps."""
    script = everyday.RECIPES[name].build(Datasets(root))
    last = max(steps // 10, 1)

    def final(make: Callable[..., Optimizer], lr: float, seed: int) -> float:
        losses = train(script, lambda p, lr, steps: (make(p, lr=lr), None), lr, seed, steps).train
        return float(losses[0, -last:].mean())

    rates = (0.001, 0.003, 0.01)
    lr = min(rates, key=lambda lr: final(Adam, lr, 0))
    adam = [final(Adam, lr, seed) for seed in seeds]
    makes = {who: CONTENDERS[who] for who in ("window mean", "accelerated Adam")}
    shifted = [final(Adam, lr, seed + 100) for seed in seeds]
    ratios = {
        who: statistics.geometric_mean(final(make, lr, seed) / own for seed, own in zip(seeds, adam, strict=True))
        for who, make in makes.items()
    }
    return {
        "rate": lr,
        "Adam": statistics.fmean(adam),
        **ratios,
        "other seeds": statistics.fmean(shifted) / statistics.fmean(adam),
    }


def cost(width: int = 600, steps: int = 200) -> dict[str, float]:
    """Milliseconds of a training step of an MLP with 840,000 weights, batch 64; the two take turns."""
    times: dict[str, list[float]] = {}
    racers = []
    for who in ("Adam", "accelerated Adam"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        racers.append((who, net, CONTENDERS[who](net.parameters(), lr=1e-5)))
    x, y = torch.randn(64, 784), torch.randint(10, (64,))
    for _ in range(steps):
        for who, net, optimizer in racers:
            start = time.process_time()
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step(**({"loss": loss} if who != "Adam" else {}))
            times.setdefault(who, []).append(1000 * (time.process_time() - start))
    return {who: statistics.fmean(taken[-(len(taken) * 4 // 5) :]) for who, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tasks", nargs="+", default=None)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS)[:3], help="with Adam")
    parser.add_argument("--noisy", action="store_true", help="training scripts on minibatches instead")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--cost", action="store_true", help="only what a step takes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.cost:
        print(json.dumps(cost()))
        return
    names = args.tasks or (["friedman-mlp", "diamond-prices", "diabetes"] if args.noisy else list(TASKS))
    run = partial(noisy, root=args.data_root) if args.noisy else partial(quiet, contenders=args.contenders)
    for name in names:
        print(json.dumps({"task": name} | run(name, args.seeds, args.steps)), flush=True)


if __name__ == "__main__":
    main()
