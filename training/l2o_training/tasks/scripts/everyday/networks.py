"""Networks of the everyday scripts, with PyTorch's default initialisation where the network has none of its own."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_training.tasks.modules import Residual


def mlp(
    sizes: tuple[int, ...], activation: Callable[[], nn.Module], *, norm: bool = False, dropout: float = 0.0
) -> nn.Sequential:
    """Linear layers, and between them BatchNorm, activation and dropout."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes[:-1]):
        layers.append(nn.Linear(before, after))
        layers += [nn.BatchNorm1d(after)] * norm
        layers.append(activation())
        layers += [nn.Dropout(dropout)] * (dropout > 0)
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def plain(sizes: tuple[int, ...]) -> nn.Sequential:
    """`mlp` with ReLU, weights that keep the size of signals (He et al. 2015) and no biases at first."""
    network = mlp(sizes, nn.ReLU)
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return network


class Oscillation(nn.Module):
    """a exp(−b t) cos ω t + c: four scalars, each with a unit of its own, beginning with a guess."""

    def __init__(self) -> None:
        super().__init__()
        self.amplitude, self.decay, self.frequency, self.offset = (
            nn.Parameter(torch.tensor(value)) for value in (500.0, 0.02, 0.58, 0.0)
        )

    def forward(self, t: Tensor) -> Tensor:
        """(B, 1) → (B, 1)."""
        return self.amplitude * torch.exp(-self.decay * t) * torch.cos(self.frequency * t) + self.offset


class NGrams(nn.Module):
    """Logits of what comes after a few characters: a weight for each pair of characters and place, zero at first."""

    def __init__(self, characters: int, length: int):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(characters, characters) for _ in range(length))
        for table in self.parameters():
            nn.init.zeros_(table)

    def forward(self, x: Tensor) -> Tensor:
        """(B, length) characters → (B, characters)."""
        return torch.stack([table(x[:, place]) for place, table in enumerate(self.tables)]).sum(0)


def lenet() -> nn.Sequential:
    """LeNet-5 with tanh and average pooling, as it is usually written (LeCun et al. 1998)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)),
    )


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with biases and BatchNorm beside a shortcut, 1×1 where shapes differ (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.BatchNorm2d(after))
        self.second = nn.Sequential(nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after))
        self.shortcut = (
            nn.Identity()
            if (before, stride) == (after, 1)
            else nn.Sequential(nn.Conv2d(before, after, 1, stride=stride), nn.BatchNorm2d(after))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, h, w) → (B, after, h/stride, w/stride)."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def resnet(width: int, classes: int) -> nn.Sequential:
    """A stem and three residual blocks of width, 2 × width and 4 × width channels, strides 1, 2 and 2."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        ResidualBlock(width, width, 1),
        ResidualBlock(width, 2 * width, 2),
        ResidualBlock(2 * width, 4 * width, 2),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes)),
    )


class ChannelsLast(nn.Module):
    """Layers that act on channels, at every position: (B, c, h, w) → (B, c', h, w).

    Args:
        layers: of (…, c), one after the other.
    """

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape that the layers give."""
        return self.layers(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def convnext_block(width: int) -> Residual:
    """A 7×7 convolution of each channel, LayerNorm, and an MLP across channels (Liu et al. 2022)."""
    return Residual(
        nn.Conv2d(width, width, 7, padding=3, groups=width),
        ChannelsLast(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
    )


def convnext(width: int, depth: int, classes: int) -> nn.Sequential:
    """Patches of 2×2 pixels, blocks, LayerNorm of the mean over positions."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 2, stride=2), ChannelsLast(nn.LayerNorm(width))),
        *(convnext_block(width) for _ in range(depth)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(width), nn.Linear(width, classes)),
    )


def conv_autoencoder(code: int) -> nn.Sequential:
    """Two convolutions of stride 2, a linear code, and back: (B, 1, 28, 28) → (B, 784)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 49, code), nn.Linear(code, 32 * 49), nn.ReLU(), nn.Unflatten(1, (32, 7, 7))),
        *(nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), nn.ReLU()),
        *(nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1), nn.Flatten()),
    )


class CharLSTM(nn.Module):
    """An LSTM over characters with dropout: every position predicts the next one."""

    def __init__(self, characters: int, width: int, hidden: int, dropout: float):
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden, characters))

    def forward(self, text: Tensor) -> Tensor:
        """(B, length) → (B, length, characters)."""
        return self.head(self.lstm(self.embed(text))[0])  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A causal pre-norm transformer with MLPs of four times its width (Radford et al. 2019)."""

    def __init__(self, characters: int, length: int, width: int, heads: int, depth: int, dropout: float):
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, characters)
        self.register_buffer("mask", torch.triu(torch.ones(length, length, dtype=torch.bool), 1), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        """(B, length) → (B, length, characters)."""
        hidden = self.embed(text) + self.positions
        return self.head(self.blocks(hidden, mask=self.mask, is_causal=True))  # type: ignore[no-any-return]


class Sine(nn.Module):
    """sin(30 (Wx + b)), with the initial weights that keep its distribution through the layers.

    Source: Sitzmann et al. 2020, section 3.2.
    """

    FREQUENCY = 30.0

    def __init__(self, inputs: int, outputs: int, *, first: bool = False):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        bound = 1 / inputs if first else math.sqrt(6 / inputs) / self.FREQUENCY
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) → (…, outputs)."""
        return torch.sin(self.FREQUENCY * self.linear(x))


def siren(inputs: int, width: int, depth: int) -> nn.Sequential:
    """`depth` layers of sines, and a linear one."""
    layers = [Sine(width, width) for _ in range(depth - 1)]
    return nn.Sequential(Sine(inputs, width, first=True), *layers, nn.Linear(width, 1))
