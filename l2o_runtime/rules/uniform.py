"""What rules have in common that steer all tensors alike, by the context alone."""

from abc import ABC

from torch import Tensor

from l2o_runtime.rules.base import Rule
from l2o_runtime.state import State


class UniformRule(Rule, ABC):
    """A rule whose first two phases are those of its context."""

    def observe(self, param: Tensor, grad: Tensor, state: State, offset: int | Tensor = 0) -> Tensor:
        """What the context looks at."""
        return self.context.observe(param, grad, state, offset)

    def steer(self, sums: Tensor, shapes: Tensor | None, loss: Tensor, state: State) -> tuple[Tensor, State]:
        """The context (..., 1, c), the same for all tensors."""
        context, new = self.context.read(sums.squeeze(-2), loss, state)
        return context.unsqueeze(-2), new
