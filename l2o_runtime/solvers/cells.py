"""Cells: one layer of an unrolled algorithm for sparse x with b = A x, and the values that it begins with.

A cell is pure: what it is made of are constants, which belong to A, variables, which are learned, and memory, which
goes from layer to layer beside x. A variable is there for every layer, or once for all. x begins at zero, and all
tensors are (…, n) or (…, m).

Variables begin with a matrix M, and a threshold: with `start = "ista"` M = A/L and θ = λ/L, as published, so that a
solver begins as ISTA; with "analytic" M is the W of ALISTA and θ = λ, from which layers are learned in far fewer
updates. L = 1.001 ‖A‖₂², and λ is `shrinkage`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from l2o_runtime.solvers.analytic import coherent_least, least_squares, lipschitz
from l2o_runtime.solvers.thresholds import chosen_support, count_of, posterior_mean, shrink, shrink_rest

if TYPE_CHECKING:
    from l2o_runtime.solvers.unrolled import UnrolledConfig

Memory: TypeAlias = dict[str, Tensor]
Sizes: TypeAlias = Mapping[str, Literal["rows", "columns"]]
Gain: TypeAlias = Literal["linear", "inverse", "exponential", "sigmoid"]

TINY = 1e-12
"""Variances and norms are never less."""


class Cell(ABC):
    """One layer.

    Args:
        config: of the solver.

    Attributes:
        memory: what goes from layer to layer beside x, and whether it is as long as b ("rows") or x ("columns").
    """

    memory: ClassVar[Sizes] = {}

    def __init__(self, config: "UnrolledConfig"):
        self.config = config

    def constants(self, matrix: Tensor) -> dict[str, Tensor]:
        """What belongs to A (m, n); A itself comes first."""
        return {"matrix": matrix}

    @abstractmethod
    def variables(self, matrix: Tensor) -> dict[str, list[Tensor]]:
        """What layers begin with: a value for each, or one for all."""

    @abstractmethod
    def layer(
        self, k: int, x: Tensor, b: Tensor, memory: Memory, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Memory]:
        """The layer of number k = 0, 1, …

        Args:
            k: its number.
            x: (…, n).
            b: (…, m).
            memory: from the layer before; zeros at first.
            values: constants, and the layer's variables.

        Returns:
            x after it, and the memory.
        """

    def units(self, matrix: Tensor) -> dict[str, Tensor]:
        """What variables are measured in that mean the same for another A in its own units: name → unit for A."""
        return {}

    def each(self, value: Tensor) -> list[Tensor]:
        """One such value per layer."""
        return [value.clone() for _ in range(self.config.layers)]

    def first(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """M (m, n) and θ, which variables begin with."""
        if self.config.start == "analytic":
            return coherent_least(matrix), matrix.new_tensor(self.config.shrinkage)
        size = lipschitz(matrix)
        return matrix / size, self.config.shrinkage / size

    def count(self, k: int) -> int:
        """How many entries of x pass layer k as they are, with support selection."""
        return count_of(k, self.config.columns, self.config.percent, self.config.most)


def residual(x: Tensor, b: Tensor, matrix: Tensor) -> Tensor:
    """b − A x."""
    return b - x @ matrix.T


def layer_residual(k: int, x: Tensor, b: Tensor, matrix: Tensor) -> Tensor:
    """b − A x before layer k: in layer 0 x is zero."""
    return b if k == 0 else residual(x, b, matrix)


class LISTA(Cell):
    """x ← η_{θ_k}(W₁ b + W₂ₖ x), with one W₁ for all layers.

    Begins with W₁ = Mᵀ, W₂ = I − MᵀA. Source: Gregor & LeCun 2010, "Learning Fast Approximations of Sparse Coding".
    """

    memory: ClassVar[Sizes] = {"input": "columns"}

    def variables(self, matrix: Tensor) -> dict[str, list[Tensor]]:
        """W₁ᵀ, W₂ᵀ and θ."""
        weight, threshold = self.first(matrix)
        return {
            "encoder": [weight],
            "mutual": self.each(inhibition(weight, matrix)),
            "threshold": self.each(threshold),
        }

    def layer(
        self, k: int, x: Tensor, b: Tensor, memory: Memory, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Memory]:
        """The sum, and the threshold."""
        z, inputs = self.total(k, x, b, memory, values)
        return shrink(z, values["threshold"]), {"input": inputs}

    def total(
        self, k: int, x: Tensor, b: Tensor, memory: Memory, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """W₁ b + W₂ x, in layer 0 without the second, which is zero; and W₁ b, which is computed once."""
        inputs = b @ values["encoder"] if k == 0 else memory["input"]
        return inputs if k == 0 else inputs + x @ values["mutual"], inputs


def inhibition(weight: Tensor, matrix: Tensor) -> Tensor:
    """(I − MᵀA)ᵀ (n, n)."""
    return torch.eye(matrix.shape[1], device=matrix.device, dtype=matrix.dtype) - matrix.T @ weight


class LISTACP(Cell):
    """x ← η_{θ_k}(x + W_kᵀ (b − A x)). Begins with W = M.

    Source: Chen, Liu, Wang & Yin 2018, "Theoretical Linear Convergence of Unfolded ISTA", equation 10.
    """

    def variables(self, matrix: Tensor) -> dict[str, list[Tensor]]:
        """W and θ."""
        weight, threshold = self.first(matrix)
        return {"weight": self.each(weight), "threshold": self.each(threshold)}

    def layer(
        self, k: int, x: Tensor, b: Tensor, memory: Memory, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Memory]:
        """A gradient step with weights of its own, and the threshold."""
        return self.threshold(k, x + layer_residual(k, x, b, values["matrix"]) @ values["weight"], values), {}

    def threshold(self, k: int, z: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """η_{θ_k}(z)."""
        return shrink(z, values["threshold"])


class LISTACPSS(LISTACP):
    """LISTA-CP with support selection: the largest entries pass as they are.

    Source: Chen, Liu, Wang & Yin 2018, equation 13.
    """

    def threshold(self, k: int, z: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """η^{p_k}_{θ_k}(z)."""
        support = chosen_support(z, values["threshold"], self.count(k))
        return shrink_rest(z, values["threshold"], support)


class ALISTA(LISTACPSS):
    """x ← η^{p_k}_{θ_k}(x + γ_k Wᵀ (b − A x)), where W belongs to A: two numbers per layer are learned.

    Begins with γ = 1. Source: Liu, Chen, Wang & Yin 2019, "ALISTA", equation 16.
    """

    def constants(self, matrix: Tensor) -> dict[str, Tensor]:
        """A, and W in closed form."""
        return {"matrix": matrix, "weight": coherent_least(matrix)}

    def variables(self, matrix: Tensor) -> dict[str, list[Tensor]]:
        """γ and θ."""
        return {"step_size": self.each(matrix.new_ones(())), "threshold": self.each(self.first(matrix)[1])}

    def layer(
        self, k: int, x: Tensor, b: Tensor, memory: Memory, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Memory]:
        """A step along W, and the threshold."""
        step = layer_residual(k, x, b, values["matrix"]) @ values["weight"]
        return self.threshold(k, torch.addcmul(x, values["step_size"], step), values), {}


class LFISTA(LISTA):
    """x_{k+1} = η_{θ_k}(W_e b + W_{g,k} x_k + W_{m,k} x_{k−1}), with one W_e for all layers.

    Begins as FISTA: W_e = Mᵀ, W_g = (1 + m_k)(I − MᵀA), W_m = −m_k (I − MᵀA), where m_k = (t_{k−1} − 1)/t_k. Trained
    layer by layer it does not: a new layer begins with what the one before has learned, and the first two, for which
    m_k = 0, learn no W_m. Momentum then begins at nothing, and is learned.

    Source: Moreau & Bruna 2017, "Understanding Trainable Sparse Coding via Matrix Factorization", section 4.
    """

    memory: ClassVar[Sizes] = {"input": "columns", "previous": "columns"}

    def variables(self, matrix: Tensor) -> dict[str, list[Tensor]]:
        """W_eᵀ, W_gᵀ, W_mᵀ and θ."""
        weight, threshold = self.first(matrix)
        mutual, momenta = inhibition(weight, matrix), momentum(self.config.layers)
        return {
            "encoder": [weight],
            "mutual": [(1 + m) * mutual for m in momenta],
            "inertia": [-m * mutual for m in momenta],
            "threshold": self.each(threshold),
        }

    def layer(
        self, k: int, x: Tensor, b: Tensor, memory: Memory, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Memory]:
        """As LISTA's, with inertia from layer 2 on, where it is not zero."""
        z, inputs = self.total(k, x, b, memory, values)
        z = z if k < 2 else z + memory["previous"] @ values["inertia"]
        return shrink(z, values["threshold"]), {"input": inputs, "previous": x}


