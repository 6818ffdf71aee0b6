"""Functions with many local minima: Rastrigin's family, searched from one point or by a swarm."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from l2o_runtime.config import require
from l2o_runtime.solvers import Swarm
from l2o_training.tasks.base import Instances, Seen, Task, generator

HEIGHT = 10.0
"""α, of the bumps."""


def rastrigin(x: Tensor, matrix: Tensor, target: Tensor, bumps: Tensor) -> Tensor:
    """½‖A x − b‖² − α cᵀ cos(2π x) + α n, α = 10: (…,) from x (…, n), A (…, n, n), b and c (…, n).

    Rastrigin's own function is that of A = I, b = 0 and c = 1, with its minimum 0 at 0.

    Source: Cao, Chen, Wang & Shen 2019, "Learning to Optimize in Swarms", equation 7.

    >>> rastrigin(torch.tensor([0.0, 1.0]), torch.eye(2), torch.zeros(2), torch.ones(2))
    tensor(0.5000)
    """
    fit = (torch.einsum("...ij,...j->...i", matrix, x) - target).square().sum(-1) / 2
    waves: Tensor = HEIGHT * (x.shape[-1] - (bumps * (2 * math.pi * x).cos()).sum(-1))
    return fit + waves


@dataclass(frozen=True, kw_only=True)
class Family(Swarm):
    """The A, b and c of problems, for oracles: row by row, the same for all particles of a swarm."""

    matrix: Tensor
    target: Tensor
    bumps: Tensor

    def part(self, start: int, stop: int) -> "Family":
        """That of some rows, which have to be whole swarms."""
        super().part(start, stop)
        values = {key: getattr(self, key)[start:stop] for key in ("matrix", "target", "bumps")}
        return Family(particles=self.particles, **values)

    def lowest(self, restarts: int = 64, seed: int = 0) -> Tensor:
        """The lowest value (P,) of each problem that `best_known` finds."""
        first = slice(None, None, self.particles)
        return best_known(self.matrix[first], self.target[first], self.bumps[first], restarts, seed)


@torch.no_grad()
def best_known(matrix: Tensor, target: Tensor, bumps: Tensor, restarts: int, seed: int, sweeps: int = 10) -> Tensor:
    """The lowest value (P,) that a search finds which knows A, b and c; in float64.

    From many points x coordinates are minimized one after the other, exactly: along one of them f is a parabola and a
    cosine, which is looked at on a grid of width 1/30 around the parabola's vertex, and then by Newton's steps. It is
    an upper bound on the minimum. Restarts are drawn around the least-squares solution.
    """
    matrix, target, bumps = (value.double().unsqueeze(1) for value in (matrix, target, bumps))
    n = matrix.shape[-1]
    rng = generator(seed, matrix.device)
    x = 3 * torch.randn(len(matrix), restarts, n, generator=rng, dtype=torch.float64, device=matrix.device)
    grid = torch.arange(-120, 121, dtype=torch.float64, device=matrix.device) / 30
    for _ in range(sweeps):
        for i in range(n):
            column = matrix[..., :, i]
            curvature = column.square().sum(-1).clamp_min(1e-12)
            rest = torch.einsum("...ij,...j->...i", matrix, x) - column * x[..., i, None] - target
            vertex = -(rest * column).sum(-1) / curvature
            c = bumps[..., i]
            places = torch.cat([vertex[..., None] + grid, x[..., i, None]], dim=-1)
            values = curvature[..., None] / 2 * (places - vertex[..., None]).square()
            values = values - HEIGHT * c[..., None] * (2 * math.pi * places).cos()
            best = places.gather(-1, values.argmin(-1, keepdim=True)).squeeze(-1)
            for _ in range(3):
                slope = curvature * (best - vertex) + 2 * math.pi * HEIGHT * c * (2 * math.pi * best).sin()
                bend = curvature + 4 * math.pi**2 * HEIGHT * c * (2 * math.pi * best).cos()
                best = best - torch.where(bend > 0, slope / bend, 0.0).clamp(-0.01, 0.01)
            x = torch.cat([x[..., :i], best[..., None], x[..., i + 1 :]], dim=-1)
    return rastrigin(x, matrix, target, bumps).amin(-1)


class Swarms(Instances):
    """Instances that come as swarms; what is scored is the best value that any particle of the swarm has seen so far.

    That value is kept as the running statistics of the row, so that whoever looks at points carries it on.
    """

    structure: Family

    def look(self, params: Tensor, statistics: Tensor) -> Seen:
        """Losses and gradients of all particles, and the best of their swarm so far."""
        seen = super().look(params, statistics[:, :0])
        k = self.structure.particles
        lowest = seen.loss.nan_to_num(torch.inf, torch.inf, torch.inf).unflatten(0, (-1, k)).amin(1)
        best = torch.minimum(lowest.repeat_interleave(k), statistics[:, 0])
        return seen._replace(score=best, statistics=best.unsqueeze(1))


class RastriginTask(Task):
    """Rastrigin's family, from random points.

    Args:
        size: n.
        particles: points per problem; instances are rows, k of them for each problem.
        spread: None for A, b, c and x₀ from N(0, 1); else the family near Rastrigin's own function, A = I + σ N(0, 1),
            b = σ N(0, 1), c = 1 + σ N(0, 1), and x₀ from U[−3, 3].
        device: where instances live.

    Source: Cao, Chen, Wang & Shen 2019, section 4.
    """

    def __init__(self, size: int, particles: int, spread: float | None, device: torch.device):
        self.name = f"rastrigin-{size}" if spread is None else f"near-rastrigin-{size}"
        self.size, self.particles, self.spread, self.device = size, particles, spread, device

    def instances(self, count: int, seed: int) -> Swarms:
        """Draw `count` rows, of count/k problems.

        Raises:
            ConfigError: they are no whole swarms.
        """
        n, k, device = self.size, self.particles, self.device
        require(count % k == 0, f"{self.name}: {count} instances are no whole swarms: take a multiple of {k} particles")
        rng = generator(seed, device)

        def normal(*shape: int) -> Tensor:
            return torch.randn(count // k, *shape, generator=rng, device=device)

        matrix, target, bumps = normal(n, n), normal(n), normal(n)
        if self.spread is not None:
            matrix, target, bumps = (self.spread * value for value in (matrix, target, bumps))
            matrix, bumps = matrix + torch.eye(n, device=device), bumps + 1
        matrix, target, bumps = (value.repeat_interleave(k, 0) for value in (matrix, target, bumps))
        if self.spread is None:
            start = torch.randn(count, n, generator=rng, device=device)
        else:
            start = 6 * torch.rand(count, n, generator=rng, device=device) - 3
        return Swarms(
            start,
            _losses,
            lambda: (matrix, target, bumps),
            rng,
            statistics=torch.full((count, 1), torch.inf, device=device),
            structure=Family(particles=k, matrix=matrix, target=target, bumps=bumps),
        )


def _losses(params: Tensor, batch: tuple[Tensor, ...], statistics: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """`rastrigin` of every row."""
    return rastrigin(params, *batch), statistics
