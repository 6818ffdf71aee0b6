"""A learned swarm: particles that search together, each told where the others are and how well they do."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from l2o_runtime.config import require
from l2o_runtime.rules.base import silence
from l2o_runtime.rules.coordinate_lstm import CoordinateLSTM
from l2o_runtime.rules.features import log_sign, step_size
from l2o_runtime.solvers.base import Point, Problems, Solver, SolverConfig
from l2o_runtime.state import State, zeros

MOMENTUM = 0.9
"""Decay of the average of gradients."""

FEATURES = 4
"""What a particle looks at: gradient, momentum, the way to its best point so far, attraction by better particles."""

OUTPUTS = FEATURES + 1
"""What the network says: a factor for each of them, and a free step."""

SHY = 3.0
"""A particle is pulled by σ(−3), a twentieth of the way, before meta-training."""

FOUND, LOWEST, AVERAGE = "found", "lowest", "average"
"""Names in the state: best point of every particle so far (B, n), its loss (B,), and the average gradient (B, n)."""


@dataclass(frozen=True, kw_only=True)
class Swarm:
    """What a solver may read of problems that come as swarms.

    Attributes:
        particles: k; rows i k … (i + 1) k − 1 are the points at which problem i is evaluated.
    """

    particles: int

    def part(self, start: int, stop: int) -> "Swarm":
        """That of some rows, which have to be whole swarms."""
        whole = start % self.particles == 0 and stop % self.particles == 0
        require(whole, f"rows {start}..{stop} are no whole swarms of {self.particles} particles: take fewer ranks")
        return self


@dataclass(frozen=True, kw_only=True)
class SwarmConfig(SolverConfig):
    """A swarm with one LSTM for every coordinate of every particle.

    Attributes:
        particles: k.
        hidden, layers: of the LSTM.
        rate: the learning rate of gradient descent, which it is before it is meta-trained.
        output_scale: factor on free steps.
    """

    kind: ClassVar[str] = "swarm"
    particles: int = 4
    hidden: int = 20
    layers: int = 2
    rate: float = 0.001
    output_scale: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.particles <= 64, f"particles: must be in 1..64, got {self.particles}")
        require(1 <= self.hidden <= 512, f"hidden: must be in 1..512, got {self.hidden}")
        require(1 <= self.layers <= 8, f"layers: must be in 1..8, got {self.layers}")
        for key in ("rate", "output_scale"):
            require(0 < getattr(self, key) <= 100, f"{key}: must be in (0, 100], got {getattr(self, key)}")

    @property
    def network(self) -> str:
        """The network in a few words."""
        return f"{self.particles} particles, {self.layers} × {self.hidden} LSTM per coordinate, attention"


class SwarmSolver(Solver):
    """x_j ← x_j + Δ_j, where Δ_j is what an LSTM makes of four features of particle j and of what others intend.

    With the gradient g, its average m, the way d to the particle's best point and the attraction a, in every coordinate

        Δ = −rate (e^{2 o₁} g + 2 o₂ m) + σ(o₃ − 3) d + σ(o₄ − 3) a + scale · o₅,

    so that it is gradient descent with a slight pull before it is meta-trained. Features are weighted by an attention
    within the particle before the LSTM sees them, and what the LSTM says is mixed by one between particles:
    e_j = c_j + 1/k Σ_r m_rj q_rj c_r, with the similarity q_rj of hidden states, softmax over r, and
    m_rj = exp(−‖x_r − x_j‖²/n).

    Nothing depends on the number of coordinates: a swarm that is meta-trained in 10 dimensions runs in 20.

    Source: Cao, Chen, Wang & Shen 2019, "Learning to Optimize in Swarms", section 3; there the free step is all of Δ.
    """

    config: SwarmConfig

    def __init__(self, config: SwarmConfig):
        super().__init__()
        self.config, self.queries = config, config.particles
        self.cell = CoordinateLSTM(2 * FEATURES, 0, config.hidden, config.layers, config.hidden)
        self.of_feature = nn.Linear(2, config.hidden)
        self.of_memory = nn.Linear(config.hidden, config.hidden, bias=False)
        self.attends = nn.Parameter(torch.zeros(config.hidden))
        self.says = nn.Linear(config.hidden, OUTPUTS)
        silence(self.says)

    def init(self, problems: Problems) -> State:
        """No point was seen yet.

        Raises:
            ConfigError: problems are no swarms, or of another number of particles.
        """
        found, wanted = getattr(problems.structure, "particles", 1), self.config.particles
        advice = f"set particles = {wanted} in the task, or rule.particles = {found}"
        require(
            found == wanted, f"swarm: the task gives {found} points per problem, the solver moves {wanted}: {advice}"
        )
        params = problems.params
        state = zeros(self.cell.coordinate_spec, tuple(params.shape), params.device)
        lowest = torch.full_like(params[:, 0], torch.inf)
        return state | {FOUND: params, LOWEST: lowest, AVERAGE: torch.zeros_like(params)}

    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """A step of all particles; all that is seen is constant, as for a rule."""
        params, loss = point.params.detach(), point.loss.nan_to_num(torch.inf, torch.inf, torch.inf)
        better = loss < state[LOWEST]
        found = torch.where(better.unsqueeze(-1), params, state[FOUND])
        lowest = torch.where(better, loss, state[LOWEST])
        average = MOMENTUM * state[AVERAGE] + (1 - MOMENTUM) * point.grad
        known = {FOUND: found, LOWEST: lowest, AVERAGE: average}
        ways = [point.grad, average, found - params, self._attraction(params, found, lowest)]
        last = state[f"h{self.config.layers - 1}"]
        said, memory = self.cell(self._within(ways, last), params[:, :0], state)
        delta = self._delta(self.says(self._between(said, params)), ways)
        return point.params + delta, memory | known

    def _attraction(self, params: Tensor, found: Tensor, lowest: Tensor) -> Tensor:
        """`attraction` of rows."""
        x, y, values = (rows.unflatten(0, (-1, self.config.particles)) for rows in (params, found, lowest))
        return attraction(x, y, values).flatten(0, 1)

    def _delta(self, said: Tensor, ways: list[Tensor]) -> Tensor:
        """Δ (B, n), from outputs (B, n, 5) and directions."""
        size, momentum, back, across, free = said.unbind(-1)
        grad, average, to_best, to_better = ways
        delta = -self.config.rate * (step_size(size) * grad + 2 * momentum * average)
        delta = delta + (back - SHY).sigmoid() * to_best + (across - SHY).sigmoid() * to_better
        moved: Tensor = delta + self.config.output_scale * free
        return moved

    def _within(self, ways: list[Tensor], memory: Tensor) -> Tensor:
        """What the LSTM sees: features (B, n, 8), each weighted by the attention that the particle pays to it."""
        seen = torch.stack([torch.stack(log_sign(way).features, dim=-1) for way in ways], dim=-2)
        scores = (self.of_feature(seen) + self.of_memory(memory).unsqueeze(-2)).tanh() @ self.attends
        weights = FEATURES * scores.mean(1).softmax(-1)
        weighted: Tensor = (weights[:, None, :, None] * seen).flatten(-2)
        return weighted

    def _between(self, said: Tensor, params: Tensor) -> Tensor:
        """e (B, n, hidden), from c (B, n, hidden): each particle hears those near it that intend much the same."""
        k = self.config.particles
        c, x = (value.unflatten(0, (-1, k)) for value in (said, params))
        alike = torch.einsum("prnh,pjnh->prj", c, c) / (c.shape[2] * c.shape[3] ** 0.5)
        weights = near(x) * alike.softmax(1)
        mixed: Tensor = c + torch.einsum("prj,prnh->pjnh", weights, c) / k
        return mixed.flatten(0, 1)


def near(x: Tensor) -> Tensor:
    """exp(−‖x_r − x_j‖²/n) of all pairs of particles: (P, k, k) from (P, k, n).

    >>> near(torch.tensor([[[0.0, 0.0], [0.0, 0.0]]]))
    tensor([[[1., 1.],
             [1., 1.]]])
    """
    squares = (x.unsqueeze(1) - x.unsqueeze(2)).square().mean(-1)
    result: Tensor = (-squares).exp()
    return result


def attraction(x: Tensor, found: Tensor, lowest: Tensor) -> Tensor:
    """The way from each particle to the best points of those that have found a lower loss, nearer ones first.

    Σ_r w_rj (y_r − x_j) / Σ_r w_rj over particles r with a lower loss than j, w_rj = exp(−‖y_r − y_j‖²/n); zero for the
    best one.

    Args:
        x: (P, k, n) where particles are.
        found: (P, k, n) y, their best points so far.
        lowest: (P, k) the losses there.

    >>> attraction(torch.zeros(1, 2, 1), torch.tensor([[[0.0], [2.0]]]), torch.tensor([[5.0, 1.0]])).flatten()
    tensor([2., 0.])
    """
    weights = near(found) * (lowest.unsqueeze(2) < lowest.unsqueeze(1))  # (P, r, j)
    total = weights.sum(1).unsqueeze(-1)
    mean = torch.einsum("prj,prn->pjn", weights, found) / total.clamp_min(torch.finfo(x.dtype).tiny)
    return torch.where(total > 0, mean - x, 0.0)
