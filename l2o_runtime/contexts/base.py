"""What every context is: additive statistics in, a small global vector out."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from l2o_runtime.config import FlagConfig
from l2o_runtime.contexts.gram import GramWindow, LossWindow
from l2o_runtime.state import State, StateSpec, of_tensors, to_tensors


class Context(nn.Module, ABC):
    """A view of the optimization that is the same for every coordinate.

    A context observes parameters and gradients through sums over coordinates, and reads a vector of `config.width`
    numbers from them.

    Attributes:
        per_tensor: whether every tensor has one of its own.
    """

    per_tensor: ClassVar[bool] = False

    @property
    def coordinate_spec(self) -> StateSpec:
        """State kept for every coordinate."""
        return {}

    @property
    def context_spec(self) -> StateSpec:
        """State kept once for the optimization."""
        return {}

    @property
    def placed(self) -> bool:
        """Whether `observe` has to know where coordinates are in the whole."""
        return False

    @property
    def observes(self) -> bool:
        """Whether it has statistics."""
        return type(self).observe is not Context.observe

    def observe(self, param: Tensor, grad: Tensor, state: State, offset: int | Tensor) -> Tensor:
        """Statistics (..., k) of coordinates (..., n); those of a whole are the sum over its parts."""
        return param.new_zeros((*param.shape[:-1], 0))

    def observe_tensors(self, param: Tensor, grad: Tensor, state: State, owner: Tensor, tensors: int) -> Tensor:
        """`observe` in rows, one for each tensor: (..., S, k). Here only their sum counts, which stands in the first.

        Args:
            param, grad, state: of all coordinates (..., n).
            owner: (n,) number of each coordinate's tensor.
            tensors: S.
        """
        first = torch.arange(tensors, device=param.device).unsqueeze(-1) == 0
        return torch.where(first, self.observe(param, grad, state, 0).double().unsqueeze(-2), 0.0)

    def remember(self, param: Tensor, grad: Tensor, state: State) -> State:
        """Coordinate state after this step."""
        return {}

    @abstractmethod
    def read(self, statistics: Tensor, loss: Tensor, state: State) -> tuple[Tensor, State]:
        """Context (..., c) and the new context state, from summed statistics (..., k) and loss (...)."""

    @property
    def tensor_spec(self) -> StateSpec:
        """What of `context_spec` a rule keeps for every tensor, under the names of its state."""
        return to_tensors(self.context_spec) if self.per_tensor else {}

    @property
    def model_spec(self) -> StateSpec:
        """What of it a rule keeps once."""
        return {} if self.per_tensor else self.context_spec

    def read_rows(self, rows: Tensor, loss: Tensor, state: State) -> tuple[Tensor, State]:
        """`read` of every tensor by itself, or of all together.

        Args:
            rows: (..., S, k) statistics of every tensor.
            loss: (...).
            state: of a rule, with `tensor_spec`, (..., S) in front, and `model_spec`.

        Returns:
            Context (..., S, c), or (..., 1, c) of all together, and the new state under the same names.
        """
        if not self.per_tensor:
            context, new = self.read(rows.sum(-2), loss, state)
            return context.unsqueeze(-2), new
        own = of_tensors(state, self.context_spec)
        context, own = self.read(rows, loss.unsqueeze(-1).expand(rows.shape[:-1]), own)
        return context, to_tensors(own)


class ConstantContext(Context):
    """Zeros: of width 0 for a rule without context, of a given width for the placebo."""

    def __init__(self, width: int = 0):
        super().__init__()
        self.width = width

    def read(self, statistics: Tensor, loss: Tensor, state: State) -> tuple[Tensor, State]:
        """Zeros of shape (..., c)."""
        return statistics.new_zeros((*statistics.shape[:-1], self.width), dtype=torch.float32), {}


class FlagContext(Context):
    """[1] from the step on at which a window of m + 1 snapshots would be full, [0] before; it sees nothing but time."""

    def __init__(self, config: FlagConfig):
        super().__init__()
        self.size = config.window + 1

    @property
    def context_spec(self) -> StateSpec:
        """The number of steps."""
        return {"count": ((), torch.int64)}

    def read(self, statistics: Tensor, loss: Tensor, state: State) -> tuple[Tensor, State]:
        """The flag (..., 1)."""
        count = state["count"] + 1
        return (count >= self.size).float().unsqueeze(-1), {"count": count}


class WindowContext(Context):
    """A context that reads the Gram matrix of a window of snapshots."""

    def __init__(self, window: GramWindow | LossWindow):
        super().__init__()
        self.window = window

    @property
    def placed(self) -> bool:
        """To hash them, which a sketch does."""
        return isinstance(self.window, GramWindow) and self.window.sketch is not None

    @property
    def coordinate_spec(self) -> StateSpec:
        """The window itself, in exact mode."""
        return self.window.coordinate_spec

    @property
    def context_spec(self) -> StateSpec:
        """What the window keeps of the whole optimization: Gram matrix, losses, count, sketches."""
        return self.window.context_spec

    def snapshot(self, param: Tensor, grad: Tensor) -> Tensor:
        """What of the coordinates (..., n) is in a snapshot: θ."""
        return param

    def observe(self, param: Tensor, grad: Tensor, state: State, offset: int | Tensor) -> Tensor:
        """Inner products with the window, or the sketch of the newest snapshot."""
        return self.window.observe(self.snapshot(param, grad), state, offset)

    def remember(self, param: Tensor, grad: Tensor, state: State) -> State:
        """Append the newest snapshot."""
        return self.window.remember(self.snapshot(param, grad), state)
