"""What a task is: it draws instances, and instances give losses and gradients for flat parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from l2o_runtime.config import require

Losses = Callable[[Tensor, tuple[Tensor, ...], Tensor, bool], tuple[Tensor, Tensor]]
"""Losses (B,) of instances that know nothing of each other, and their running statistics (B, m) from then on.

From flat parameters (B, n), a minibatch for each, running statistics so far, and whether in training mode: in
evaluation mode the statistics are used and stay as they are."""


class Seen(NamedTuple):
    """What instances show of parameters, each on its next minibatch.

    Attributes:
        loss, grad: (B,) and (B, n), in training mode.
        score: (B,) loss on the same minibatch in evaluation mode, with the running statistics from before it; that in
            training mode, where there are none.
        statistics: (B, m) the running statistics after it.
    """

    loss: Tensor
    grad: Tensor
    score: Tensor
    statistics: Tensor


class Instances:
    """B instances of a task, each with its own initial parameters and its own stream of minibatches.

    Attributes:
        params: (B, n) initial parameters.
        shapes: of the tensors that the parameters of an instance are made of; one vector where none are given.
        rng: what the minibatches are drawn with.
        statistics: (B, m) initial running statistics of BatchNorm; m = 0 without.
        steps: how many steps there will be, for solvers that are told; None where nobody says.
        structure: what model-based solvers and oracles may read of the problems; None where there is nothing.

    Where scores are not losses in evaluation mode, a subclass changes what `look` gives.
    """

    def __init__(
        self,
        params: Tensor,
        losses: Losses,
        batches: Callable[[], tuple[Tensor, ...]],
        rng: torch.Generator,
        shapes: list[torch.Size] | None = None,
        statistics: Tensor | None = None,
        structure: Any = None,
    ):
        self.params = params
        self.statistics = params.new_zeros(len(params), 0) if statistics is None else statistics
        self.shapes = [params.shape[1:]] if shapes is None else shapes
        self.rng = rng
        self.steps: int | None = None
        self.structure = structure
        self._batches = batches
        self._losses = losses
        self._scale: Tensor | None = None
        self._latest: tuple[tuple[Tensor, ...], Tensor] | None = None

    def rescale(self, scale: Tensor) -> None:
        """Train θ / scale in place of θ: to an optimizer another problem, with gradients scale times as large.

        Args:
            scale: (B, n) of every coordinate, or (B, 1).

        Source: random scaling, Lv, Jiang & Li 2017, section 4; tensor by tensor as in Metz et al. 2022 (VeLO).
        """
        require(self.structure is None, "rescale: not with problems whose structure solvers read, such as A and b")
        self._scale = scale
        self.params = self.params / self._scale

    def part(self, start: int, stop: int) -> "Instances":
        """Some of the instances, with the minibatches that they have among all."""
        some, batches = copy(self), self._batches
        some.params, some.statistics = self.params[start:stop], self.statistics[start:stop]
        some._batches = lambda: tuple(values[start:stop] for values in batches())
        some._scale = None if self._scale is None else self._scale[start:stop]
        some.structure = None if self.structure is None else self.structure.part(start, stop)
        return some

    def value_and_grad(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (B,) and gradient (B, n) at `params`, each instance on its next minibatch."""
        seen = self.look(params, self.statistics)
        return seen.loss, seen.grad

    def look(self, params: Tensor, statistics: Tensor) -> Seen:
        """What the next minibatches show of `params` (B, n), whose running statistics are (B, m) so far."""
        inner, batch = params if self._scale is None else params * self._scale, self._batches()
        self._latest = batch, statistics
        with torch.enable_grad():
            leaf = inner.detach().requires_grad_()
            losses, after = self._losses(leaf, batch, statistics, True)
            (grads,) = torch.autograd.grad(losses.sum(), leaf)
        losses = score = losses.detach()
        if statistics.shape[1]:
            with torch.no_grad():
                score, _ = self._losses(inner, batch, statistics, False)
        return Seen(losses, grads if self._scale is None else grads * self._scale, score, after.detach())

    def unscaled(self, grad: Tensor) -> Tensor:
        """∇L by the parameters themselves, from that by what an optimizer sees of them: see `rescale`."""
        return grad if self._scale is None else grad / self._scale

    def slope_of_square(self, params: Tensor) -> Tensor:
        """∂‖∇L‖²/∂θ = 2 H ∇L (B, n) at `params`, on the minibatches of the latest `look`; a Hessian-vector product.

        Of instances that are rescaled ∇L is by the parameters themselves, so that its weight is the same for all, and
        ∂θ by what an optimizer sees.
        """
        assert self._latest is not None, "look first"
        batch, statistics = self._latest
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # other kernels of attention go one way once
            leaf = params.detach().requires_grad_()
            inner = leaf if self._scale is None else leaf * self._scale
            losses, _ = self._losses(inner, batch, statistics, True)
            (grads,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
            if not grads.requires_grad:  # of a loss that is linear
                return torch.zeros_like(params)
            square = self.unscaled(grads).square().sum()
            slope: Tensor = torch.autograd.grad(square, leaf, materialize_grads=True)[0]
        return slope


class Task(ABC):
    """A distribution of optimization problems.

    Attributes:
        name: how tables call it.
        structured: whether its problems have A and b, for solvers that read them.
    """

    name: str
    structured: ClassVar[bool] = False

    @abstractmethod
    def instances(self, count: int, seed: int) -> Instances:
        """Draw `count` instances; the same seed gives the same instances and minibatches."""


def generator(seed: int, device: torch.device) -> torch.Generator:
    """A random generator of its own, so that nothing else disturbs it."""
    return torch.Generator(device).manual_seed(seed)
