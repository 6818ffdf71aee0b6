"""Two learned rules that play against each other: min over u, max over v of f(u, v)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from l2o_runtime.config import require
from l2o_runtime.rules import AnyRuleConfig, OptimisticConfig, Rule, make_rule
from l2o_runtime.solvers.base import Point, Problems, Solver, SolverConfig
from l2o_runtime.solvers.descent import Descent
from l2o_runtime.state import State

DONE = "done"
"""Name in the state: the number of moves so far."""

MIN, MAX = 0, 1
"""Players, in the order in which they move."""


@dataclass(frozen=True, kw_only=True)
class Players:
    """What a solver may read of games: who moves what.

    Attributes:
        owners: for every tensor of the problem `MIN` or `MAX`.
    """

    owners: tuple[int, ...]

    def part(self, start: int, stop: int) -> "Players":
        """That of some games: all of them have the same players."""
        return self

    def places(self, player: int, shapes: Sequence[torch.Size], device: torch.device | None = None) -> Tensor:
        """The coordinates of a player.

        >>> Players(owners=(0, 1)).places(1, [torch.Size([2]), torch.Size([3])])
        tensor([2, 3, 4])
        """
        sizes = torch.tensor([shape.numel() for shape in shapes], device=device)
        owner = torch.tensor(self.owners, device=device).repeat_interleave(sizes)
        return (owner == player).nonzero().flatten()


@dataclass(frozen=True, kw_only=True)
class TwinConfig(SolverConfig):
    """A rule for each player.

    Attributes:
        minimizer, maximizer: of any kind; they learn different weights.
    """

    kind: ClassVar[str] = "twin"
    minimizer: AnyRuleConfig = field(default_factory=OptimisticConfig)
    maximizer: AnyRuleConfig = field(default_factory=OptimisticConfig)

    @property
    def network(self) -> str:
        """The networks in a few words."""
        return f"{self.minimizer.network} for u, {self.maximizer.network} for v"

    def meta_trained(self, horizon: int, told: bool) -> Self:
        """After meta-training over so many moves, of which each player makes half."""
        moves = max(1, horizon // 2)
        sides = {key: getattr(self, key).meta_trained(moves, told) for key in ("minimizer", "maximizer")}
        return replace(super().meta_trained(horizon, told), **sides)


class Side(NamedTuple):
    """The problems as one player sees them, the other's coordinates aside."""

    params: Tensor
    shapes: Sequence[torch.Size]
    steps: int | None
    structure: Any = None


class TwinSolver(Solver):
    """u ← u + Δ(∂f/∂u) and v ← v + Δ(−∂f/∂v) by turns, each from where the other has just moved to.

    A step is the move of one player; two of them are an iteration. Problems give every coordinate the gradient of its
    own player's loss, f or −f.

    Source: Shen, Chen, Heaton, Chen, Liu, Yin & Wang 2021, "Learning A Minimax Optimizer: A Pilot Study", section 3.
    """

    config: TwinConfig

    def __init__(self, config: TwinConfig):
        super().__init__()
        self.config = config
        self.rules = nn.ModuleList([make_rule(config.minimizer), make_rule(config.maximizer)])

    def init(self, problems: Problems) -> State:
        """The states of both rules, and no move made.

        Raises:
            ConfigError: the problems are no games.
        """
        players, state = problems.structure, {DONE: torch.zeros((), dtype=torch.int64)}
        require(isinstance(players, Players), 'twin: this task has no players: take a game, such as kind = "game"')
        for player in (MIN, MAX):
            places = players.places(player, problems.shapes, problems.params.device)
            shapes = [s for s, owner in zip(problems.shapes, players.owners, strict=True) if owner == player]
            moves = None if problems.steps is None else (problems.steps + 1 - player) // 2
            side = Side(problems.params[:, places], shapes, moves)
            state |= {f"{player}/{key}": value for key, value in self._descent(player).init(side).items()}
            state[f"places/{player}"] = places
        return state

    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """The move of the player whose turn it is; the other's coordinates stay."""
        player = int(state[DONE]) % 2
        places, sign = state[f"places/{player}"], (1, -1)[player]
        side = Point(point.params[:, places], sign * point.loss, point.grad[:, places])
        own = {key.removeprefix(f"{player}/"): value for key, value in state.items() if key.startswith(f"{player}/")}
        moved, own = self._descent(player).step(side, own)
        new = {f"{player}/{key}": value for key, value in own.items()}
        return point.params.index_copy(1, places, moved), state | new | {DONE: state[DONE] + 1}

    def rule(self, player: int) -> Rule:
        """That of a player."""
        return cast(Rule, self.rules[player])

    def _descent(self, player: int) -> Descent:
        """Along the rule of a player."""
        return Descent(self.rule(player))
