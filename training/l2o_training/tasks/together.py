"""Models of many instances run as one, where the user's loss calls its model once, with one tensor.

The loss of every instance is called twice. The first time its model is a stand-in that takes the inputs away; then the
models of all instances run on their inputs at once; the second time the stand-in gives what came out of its own. Both
times random numbers have the same seed, so that the same minibatch is drawn.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from l2o_training.tasks.networks import Forward, chained, side_by_side

ONE_BY_ONE = (nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention, nn.modules.dropout._DropoutNd)
"""Layers that are no faster together, or would draw other random numbers."""


class NotTogether(Exception):
    """These models cannot run as one."""


class _Called(BaseException):
    """The stand-in was called, and has the inputs; users' code that catches exceptions lets it through."""


class StandIn:
    """In place of a model: it takes inputs away, or gives an output once."""

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.output: Any = None
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        """Nothing else of a model is here."""
        raise NotTogether

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The output, if it is there.

        Raises:
            NotTogether: the model has other inputs than one tensor, or is called again.
        """
        if self.output is not None:
            output, self.output = self.output, None
            return output
        self.calls += 1
        if self.calls > 1 or named or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise NotTogether
        self.inputs = inputs[0]
        raise _Called


Losses = Sequence[Callable[[Any], Tensor]]
"""Of every instance the loss of its next minibatch, given a model; it seeds the generators itself."""


def losses_together(
    forward: Forward, losses: Losses, params: Tensor, statistics: Tensor, training: bool
) -> tuple[Tensor, Tensor]:
    """Losses (B,) of all instances, and running statistics (B, m) from then on.

    Args:
        forward: of all models at once.
        losses: B of them.
        params: flat (B, n).
        statistics: (B, m) running statistics so far.
        training: whether in training mode.

    Raises:
        NotTogether: a loss does something else than to call its model once.
    """
    inputs, stands = [], [StandIn() for _ in losses]
    for loss, stand in zip(losses, stands, strict=True):
        try:
            loss(stand)
        except _Called:
            inputs.append(cast(Tensor, stand.inputs))
    if len(inputs) < len(losses) or any(x.shape != inputs[0].shape or x.requires_grad for x in inputs):
        raise NotTogether
    outputs, after = forward(params, torch.stack(inputs), statistics, training)
    found = []
    for loss, stand, output in zip(losses, stands, outputs.unbind(0), strict=True):
        stand.output = output
        found.append(loss(stand).float().reshape(()))
        if stand.output is not None:
            raise NotTogether
    return torch.stack(found), after


def forwards(model: nn.Module) -> list[Forward]:
    """Ways to run models like this one at once, the fastest first; whether one is right has to be tried."""
    if any(isinstance(part, ONE_BY_ONE) for part in model.modules()):
        return []
    found = [chained(list(model.children()))] if isinstance(model, nn.Sequential) else []
    return [*found, side_by_side(model)]
