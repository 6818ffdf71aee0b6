"""Hand-made solvers that are no torch optimizers: for games, for swarms, and with a line search.

Each step is shown one point, so that all of them, learned ones too, are compared at equal numbers of gradients.
"""

import torch
from torch import Tensor

from l2o_runtime.config import require
from l2o_runtime.solvers import MAX, MIN, Players, Point, Problems, Solver
from l2o_runtime.state import State
from l2o_training.tasks.base import generator

DONE = "done"
"""Name in the state: the number of points that were looked at."""

SUFFICIENT = 1e-4
"""Share of the decrease that a gradient promises, which a trial has to show (Armijo's condition)."""

PULL = 1.49445
"""Of a particle towards its own and the swarm's best point (Eberhart & Shi 2000)."""


def _none_done() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


class LineSearch(Solver):
    """Gradient descent with backtracking: a trial that does not decrease f enough halves the step, another doubles it.

    A trial costs a step as any point does, and the last point may be one that is refused.

    Args:
        rate: first length to try.

    Source: Armijo 1966.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def init(self, problems: Problems) -> State:
        """No point to go back to."""
        params = problems.params
        rows = params[:, 0]
        start = {"base": params, "slope": torch.zeros_like(params), "lowest": torch.full_like(rows, torch.inf)}
        return start | {"rate": torch.full_like(rows, self.rate / 2)}

    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """Take the trial or go back, and try again."""
        promised = SUFFICIENT * state["rate"] * state["slope"].square().sum(-1)
        taken = point.loss <= state["lowest"] - promised  # not if it is no number
        rate = state["rate"] * torch.where(taken, 2.0, 0.5)
        base = torch.where(taken.unsqueeze(-1), point.params, state["base"])
        slope = torch.where(taken.unsqueeze(-1), point.grad, state["slope"])
        lowest = torch.where(taken, point.loss, state["lowest"])
        return base - rate.unsqueeze(-1) * slope, {"base": base, "slope": slope, "lowest": lowest, "rate": rate}


class Optimistic(Solver):
    """θ ← θ − lr (2 g − g⁻), with the gradient g⁻ of the step before.

    Source: Popov 1980; Daskalakis, Ilyas, Syrgkanis & Zeng 2018, "Training GANs with Optimism".
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def init(self, problems: Problems) -> State:
        """No gradient was seen."""
        return {DONE: _none_done(), "before": torch.zeros_like(problems.params)}

    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """The first step is that of gradient descent."""
        before = state["before"] if state[DONE] else point.grad
        after = point.params - self.rate * (2 * point.grad - before)
        return after, {DONE: state[DONE] + 1, "before": point.grad}


class ExtraGradient(Solver):
    """θ' = θ − lr g(θ), then θ ← θ − lr g(θ'): two gradients for an iteration.

    Source: Korpelevich 1976.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def init(self, problems: Problems) -> State:
        """At θ."""
        return {DONE: _none_done(), "base": problems.params}

    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """To θ', or from there on."""
        base = state["base"] if state[DONE] % 2 else point.params
        return base - self.rate * point.grad, {DONE: state[DONE] + 1, "base": base}


class Alternating(Solver):
    """Gradient descent and ascent by turns: u ← u − lr ∂f/∂u, then v ← v + lr ∂f/∂v."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def init(self, problems: Problems) -> State:
        """Whose turn it is.

        Raises:
            ConfigError: the problems are no games.
        """
        players = problems.structure
        require(isinstance(players, Players), "alternating: this task has no players")
        moves = torch.zeros(2, problems.params.shape[1], device=problems.params.device)
        for player in (MIN, MAX):
            moves[player, players.places(player, problems.shapes, moves.device)] = 1
        return {DONE: _none_done(), "moves": moves}

    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """A step of one player."""
        moves = state["moves"][int(state[DONE]) % 2]
        return point.params - self.rate * moves * point.grad, state | {DONE: state[DONE] + 1}


class ParticleSwarm(Solver):
    """v ← w v + c r₁ (y − x) + c r₂ (y* − x), x ← x + v: y is a particle's best point so far, y* the swarm's.

    Random numbers come from the number of the step, so that a state has none: all problems of a shape meet the same.

    Args:
        inertia: w.

    Source: Kennedy & Eberhart 1995; c as in Eberhart & Shi 2000.
    """

    def __init__(self, inertia: float):
        super().__init__()
        self.inertia = inertia

    def init(self, problems: Problems) -> State:
        """At rest.

        Raises:
            ConfigError: the problems are no swarms.
        """
        particles = getattr(problems.structure, "particles", 1)
        require(particles > 1, "pso: this task has one point per problem: give it more particles")
        params = problems.params
        lowest = torch.full_like(params[:, 0], torch.inf)
        state = {DONE: _none_done(), "found": params, "lowest": lowest, "velocity": torch.zeros_like(params)}
        return state | {"particles": torch.tensor(particles)}

    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """A step of all particles."""
        k, x = int(state["particles"]), point.params
        better = point.loss < state["lowest"]
        lowest = torch.where(better, point.loss, state["lowest"])
        found = torch.where(better.unsqueeze(-1), x, state["found"])
        leader = lowest.unflatten(0, (-1, k)).argmin(1) + k * torch.arange(len(x) // k, device=x.device)
        best = found[leader].repeat_interleave(k, 0)
        rng = generator(int(state[DONE]), x.device)
        own, social = torch.rand(2, *x.shape, generator=rng, device=x.device)
        velocity = self.inertia * state["velocity"] + PULL * (own * (found - x) + social * (best - x))
        new = {DONE: state[DONE] + 1, "found": found, "lowest": lowest, "velocity": velocity}
        return x + velocity, state | new