def momentum(layers: int) -> list[float]:
    """m_k = (t_{k−1} − 1)/t_k of FISTA for k = 0, 1, …, with t_0 = 1, and m_0 = 0.

    Source: Beck & Teboulle 2009, "A Fast Iterative Shrinkage-Thresholding Algorithm", equation 4.2.

    >>> [round(m, 3) for m in momentum(4)]
    [0.0, 0.0, 0.282, 0.434]
    """
    before, found = 1.0, [0.0]
    for _ in range(layers - 1):
        now = (1 + math.sqrt(1 + 4 * before**2)) / 2
        found.append((before - 1) / now)
        before = now
    return found


class LAMP(Cell):
    """v_k = b − A x + (‖x‖₀/m) v_{k−1}; x ← η_{α_k σ}(x + B_k v_k) with σ = ‖v_k‖/√m.

    Begins as AMP: B = Aᵀ, and α = `shrinkage`. Source: Borgerding, Schniter & Rangan 2017, "AMP-Inspired Deep Networks
    for Sparse Linear Inverse Problems", section IV-A.
    """

    memory: ClassVar[Sizes] = {"residual": "rows"}

    def variables(self, matrix: Tensor) -> dict[str, list[Tensor]]:
        """Bᵀ and α."""
        return {"weight": self.each(matrix), "tuning": self.each(matrix.new_tensor(self.config.shrinkage))}

    def layer(
        self, k: int, x: Tensor, b: Tensor, memory: Memory, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Memory]:
        """With the Onsager term."""
        v = b if k == 0 else onsager(x, b, memory["residual"], values["matrix"])
        sigma = v.square().mean(-1, keepdim=True).clamp_min(TINY).sqrt()
        return shrink(x + v @ values["weight"], values["tuning"] * sigma), {"residual": v}


