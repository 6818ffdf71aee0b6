"""A learned solver as a function: x = solver(b)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from l2o_runtime.config import require
from l2o_runtime.files.artifact import ArtifactError, read_learned
from l2o_runtime.solvers import UnrolledSolver
from l2o_runtime.solvers.analytic import lipschitz
from l2o_runtime.solvers.classical import lasso, proximal_step

WEIGHT = 0.005
"""λ of the safeguard, where the file does not say what the solver was meta-trained with."""

BLOCK = 256
"""Signals that go through the layers together on a CPU, so that what lies between layers stays near."""


class LearnedSolver:
    """Recovers sparse x from b = A x + ε with the layers of a meta-trained solver; A is part of its file.

    Args:
        path: a `.safetensors` file that `l2o train` wrote.

    Attributes:
        solver: the layers, frozen.
        provenance: where they come from.

    Raises:
        ArtifactError: the file is missing, damaged, or of a rule, which `LearnedOptimizer` runs.
    """

    def __init__(self, path: str | Path):
        found, self.provenance = read_learned(path)
        if not isinstance(found, UnrolledSolver):
            raise ArtifactError(f"{path}: of kind {found.config.kind}, which LearnedOptimizer(params, rule=…) runs")
        self.solver: UnrolledSolver = found

    @property
    def matrix(self) -> Tensor:
        """A (m, n)."""
        return self.solver.matrix

    @property
    def layers(self) -> int:
        """K."""
        return self.solver.config.layers

    @torch.no_grad()
    def __call__(
        self, b: Tensor, *, layers: int | None = None, safeguard: bool = False, weight: float | None = None
    ) -> Tensor:
        """x (…, n) for b (…, m), on the device of b and with its dtype; layers compute in float32.

        With a safeguard, a layer after which f(x) = ½‖A x − b‖² + λ‖x‖₁ is above f(0) gives way to a step of ISTA, row
        by row, and a row that ends above ISTA after as many steps is ISTA's. So no row ends above ISTA's. Between, f
        may be above it: good layers do not go straight down. It costs about four times the time.

        Args:
            b: measurements; a vector, or any number of them.
            layers: how many of them; all if left out.
            safeguard: whether layers are checked.
            weight: λ of the safeguard; that of the tasks of meta-training if left out.

        Raises:
            ConfigError: b has another size or numbers that are not finite, there are not so many layers, or λ is none.

        Source: Heaton, Chen, Wang & Yin 2020, "Safeguarded Learned Convex Optimization", of which this is a variant:
            its bound on residuals falls from layer to layer, this one does not.
        """
        rows, count = self.solver.config.rows, self.layers if layers is None else layers
        known = type(count) is int and 1 <= count <= self.layers
        require(known, f"layers: must be in 1..{self.layers}, as was trained; got {layers}")
        require(isinstance(b, Tensor), f"b: expected a tensor (…, {rows}), got {type(b).__name__}")
        real = b.is_floating_point() and b.dim() >= 1 and b.shape[-1] == rows
        require(real, f"b: expected floating-point numbers (…, {rows}), got {tuple(b.shape)} of {b.dtype}")
        target = b.to(self.matrix.dtype)
        require(bool(target.isfinite().all()), f"b: it has numbers that are not finite in {target.dtype}")
        told = weight is None or 0 <= weight < float("inf")
        require(told, f"weight: λ of the safeguard must be a finite number, 0 or more, got {weight}")
        if self.matrix.device != b.device:  # a look at all tensors takes as long as two layers of one signal
            self.solver.to(b.device)
        signals = target.reshape(-1, rows)
        blocks = signals.split(BLOCK) if b.device.type == "cpu" else [signals]
        run = self._guarded(weight) if safeguard else self.solver
        x = torch.cat([run(block, count) for block in blocks])
        return x.reshape(*b.shape[:-1], x.shape[-1]).to(b.dtype)

    def fit(self, matrix: Tensor) -> Self:
        """Go over to another A, without meta-training: for cells that learn numbers alone, such as ALISTA's.

        Thresholds stay as they are, so that columns of norm 1, as in meta-training, are what this is for. Step sizes of
        StepLISTA keep their ratio to 1/L, which belongs to A.

        Args:
            matrix: A (m, n), of any size.

        Raises:
            ConfigError: the cell's weights belong to the A that it was meta-trained for; or A is no matrix, or has
                numbers that are not finite, or rows that depend on each other.
        """
        old, config = self.solver, self.solver.config
        own = [name for name, value in old.named_parameters() if value.dim()]
        require(
            not own, f"fit: the weights of {config.cell} belong to its A; meta-train it for another, or take alista"
        )
        require(matrix.dim() == 2 and matrix.is_floating_point(), f"A: expected a matrix, got {tuple(matrix.shape)}")
        rows, columns = matrix.shape
        new = UnrolledSolver(replace(config, rows=rows, columns=columns))
        new.fit_to(matrix.detach().to(device="cpu", dtype=torch.float32), variables=False)
        new.load_state_dict(dict(old.named_parameters()), strict=False)
        before, after = (each.cell.units(each.matrix) for each in (old, new))
        with torch.no_grad():
            for name, unit in after.items():
                for value in getattr(new, name):
                    value *= unit / before[name]
        self.solver = new.eval().requires_grad_(False)
        return self

    def _guarded(self, weight: float | None) -> Callable[[Tensor, int], Tensor]:
        """Layers, each where f is not above f(0), else ISTA's step from x; at the end the lower of x and ISTA."""
        told, matrix = self._weight() if weight is None else weight, self.matrix
        size = lipschitz(matrix)

        def run(b: Tensor, layers: int) -> Tensor:
            memory = self.solver.memory(b)
            x = ista = b.new_zeros(*b.shape[:-1], matrix.shape[1])
            start = lasso(x, b, matrix, told)
            for k in range(layers):
                proposed, memory = self.solver.layer(k, x, b, memory)
                step = proximal_step(x, b, matrix, size, told)
                ista = proximal_step(ista, b, matrix, size, told)
                x = torch.where((lasso(proposed, b, matrix, told) <= start).unsqueeze(-1), proposed, step)
            lower = lasso(x, b, matrix, told) <= lasso(ista, b, matrix, told)
            return torch.where(lower.unsqueeze(-1), x, ista)

        return run

    def _weight(self) -> float:
        """λ of the first task of meta-training, as far as the provenance says."""
        config: Any = self.provenance.get("config")
        tasks = config.get("tasks") if isinstance(config, dict) else None
        first = tasks[0] if isinstance(tasks, list) and tasks and isinstance(tasks[0], dict) else {}
        found = first.get("weight", WEIGHT)
        return float(found) if isinstance(found, int | float) else WEIGHT

    def __repr__(self) -> str:
        return f"LearnedSolver({self.solver.config.network})"
