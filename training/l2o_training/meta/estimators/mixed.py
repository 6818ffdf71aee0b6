"""Truncated back-propagation and evolution strategies together, each as far as it can be trusted."""

import torch
from torch import Tensor

from l2o_runtime.solvers import Solver
from l2o_training.config import TrainConfig
from l2o_training.meta.estimators.base import Estimator, Share, size
from l2o_training.meta.estimators.es import ES
from l2o_training.meta.estimators.tbptt import TBPTT
from l2o_training.meta.slots import TaskSlot


class Mixed(Estimator):
    """w · tbptt + (1 − w) · es, with w = V_es / (V_tbptt + V_es).

    V is the variance of a mean over slots, summed over the parameters, as the slots of this very update show it.
    Where the loss is smooth, back-propagation varies little and counts; where it is rugged, its gradients explode
    and the smoothed ones take over. The weight is one number, since a few slots say little about single parameters.

    A message is a slot's gradient, the square of its norm, and the differences of losses of its pairs.

    Source: Metz et al. 2019, "Understanding and correcting pathologies in the training of learned optimizers",
    section 3.2, there with a weight for every parameter.
    """

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self.through, self.around = TBPTT(config), ES(config)

    def hand_over(self, share: float) -> None:
        """Of both."""
        for part in (self.through, self.around):
            part.hand_over(share)

    def width(self, outer: Solver) -> int:
        """P + 1 + slots × pairs."""
        return self.through.width(outer) + 1 + self.around.width(outer)

    def share(self, outer: Solver, slot: TaskSlot) -> Share:
        """Perturbed truncations first, then the one that the slot goes on from."""
        around, _ = self.around.particles(outer, slot)
        share = self.through.share(outer, slot)
        square = share.message.square().sum().view(1)
        return Share(torch.cat([share.message, square, around]), share.loss, share.terms)

    def gradient(self, outer: Solver, slots: list[TaskSlot], message: Tensor) -> Tensor:
        """The mixture: back-propagation alone where nothing varies; of what is not finite, nothing."""
        count = len(slots)
        through, square, around = message.split([size(outer), 1, self.around.width(outer)])
        smoothed = torch.stack(list(self.around.gradients(outer, slots, around)))
        if not square.isfinite():
            return smoothed.mean(0)
        # Both are variances of a mean: of what the slots say each, divided by their number.
        varies = ((square * count - through.square().sum()) / (count - 1)).clamp_min(0)
        smoothed_varies = smoothed.var(0).sum() / count
        weight = (smoothed_varies / (varies + smoothed_varies)).nan_to_num(1.0)
        mixture: Tensor = weight * through + (1 - weight) * smoothed.mean(0)
        return mixture if smoothed.isfinite().all() else through
