"""What a solver is: it is shown a point of an optimization, and says where to look next.

A solver is pure: all that it remembers is in its state, so that optimizations can be copied, stopped and resumed. What
is learned are its parameters; a hand-made solver has none.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from l2o_runtime.state import State


class Point(NamedTuple):
    """Where B optimizations are, and what is seen there.

    Attributes:
        params: (B, n).
        loss: (B,) at them; zero where it is not shown.
        grad: (B, n) the gradient of the loss.
    """

    params: Tensor
    loss: Tensor
    grad: Tensor


class Problems(Protocol):
    """What a solver may read of B problems before it begins; one that reads more asks for richer ones."""

    @property
    def params(self) -> Tensor:
        """(B, n) where the optimizations begin."""

    @property
    def shapes(self) -> Sequence[torch.Size]:
        """Of the tensors that the n coordinates belong to, one after the other."""

    @property
    def steps(self) -> int | None:
        """How many steps there will be; None where nobody says."""


class Solver(nn.Module, ABC):
    """Carries optimizations of B problems side by side; none of them sees another.

    Attributes:
        queries: points that are evaluated per step.
    """

    queries: int = 1

    @abstractmethod
    def init(self, problems: Problems) -> State:
        """The state at the beginning."""

    @abstractmethod
    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """One step.

        Args:
            point: the current one. Loss and gradient are constants; what is differentiated comes in the parameters.
            state: from `init` or the step before; it stays as it is.

        Returns:
            The next parameters (B, n) and the new state.
        """
