"""What an estimator of the meta-gradient is: slots give messages, and the sum of all messages gives the gradient."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from l2o_runtime.solvers import Solver
from l2o_training.config import TrainConfig
from l2o_training.meta.objectives import make_objectives
from l2o_training.meta.slots import TaskSlot


@dataclass(frozen=True)
class Share:
    """What a slot adds to an outer update.

    Attributes:
        message: (m,) to be summed over all slots and ranks; float64 where there is more than one.
        loss: mean loss over the steps, for the record.
        terms: what objectives say of whole truncations, by their names, for the record.
    """

    message: Tensor
    loss: Tensor
    terms: dict[str, Tensor]


class Estimator(ABC):
    """Estimates the gradient of the meta-loss, averaged over slots, by the P parameters of what is trained.

    Args:
        config: the run.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.objectives = make_objectives(config)

    def hand_over(self, share: float) -> None:
        """Weigh the objectives for this share of the learner in the steps, where there is an expert."""
        self.objectives = make_objectives(self.config, share)

    @property
    def copies(self) -> int:
        """Optimizations that a slot carries."""
        return 1

    @abstractmethod
    def width(self, outer: Solver) -> int:
        """m, the length of a message."""

    def count(self, outer: Solver, slots: list[TaskSlot]) -> None:  # noqa: B027
        """Take note of the next truncation, which all slots have counted; on every rank, before any `share`."""

    @abstractmethod
    def share(self, outer: Solver, slot: TaskSlot) -> Share:
        """Advance a slot by a truncation."""

    @abstractmethod
    def gradient(self, outer: Solver, slots: list[TaskSlot], message: Tensor) -> Tensor:
        """The meta-gradient (P,), in the order of the parameters; the same on every rank.

        Args:
            outer: what is trained, at the parameters that the messages were made with.
            slots: all of them, also those of other ranks, whose truncation was counted.
            message: (m,) sum of all messages.
        """

    def restore(self, outer: Solver, slots: list[TaskSlot]) -> None:  # noqa: B027
        """Go on from where the slots are, after a run was resumed."""


def size(outer: Solver) -> int:
    """P, the number of parameters that are trained."""
    return sum(p.numel() for p in trained(outer))


def trained(outer: Solver) -> list[nn.Parameter]:
    """The parameters that are trained, in the order of the meta-gradient."""
    return [p for p in outer.parameters() if p.requires_grad]
