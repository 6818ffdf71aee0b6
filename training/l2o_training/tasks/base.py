"""What a task is: it draws instances, and instances give losses and gradients for flat parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

Losses = Callable[[Tensor, tuple[Tensor, ...]], Tensor]
"""Losses (B,) of instances that know nothing of each other: from flat parameters (B, n) and a minibatch for each."""


class Instances:
    """B instances of a task, each with its own initial parameters and its own stream of minibatches.

    Attributes:
        params: (B, n) initial parameters.
        shapes: of the tensors that the parameters of an instance are made of; one vector where none are given.
        rng: what the minibatches are drawn with.
    """

    def __init__(
        self,
        params: Tensor,
        losses: Losses,
        batches: Callable[[], tuple[Tensor, ...]],
        rng: torch.Generator,
        shapes: list[torch.Size] | None = None,
    ):
        self.params = params
        self.shapes = [params.shape[1:]] if shapes is None else shapes
        self.rng = rng
        self._batches = batches
        self._losses = losses
        self._scale: Tensor | None = None

    def rescale(self, scale: Tensor) -> None:
        """Train θ / scale in place of θ: to an optimizer another problem, with gradients scale times as large.

        Args:
            scale: (B,) of every instance.

        Source: random scaling, Lv, Jiang & Li 2017, section 4.
        """
        self._scale = scale.unsqueeze(-1)
        self.params = self.params / self._scale

    def part(self, start: int, stop: int) -> "Instances":
        """Some of the instances, with the minibatches that they have among all."""
        some, batches = copy(self), self._batches
        some.params = self.params[start:stop]
        some._batches = lambda: tuple(values[start:stop] for values in batches())
        some._scale = None if self._scale is None else self._scale[start:stop]
        return some

    def value_and_grad(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (B,) and gradient (B, n) at `params`, each instance on its next minibatch."""
        inner = params if self._scale is None else params * self._scale
        with torch.enable_grad():
            leaf = inner.detach().requires_grad_()
            losses = self._losses(leaf, self._batches())
            (grads,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), grads if self._scale is None else grads * self._scale


class Task(ABC):
    """A distribution of optimization problems.

    Attributes:
        name: how tables call it.
    """

    name: str

    @abstractmethod
    def instances(self, count: int, seed: int) -> Instances:
        """Draw `count` instances; the same seed gives the same instances and minibatches."""


def generator(seed: int, device: torch.device) -> torch.Generator:
    """A random generator of its own, so that nothing else disturbs it."""
    return torch.Generator(device).manual_seed(seed)
