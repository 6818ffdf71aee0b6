"""A variational autoencoder of scikit-learn's digits: three of the ten classes every time."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

DIGITS = load_digits()
IMAGES, LABELS = torch.tensor(DIGITS.data).float() / 16, torch.tensor(DIGITS.target)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8))
        self.decode = nn.Sequential(nn.Linear(4, 48), nn.ReLU(), nn.Linear(48, 64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_variance = self.encode(x).chunk(2, -1)
        noise = torch.randn_like(mean)
        return self.decode(mean + noise * (0.5 * log_variance).exp()), mean, log_variance


def make(seed: int) -> tuple[nn.Module, object]:
    images = IMAGES[torch.isin(LABELS, torch.randperm(10)[:3])]

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        x = images[torch.randint(len(images), (32,))]
        logits, mean, log_variance = model(x)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean()
        return (F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1).mean() + divergence) / 64

    return VAE(), loss
