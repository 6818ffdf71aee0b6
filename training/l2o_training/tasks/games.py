"""Games of two players: min over u, max over v of f(u, v)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from l2o_runtime.solvers import MAX, MIN, Players
from l2o_training.tasks.base import Instances, Seen, Task, generator

GameName = Literal["saddle", "rotated-saddle", "seesaw", "matrix"]

Payoff = Callable[[Tensor, Tensor, Tensor], Tensor]
"""f (B,) from u (B, n), v (B, n), and what was drawn: a and b (B, 2), or A (B, n, n)."""


def saddle(u: Tensor, v: Tensor, drawn: Tensor) -> Tensor:
    """a ‖u‖² − b ‖v‖²."""
    a, b = drawn.unbind(-1)
    value: Tensor = a * u.square().sum(-1) - b * v.square().sum(-1)
    return value


def rotated_saddle(u: Tensor, v: Tensor, drawn: Tensor) -> Tensor:
    """a ‖u‖² − b ‖v‖² + 2 uᵀ v."""
    return saddle(u, v, drawn) + 2 * (u * v).sum(-1)


def seesaw(u: Tensor, v: Tensor, drawn: Tensor) -> Tensor:
    """−b vᵀ sin(a π u)."""
    a, b = drawn.unbind(-1)
    value: Tensor = -b * (v * (math.pi * a.unsqueeze(-1) * u).sin()).sum(-1)
    return value


def matrix_game(u: Tensor, v: Tensor, drawn: Tensor) -> Tensor:
    """uᵀ A v."""
    return torch.einsum("bi,bij,bj->b", u, drawn, v)


PAYOFFS: dict[GameName, Payoff] = {
    "saddle": saddle,
    "rotated-saddle": rotated_saddle,
    "seesaw": seesaw,
    "matrix": matrix_game,
}
"""Source: Shen et al. 2021, section 4."""


@dataclass(frozen=True, kw_only=True)
class Solutions(Players):
    """Players, and for oracles how far a point is from the nearest solution.

    Attributes:
        periods: (B, n) solutions of u are at all multiples of these; infinite where 0 is the only one.
        projections: (B, 2 n, 2 n) onto what is orthogonal to a linear space of solutions; None where there is none.
    """

    periods: Tensor
    projections: Tensor | None = None

    def part(self, start: int, stop: int) -> "Solutions":
        """That of some games."""
        projections = None if self.projections is None else self.projections[start:stop]
        return Solutions(owners=self.owners, periods=self.periods[start:stop], projections=projections)

    def apart(self, params: Tensor) -> Tensor:
        """(u, v) less the nearest solution, (B, 2 n); in float64, since squares of small distances are zero in less."""
        u, v = params.double().chunk(2, dim=-1)
        finite = self.periods.isfinite()
        period = torch.where(finite, self.periods, 1.0).double()
        u = torch.where(finite, u - (u / period).round() * period, u)
        apart = torch.cat([u, v], dim=-1)
        if self.projections is not None:
            apart = torch.einsum("bij,bj->bi", self.projections, apart)
        return apart


class Game(Instances):
    """Instances of a game: every coordinate has the gradient of its own player's loss, (∂f/∂u, −∂f/∂v).

    So every optimizer plays: gradient descent on it is descent and ascent at once. What is scored is no loss, which
    nobody minimizes, but the distance to the nearest solution.
    """

    structure: Solutions

    def look(self, params: Tensor, statistics: Tensor) -> Seen:
        """f, its field, and the distance to a solution."""
        seen = super().look(params, statistics)
        half = params.shape[-1] // 2
        field = torch.cat([seen.grad[:, :half], -seen.grad[:, half:]], dim=-1)
        return seen._replace(grad=field, score=torch.linalg.vector_norm(self.structure.apart(params), dim=-1))


class GameTask(Task):
    """A game with fresh numbers: a, b from U[0.9, 1], or A with entries from U[0.5, 1], half of them zero.

    Args:
        game: which.
        size: n, of u and of v.
        reach: u₀, v₀ come from U[−reach, reach].
        device: where instances live.

    Source: Shen et al. 2021, section 4. Matrices may be singular there too: the solutions are then a linear space.
    """

    def __init__(self, game: GameName, size: int, reach: float, device: torch.device):
        self.name = game if size == 1 else f"{game}-{size}"
        self.game, self.size, self.reach, self.device = game, size, reach, device

    def instances(self, count: int, seed: int) -> Game:
        """Draw `count` games and points."""
        n, rng = self.size, generator(seed, self.device)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(count, *shape, generator=rng, device=self.device)

        matrix = self.game == "matrix"
        drawn = uniform(0.5, 1, n, n) * (uniform(0, 1, n, n) < 0.5) if matrix else uniform(0.9, 1, 2)
        start, payoff = uniform(-self.reach, self.reach, 2 * n), PAYOFFS[self.game]

        def losses(params: Tensor, batch: tuple[Tensor, ...], stats: Tensor, training: bool) -> tuple[Tensor, Tensor]:
            return payoff(*params.chunk(2, dim=-1), *batch), stats

        shapes = [torch.Size([n]), torch.Size([n])]
        return Game(start, losses, lambda: (drawn,), rng, shapes, structure=self._solutions(drawn))

    def _solutions(self, drawn: Tensor) -> Solutions:
        periods = torch.full((len(drawn), self.size), torch.inf, device=self.device)
        projections = None
        if self.game == "seesaw":
            periods = (1 / drawn[:, :1]).expand(-1, self.size)
        if self.game == "matrix":
            matrix = drawn.double()
            inverse = torch.linalg.pinv(matrix, rtol=1e-9)
            projections = torch.stack([torch.block_diag(a @ i, i @ a) for a, i in zip(matrix, inverse, strict=True)])
        return Solutions(owners=(MIN, MAX), periods=periods, projections=projections)
