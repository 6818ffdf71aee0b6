"""Partial updates: in a step of meta-training only some of the tensors are moved, drawn by chance."""

import random

import torch
from torch import Tensor

from l2o_runtime.rules import Rule
from l2o_runtime.solvers import Descent, Point
from l2o_runtime.solvers.base import Problems
from l2o_runtime.solvers.descent import LAYOUT
from l2o_runtime.state import State
from l2o_training.tasks import Instances
from l2o_training.tasks.base import generator

SEED, DONE = "partial/seed", "partial/done"
"""Names of what is kept besides the state of `Descent`: the seed of the instances, and steps so far."""


class PartialUpdates(Descent):
    """θ_s ← θ_s + b_s Δ_s for every tensor s, b_s ~ Bernoulli(p) in every step, for every instance by itself.

    The rule sees all gradients, and its states go on for all tensors; those with b_s = 0 stay where they are, exactly.
    What is drawn depends on nothing but the seed of the instances and the step, so that a resumed run draws the same.

    Args:
        rule: gives the steps.
        chance: p.

    Source: HALO, Li et al. 2020, "HALO: Hardware-Aware Learning to Optimize", stochastic layer-wise updates.
    """

    def __init__(self, rule: Rule, chance: float):
        super().__init__(rule)
        self.chance = chance

    def init(self, problems: Problems) -> State:
        """That of `Descent`, and of the draws."""
        assert isinstance(problems, Instances)  # others have no seed
        device = problems.params.device
        seed = torch.tensor(problems.rng.initial_seed(), device=device)
        return super().init(problems) | {SEED: seed, DONE: torch.zeros_like(seed)}

    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """A step of the tensors that are drawn."""
        params, after = super().step(point, state)
        owner, tensors = state[f"{LAYOUT}owner"], len(state[f"{LAYOUT}shapes"])
        seed = random.Random(f"{int(state[SEED])}/{int(state[DONE])}").getrandbits(32)
        drawn = torch.rand(len(params), tensors, generator=generator(seed, torch.device("cpu"))) < self.chance
        moved = torch.where(drawn.to(params.device)[:, owner], params, point.params)
        return moved, after | {SEED: state[SEED], DONE: state[DONE] + 1}
