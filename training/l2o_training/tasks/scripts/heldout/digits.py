"""Held-out scripts on scikit-learn's 1,797 digits of 8 × 8 pixels."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_training.tasks.data import Load
from l2o_training.tasks.scripts.base import Batch, Script
from l2o_training.tasks.scripts.everyday.networks import mlp
from l2o_training.tasks.scripts.everyday.tables import arrays, shuffled
from l2o_training.tasks.scripts.images import cross_entropy, reconstruction
from l2o_training.tasks.scripts.tables import split

VALIDATION = 297
ADAPTER_RANK, PRETRAINED = 4, 200


def examples() -> Batch:
    """Images (N, 1, 8, 8) from 0 to 1, and labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = shuffled(*arrays(found.images / 16, found.target))
    return images[:, None], labels.long()


def script(
    make: Callable[[], nn.Module], loss: Callable[[nn.Module, Batch], Tensor], batch: int, *, labels: bool = False
) -> Script:
    """Digits with or without their labels."""
    return Script(make, loss, *split(examples() if labels else examples()[:1], VALIDATION), batch)


class Projected(nn.Module):
    """An MLP with BatchNorm; what it gives has length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp((64, 128, 128, 32), nn.ReLU, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) → (B, 32)."""
        return F.normalize(self.mlp(x), dim=-1)


def agreement(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of which noisy image belongs to which with holes, both ways (Chen et al. 2020)."""
    (images,) = batch
    noisy, holed = images + 0.3 * torch.randn_like(images), images * (torch.rand_like(images) > 0.3)
    logits, own = model(noisy) @ model(holed).T / 0.2, torch.arange(len(images))
    return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))


def contrastive(_: Load) -> Script:
    """Two views of a digit are to be alike."""
    return script(Projected, agreement, 128)


class UNet(nn.Module):
    """Down by 2 and up again, with a shortcut (Ronneberger et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
        self.down, self.deep = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) → (B, 1, 8, 8)."""
        fine = F.relu(self.first(x))
        coarse = F.relu(self.up(F.relu(self.deep(F.relu(self.down(fine))))))
        return self.out(F.relu(self.last(torch.cat([fine, coarse], 1))))  # type: ignore[no-any-return]


def cleaned(model: nn.Module, batch: Batch) -> Tensor:
    """Squared error of digits without the noise that is drawn."""
    (images,) = batch
    return F.mse_loss(model(images + 0.5 * torch.randn_like(images)), images)


def denoiser(_: Load) -> Script:
    """Digits with as much noise as ink."""
    return script(UNet, cleaned, 32)


class Gated(nn.Module):
    """A depthwise and a pointwise convolution, channels gated by their means (Hu et al. 2018), and a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm, self.pointwise = nn.GroupNorm(4, channels), nn.Conv2d(channels, channels, 1)
        self.gate = mlp((channels, channels // 4, channels), nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) → the same."""
        hidden = F.gelu(self.pointwise(self.norm(self.depthwise(x))))
        return x + hidden * self.gate(hidden.mean((2, 3))).sigmoid()[..., None, None]  # type: ignore[no-any-return]


def gated_network() -> nn.Module:
    """Two gated blocks of 24 channels."""
    return nn.Sequential(
        *(nn.Conv2d(1, 24, 3, padding=1), Gated(24), nn.MaxPool2d(2), Gated(24)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)),
    )


def squeeze_excite(_: Load) -> Script:
    """Which digit it is."""
    return script(gated_network, cross_entropy, 32, labels=True)


def sigmoid_autoencoder(_: Load) -> Script:
    """Sigmoids as before 2010."""
    return script(partial(mlp, (64, 128, 32, 8, 32, 128, 64), nn.Sigmoid), reconstruction, 64)


class Adapted(nn.Module):
    """A frozen layer and a trained product of low rank, zero at first (Hu et al. 2021)."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = nn.Linear(layer.in_features, layer.out_features)
        self.layer.load_state_dict(layer.state_dict())
        self.layer.requires_grad_(requires_grad=False)
        self.down = nn.Parameter(torch.randn(ADAPTER_RANK, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, ADAPTER_RANK))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) → (B, outputs)."""
        return self.layer(x) + x @ self.down.T @ self.up.T  # type: ignore[no-any-return]


def pretrained() -> nn.Sequential:
    """An MLP after some steps of Adam on the digits from 0 to 4."""
    (images, labels), _ = split(examples(), VALIDATION)
    images, labels = images[labels < 5], labels[labels < 5]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        network = mlp((64, 128, 128, 10), nn.ReLU)
        optimizer = torch.optim.Adam(network.parameters())
        for _step in range(PRETRAINED):
            rows = torch.randint(len(labels), (64,))
            optimizer.zero_grad()
            cross_entropy(network, (images[rows], labels[rows])).backward()
            optimizer.step()
    return network


def adapted(network: nn.Sequential) -> nn.Module:
    """The network with an adapter at every linear layer."""
    return nn.Sequential(*(Adapted(layer) if isinstance(layer, nn.Linear) else layer for layer in network))


def adapters(_: Load) -> Script:
    """All ten digits, after five of them."""
    return script(partial(adapted, pretrained()), cross_entropy, 64, labels=True)
