"""Small regressions: scikit-learn's Friedman functions of ten variables, with weights and noise of their own."""

import torch
from sklearn.datasets import make_friedman1
from torch import nn


def make(seed: int) -> tuple[nn.Module, object]:
    inputs, targets = (torch.tensor(part).float() for part in make_friedman1(500, 10, noise=0.5, random_state=seed))
    targets = (targets - targets.mean()) / targets.std()
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        rows = torch.randint(500, (32,))
        return (model(inputs[rows]).squeeze(-1) - targets[rows]).square().mean()

    return model, loss
