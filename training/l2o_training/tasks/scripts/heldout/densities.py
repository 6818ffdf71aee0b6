"""Held-out scripts that fit densities: a flow, mixtures, diffusion, and a Gaussian process."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_training.tasks.data import Load
from l2o_training.tasks.scripts.base import Batch, Script
from l2o_training.tasks.scripts.everyday.networks import mlp
from l2o_training.tasks.scripts.tables import split

POINTS, VALIDATION = 8192, 1024
NOISE_LEVELS = 100
"""Of the diffusion."""


def moons() -> tuple[Batch, Batch]:
    """Points (N, 2) on two half circles with a little noise."""
    from sklearn.datasets import make_moons

    points, _labels = make_moons(POINTS + VALIDATION, noise=0.1, random_state=0)
    return split((torch.tensor(points, dtype=torch.float32),), VALIDATION)


class Coupling(nn.Module):
    """One coordinate scaled and shifted by what the other says (Dinh et al. 2017)."""

    def __init__(self, first: bool):
        super().__init__()
        self.first = first
        self.net = mlp((1, 64, 64, 2), nn.ReLU)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 2) → (B, 2), and the logarithm of the determinant (B,)."""
        kept, moved = x.split(1, -1) if self.first else x.flip(-1).split(1, -1)
        log_scale, shift = self.net(kept).split(1, -1)
        log_scale = log_scale.tanh()
        parts = [kept, moved * log_scale.exp() + shift]
        return torch.cat(parts if self.first else parts[::-1], -1), log_scale.squeeze(-1)


class Flow(nn.Module):
    """Couplings in turn, from data to N(0, 1)."""

    def __init__(self, couplings: int):
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(index % 2 == 0) for index in range(couplings))

    def forward(self, x: Tensor) -> Tensor:
        """Negative log density (B,) of points (B, 2)."""
        volume = torch.zeros(len(x))
        for coupling in self.couplings:
            x, log_scale = coupling(x)
            volume = volume + log_scale
        return 0.5 * x.square().sum(-1) + math.log(2 * math.pi) - volume


def mean_output(model: nn.Module, batch: Batch) -> Tensor:
    """Of a network that gives every example's loss."""
    return model(*batch).mean()  # type: ignore[no-any-return]


def flow(_: Load) -> Script:
    """Two moons."""
    return Script(partial(Flow, 6), mean_output, *moons(), 128)


def mixture_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log likelihood of a mixture density network (Bishop 1994)."""
    x, y = batch
    logits, mean, log_deviation = model(x).chunk(3, -1)
    log_density = -0.5 * ((y - mean) / log_deviation.exp()).square() - log_deviation - 0.5 * math.log(2 * math.pi)
    return -torch.logsumexp(F.log_softmax(logits, -1) + log_density, -1).mean()


def mixture_density(_: Load) -> Script:
    """y from x = y + 0.3 sin 2πy and noise, y from 0 to 1, in tenths: in the middle there are three answers."""
    rng = torch.Generator().manual_seed(0)
    y = torch.rand(POINTS + VALIDATION, 1, generator=rng)
    x = y + 0.3 * torch.sin(2 * math.pi * y) + 0.05 * torch.randn(y.shape, generator=rng)
    return Script(partial(mlp, (1, 64, 64, 15), nn.Tanh), mixture_loss, *split((x, 10 * y), VALIDATION), 128)


class Mixture(nn.Module):
    """Gaussians with diagonal covariances, anywhere at first."""

    def __init__(self, components: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.mean = nn.Parameter(torch.randn(components, 2))
        self.log_deviation = nn.Parameter(torch.zeros(components, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Negative log density (B,) of points (B, 2)."""
        distance = (x[:, None] - self.mean) / self.log_deviation.exp()
        log_density = -(0.5 * distance.square() + self.log_deviation).sum(-1) - math.log(2 * math.pi)
        return -torch.logsumexp(self.logits.log_softmax(-1) + log_density, -1)


def gaussian_mixture(_: Load) -> Script:
    """Eight clouds of different width."""
    rng = torch.Generator().manual_seed(0)
    centre, deviation = 3 * torch.randn(8, 2, generator=rng), 0.1 + 0.5 * torch.rand(8, 1, generator=rng)
    which = torch.randint(8, (POINTS + VALIDATION,), generator=rng)
    points = centre[which] + deviation[which] * torch.randn(len(which), 2, generator=rng)
    return Script(partial(Mixture, 8), mean_output, *split((points,), VALIDATION), 256)


class Denoiser(nn.Module):
    """Residual layers that see the noise level by an embedding."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.place, self.level = nn.Linear(2, width), nn.Embedding(NOISE_LEVELS, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """(B, 2) points, (B,) levels → (B, 2) noise."""
        hidden = self.place(x) + self.level(level)
        for layer in self.layers:
            hidden = hidden + layer(F.silu(hidden))
        return self.out(F.silu(hidden))  # type: ignore[no-any-return]


def noise_error(model: nn.Module, batch: Batch) -> Tensor:
    """Squared error of the noise in points at levels that are drawn (Ho et al. 2020, equation 14)."""
    (points,) = batch
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.06, NOISE_LEVELS), 0)
    level = torch.randint(NOISE_LEVELS, (len(points),))
    share, noise = kept[level, None], torch.randn_like(points)
    return F.mse_loss(model(share.sqrt() * points + (1 - share).sqrt() * noise, level), noise)


def diffusion(_: Load) -> Script:
    """Two moons."""
    return Script(partial(Denoiser, 128, 3), noise_error, *moons(), 256)


class Kernel(nn.Module):
    """Squared exponential and noise, all 1 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance, self.log_length, self.log_noise = (nn.Parameter(torch.zeros(())) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative log marginal likelihood of readings (N,) at places (N,), per reading."""
        distance = (x[:, None] - x) / self.log_length.exp()
        covariance = self.log_variance.exp() * torch.exp(-0.5 * distance.square())
        factor = torch.linalg.cholesky(covariance + (1e-4 + self.log_noise.exp()) * torch.eye(len(x)))
        white = torch.linalg.solve_triangular(factor, y[:, None], upper=False)
        total = 0.5 * white.square().sum() + factor.diagonal().log().sum()
        return total / len(x) + 0.5 * math.log(2 * math.pi)  # type: ignore[no-any-return]


def gaussian_process(_: Load) -> Script:
    """96 readings of a smooth function with noise of deviation one half; a third of them validates."""
    rng = torch.Generator().manual_seed(0)
    x = 10 * torch.rand(96, generator=rng)
    covariance = 2 * torch.exp(-0.5 * ((x[:, None] - x) / 1.5).square()) + 0.25 * torch.eye(96)
    y = torch.linalg.cholesky(covariance) @ torch.randn(96, generator=rng)
    return Script(Kernel, mean_output, *split((x, y), 32), 64)
