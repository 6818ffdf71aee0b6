"""What an estimator of the meta-gradient is: lanes give messages, and the sum of all messages gives the gradient."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from l2o_runtime.contexts import KAE
from l2o_runtime.rules import Rule
from l2o_training.config import TrainConfig
from l2o_training.meta.curriculum import Lane
from l2o_training.meta.unroll import Segment


@dataclass(frozen=True)
class Share:
    """What a lane adds to an outer update.

    Attributes:
        message: (m,) float64, to be summed over all lanes and ranks.
        loss: mean loss over the steps, for the record.
        koopman: Koopman loss, None without a KAE, for the record.
    """

    message: Tensor
    loss: Tensor
    koopman: Tensor | None


class Estimator(ABC):
    """Estimates the gradient of the meta-loss, averaged over lanes, with respect to the rule's P parameters.

    Args:
        config: the run.
    """

    def __init__(self, config: TrainConfig):
        self.config = config

    @property
    def copies(self) -> int:
        """Optimizations that a lane carries."""
        return 1

    @abstractmethod
    def width(self, rule: Rule) -> int:
        """m, the length of a message."""

    def count(self, rule: Rule, lanes: list[Lane]) -> None:  # noqa: B027
        """Take note of the next truncation, which all lanes have counted; on every rank, before any `share`."""

    @abstractmethod
    def share(self, rule: Rule, lane: Lane) -> Share:
        """Advance a lane by a truncation."""

    @abstractmethod
    def gradient(self, rule: Rule, lanes: list[Lane], message: Tensor) -> Tensor:
        """The meta-gradient (P,), in the order of the rule's parameters; the same on every rank.

        Args:
            rule: at the parameters that the messages were made with.
            lanes: all of them, also those of other ranks, whose truncation was counted.
            message: (m,) sum of all messages.
        """

    def restore(self, rule: Rule, lanes: list[Lane]) -> None:  # noqa: B027
        """Go on from where the lanes are, after a run was resumed."""

    def koopman(self, rule: Rule, segment: Segment) -> Tensor | None:
        """The Koopman loss of a truncation, None without a KAE."""
        if isinstance(rule.context, KAE) and segment.features is not None:
            return rule.context.koopman_loss(segment.features)
        return None


def flat(tensors: list[Tensor]) -> Tensor:
    """Tensors as one vector, float64."""
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


def size(rule: Rule) -> int:
    """P, the number of the rule's parameters."""
    return sum(p.numel() for p in rule.parameters())
