"""What a training script is: a network, its loss, and examples to train and to validate on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from l2o_training.tasks.data import Datasets

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Script:
    """A training script with its data in memory.

    Attributes:
        make_model: builds the network with PyTorch's default initialisation.
        loss: network and minibatch → scalar, the mean over the minibatch.
        train, validation: tensors whose first axis counts examples; no example is in both.
        batch_size: examples of a minibatch.
    """

    make_model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    train: Batch
    validation: Batch
    batch_size: int

    def batches(self, seed: int) -> Iterator[Batch]:
        """Minibatches without end: every epoch goes once through the examples, in an order of its own."""
        rng = torch.Generator().manual_seed(seed)
        count = len(self.train[0])
        while True:
            order = torch.randperm(count, generator=rng)
            for start in range(0, count - self.batch_size + 1, self.batch_size):
                index = order[start : start + self.batch_size]
                yield tuple(tensor[index] for tensor in self.train)


@dataclass(frozen=True)
class Recipe:
    """How a training script is made.

    Attributes:
        name: how tables call it.
        description: network, data and loss in one line.
        build: gives the script; what it draws comes from seeds of its own.
        data: name of the data set that `build` loads; None where it makes its examples itself, or takes them from
            scikit-learn.
    """

    name: str
    description: str
    build: Callable[[Datasets], Script]
    data: str | None = None
