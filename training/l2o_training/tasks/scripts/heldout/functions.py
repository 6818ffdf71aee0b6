"""Held-out scripts that fit functions: quantiles, counts, risks, distances, a field, other networks."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_training.tasks.data import Load
from l2o_training.tasks.scripts.base import Batch, Script
from l2o_training.tasks.scripts.everyday.networks import mlp
from l2o_training.tasks.scripts.tables import split, squared_error

TRAIN, VALIDATION = 8192, 1024
QUANTILES = (0.1, 0.5, 0.9)


def rows(*shape: int) -> tuple[Tensor, torch.Generator]:
    """Numbers from −1 to 1, (N, *shape), and what draws more."""
    rng = torch.Generator().manual_seed(0)
    return 2 * torch.rand(TRAIN + VALIDATION, *shape, generator=rng) - 1, rng


def pinball(model: nn.Module, batch: Batch) -> Tensor:
    """Mean of max(q e, (q − 1) e) over quantiles q, for errors e (Koenker & Bassett 1978)."""
    x, y = batch
    level, error = torch.tensor(QUANTILES), y[:, None] - model(x)
    return torch.maximum(level * error, (level - 1) * error).mean()


def quantiles(_: Load) -> Script:
    """A smooth function of four numbers, the last of which says how much noise there is."""
    x, rng = rows(4)
    noise = (0.1 + 0.5 * x[:, 3].abs()) * torch.randn(len(x), generator=rng)
    y = torch.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2] + noise
    return Script(partial(mlp, (4, 64, 64, 3), nn.ReLU), pinball, *split((x, y), VALIDATION), 64)


def deviance(model: nn.Module, batch: Batch) -> Tensor:
    """Poisson deviance 2 (y log(y/μ) − y + μ) of counts y, μ = exp of the output."""
    x, y = batch
    log_rate = model(x).squeeze(-1)
    return 2 * (torch.special.xlogy(y, y) - y * log_rate - y + log_rate.exp()).mean()  # type: ignore[no-any-return]


def counts(_: Load) -> Script:
    """Counts whose logarithm is linear in twenty features, each in its unit."""
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(TRAIN + VALIDATION, 20, generator=rng), 0.3 * torch.randn(20, generator=rng)
    y, unit = torch.poisson(torch.exp(x @ weight + 0.5), generator=rng), torch.randn(20, generator=rng).exp()
    return Script(partial(nn.Linear, 20, 1), deviance, *split((x * unit, y), VALIDATION), 64)


def partial_likelihood(model: nn.Module, batch: Batch) -> Tensor:
    """−log of the chance that it is whom it was, of all who were still there (Cox 1972), a mean over events."""
    x, time = batch
    risk = model(x[time.argsort(descending=True)]).squeeze(-1)
    return (torch.logcumsumexp(risk, 0) - risk).mean()  # type: ignore[no-any-return]


def survival(_: Load) -> Script:
    """Times of 2,000 people whose hazard is a function of ten numbers; all events are seen."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2000 + VALIDATION, 10, generator=rng)
    hazard = torch.exp(0.5 * x @ torch.randn(10, generator=rng) + torch.sin(2 * x[:, 0]))
    time = -torch.rand(len(x), generator=rng).log() / hazard

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(10, 32), nn.SELU(), nn.AlphaDropout(0.1), nn.Linear(32, 1))

    return Script(make, partial_likelihood, *split((x, time), VALIDATION), 200)


def absolute_error(model: nn.Module, batch: Batch) -> Tensor:
    """Mean absolute error of one output."""
    x, y = batch
    return F.l1_loss(model(x).squeeze(-1), y)


def distance_field(_: Load) -> Script:
    """Signed distance from a circle and a square."""
    x, _rng = rows(2)
    y = torch.minimum((x - 0.3).norm(dim=-1) - 0.3, (x + 0.3).abs().amax(-1) - 0.25)
    make = partial(mlp, (2, 128, 128, 128, 1), nn.Softplus)
    return Script(make, absolute_error, *split((x, y), VALIDATION), 256)


def field_error(model: nn.Module, batch: Batch) -> Tensor:
    """Squared error of (∂H/∂p, −∂H/∂q) for the network's H(q, p) (Greydanus et al. 2019)."""
    x, target = batch
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return F.mse_loss(torch.stack([slope[:, 1], -slope[:, 0]], -1), target)


def pendulum(_: Load) -> Script:
    """Velocity and acceleration of a pendulum, from angle and momentum."""
    x, _rng = rows(2)
    x = 2 * x
    target = torch.stack([x[:, 1], -torch.sin(x[:, 0])], -1)
    return Script(partial(mlp, (2, 64, 64, 1), nn.Tanh), field_error, *split((x, target), VALIDATION), 64)


class Hypernetwork(nn.Module):
    """An MLP gives the weights of another, one hidden layer of 16 (Ha et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp((3, 64, 64, 49), nn.ReLU)

    def forward(self, which: Tensor, x: Tensor) -> Tensor:
        """(B, 3) which function, (B, N) places → (B, N) values."""
        first, bias, second, shift = self.mlp(which)[:, None].split((16, 16, 16, 1), -1)
        return (torch.tanh(x[..., None] * first + bias) * second).sum(-1) + shift.squeeze(-1)  # type: ignore[no-any-return]


def hypernetwork(_: Load) -> Script:
    """a sin((1 + b) x) + c on sixteen places, from (a, b, c)."""
    which, rng = rows(3)
    x = 4 * torch.rand(len(which), 16, generator=rng) - 2
    y = which[:, :1] * torch.sin((1 + which[:, 1:2]) * x) + which[:, 2:]
    return Script(Hypernetwork, squared_error, *split((which, x, y), VALIDATION), 32)


def divergence(model: nn.Module, batch: Batch) -> Tensor:
    """KL divergence of the network's chances from a teacher's (Hinton et al. 2015)."""
    x, chances = batch
    return F.kl_div(model(x).log_softmax(-1), chances, reduction="batchmean")


def distillation(_: Load) -> Script:
    """A random teacher of 200 units, whose weights are drawn large."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(TRAIN + VALIDATION, 20, generator=rng)
    first, second = 0.25 * torch.randn(20, 200, generator=rng), 0.15 * torch.randn(200, 10, generator=rng)
    chances = (2 * F.relu(x @ first) @ second).softmax(-1)
    return Script(partial(mlp, (20, 32, 32, 10), nn.ReLU), divergence, *split((x, chances), VALIDATION), 64)
