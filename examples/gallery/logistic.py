"""Logistic regressions: two classes in twenty variables of very different scales, other weights every time."""

import torch
import torch.nn.functional as F
from torch import nn

SCALES = torch.logspace(-1.5, 0.5, 20)


def make(seed: int) -> tuple[nn.Module, object]:
    inputs = torch.randn(400, 20) * SCALES[torch.randperm(20)]
    labels = (inputs @ (torch.randn(20) / inputs.std(0)) + torch.randn(400) > 0).float()
    model = nn.Linear(20, 1)

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        rows = torch.randint(400, (32,))
        return F.binary_cross_entropy_with_logits(model(inputs[rows]).squeeze(-1), labels[rows])

    return model, loss
