"""Unrolled solvers: an algorithm of a few steps, each a layer with variables of its own."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from l2o_runtime.config import nearest, require
from l2o_runtime.solvers.base import Point, Problems, Solver, SolverConfig, structure_of
from l2o_runtime.solvers.cells import CELLS, Gain, Memory
from l2o_runtime.state import State

TARGET, DONE, MEMORY = "problem/target", "done", "memory/"
"""Names in the state: b (B, m), the number of layers so far, and what the memory's begin with."""

MAX_WEIGHTS = 11 * 2**20
"""Bound on the numbers in a solver, 44 MiB, so that its file keeps within `files.artifact.MAX_BYTES`."""


@dataclass(frozen=True, kw_only=True)
class UnrolledConfig(SolverConfig):
    """An unrolled solver for sparse x with b = A x.

    Attributes:
        cell: what a layer is; see `solvers.cells`.
        rows, columns: m and n of A.
        layers: K.
        start: what variables begin with, see `solvers.cells`.
        shrinkage: λ that thresholds begin with; that of the Lasso with step-lista, and AMP's factor with lamp.
        percent, most: of the entries of x, min(percent · (k + 1), most) % pass layer k = 0, 1, … as they are, with
            lista-cpss, alista and glista.
        gain, gain_size: the gate of glista, and the factor that it begins with.
        sparsity, noise: the chance that an entry is not zero, and the variance of the noise, which tista is told.
    """

    kind: ClassVar[str] = "unrolled"
    cell: str = "lista-cp"
    rows: int = 256
    columns: int = 512
    layers: int = 16
    start: Literal["ista", "analytic"] = "ista"
    shrinkage: float = 0.4
    percent: float = 1.2
    most: float = 13.0
    gain: Gain = "linear"
    gain_size: float = 5.0
    sparsity: float = 0.1
    noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.cell in CELLS, f"cell: no {self.cell!r}: {nearest(self.cell, list(CELLS))}")
        require(1 <= self.layers <= 1000, f"layers: must be in 1..1000, got {self.layers}")
        for key in ("rows", "columns"):
            require(1 <= getattr(self, key) <= 2**16, f"{key}: must be in 1..65536, got {getattr(self, key)}")
        for key in ("percent", "most"):
            require(0 <= getattr(self, key) <= 100, f"{key}: must be in 0..100, got {getattr(self, key)}")
        require(self.shrinkage >= 0, f"shrinkage: must be 0 or more, got {self.shrinkage}")
        require(0 < self.sparsity < 1, f"sparsity: must be between 0 and 1, got {self.sparsity}")
        require(self.noise >= 0, f"noise: must be 0 or more, got {self.noise}")
        require(self.weights <= MAX_WEIGHTS, f"layers: {self.weights:,} numbers, more than a file has, {MAX_WEIGHTS:,}")

    @property
    def weights(self) -> int:
        """Numbers in the solver, those that belong to A included."""
        m, n, k = self.rows, self.columns, self.layers
        matrices = {"lista": m * n + k * n * n, "lfista": m * n + 2 * k * n * n}
        learned = {"alista": m * n, "tista": m * n, "step-lista": 0, "glista": k * (m * n + n)}
        return m * n + matrices.get(self.cell, learned.get(self.cell, k * m * n)) + 3 * k

    @property
    def network(self) -> str:
        """The network in a few words."""
        return f"{self.cell}, {self.layers} layers, A of {self.rows} × {self.columns}"


