"""Networks that learn targets from examples: classes, the examples themselves, the next character, numbers."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_training.tasks.base import Instances, Losses, Task, generator
from l2o_training.tasks.data import Dataset
from l2o_training.tasks.networks import flat_parameters, flat_statistics, side_by_side

Draw = Callable[[tuple[int, int], torch.Generator], tuple[Tensor, Tensor]]
"""Inputs (B, N, …) and targets (B, N, …) of minibatches: N examples for each of B instances."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""From outputs and targets to the loss (B,) of every instance."""


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over each instance's labels (B, N, …) of −log softmax(outputs)[label]: (B, N, …, classes) → (B,)."""
    each = F.cross_entropy(outputs.flatten(0, -2), labels.flatten(), reduction="none")
    return each.view(len(labels), -1).mean(-1)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean of squares of each instance's differences: (B, N, k) → (B,)."""
    return (outputs - targets).square().flatten(1).mean(-1)


def losses_of(model: nn.Module, loss: Loss) -> Losses:
    """The losses of a network's instances as a function of their flat parameters."""
    forward = side_by_side(model)

    def losses(params: Tensor, batch: tuple[Tensor, ...], statistics: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        outputs, statistics = forward(params, inputs, statistics, training)
        return loss(outputs, targets), statistics

    return losses


@dataclass(frozen=True)
class Labelled:
    """Draws images and their classes, with replacement.

    Attributes:
        dataset: the images.
        noise: share of labels that are replaced by any class.
    """

    dataset: Dataset
    noise: float = 0.0

    def __call__(self, size: tuple[int, int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (B, N, c, h, w) and labels (B, N)."""
        labels, device = self.dataset.labels, self.dataset.labels.device
        images, labels = self.dataset.batch(torch.randint(len(labels), size, generator=rng, device=device))
        if self.noise:
            others = torch.randint(self.dataset.classes, size, generator=rng, device=device)
            labels = torch.where(torch.rand(size, generator=rng, device=device) < self.noise, others, labels)
        return images, labels


@dataclass(frozen=True)
class Unlabelled:
    """Draws images that are to be reconstructed.

    Attributes:
        dataset: the images.
    """

    dataset: Dataset

    def __call__(self, size: tuple[int, int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (B, N, c, h, w), and the same as (B, N, c · h · w)."""
        images, _ = Labelled(self.dataset)(size, rng)
        return images, images.flatten(2)


class Text:
    """Draws passages of a text in which every character depends on the two before it, as a table of chances says.

    Args:
        characters: how many there are.
        length: of a passage.
        device: where passages live.
    """

    SIZE = 20_000

    def __init__(self, characters: int, length: int, device: torch.device):
        rng = torch.Generator().manual_seed(characters)
        chances = (3 * torch.randn(characters, characters, characters, generator=rng)).softmax(-1).cumsum(-1)
        table, text = chances.tolist(), [0, 0]
        for luck in torch.rand(self.SIZE, generator=rng).tolist():
            text.append(min(bisect_left(table[text[-2]][text[-1]], luck), characters - 1))
        self.text, self.window = torch.tensor(text, device=device), torch.arange(length + 1, device=device)

    def __call__(self, size: tuple[int, int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Characters (B, N, length), and those that follow each of them."""
        starts = torch.randint(len(self.text) - len(self.window), size, generator=rng, device=self.text.device)
        passages = self.text[starts.unsqueeze(-1) + self.window]
        return passages[..., :-1], passages[..., 1:]


class Numbers:
    """Draws vectors of given condition, and a number for each: linear in it but for a sine and noise.

    x = Q (s ∘ z), z ~ N(0, I), Q a rotation, s from 1 down to condition^−½; y = ⟨w, z⟩ + a sin(3 ⟨v, z⟩) + ε/10.

    Args:
        size: numbers of a vector.
        condition: of their covariance.
        wave: a.
        device: where they live.
    """

    def __init__(self, size: int, condition: float, wave: float, device: torch.device):
        rng = torch.Generator().manual_seed(size)
        rotation = torch.linalg.qr(torch.randn(size, size, generator=rng))[0]
        deviations = condition ** (-0.5 * torch.linspace(0, 1, size))
        self.wave = wave
        w, v = F.normalize(torch.randn(2, size, generator=rng), dim=-1)
        self.mix, self.w, self.v = ((deviations[:, None] * rotation).to(device), w.to(device), v.to(device))

    def __call__(self, size: tuple[int, int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Vectors (B, N, size) and numbers (B, N, 1)."""
        device = self.mix.device
        z = torch.randn(*size, len(self.w), generator=rng, device=device)
        noise = torch.randn(size, generator=rng, device=device)
        y = z @ self.w + self.wave * (3 * z @ self.v).sin() + noise / 10
        return z @ self.mix, y.unsqueeze(-1)


class SupervisedTask(Task):
    """Train a network from PyTorch's default initialisation on random minibatches.

    Args:
        name: how tables call it.
        make_model: builds the network; called once per instance, for its initial parameters and statistics.
        loss: of outputs and targets.
        draw: gives the minibatches.
        batch_size: examples of a minibatch.
        device: where instances live.
    """

    def __init__(
        self,
        name: str,
        make_model: Callable[[], nn.Module],
        loss: Loss,
        draw: Draw,
        batch_size: int,
        device: torch.device,
    ):
        self.name = name
        self.make_model = make_model
        self.loss = loss
        self.draw = draw
        self.batch_size = batch_size
        self.device = device

    def instances(self, count: int, seed: int) -> Instances:
        """Draw `count` initialisations and streams of minibatches."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models = [self.make_model() for _ in range(count)]
        flat = [(flat_parameters(model), flat_statistics(model)) for model in models]
        params, statistics = (torch.stack(parts).to(self.device) for parts in zip(*flat, strict=True))
        rng = generator(seed, self.device)
        shapes = [param.shape for param in models[0].parameters()]
        losses = losses_of(models[0].to(self.device), self.loss)
        return Instances(params, losses, lambda: self.draw((count, self.batch_size), rng), rng, shapes, statistics)
