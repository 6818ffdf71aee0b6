"""How far does a search of few numbers get with few optimizations: by ranks, or with a surrogate of the loss?

Verdict: with a surrogate further, at every budget that was tried, most with few optimizations; so `specialise` searches
with one: docs/decisions/0129-a-surrogate-says-where-to-go-on.md.

    python research/search.py

Losses are invented, as log losses of nine numbers around zero might be: a bowl with mixed axes, steep walls on one side
and in one direction, noise of every optimization, and what those of an update have in common. A row per budget: the
share of what there was to gain that is left, mean and median over problems.
"""

import argparse
import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from l2o_training.config import load_preset
from l2o_training.meta.estimators import make_estimator

BUDGETS = ((4, 4), (7, 4), (22, 8))
"""Updates, and perturbations in each, as twenty minutes hold them of steps of ten, three and one milliseconds."""

NOISES = (0.015, 0.07)
"""Of a log loss: a character model's on two instances, and LeNet's."""

COMMON = 0.1
"""What log losses of an update share."""

CURVATURES = torch.tensor([0.4, 0.15, 0.2, 0.25, 0.1, 0.15, 0.15, 0.28, 0.1], dtype=torch.float64)
DISTANCES = torch.tensor([0.2, 0.3, 0.3, 0.2, 0.2, 0.6, 0.3, 0.7, 0.5], dtype=torch.float64)
"""Of the size, four directions, four places; as single numbers were found to matter on two tasks."""


def problem(rng: torch.Generator) -> Callable[[Tensor], float]:
    """A log loss of nine numbers, 0 at its lowest."""
    count = len(CURVATURES)
    mixed, scales, target, wall = torch.randn(4, count, count, generator=rng, dtype=torch.float64).unbind()
    axes = torch.linalg.qr(torch.eye(count, dtype=torch.float64) + 0.25 * mixed)[0]
    hessian = axes @ torch.diag(CURVATURES * (0.5 * scales[0]).exp()) @ axes.T
    best, normal = target[0] * DISTANCES, wall[0] / wall[0].norm()

    def loss(point: Tensor) -> float:
        off = point.double() - best
        steep = 0.6 * max(0.0, -0.3 - float(point[3])) + 2 * max(0.0, float(normal @ point.double()) - 1) ** 2
        return 0.5 * float(off @ hessian @ off) + steep

    return loss


def searched(estimator: str, updates: int, particles: int, noise: float, seed: int) -> tuple[float, float]:
    """The log loss where a search ends, and where it began."""
    rng = torch.Generator().manual_seed(seed)
    loss = problem(rng)
    words = [f"estimator={estimator}", f"particles={particles}", "lanes=1", "objective=loss", f"seed={seed}"]
    made, slot, outer = make_estimator(load_preset("specialise", words)), SimpleNamespace(number=0), nn.Module()
    outer.numbers = nn.Parameter(torch.zeros(len(CURVATURES)))
    for slot.number in range(updates):
        common = COMMON * torch.randn((), generator=rng).item()
        ends = []
        for epsilon in made.perturbations(outer, slot):
            scatter = noise * torch.randn((), generator=rng).item()
            ends.append(math.exp(loss(outer.numbers.detach() + epsilon) + common + scatter))
        with torch.no_grad():
            outer.numbers -= made.gradient(outer, [slot], torch.tensor(ends, dtype=torch.float64))
    return loss(outer.numbers.detach()), loss(torch.zeros(len(CURVATURES)))


def main() -> None:
    """Run both searches on all budgets."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--problems", type=int, default=50)
    problems = found.parse_args().problems
    for noise in NOISES:
        for updates, particles in BUDGETS:
            for estimator in ("cem", "surrogate"):
                ends = [searched(estimator, updates, particles, noise, seed) for seed in range(problems)]
                end, start = torch.tensor(ends).unbind(1)
                left = f"{end.mean() / start.mean():.2f}\t{(end / start).median():.2f}"
                print(f"noise {noise}\t{updates} updates of {particles}\t{estimator}\t{left}", flush=True)


if __name__ == "__main__":
    main()
