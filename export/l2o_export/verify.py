"""Does an exported file do what the rule does? A real optimization, run with both."""

import os
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from l2o_runtime.optimizer import LearnedOptimizer

STEPS = 200
TOLERANCE = 1e-4


def trajectory(rule: Path, steps: int = STEPS) -> list[torch.Tensor]:
    """Parameters after every step of a small classifier trained with `rule`.

    A 12-16-4 network with tanh on minibatches of 32 out of 512 labelled points of a fixed random teacher, with the
    loss passed to every other step, so that both ways of calling `step` are in it. Two inputs are always zero, like the
    border of an image: their weights never get a gradient.

    Compiled kernels are off: a rule that amplifies rounding would part from its own file because of theirs.
    """
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 12, generator=rng)
    inputs[:, :2] = 0
    labels = (inputs @ torch.randn(12, 4, generator=rng)).argmax(-1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = LearnedOptimizer(model.parameters(), rule=rule)
    seen = []
    for step in range(steps):
        index = torch.randint(len(inputs), (32,), generator=rng)
        loss = F.cross_entropy(model(inputs[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        with warnings.catch_warnings(), mock.patch.dict(os.environ, L2O_KERNELS="plain"):
            warnings.simplefilter("ignore", UserWarning)  # parity is asked for beyond the horizon, and without the loss
            optimizer.step(loss=loss if step % 2 else None)
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    return seen


def parity(reference: list[torch.Tensor], other: list[torch.Tensor]) -> list[float]:
    """Relative distance ‖θ − θ'‖ / ‖θ‖ after every step; infinite where either is not finite."""
    pairs = zip(reference, other, strict=True)
    distances = [float((a - b).norm() / a.norm().clamp_min(1e-12)) for a, b in pairs]
    return [d if d == d else float("inf") for d in distances]


def part_at(distances: list[float], tolerance: float = TOLERANCE) -> int | None:
    """First step (from 1) after which two trajectories are further apart than `tolerance`, if any."""
    return next((step for step, d in enumerate(distances, 1) if d > tolerance), None)
