"""Steppers: how the steps of a truncation are made, and through what of them the meta-gradient is taken."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from l2o_runtime.solvers import Descent, Point, Solver
from l2o_runtime.solvers.descent import Chosen, take
from l2o_runtime.state import State


class Stepper:
    """Steps of a solver, differentiated through every coordinate.

    Args:
        solver: makes them.
    """

    def __init__(self, solver: Solver):
        self.solver = solver

    def step(self, point: Point, state: State) -> tuple[Tensor, State, Tensor]:
        """One step.

        Returns:
            Parameters (B, n), the new state, and those of the parameters (B, k) that are differentiated through.
        """
        params, state = self.solver.step(point, state)
        return params, state, params

    def take(self, values: Tensor) -> Tensor:
        """What of values (B, n) belongs to the coordinates that are differentiated through: (B, k)."""
        return values

    def weigh(self, slope: Tensor) -> Tensor:
        """Weights (B, k) with which Σ_k w_k θ_k is Σ_i slope_i θ_i over all coordinates, or an estimate of it."""
        return slope


class Recomputing(Stepper):
    """Keeps only the states between steps, and computes everything else again for the gradient."""

    def step(self, point: Point, state: State) -> tuple[Tensor, State, Tensor]:
        """One step, with activation checkpointing."""
        params, state = checkpoint(self.solver.step, point, state, use_reentrant=False)
        return params, state, params


@dataclass(frozen=True)
class Sample:
    """Some coordinates, through which alone a truncation is differentiated.

    A meta-gradient is a sum over coordinates, which differ little from each other: an image's pixels see much the same.
    Drawn with probability q_i each, and weighted by 1/(k q_i), k of them give an estimate without bias for a fraction
    of the time.

    Attributes:
        places: (B, k) which.
        weight: (B, k) 1/(k q_i).
    """

    places: Tensor
    weight: Tensor

    @classmethod
    def draw(cls, grad: Tensor, fraction: float, rng: torch.Generator) -> "Sample":
        """Draw with replacement, q_i half uniform and half proportional to |g_i|.

        Args:
            grad: (B, n) gradients where the truncation begins.
            fraction: k/n.
            rng: random numbers.
        """
        size = grad.nan_to_num(0, 0, 0).abs() + 1e-30
        q = (size / size.sum(-1, keepdim=True) + 1 / grad.shape[-1]) / 2
        k = max(1, round(fraction * grad.shape[-1]))
        places = torch.multinomial(q, k, replacement=True, generator=rng)
        return cls(places, 1 / (k * q.gather(-1, places)))


class Sampling(Stepper):
    """All coordinates without a graph, the chosen ones beside them with one; for one truncation.

    Args:
        solver: descends along a rule, which moves coordinates one by one.
        sample: the chosen ones.
    """

    def __init__(self, solver: Descent, sample: Sample):
        super().__init__(solver)
        self.descent, self.sample = solver, sample
        self.chosen: Chosen | None = None

    def step(self, point: Point, state: State) -> tuple[Tensor, State, Tensor]:
        """One step; the first begins with the chosen coordinates where all of them are."""
        if self.chosen is None:
            self.chosen = self.descent.choose(point.params, state, self.sample.places)
        params, state, self.chosen = self.descent.step_chosen(point, state, self.chosen)
        return params, state, self.chosen.params

    def take(self, values: Tensor) -> Tensor:
        """Those of the chosen coordinates."""
        return take(values, self.sample.places)

    def weigh(self, slope: Tensor) -> Tensor:
        """The chosen coordinates', so that the sum is right on average."""
        return self.sample.weight * self.take(slope)
