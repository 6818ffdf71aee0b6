"""A SIREN for every picture: sine networks that learn 24×24 pieces of scikit-learn's sample images by heart."""

import torch
from sklearn.datasets import load_sample_images
from torch import nn

IMAGES = [torch.tensor(image).float().mean(-1) / 127.5 - 1 for image in load_sample_images().images]
SIDE = 24
PLACES = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, SIDE)] * 2, indexing="ij"), -1).view(-1, 2)


class Sine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(15 * x)


def make(seed: int) -> tuple[nn.Module, object]:
    rng = torch.Generator().manual_seed(seed)
    image = IMAGES[seed % 2]
    top, left = (int(torch.randint(side - 4 * SIDE, (), generator=rng)) for side in image.shape)
    pixels = image[top : top + 4 * SIDE : 4, left : left + 4 * SIDE : 4].reshape(-1, 1)
    model = nn.Sequential(nn.Linear(2, 32), Sine(), nn.Linear(32, 32), Sine(), nn.Linear(32, 1))
    for layer, bound in zip(model[::2], (1 / 2, (6 / 32) ** 0.5 / 15, (6 / 32) ** 0.5 / 15), strict=True):
        nn.init.uniform_(layer.weight, -bound, bound)

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        return (model(PLACES) - pixels).square().mean()

    return model, loss
