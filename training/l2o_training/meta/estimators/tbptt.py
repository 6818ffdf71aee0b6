"""Truncated back-propagation through time."""

import torch
from torch import Tensor

from l2o_runtime.solvers import Descent, Solver
from l2o_training.config import TrainConfig
from l2o_training.meta.estimators.base import Estimator, Share, size, trained
from l2o_training.meta.objectives import TINY
from l2o_training.meta.slots import TaskSlot
from l2o_training.meta.steppers import Recomputing, Sample, Sampling, Stepper
from l2o_training.meta.unroll import unroll
from l2o_training.tasks.base import generator


class TBPTT(Estimator):
    """The gradient of a truncation's meta-loss, states at its beginning held constant.

    Biased towards what pays within u steps, with little variance. A message is a slot's gradient: m = P. Their norms
    can differ a thousandfold, so that the mean over slots is little else than the largest; `clip_lanes` bounds each
    of them, and leaves out one that is not finite.
    """

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        # Of slots that are summed, every message is a copy; one alone is done with before the next.
        self._room = torch.empty(0)

    def width(self, outer: Solver) -> int:
        """P."""
        return size(outer)

    def share(self, outer: Solver, slot: TaskSlot) -> Share:
        """Unroll, and differentiate through the steps."""
        config, (inner,) = self.config, slot.begun(outer)
        stepper = self._stepper(outer, slot)
        trace = unroll(outer, inner, slot.span, self.objectives, config.weights, stepper)
        params = trained(outer)
        grads = torch.autograd.grad(trace.objective / config.lanes, params, allow_unused=True)
        message = self._flat([torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)])
        if config.lanes > 1 or config.clip_lanes:  # one alone is summed with none, and solvers have millions of weights
            message = message.double()
        if config.clip_lanes:
            norm = message.norm()
            shrunk = message * (config.clip / config.lanes / norm.clamp_min(TINY)).clamp_max(1)
            message = torch.where(norm.isfinite(), shrunk, 0.0)
        return Share(message, trace.losses.double().mean(), trace.terms)

    def gradient(self, outer: Solver, slots: list[TaskSlot], message: Tensor) -> Tensor:
        """The message as it is."""
        return message

    def _flat(self, grads: list[Tensor]) -> Tensor:
        """Gradients as one vector, always in the same place: new memory for millions takes 8 ms of an update of 40."""
        count, first = sum(grad.numel() for grad in grads), grads[0]
        if (len(self._room), self._room.dtype, self._room.device) != (count, first.dtype, first.device):
            self._room = first.new_empty(count)
        return torch.cat([grad.reshape(-1) for grad in grads], out=self._room)

    def _stepper(self, outer: Solver, slot: TaskSlot) -> Stepper:
        """What the gradient of a slot's truncation is taken through."""
        if self.config.sample is None:
            return Recomputing(outer) if self.config.recompute else Stepper(outer)
        assert isinstance(outer, Descent)  # other solvers do not move coordinates one by one
        (inner,) = slot.begun(outer)
        rng = generator(slot.seed, inner.params.device)
        return Sampling(outer, Sample.draw(inner.grad, self.config.sample, rng))
