"""Truncated back-propagation through time."""

import torch
from torch import Tensor

from l2o_runtime.rules import Rule
from l2o_training.meta.curriculum import Lane
from l2o_training.meta.estimators.base import Estimator, Share, flat, size
from l2o_training.meta.unroll import TINY, Sample, unroll
from l2o_training.tasks.base import generator


class TBPTT(Estimator):
    """The gradient of a truncation's meta-loss, states at its beginning held constant.

    Biased towards what pays within u steps, with little variance. A message is a lane's gradient: m = P. Their norms
    can differ a thousandfold, so that the mean over lanes is little else than the largest; `clip_lanes` bounds each
    of them, and leaves out one that is not finite.
    """

    def width(self, rule: Rule) -> int:
        """P."""
        return size(rule)

    def share(self, rule: Rule, lane: Lane) -> Share:
        """Unroll, and differentiate through the steps."""
        config, (inner,) = self.config, lane.begun(rule)
        sample = None
        if config.sample is not None:
            sample = Sample.draw(inner.grad, config.sample, generator(lane.seed, inner.params.device))
        segment = unroll(
            rule,
            inner,
            config.unroll,
            config.weights,
            objective=config.objective,
            tail=config.tail,
            sample=sample,
            recompute=config.recompute,
        )
        koopman, objective = self.koopman(rule, segment), segment.objective
        if koopman is not None:
            objective = objective + config.koopman * koopman
        params = list(rule.parameters())
        grads = torch.autograd.grad(objective / config.lanes, params, allow_unused=True)
        message = flat([torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)])
        if config.clip_lanes:
            norm = message.norm()
            shrunk = message * (config.clip / config.lanes / norm.clamp_min(TINY)).clamp_max(1)
            message = torch.where(norm.isfinite(), shrunk, 0.0)
        return Share(message, segment.losses.double().mean(), None if koopman is None else koopman.detach())

    def gradient(self, rule: Rule, lanes: list[Lane], message: Tensor) -> Tensor:
        """The message as it is."""
        return message
