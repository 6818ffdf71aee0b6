"""What a solver is: it is shown a point of an optimization, and says where to look next.

A solver is pure: all that it remembers is in its state, so that optimizations can be copied, stopped and resumed. What
is learned are its parameters; a hand-made solver has none.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from l2o_runtime.config import ContextConfig, NoneConfig, require
from l2o_runtime.state import State


class Point(NamedTuple):
    """Where B optimizations are, and what is seen there.

    Attributes:
        params: (B, n).
        loss: (B,) at them; zero where it is not shown.
        grad: (B, n) the gradient of the loss.
    """

    params: Tensor
    loss: Tensor
    grad: Tensor


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What a model-based solver, or an oracle, may read of B problems: b = A x* + ε, f(x) = ½‖A x − b‖² + λ‖x‖₁.

    Attributes:
        matrix: A, (m, n) of all problems, or (B, m, n).
        target: b, (B, m).
        weight: λ.
        solution: x*, (B, n), which oracles and meta-losses know; None where nobody does.
    """

    matrix: Tensor
    target: Tensor
    weight: float = 0.0
    solution: Tensor | None = None

    def part(self, start: int, stop: int) -> "Structure":
        """That of some of the problems."""
        return Structure(
            matrix=self.matrix if self.matrix.dim() == 2 else self.matrix[start:stop],
            target=self.target[start:stop],
            weight=self.weight,
            solution=None if self.solution is None else self.solution[start:stop],
        )


def structure_of(problems: "Problems") -> Structure:
    """What is known of problems b = A x* + ε.

    Raises:
        ConfigError: they are no such problems.
    """
    structure = problems.structure
    require(isinstance(structure, Structure), "rule: these tasks have no A and b to read: take a task that has")
    return structure  # type: ignore[no-any-return]


class Problems(Protocol):
    """What a solver may read of B problems before it begins; one that reads more asks for richer ones."""

    @property
    def params(self) -> Tensor:
        """(B, n) where the optimizations begin."""

    @property
    def shapes(self) -> Sequence[torch.Size]:
        """Of the tensors that the n coordinates belong to, one after the other."""

    @property
    def steps(self) -> int | None:
        """How many steps there will be; None where nobody says."""

    @property
    def structure(self) -> Any:
        """What is known of the problems beside their gradients, a `Structure` for one; None where nothing is."""


@dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """What fixes the architecture of a learned solver, whatever its kind. One that follows a rule is no such solver.

    Attributes:
        horizon: number of steps that it was meta-trained for.
    """

    kind: ClassVar[str]
    context: ClassVar[ContextConfig] = NoneConfig()
    scheduled: ClassVar[bool] = False
    horizon: int = 100

    def __post_init__(self) -> None:
        require(1 <= self.horizon <= 10**9, f"horizon: must be in 1..{10**9}, got {self.horizon}")

    @property
    def network(self) -> str:
        """The network in a few words."""
        return self.kind

    @property
    def unrolled(self) -> Self:
        """As it is while it is meta-trained."""
        return self

    def meta_trained(self, horizon: int, told: bool) -> Self:
        """After meta-training over so many steps."""
        return replace(self, horizon=horizon)


class Solver(nn.Module, ABC):
    """Carries optimizations of B problems side by side; none of them sees another.

    Attributes:
        config: of a learned one.
        queries: points that are evaluated per step.
        blind: whether it reads nothing of a point but its parameters.
    """

    config: SolverConfig
    queries: int = 1
    blind: bool = False

    def fit(self, problems: Problems) -> None:
        """Begin with what all problems of a kind have in common, such as A; before meta-training."""

    def grow(self, steps: int) -> None:
        """Prepare for optimizations of so many steps, after meta-training with fewer."""

    @abstractmethod
    def init(self, problems: Problems) -> State:
        """The state at the beginning."""

    @abstractmethod
    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """One step.

        Args:
            point: the current one. Loss and gradient are constants; what is differentiated comes in the parameters.
            state: from `init` or the step before; it stays as it is.

        Returns:
            The next parameters (B, n) and the new state.
        """
