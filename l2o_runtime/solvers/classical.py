"""ISTA, FISTA and AMP: what unrolled solvers are made of, and are held against. Nothing of them is learned.

Source: Beck & Teboulle 2009, "A Fast Iterative Shrinkage-Thresholding Algorithm", and Donoho, Maleki & Montanari 2009,
"Message-Passing Algorithms for Compressed Sensing".
"""

import torch
from torch import Tensor

from l2o_runtime.solvers.analytic import lipschitz
from l2o_runtime.solvers.base import Point, Problems, Solver, structure_of
from l2o_runtime.solvers.cells import TINY, onsager, residual
from l2o_runtime.solvers.thresholds import shrink
from l2o_runtime.state import State


def proximal_step(x: Tensor, b: Tensor, matrix: Tensor, size: Tensor, weight: float) -> Tensor:
    """η_{λ/L}(x + Aᵀ(b − A x)/L), the step of ISTA for ½‖A x − b‖² + λ‖x‖₁.

    Args:
        x, b: (…, n) and (…, m).
        matrix: A (m, n).
        size: L.
        weight: λ.
    """
    return shrink(x + residual(x, b, matrix) @ matrix / size, weight / size)


def lasso(x: Tensor, b: Tensor, matrix: Tensor, weight: float) -> Tensor:
    """½‖A x − b‖² + λ‖x‖₁, (…)."""
    return residual(x, b, matrix).square().sum(-1) / 2 + weight * x.abs().sum(-1)


class ISTA(Solver):
    """Proximal gradient steps of 1/L, for problems with one A.

    Args:
        weight: λ; the problems' own if left out.
    """

    blind = True

    def __init__(self, weight: float | None = None):
        super().__init__()
        self.weight = weight

    def init(self, problems: Problems) -> State:
        """A, b, L and λ."""
        structure = structure_of(problems)
        weight = structure.weight if self.weight is None else self.weight
        return {
            "matrix": structure.matrix,
            "target": structure.target,
            "size": lipschitz(structure.matrix),
            "weight": structure.target.new_tensor(weight),
        }

    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """One step."""
        return self._proximal(point.params, state), state

    def _proximal(self, x: Tensor, state: State) -> Tensor:
        return proximal_step(x, state["target"], state["matrix"], state["size"], float(state["weight"]))


class FISTA(ISTA):
    """ISTA with momentum."""

    def init(self, problems: Problems) -> State:
        """That of ISTA, the point before, and t_0 = 0, which makes t_1 = 1."""
        return super().init(problems) | {"before": problems.params, "t": torch.zeros((), dtype=torch.float64)}

    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """x_{k+1} from y_k = x_k + (t_{k−1} − 1)/t_k (x_k − x_{k−1})."""
        x, t = point.params, float(state["t"])
        now = (1 + (1 + 4 * t**2) ** 0.5) / 2
        y = x + (t - 1) / now * (x - state["before"])
        return self._proximal(y, state), state | {"before": x, "t": torch.full_like(state["t"], now)}


class AMP(Solver):
    """Approximate message passing: v = b − A x + (‖x‖₀/m) v, x ← η_{α σ}(x + Aᵀ v) with σ = ‖v‖/√m.

    It is for A with independent entries, and columns of norm 1.

    Args:
        tuning: α; for a share of 0.1 of entries that are not zero, 1.1 to 1.5 does well.
    """

    blind = True

    def __init__(self, tuning: float = 1.3):
        super().__init__()
        self.tuning = tuning

    def init(self, problems: Problems) -> State:
        """A, b and no residual yet."""
        structure = structure_of(problems)
        return {
            "matrix": structure.matrix,
            "target": structure.target,
            "residual": torch.zeros_like(structure.target),
        }

    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """One step."""
        x, matrix = point.params, state["matrix"]
        v = onsager(x, state["target"], state["residual"], matrix)
        sigma = v.square().mean(-1, keepdim=True).clamp_min(TINY).sqrt()
        return shrink(x + v @ matrix, self.tuning * sigma), state | {"residual": v}