def onsager(x: Tensor, b: Tensor, before: Tensor, matrix: Tensor) -> Tensor:
    """b − A x + (‖x‖₀/m) v, where v was this before. The number of entries is a constant."""
    density = (x != 0).to(x.dtype).sum(-1, keepdim=True) / len(matrix)
    return residual(x, b, matrix) + density * before


class GLISTA(LISTACPSS):
    """LISTA-CPSS whose input is raised by a gain gate, and whose output overshoots.

    y = (1 + a_k gate(D_k |x|)) x; x̃ = η^{p_k}_{θ_k}(y + W_kᵀ(b − A y)); o = 1 + c_k s/(|x̃ − x| + 0.1), where s is θ_k
    outside of the support that the layer before selected, else zero; x ← x + o (x̃ − x). Begins with a = `gain_size`,
    D = 1, c = 0 and W = M.

    Source: Wu, Guo, Li & Zhang 2020, "Sparse Coding with Gated Learned ISTA", sections 3 and 4.
    """

    memory: ClassVar[Sizes] = {"support": "columns"}

    def variables(self, matrix: Tensor) -> dict[str, list[Tensor]]:
        """Those of LISTA-CP, a, D and c."""
        return super().variables(matrix) | {
            "gain": self.each(matrix.new_tensor(self.config.gain_size)),
            "gate": self.each(matrix.new_ones(matrix.shape[1])),
            "overshoot": self.each(matrix.new_zeros(())),
        }

    def layer(
        self, k: int, x: Tensor, b: Tensor, memory: Memory, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Memory]:
        """Gain, LISTA-CPSS, overshoot.

        Scalars are multiplied first: for 64 rows of 512 numbers an operator takes as long as a tenth of a product.
        """
        gate = GATES[self.config.gain]
        y = x if k == 0 else torch.addcmul(x, values["gain"], gate(x, values["gate"] * x.abs()))
        z = y + layer_residual(k, y, b, values["matrix"]) @ values["weight"]
        support = chosen_support(z, values["threshold"], self.count(k))
        shrunk = shrink_rest(z, values["threshold"], support)
        moved = shrunk - x
        over = (1 - memory["support"]) * (moved / (moved.abs() + 0.1))
        return torch.addcmul(shrunk, values["overshoot"] * values["threshold"], over), {"support": support}


