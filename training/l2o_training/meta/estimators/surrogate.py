"""Search by a surrogate: a Gaussian process of all that was tried so far says where to go on."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2o_runtime.solvers import Solver
from l2o_training.config import TrainConfig
from l2o_training.meta.estimators.base import size, trained
from l2o_training.meta.estimators.cem import CEM, FALL, rank_weights
from l2o_training.meta.slots import TaskSlot

LENGTHS = (2.5, 4.0, 6.0, 10.0)
"""Length scales that are weighed, in units of the σ at the beginning."""

NOISES = (0.003, 0.03, 0.3)
"""Variances of noise that are weighed, beside that of what is sought."""

COMMON = 1.0
"""Variance that the losses of an update share, as they are on the same instances, beside that of what is sought."""

CAP = 3.0
"""Losses count as no further above the best of their update than so many times as far as their median."""

BEGINNINGS = 4
"""Of the best that was tried, where the lowest expectation is sought from."""

DESCENT = 80
"""Steps of that search."""


class Process(NamedTuple):
    """A bowl around zero, and a Gaussian process with a squared exponential kernel, given what was tried.

    Attributes:
        points: (n, P) what was tried, beside where the search began.
        length: of the kernel.
        weights: (n,) of the kernels in what is expected.
        steepness: of the bowl, half of which is multiplied with a point's square; 0 or more.
    """

    points: Tensor
    length: float
    weights: Tensor
    steepness: float

    def kernel(self, at: Tensor) -> Tensor:
        """Of points (m, P) and all that was tried, (m, n)."""
        return (-0.5 * (torch.cdist(at, self.points) / self.length).square()).exp()

    def expected(self, at: Tensor) -> Tensor:
        """Beside the mean, at points (m, P): (m,)."""
        return self.kernel(at) @ self.weights + self.steepness * at.square().sum(1) / 2

    def slope(self, at: Tensor) -> Tensor:
        """Its gradient at points, (m, P)."""
        pulls = self.kernel(at) * self.weights
        return (pulls @ self.points - pulls.sum(1, keepdim=True) * at) / self.length**2 + self.steepness * at

    def lowest(self, beginnings: Tensor) -> Tensor:
        """Where it is lowest, of what normalised descent finds from (m, P): (P,)."""
        at = beginnings
        for step in range(DESCENT):
            slope = self.slope(at)
            move = slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12)
            at = at - 0.1 * self.length * (1 - step / DESCENT) * move
        return at[self.expected(at).argmin()]


def fitted(points: Tensor, values: Tensor, updates: Tensor, sigma: float) -> Process:
    """The process with the length and the noise of the highest marginal likelihood, all else being best for them.

    Args:
        points: (n, P) float64, beside where the search began.
        values: (n,) what was found there, finite.
        updates: (n,) numbers of updates: values of one have something in common.
        sigma: the unit of lengths.

    Source: Rasmussen & Williams 2006, "Gaussian Processes for Machine Learning", equations 2.42 and 5.8.

    >>> points = torch.linspace(-1, 1, 9, dtype=torch.float64).unsqueeze(1)
    >>> found = fitted(points, (points[:, 0] - 0.3).square(), torch.zeros(9), 0.4)
    >>> round(found.lowest(points[:1]).item(), 1)
    0.3
    """
    best, found = math.inf, None
    bowl = points.square().sum(1) / 2
    basis = torch.stack([torch.ones_like(bowl), bowl], dim=1)
    shared = COMMON * (updates.unsqueeze(0) == updates.unsqueeze(1)).double()
    for length in (sigma * unit for unit in LENGTHS):
        process = Process(points, length, values, 0.0)
        for noise in NOISES:
            covariance = process.kernel(points) + shared + noise * torch.eye(len(points), dtype=torch.float64)
            root = torch.linalg.cholesky(covariance)
            solved = torch.cholesky_solve(torch.cat([basis, values[:, None]], dim=1), root)
            level, steepness = torch.linalg.pinv(basis.T @ solved[:, :2]) @ (basis.T @ solved[:, 2])
            if steepness < 0:
                level, steepness = solved[:, 2].sum() / solved[:, 0].sum(), torch.zeros_like(level)
            weights = solved[:, 2] - solved[:, :2] @ torch.stack([level, steepness])
            variance = float((values - level - steepness * bowl) @ weights) / len(values)
            score = 0.5 * len(values) * math.log(max(variance, 1e-300)) + float(root.diagonal().log().sum())
            if score < best:
                best, found = score, process._replace(weights=weights, steepness=float(steepness))
    assert found is not None
    return found


def capped(losses: Tensor) -> Tensor:
    """Losses of an update (n,), none far above their median, which one that is not finite counts as.

    >>> capped(torch.tensor([1.0, 2.0, 3.0, 50.0, torch.inf]))
    tensor([1.0000, 2.0000, 3.0000, 5.5000, 5.5000])
    """
    finite = losses[losses.isfinite()]
    lowest = finite.min()
    spread = finite.quantile(0.5) - lowest
    spread = torch.where(spread > 0, spread, lowest.abs().clamp_min(1e-12))
    return losses.nan_to_num(torch.inf).minimum(lowest + CAP * spread)


class Surrogate(CEM):
    """Every update tries perturbations as `CEM` does, and goes to where the loss is expected to be lowest.

    What is expected is the mean of a Gaussian process, given all that was tried in this run, not in the last update
    alone: where few optimizations fit into the time, that makes more of them. Beside it there is a bowl around where
    the search began: that is no bad place, and far from it losses are high. It goes no further in an update than the
    perturbations are long. Losses are taken by their logarithms where all are positive.
    """

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self._tried: list[tuple[int, list[float], float]] = []

    def gradient(self, outer: Solver, slots: list[TaskSlot], message: Tensor) -> Tensor:
        """Where it is less where it goes, (P,)."""
        losses = message.view(self.config.lanes, -1).mean(0).double().cpu()
        if not losses.isfinite().any():
            return torch.zeros(size(outer), dtype=torch.float64, device=message.device)
        epsilons = torch.stack(self.perturbations(outer, slots[0])).double().cpu()
        here = torch.cat([p.detach().flatten() for p in trained(outer)]).double().cpu()
        update = slots[0].number // self.config.lanes
        self._tried += [
            (update, point, loss) for point, loss in zip((here + epsilons).tolist(), losses.tolist(), strict=True)
        ]
        columns = zip(*self._tried, strict=True)
        updates, points, values = (torch.tensor(column, dtype=torch.float64) for column in columns)
        if self.config.objective == "loss" and bool((values > 0).all()):
            values = values.log()
        values = torch.cat([capped(values[updates == number]) for number in updates.unique()])
        begun = (points[0] + points[1]) / 2  # of an antithetic pair
        process = fitted(points - begun, values, updates, self.config.sigma)
        ranked = here + rank_weights(len(epsilons))[losses.argsort(stable=True).argsort(stable=True)] @ epsilons
        beginnings = torch.cat([points[values.argsort(stable=True)[:BEGINNINGS]], here[None], ranked[None]])
        move = begun + process.lowest(beginnings - begun) - here
        longest = self.config.sigma * FALL**update * math.sqrt(len(here))
        return (-move * min(1.0, longest / max(float(move.norm()), 1e-12))).to(message.device)

    def state(self) -> Any:
        """All that was tried."""
        return [(update, point, loss if math.isfinite(loss) else None) for update, point, loss in self._tried]

    def restore(self, outer: Solver, slots: list[TaskSlot], state: Any) -> None:
        """Take it up again."""
        self._tried = [(update, point, math.inf if loss is None else loss) for update, point, loss in state]
