"""Networks of training scripts, plainly written, with PyTorch's default initialisation.

No meta-training sees them: its networks are those of `l2o_training.tasks.networks`.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_training.tasks.networks import encoder


def deep_mlp(inputs: int, width: int, depth: int, classes: int) -> nn.Sequential:
    """`depth` hidden layers of `width` ReLUs."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise((inputs, *[width] * depth)):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def convnet(channels: tuple[int, ...], classes: int) -> nn.Sequential:
    """3×3 convolutions of stride 2 with ReLU, the mean over positions, a linear layer."""
    layers: list[nn.Module] = []
    for before, after in pairwise((3, *channels)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))


def convnet_batchnorm(channels: tuple[int, int], side: int, classes: int) -> nn.Sequential:
    """Two 3×3 convolutions of stride 2 with BatchNorm and ReLU, a linear layer.

    The convolutions have biases, as torch makes them by default. BatchNorm takes them off again, so that their
    gradients are rounding alone; what carries them away is seen in evaluation mode only.
    """
    first, second = channels
    return nn.Sequential(
        *(nn.Conv2d(1, first, 3, stride=2, padding=1), nn.BatchNorm2d(first), nn.ReLU()),
        *(nn.Conv2d(first, second, 3, stride=2, padding=1), nn.BatchNorm2d(second), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(second * (side // 4) ** 2, classes)),
    )


def cnn() -> nn.Sequential:
    """Two 3×3 convolutions and two linear layers for MNIST, 1.2 million parameters, as torch's example has them."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 12 * 12, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


class Residual(nn.Module):
    """x + f(x).

    Args:
        layers: f, one after the other.
    """

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.f = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of x."""
        return x + self.f(x)  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with GroupNorm beside a shortcut, 1×1 where shapes differ (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(4, after), nn.GroupNorm(4, after)])
        self.shortcut = (
            nn.Identity() if (before, stride) == (after, 1) else nn.Conv2d(before, after, 1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, h, w) → (B, after, h/stride, w/stride)."""
        inner = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(inner)) + self.shortcut(x))


def resnet(width: int, classes: int) -> nn.Sequential:
    """A stem and three residual blocks of width, 2 × width and 2 × width channels, strides 1, 2 and 2."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        ResidualBlock(width, width, 1),
        ResidualBlock(width, 2 * width, 2),
        ResidualBlock(2 * width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


class ViT(nn.Module):
    """Vision transformer: patches with learned positions, and the mean over tokens (Dosovitskiy et al. 2021)."""

    def __init__(self, channels: int, side: int, patch: int, width: int, heads: int, depth: int, classes: int):
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))
        self.encoder = encoder(width, heads, depth)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, images: Tensor) -> Tensor:
        """(B, c, h, w) → (B, classes)."""
        tokens = self.embed(images).flatten(2).mT + self.positions
        return self.head(self.encoder(tokens).mean(1))  # type: ignore[no-any-return]


class MixerBlock(nn.Module):
    """An MLP across tokens, then one across channels (Tolstikhin et al. 2021)."""

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.across = nn.Sequential(nn.Linear(tokens, tokens), nn.GELU(), nn.Linear(tokens, tokens))
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) → the same."""
        x = x + self.across(self.norms[0](x).mT).mT
        return x + self.within(self.norms[1](x))  # type: ignore[no-any-return]


class Mixer(nn.Module):
    """MLP-Mixer over patches."""

    def __init__(self, channels: int, side: int, patch: int, width: int, depth: int, classes: int):
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(MixerBlock((side // patch) ** 2, width) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, images: Tensor) -> Tensor:
        """(B, c, h, w) → (B, classes)."""
        return self.head(self.blocks(self.embed(images).flatten(2).mT).mean(1))  # type: ignore[no-any-return]


def autoencoder(inputs: int, hidden: int, code: int) -> nn.Sequential:
    """A tanh bottleneck between two ReLU layers, pixels through a sigmoid."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, code), nn.Tanh()),
        *(nn.Linear(code, hidden), nn.ReLU(), nn.Linear(hidden, inputs), nn.Sigmoid()),
    )


class VAE(nn.Module):
    """A variational autoencoder with a normal latent (Kingma & Welling 2014)."""

    def __init__(self, inputs: int, hidden: int, latent: int):
        super().__init__()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decode = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, inputs))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of pixels (B, inputs), mean and log-variance (B, latent); the mean is decoded in evaluation mode."""
        mean, log_variance = self.encode(images).chunk(2, -1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return self.decode(mean + noise * (0.5 * log_variance).exp()), mean, log_variance


class Factorisation(nn.Module):
    """Ratings as inner products of two embeddings, with biases."""

    def __init__(self, users: int, items: int, rank: int):
        super().__init__()
        self.users, self.items = nn.Embedding(users, rank), nn.Embedding(items, rank)
        self.user_bias, self.item_bias = nn.Embedding(users, 1), nn.Embedding(items, 1)

    def forward(self, pairs: Tensor) -> Tensor:
        """(B, 2) user and item → ratings (B,)."""
        user, item = pairs.unbind(-1)
        biases = self.user_bias(user) + self.item_bias(item)
        return (self.users(user) * self.items(item)).sum(-1) + biases.squeeze(-1)  # type: ignore[no-any-return]


class Tabular(nn.Module):
    """Numbers and embedded categories through two SiLU layers with LayerNorm to one number."""

    def __init__(self, numbers: int, categories: tuple[int, ...], width: int, hidden: int):
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(count, width) for count in categories)
        inputs = numbers + width * len(categories)
        self.layers = nn.Sequential(
            *(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.SiLU()),
            *(nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.SiLU(), nn.Linear(hidden, 1)),
        )

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """(B, numbers) and (B, categories) → (B,)."""
        parts = [embed(column) for embed, column in zip(self.embed, categories.unbind(-1), strict=True)]
        return self.layers(torch.cat([numbers, *parts], -1)).squeeze(-1)  # type: ignore[no-any-return]