class UnrolledSolver(Solver):
    """K layers of a cell, one per step.

    What belongs to A is kept as buffers. A variable is a list of as many parameters as there are layers, or of one, so
    that names of what belongs to layer k end in .k, and what all share is part of layer 0.
    """

    config: UnrolledConfig
    matrix: Tensor
    blind = True

    def __init__(self, config: UnrolledConfig):
        super().__init__()
        self.config, self.cell = config, CELLS[config.cell](config)
        shapes = torch.empty(config.rows, config.columns, device="meta")
        self.constants = list(self.cell.constants(shapes))
        for name, constant in self.cell.constants(shapes).items():
            self.register_buffer(name, torch.zeros(constant.shape))
        self.names = list(self.cell.variables(shapes))
        for name, values in self.cell.variables(shapes).items():
            setattr(self, name, nn.ParameterList([nn.Parameter(torch.zeros(value.shape)) for value in values]))

    def fit(self, problems: Problems) -> None:
        """Begin with what the problems' A gives; see `fit_to`."""
        self.fit_to(structure_of(problems).matrix)

    @torch.no_grad()
    def fit_to(self, matrix: Tensor, variables: bool = True) -> None:
        """Take what belongs to A (m, n), and the values that variables begin with.

        Args:
            matrix: A.
            variables: whether these begin anew, too.

        Raises:
            ConfigError: A has another shape, numbers that are not finite, or not the rank that the cell asks for.
        """
        wanted, found = (self.config.rows, self.config.columns), tuple(matrix.shape)
        require(found == wanted, f"rule.rows, rule.columns: the task's A is {found}, the solver's {wanted}")
        require(bool(matrix.isfinite().all()), "A: it has numbers that are not finite")
        for name, constant in self.cell.constants(matrix).items():
            getattr(self, name).copy_(constant)
        if variables:
            for name, values in self.cell.variables(matrix).items():
                for parameter, value in zip(getattr(self, name), values, strict=True):
                    parameter.copy_(value)

    @torch.no_grad()
    def grow(self, steps: int) -> None:
        """The last of so many layers, and those after it, begin with what the one before it has learned."""
        for name in self.names:
            values = getattr(self, name)
            for value in values[steps - 1 :] if steps > 1 else ():
                value.copy_(values[steps - 2])

    def init(self, problems: Problems) -> State:
        """What it reads of the problems, and no layer done.

        Raises:
            ConfigError: their A is another than the solver's.
        """
        structure = structure_of(problems)
        matrix, target = structure.matrix, structure.target
        wanted, found = tuple(self.matrix.shape), tuple(matrix.shape)
        require(found == wanted, f"rule.rows, rule.columns: the task's A is {found}, the solver's {wanted}")
        require(
            torch.equal(matrix, self.matrix), "rule: the task's A has other numbers than the solver's; meta-train it"
        )
        memory = {f"{MEMORY}{name}": value for name, value in self.memory(target).items()}
        return {TARGET: target, DONE: torch.zeros((), dtype=torch.int64)} | memory

    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """The next layer; after the last one, x stays as it is."""
        done = int(state[DONE])
        if done == self.config.layers:
            return point.params, state
        memory = {name: state[f"{MEMORY}{name}"] for name in self.cell.memory}
        x, memory = self.layer(done, point.params, state[TARGET], memory)
        return x, state | {DONE: state[DONE] + 1} | {f"{MEMORY}{name}": value for name, value in memory.items()}

    def layer(self, k: int, x: Tensor, b: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Layer k: x (…, n) and memory after it."""
        values = {name: getattr(self, name) for name in self.constants}
        for name in self.names:
            kept = getattr(self, name)
            values[name] = kept[min(k, len(kept) - 1)]
        return self.cell.layer(k, x, b, memory, values)

    def forward(self, b: Tensor, layers: int | None = None) -> Tensor:
        """x (…, n) after so many layers, all if left out, for b (…, m)."""
        x, memory = b.new_zeros(*b.shape[:-1], self.config.columns), self.memory(b)
        for k in range(self.config.layers if layers is None else layers):
            x, memory = self.layer(k, x, b, memory)
        return x

    def memory(self, b: Tensor) -> Memory:
        """What the first layer gets for b (…, m): zeros."""
        config = self.config
        return {name: b.new_zeros(*b.shape[:-1], getattr(config, size)) for name, size in self.cell.memory.items()}
