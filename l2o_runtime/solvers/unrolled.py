"""Unrolled solvers: an algorithm of a few steps, each a layer with weights of its own."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from l2o_runtime.config import MAX_NUMBERS, require
from l2o_runtime.solvers.base import Point, Problems, Solver, SolverConfig, Structure
from l2o_runtime.state import State

TARGET, DONE = "problem/target", "done"
"""Names in the state: b (B, m), and the number of layers so far."""


def shrink(x: Tensor, threshold: Tensor) -> Tensor:
    """The soft threshold sign(x) max(|x| − θ, 0).

    >>> shrink(torch.tensor([-3.0, 0.5, 2.0]), torch.tensor(1.0))
    tensor([-2., 0., 1.])
    """
    return torch.sign(x) * (x.abs() - threshold).clamp_min(0)


@dataclass(frozen=True, kw_only=True)
class UnrolledConfig(SolverConfig):
    """An unrolled solver for sparse x with b = A x.

    Attributes:
        rows, columns: m and n of A.
        layers: K.
        shrinkage: λ that thresholds begin with, λ/L.
    """

    kind: ClassVar[str] = "unrolled"
    rows: int = 256
    columns: int = 512
    layers: int = 16
    shrinkage: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.layers <= 1000, f"layers: must be in 1..1000, got {self.layers}")
        for key in ("rows", "columns"):
            require(getattr(self, key) >= 1, f"{key}: must be 1 or more, got {getattr(self, key)}")
        numbers = self.rows * self.columns * (self.layers + 1)
        require(numbers <= MAX_NUMBERS, f"layers: {numbers} weights, more than {MAX_NUMBERS}")

    @property
    def network(self) -> str:
        """The network in a few words."""
        return f"{self.layers} layers, A of {self.rows} × {self.columns}"


class UnrolledSolver(Solver):
    """x_{k+1} = η_{θ_k}(x_k + W_kᵀ (b − A x_k)): LISTA-CP.

    Source: Chen, Liu, Wang & Yin 2018, "Theoretical Linear Convergence of Unfolded ISTA", equation 10.
    """

    config: UnrolledConfig
    matrix: Tensor

    def __init__(self, config: UnrolledConfig):
        super().__init__()
        self.config = config
        shape = (config.rows, config.columns)
        self.register_buffer("matrix", torch.zeros(shape))
        self.weight = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for _ in range(config.layers)])
        self.threshold = nn.ParameterList([nn.Parameter(torch.zeros(())) for _ in range(config.layers)])

    @torch.no_grad()
    def fit(self, problems: Problems) -> None:
        """A, W_k = A/L and θ_k = λ/L, where L is 1.001 times the largest eigenvalue of AᵀA."""
        matrix = _structure(problems).matrix
        wanted, found = (self.config.rows, self.config.columns), tuple(matrix.shape)
        require(found == wanted, f"rule.rows, rule.columns: the task's A is {found}, the solver's {wanted}")
        scale = 1.001 * float(torch.linalg.matrix_norm(matrix, 2)) ** 2
        self.matrix.copy_(matrix)
        for weight, threshold in zip(self.weight, self.threshold, strict=True):
            weight.copy_(matrix / scale)
            threshold.fill_(self.config.shrinkage / scale)

    def init(self, problems: Problems) -> State:
        """What it reads of the problems, and no layer done."""
        return {TARGET: _structure(problems).target, DONE: torch.zeros((), dtype=torch.int64)}

    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """The next layer."""
        layer, x = int(state[DONE]), point.params
        residual = state[TARGET] - x @ self.matrix.T
        x = shrink(x + residual @ self.weight[layer], self.threshold[layer])
        return x, state | {DONE: state[DONE] + 1}


def _structure(problems: Problems) -> Structure:
    structure = problems.structure
    require(isinstance(structure, Structure), "unrolled: these problems have no A and b: take a task that has")
    return structure  # type: ignore[no-any-return]
