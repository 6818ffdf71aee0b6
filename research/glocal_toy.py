"""Does the steady mode of the first hypergradients foretell that of the whole optimization?

Verdict: from thirty steps on, at a tolerance of 0.01; too large a tolerance is worse than no model.

Ridge regression by gradient descent: h_t is the derivative of the validation loss after t steps by the logarithm of the
weight decay, in forward mode; the truth is that at the minimum, in closed form. Local is h_τ, mean that of h_1 … h_τ.
Error is |estimate − truth| / |truth|, medians over seeds.

    python research/glocal_toy.py --seeds 20
"""

import argparse
import statistics

import torch
from torch import Tensor

from l2o_training.meta.estimators.glocal import foretell


def hypergradients(seed: int, steps: int) -> tuple[Tensor, Tensor]:
    """h_t after 1 … `steps` steps, (steps, 2), of two groups of weights, each with its own decay; and the truth."""
    rng = torch.Generator().manual_seed(seed)
    size, rows = 20, 40
    scale = torch.logspace(0, -1, size, dtype=torch.float64)
    inputs = [torch.randn(rows, size, generator=rng, dtype=torch.float64) * scale for _ in range(2)]
    weights = torch.randn(size, generator=rng, dtype=torch.float64)
    targets = [x @ weights + 0.5 * torch.randn(rows, generator=rng, dtype=torch.float64) for x in inputs]
    groups = torch.zeros(size, 2, dtype=torch.float64)
    groups[: size // 2, 0] = groups[size // 2 :, 1] = 1
    decay = groups @ torch.tensor([0.02, 0.02], dtype=torch.float64)
    hessian = inputs[0].mT @ inputs[0] / rows + decay.diag()

    def validation(theta: Tensor) -> Tensor:
        return inputs[1].mT @ (inputs[1] @ theta - targets[1]) / rows

    rate = 0.9 / float(torch.linalg.eigvalsh(hessian)[-1])
    theta, tangent, found = torch.zeros(size, dtype=torch.float64), torch.zeros(size, 2, dtype=torch.float64), []
    for _ in range(steps):
        slope = hessian @ theta - inputs[0].mT @ targets[0] / rows
        tangent = tangent - rate * (hessian @ tangent + (decay * theta)[:, None] * groups)
        theta = theta - rate * slope
        found.append(validation(theta) @ tangent)
    theta = torch.linalg.solve(hessian, inputs[0].mT @ targets[0] / rows)
    tangent = torch.linalg.solve(hessian, -(decay * theta)[:, None] * groups)
    return torch.stack(found), validation(theta) @ tangent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()
    runs = [hypergradients(seed, 100) for seed in range(args.seeds)]

    def error(estimate: Tensor, truth: Tensor) -> float:
        return float((estimate - truth).norm() / truth.norm())

    print("| τ | tolerance | local | mean | glocal | fell back |\n|---:|---:|---:|---:|---:|---:|")
    for tau in (10, 30, 100):
        for tolerance in (0.001, 0.01, 0.03, 0.1):
            foretold = [foretell(run[:tau], tolerance) for run, _ in runs]
            local = statistics.median(error(run[tau - 1], truth) for run, truth in runs)
            mean = statistics.median(error(run[:tau].mean(0), truth) for run, truth in runs)
            glocal = statistics.median(error(f.value, truth) for f, (_, truth) in zip(foretold, runs, strict=True))
            lost = sum(f.fell_back for f in foretold)
            print(f"| {tau} | {tolerance} | {local:.3f} | {mean:.3f} | {glocal:.3f} | {lost} of {args.seeds} |")


if __name__ == "__main__":
    main()