GATES: dict[Gain, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, z: x * torch.relu(1 - torch.relu(z)),
    "inverse": lambda x, z: 0.2 * (x / (0.001 + z.abs())),
    "exponential": lambda x, z: x * torch.exp(-z.abs()),
    "sigmoid": lambda x, z: x * torch.sigmoid(-z),
}
"""x times what GLISTA's gain does with z = D |x|: it falls as that grows."""


class StepLISTA(Cell):
    """x ← η_{λ α_k}(x + α_k Aᵀ (b − A x)): ISTA with a learned step size per layer. Begins with α = 1/L.

    Source: Ablin, Moreau, Massias & Gramfort 2019, "Learning Step Sizes for Unfolded Sparse Coding", equation 10.
    """

    def variables(self, matrix: Tensor) -> dict[str, list[Tensor]]:
        """α."""
        return {name: self.each(unit) for name, unit in self.units(matrix).items()}

    def units(self, matrix: Tensor) -> dict[str, Tensor]:
        """Steps are as long as A lets them be."""
        return {"step_size": 1 / lipschitz(matrix)}

    def layer(
        self, k: int, x: Tensor, b: Tensor, memory: Memory, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Memory]:
        """A step of ISTA."""
        matrix, step = values["matrix"], values["step_size"]
        return shrink(x + step * (layer_residual(k, x, b, matrix) @ matrix), step * self.config.shrinkage), {}


class TISTA(Cell):
    """x ← E[s | x + γ_k W (b − A x)] with W = Aᵀ(A Aᵀ)⁻¹, for sparse Gaussian s: a number per layer is learned.

    With v² = max(‖b − A x‖² − m σ², ε)/‖A‖²_F, the variance of the error before the mean is
    τ² = v²/n (n + (γ² − 2γ) m) + γ² σ² ‖W‖²_F/n. Begins with γ = 1.

    Source: Ito, Takabe & Wadayama 2019, "Trainable ISTA for Sparse Signal Recovery", equations 6 to 11.
    """

    def constants(self, matrix: Tensor) -> dict[str, Tensor]:
        """A, and Wᵀ."""
        return {"matrix": matrix, "inverse": least_squares(matrix).to(matrix.dtype)}

    def variables(self, matrix: Tensor) -> dict[str, list[Tensor]]:
        """γ."""
        return {"step_size": self.each(matrix.new_ones(()))}

    def layer(
        self, k: int, x: Tensor, b: Tensor, memory: Memory, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Memory]:
        """A step, and the posterior mean."""
        matrix, inverse, step = values["matrix"], values["inverse"], values["step_size"]
        (m, n), noise, error = matrix.shape, self.config.noise, layer_residual(k, x, b, matrix)
        excess = (error.square().sum(-1, keepdim=True) - m * noise) / matrix.square().sum()
        spread = excess.clamp_min(TINY) / n * (n + (step**2 - 2 * step) * m)
        variance = spread + step**2 * noise / n * inverse.square().sum()
        return posterior_mean(x + step * (error @ inverse), variance.clamp_min(TINY), self.config.sparsity), {}


CELLS: dict[str, type[Cell]] = {
    "lista": LISTA,
    "lista-cp": LISTACP,
    "lista-cpss": LISTACPSS,
    "alista": ALISTA,
    "lfista": LFISTA,
    "lamp": LAMP,
    "glista": GLISTA,
    "step-lista": StepLISTA,
    "tista": TISTA,
}
"""Name → cell. A new one is a class here, and a line."""
