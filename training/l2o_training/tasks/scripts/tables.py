"""Training scripts on numbers that are drawn from a seed: ratings, a table, least squares."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_training.tasks import modules
from l2o_training.tasks.data import Load
from l2o_training.tasks.scripts.base import Batch, Script

USERS, ITEMS = 300, 200
CATEGORIES = (5, 12, 30)


def split(batch: Batch, validation: int) -> tuple[Batch, Batch]:
    """The first examples to validate on, the others to train on."""
    return tuple(tensor[validation:] for tensor in batch), tuple(tensor[:validation] for tensor in batch)


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error; the last tensor of the batch is the target."""
    *inputs, target = batch
    return F.mse_loss(model(*inputs).view_as(target), target)


def factorisation(_: Load) -> Script:
    """20,000 noisy ratings of rank 4 with biases; popular users and items are seen more often."""
    rng = torch.Generator().manual_seed(1)
    users, items = torch.randn(USERS, 5, generator=rng), torch.randn(ITEMS, 5, generator=rng)
    user = (USERS * torch.rand(20_000, generator=rng).square()).long()
    item = (ITEMS * torch.rand(20_000, generator=rng).square()).long()
    rating = (users[user, :4] * items[item, :4]).sum(-1) / 2 + 0.5 * (users[user, 4] + items[item, 4])
    rating = rating + 0.3 * torch.randn(20_000, generator=rng)
    parts = split((torch.stack([user, item], -1), rating), 1000)
    return Script(partial(modules.Factorisation, USERS, ITEMS, 8), squared_error, *parts, 128)


def tabular(_: Load) -> Script:
    """Ten numbers of very different scale and tails, three categories; the target is non-linear in five and two."""
    rng = torch.Generator().manual_seed(2)
    x = torch.rand(6000, 10, generator=rng)
    codes = torch.stack([torch.randint(count, (6000,), generator=rng) for count in CATEGORIES], -1)
    effects = [torch.randn(count, generator=rng) for count in CATEGORIES]
    target = 10 * torch.sin(torch.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5).square() + 10 * x[:, 3] + 5 * x[:, 4]
    target = target + 2 * effects[0][codes[:, 0]] + 3 * x[:, 5] * effects[1][codes[:, 1]]
    target = target + torch.randn(6000, generator=rng)
    numbers = torch.cat([x[:, :5] - 0.5, -x[:, 5:].clamp_min(1e-4).log()], -1) * torch.logspace(-1, 1, 10)
    parts = split((numbers, codes, (target - target.mean()) / target.std()), 600)
    return Script(partial(modules.Tabular, 10, CATEGORIES, 4, 32), squared_error, *parts, 64)


def least_squares(_: Load) -> Script:
    """100 features, rotated, whose variances fall from 1 to 1e-4: a Hessian of condition 10⁴."""
    rng = torch.Generator().manual_seed(3)
    rotation, _r = torch.linalg.qr(torch.randn(100, 100, generator=rng))
    deviations = torch.logspace(0, -2, 100)
    latent = torch.randn(5000, 100, generator=rng)
    # The weights are larger where the variance is small, so that every direction counts alike in the loss.
    target = latent.sum(-1) / 10 + 0.05 * torch.randn(5000, generator=rng)
    features = (latent * deviations) @ rotation.T
    parts = split((features, target), 500)
    return Script(partial(nn.Linear, 100, 1), squared_error, *parts, 32)
