"""LeNet-5 on scikit-learn's digits, on MNIST where L2O_DATA names a folder with it: other examples every time."""

import os

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

if os.environ.get("L2O_DATA"):
    from torchvision.datasets import MNIST

    mnist = MNIST(os.environ["L2O_DATA"])
    IMAGES, LABELS = mnist.data[:, None].float() / 255, mnist.targets
else:
    digits = load_digits()
    IMAGES = F.interpolate(torch.tensor(digits.images)[:, None].float() / 16, 28)
    LABELS = torch.tensor(digits.target)


def lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)),
    )


def make(seed: int) -> tuple[nn.Module, object]:
    own = torch.randperm(len(IMAGES))[: len(IMAGES) // 2]

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        rows = own[torch.randint(len(own), (64,))]
        return F.cross_entropy(model(IMAGES[rows]), LABELS[rows])

    return lenet(), loss
