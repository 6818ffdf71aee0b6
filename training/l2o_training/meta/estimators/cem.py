"""The cross-entropy method: perturbed rules are ranked by how whole optimizations end."""

import random

import torch
from torch import Tensor

from l2o_runtime.solvers import Solver
from l2o_training.meta.estimators.base import Share, size
from l2o_training.meta.estimators.es import ES, again, recorded
from l2o_training.meta.slots import TaskSlot
from l2o_training.meta.validation import score
from l2o_training.tasks.base import generator

FALL = 0.93
"""What σ is multiplied with in every update."""


def rank_weights(count: int) -> Tensor:
    """Of the better half of so many, the best first, and 0 for the others; they sum to 1.

    w_i ∝ log(μ + ½) − log i for i = 1 … μ = count / 2. Source: Hansen 2016, "The CMA Evolution Strategy: A Tutorial",
    arXiv 1604.00772, section 3.2.

    >>> rank_weights(4)
    tensor([0.8042, 0.1958, 0.0000, 0.0000], dtype=torch.float64)
    """
    better = count // 2
    weights = torch.zeros(count, dtype=torch.float64)
    weights[:better] = torch.log(torch.tensor(better + 0.5)) - torch.arange(1, better + 1).double().log()
    return weights / weights.sum()


class CEM(ES):
    """Every update moves what is trained to the mean of the better half of its perturbations, the best counting most.

    All slots try the same perturbations, in antithetic pairs, and their losses are averaged before they are ranked:
    what a loss is worth in itself does not matter, and one that is not finite is the worst. σ shrinks with every
    update. For few parameters, and whole optimizations. Its gradient is for a plain step of length 1.

    Source: mirrored (μ/μ_w, λ) evolution strategies, Hansen 2016, without adaptation of the covariance.
    """

    def width(self, outer: Solver) -> int:
        """slots × particles."""
        return self.config.lanes * self.config.particles

    def share(self, outer: Solver, slot: TaskSlot) -> Share:
        """What a validation would say of every particle, on the slot's instances."""
        (inner,) = slot.begun(outer)
        ends: list[float] = []
        traces = []
        for epsilon in self.perturbations(outer, slot):
            traces.append(self.advance(outer, slot, again(outer, slot, inner), epsilon))
            ends.append(score(self.config, traces[-1].scores.double().mean(-1)))
        message = torch.zeros(self.config.lanes, self.config.particles, dtype=torch.float64, device=inner.loss.device)
        values = torch.tensor(ends, dtype=torch.float64)
        if self.config.objective != "loss":  # the mean over slots minds easy tasks as much as hard ones
            values = values.log()
        message[slot.index] = values.nan_to_num(torch.inf, torch.inf, -torch.inf)
        return Share(message.flatten(), *recorded(traces))

    def gradient(self, outer: Solver, slots: list[TaskSlot], message: Tensor) -> Tensor:
        """−Σ_i w_i ε_i, (P,)."""
        losses = message.view(self.config.lanes, -1).mean(0).cpu()
        epsilons = self.perturbations(outer, slots[0])
        weights = rank_weights(len(epsilons))[losses.argsort(stable=True).argsort(stable=True)]
        return -(weights.to(message.device) @ torch.stack(epsilons).double())

    def perturbations(self, outer: Solver, slot: TaskSlot) -> list[Tensor]:
        """Those of the slot's update, the same for all slots: ε and −ε for every pair."""
        update, device = slot.number // self.config.lanes, next(outer.parameters()).device
        found = []
        for pair in range(self.pairs):
            seed = random.Random(f"{self.config.seed}/{update}/{pair}").getrandbits(63)
            drawn = torch.randn(size(outer), generator=generator(seed, torch.device("cpu"))).to(device)
            found += [self.config.sigma * FALL**update * drawn, -self.config.sigma * FALL**update * drawn]
        return found
