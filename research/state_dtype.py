"""What it costs in accuracy to keep a rule's state in bfloat16: the same training, with some of the state rounded.

Verdict: little over 200 steps. With h, c and m so kept parameters end 3.0e-02 away, on other minibatches 8.7e-01, and
the loss is 0.997 of the float32 run's; v stays in float32 (`docs/performance.md`).

    python research/state_dtype.py --seeds 5 --steps 200

An MLP (64-32-10) on scikit-learn's digits, minibatches of 64. For every choice of states in bfloat16: the distance of
the parameters from those of the float32 run, relative to the way that the float32 run has come from its start, after
20 steps and at the end (median and worst of all seeds); and the mean loss of the last 10 steps relative to the float32
run's. The last row is a float32 run on other minibatches.
"""

import argparse
import statistics
import warnings

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from l2o_runtime import HorizonWarning, LearnedOptimizer
from l2o_runtime.stepping import parts

CHOICES = {"h, c": ("h", "c"), "h, c, m": ("h", "c", "m"), "h, c, m, v": ("h", "c", "m", "v")}


def train(rule: str, seed: int, steps: int, narrow: tuple[str, ...], batches: int) -> tuple[list[Tensor], float]:
    """θ before every step and at the end, and the mean loss of the last ten."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    parts.NARROW = narrow
    optimizer = LearnedOptimizer(model.parameters(), rule=rule, state_dtype=torch.bfloat16)
    rng = torch.Generator().manual_seed(batches)
    path, losses = [], []
    for _ in range(steps):
        path.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        index = torch.randint(len(images), (64,), generator=rng)
        loss = F.cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        losses.append(loss.item())
    path.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    return path, statistics.fmean(losses[-10:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", default="default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", HorizonWarning)
    torch.set_num_threads(1)
    exact = [train(arguments.rule, seed, arguments.steps, (), 1000 + seed) for seed in range(arguments.seeds)]
    print("in bfloat16 | distance at 20, median (worst) | at the end | loss over float32's, mean (largest)")
    for name, narrow, shift in [*((name, keys, 0) for name, keys in CHOICES.items()), ("other minibatches", (), 500)]:
        near, far, ratios = [], [], []
        for seed, (path, level) in enumerate(exact):
            other, reached = train(arguments.rule, seed, arguments.steps, narrow, 1000 + seed + shift)
            for found, step in ((near, min(20, arguments.steps)), (far, arguments.steps)):
                found.append(float((other[step] - path[step]).norm() / (path[step] - path[0]).norm()))
            ratios.append(reached / level)
        distances = " | ".join(f"{statistics.median(found):.1e} ({max(found):.1e})" for found in (near, far))
        print(f"{name} | {distances} | {statistics.fmean(ratios):.3f} ({max(ratios):.3f})", flush=True)


if __name__ == "__main__":
    main()
