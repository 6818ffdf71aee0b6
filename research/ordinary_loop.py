"""No question of its own: the training loop of `step_length.py`, and Fashion-MNIST."""

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from l2o_training.tasks.data import load_dataset

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]


def fashion_mnist(root: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 784) of about zero mean and unit variance, and labels (N,)."""
    data = load_dataset("fashion-mnist", root)
    return ((data.images.float() / 255 - 0.286) / 0.353).flatten(1), data.labels


def mean_loss(
    make_optimizer: MakeOptimizer,
    make_model: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module], Tensor],
    steps: int,
    runs: int,
) -> float:
    """Mean of the last 20 losses, over seeds 0, 1, …; `loss_of` draws its minibatches from torch's generator."""
    finals = []
    for seed in range(runs):
        torch.manual_seed(seed)
        model = make_model()
        optimizer = make_optimizer(model.parameters())
        losses = []
        for _ in range(steps):
            loss = loss_of(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        finals.append(mean(losses[-20:]))
    return mean(finals)
