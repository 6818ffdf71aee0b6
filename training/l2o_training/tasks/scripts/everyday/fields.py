"""Everyday scripts that fit functions: of space, a photograph and the heat equation, and of time, an oscillation."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_training.tasks.data import Load
from l2o_training.tasks.scripts.base import Batch, Script
from l2o_training.tasks.scripts.everyday import networks
from l2o_training.tasks.scripts.tables import split, squared_error

SIDE, SHRINK = 64, 6
POINTS, VALIDATION = 8192, 1024
DIFFUSION = 0.2
"""α of the heat equation u_t = α u_xx."""


def siren(_: Load) -> Script:
    """Grey values of pixels from their places in the square from −1 to 1; one pixel in eight is held out."""
    from sklearn.datasets import load_sample_image

    photograph = torch.tensor(load_sample_image("china.jpg"), dtype=torch.float32).mean(-1) / 127.5 - 1
    cut = SIDE * SHRINK
    grey = F.avg_pool2d(photograph[:cut, :cut][None], SHRINK)[0]
    axis = torch.linspace(-1, 1, SIDE)
    places = torch.cartesian_prod(axis, axis)
    order = torch.randperm(SIDE * SIDE, generator=torch.Generator().manual_seed(0))
    parts = split((places[order], grey.flatten()[order]), SIDE * SIDE // 8)
    return Script(partial(networks.siren, 2, 64, 3), squared_error, *parts, 512)


def solution(x: Tensor, t: Tensor) -> Tensor:
    """u with u_t = α u_xx, u(x, 0) = sin πx and u(0, t) = u(1, t) = 0."""
    return torch.exp(-DIFFUSION * math.pi**2 * t) * torch.sin(math.pi * x)


def residuals(model: nn.Module, batch: Batch) -> Tensor:
    """Squared residuals of equation, initial values and boundary; in evaluation mode the squared error of u.

    Source: Raissi et al. 2019.

    Args:
        model: (N, 2) points (x, t) → (N, 1) u.
        batch: the points.
    """
    (points,) = batch
    x, t = points.unbind(-1)
    if not model.training:
        return F.mse_loss(model(points).squeeze(-1), solution(x, t))
    inside = points.clone().requires_grad_()
    u = model(inside).squeeze(-1)
    (slope,) = torch.autograd.grad(u.sum(), inside, create_graph=True)
    (bend,) = torch.autograd.grad(slope[:, 0].sum(), inside, create_graph=True)
    equation = slope[:, 1] - DIFFUSION * bend[:, 0]
    start = model(torch.stack([x, torch.zeros_like(t)], -1)).squeeze(-1) - torch.sin(math.pi * x)
    edge = model(torch.stack([(x > 0.5).float(), t], -1))
    return equation.square().mean() + start.square().mean() + edge.square().mean()  # type: ignore[no-any-return]


def oscillation(_: Load) -> Script:
    """400 noisy readings of 800 exp(−0.05 t) cos 0.6 t + 30, from t = 0 to 50."""
    rng = torch.Generator().manual_seed(0)
    time = 50 * torch.rand(450, 1, generator=rng)
    reading = 800 * torch.exp(-0.05 * time) * torch.cos(0.6 * time) + 30 + 5 * torch.randn(450, 1, generator=rng)
    return Script(networks.Oscillation, squared_error, *split((time, reading), 50), 100)


def heat(_: Load) -> Script:
    """Points of the unit square; their x serve at the beginning of time, and their t on the edges."""
    points = torch.rand(POINTS + VALIDATION, 2, generator=torch.Generator().manual_seed(0))
    return Script(partial(networks.mlp, (2, 32, 32, 32, 1), nn.Tanh), residuals, *split((points,), VALIDATION), 128)
