"""What contenders are compared on: flat tasks, whose instances run side by side, and training scripts."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from l2o_training.compare.contenders import Contender

LOOKS = 5
"""Times at which the validation loss is taken, evenly spaced; the last is the end."""


def looks(steps: int) -> list[int]:
    """Numbers of steps after which the validation loss is taken.

    >>> looks(100), looks(3)
    ([20, 40, 60, 80, 100], [1, 2, 3])
    """
    return sorted({max(1, round(steps * (i + 1) / LOOKS)) for i in range(LOOKS)})


class Group(NamedTuple):
    """Runs that are advanced together, with one seed."""

    seed: int
    size: int


@dataclass(frozen=True)
class Curves:
    """What runs of a contender gave.

    Attributes:
        train: (runs, steps) loss of each minibatch, before its step; NaN after the loss was not finite.
        validation: (runs, looks) loss on all validation examples, in evaluation mode; (runs, 0) without any.
        batch_validation: (runs, looks) the same with the statistics of minibatches in place of BatchNorm's running
            ones; (runs, 0) without either.
        parameters: of the network, or of the problem.
        state_bytes: of the optimizer's state tensors, per parameter; None where nobody has counted them.
    """

    train: np.ndarray
    validation: np.ndarray
    batch_validation: np.ndarray
    parameters: int
    state_bytes: float | None = None

    def fits(self, runs: int, steps: int) -> bool:
        """Whether these are so many runs of so many steps."""
        held = [(runs, 0), (runs, len(looks(steps)))]
        return self.train.shape == (runs, steps) and {self.validation.shape, self.batch_validation.shape} <= {*held}


def joined(parts: list[Curves]) -> Curves:
    """Several groups of runs as one."""
    fields = ("train", "validation", "batch_validation")
    together = {name: np.concatenate([getattr(part, name) for part in parts]) for name in fields}
    return Curves(**together, parameters=parts[0].parameters, state_bytes=parts[0].state_bytes)


class Workload(ABC):
    """A problem, or a distribution of problems, that contenders are run on.

    Attributes:
        name: how tables call it.
        description: what it is, in one line.
        data: name of the data set it needs; None where it makes its examples itself.
        validates: whether there is a validation loss.
    """

    name: str
    description: str
    data: str | None
    validates: bool = False

    @abstractmethod
    def prepare(self) -> None:
        """Load what is needed.

        Raises:
            DataError: data is missing.
        """

    @abstractmethod
    def key(self, contender: Contender) -> dict[str, Any]:
        """What results of a contender depend on, learning rate, seed and length aside."""

    @abstractmethod
    def groups(self, runs: int, seed: int) -> list[Group]:
        """How so many runs are measured, from a seed on."""

    @abstractmethod
    def measure(self, contender: Contender, lr: float, group: Group, steps: int) -> Curves:
        """Run a contender; all contenders meet the same initial weights and minibatches."""


class TimedWorkload(Workload):
    """A workload whose runs are made one after the other with torch optimizers, so that their steps have times."""

    @abstractmethod
    def own_key(self) -> dict[str, Any]:
        """What results depend on, contenders aside: the task, and the code of the task and of the loop."""

    def key(self, contender: Contender) -> dict[str, Any]:
        """That, and the code of the contender's steps."""
        return self.own_key() | {"optimizer": contender.identity, "stepping": contender.stepping[0]}

    def times_key(self, contenders: list[Contender]) -> dict[str, Any]:
        """What times depend on: times on a busy machine compare only within one process."""
        return self.own_key() | {
            "optimizers": [f"{contender.identity} {contender.stepping[0]}" for contender in contenders],
            "threads": torch.get_num_threads(),
        }

    def groups(self, runs: int, seed: int) -> list[Group]:
        """Every run has a seed of its own."""
        return [Group(seed + run, 1) for run in range(runs)]

    @abstractmethod
    def times(self, contenders: list[Contender]) -> dict[str, tuple[float, float]]:
        """Seconds of a training step and of the optimizer's part of it, by contender."""
