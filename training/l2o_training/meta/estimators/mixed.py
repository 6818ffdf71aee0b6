"""Truncated back-propagation and evolution strategies together, each as far as it can be trusted."""

import torch
from torch import Tensor

from l2o_runtime.rules import Rule
from l2o_training.config import TrainConfig
from l2o_training.meta.curriculum import Lane
from l2o_training.meta.estimators.base import Estimator, Share, size
from l2o_training.meta.estimators.es import ES
from l2o_training.meta.estimators.tbptt import TBPTT


class Mixed(Estimator):
    """w · tbptt + (1 − w) · es, with w = V_es / (V_tbptt + V_es).

    V is the variance of a mean over lanes, summed over the rule's parameters, as the lanes of this very update show it.
    Where the loss is smooth, back-propagation varies little and counts; where it is rugged, its gradients explode
    and the smoothed ones take over. The weight is one number, since a few lanes say little about single parameters.

    A message is a lane's gradient, the square of its norm, and the differences of losses of its pairs.

    Source: Metz et al. 2019, "Understanding and correcting pathologies in the training of learned optimizers",
    section 3.2, there with a weight for every parameter.
    """

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self.through, self.around = TBPTT(config), ES(config)

    def width(self, rule: Rule) -> int:
        """P + 1 + lanes × pairs."""
        return self.through.width(rule) + 1 + self.around.width(rule)

    def share(self, rule: Rule, lane: Lane) -> Share:
        """Perturbed truncations first, then the one that the lane goes on from."""
        around = self.around.message(rule, lane)
        share = self.through.share(rule, lane)
        square = share.message.square().sum().view(1)
        return Share(torch.cat([share.message, square, around]), share.loss, share.koopman)

    def gradient(self, rule: Rule, lanes: list[Lane], message: Tensor) -> Tensor:
        """The mixture: back-propagation alone where nothing varies; of what is not finite, nothing."""
        count = len(lanes)
        through, square, around = message.split([size(rule), 1, self.around.width(rule)])
        smoothed = torch.stack(list(self.around.gradients(rule, lanes, around)))
        if not square.isfinite():
            return smoothed.mean(0)
        # Both are variances of a mean: of what the lanes say each, divided by their number.
        varies = ((square * count - through.square().sum()) / (count - 1)).clamp_min(0)
        smoothed_varies = smoothed.var(0).sum() / count
        weight = (smoothed_varies / (varies + smoothed_varies)).nan_to_num(1.0)
        mixture: Tensor = weight * through + (1 - weight) * smoothed.mean(0)
        return mixture if smoothed.isfinite().all() else through
