"""Which directions gradients go along and which they go to and fro in: pure functions on sketches of gradients."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.05
"""Probability of so few, or so many, changes of sign by chance at which a direction is called one or the other."""

SWEEPS = 30
"""Iterations of `leading_directions` at most."""

TOLERANCE = 1e-10
"""Part of a block by which it may still turn where iterations end."""


@dataclass
class Covariance:
    """Exponentially weighted mean and covariance of vectors (k,), without bias, one vector at a time.

    With weights w_i = decay^(t − i): C = Σ w_i (x_i − μ)(x_i − μ)ᵀ / (W₁ − W₂/W₁), W_j = Σ w_i^j.

    Source: West 1979, with the correction for weights that tell how reliable vectors are.

    Attributes:
        mean: (k,) float64.
        scatter: (k, k) float64, the sum above.
        first, second: W₁ and W₂.
    """

    mean: Tensor
    scatter: Tensor
    first: float = 0.0
    second: float = 0.0

    @classmethod
    def empty(cls, size: int) -> "Covariance":
        """Of no vector yet."""
        return cls(torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64))

    def update(self, vector: Tensor, decay: float) -> None:
        """Take in a vector (k,); those before it lose 1 − decay of their weight."""
        before = decay * self.first
        self.first, self.second = before + 1, decay**2 * self.second + 1
        gap = vector - self.mean
        self.mean = self.mean + gap / self.first
        self.scatter = decay * self.scatter + before / self.first * torch.outer(gap, gap)

    def value(self) -> Tensor:
        """C, (k, k); zeros of fewer than two vectors.

        >>> covariance = Covariance.empty(1)
        >>> for x in (1.0, 2.0, 6.0):
        ...     covariance.update(torch.tensor([x], dtype=torch.float64), decay=1.0)
        >>> round(covariance.value().item(), 12)
        7.0
        """
        free = self.first - self.second / self.first if self.first else 0.0
        return self.scatter / free if free > 1e-12 else torch.zeros_like(self.scatter)


def leading_directions(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues, descending, and eigenvectors of a symmetric positive semi-definite matrix.

    Block power iteration: Q ← orth(C Q) by QR until the block turns no more, then Rayleigh–Ritz. A block that was right
    for a matrix a little different is a good start.

    Args:
        matrix: (k, k) float64.
        start: (k, r) of full rank.

    Returns:
        (r,) and (k, r); a matrix that is zero or not finite gives zeros and the orthogonalised start.

    Source: Golub & Van Loan 2013, algorithm 8.2.8.
    """
    block = torch.linalg.qr(start)[0]
    size = float(matrix.diagonal().sum())
    if not (math.isfinite(size) and size > 0 and bool(matrix.isfinite().all())):
        return matrix.new_zeros(block.shape[1]), block
    scaled = matrix / size
    for _ in range(SWEEPS):
        # A little of the block itself keeps it of full rank where the matrix is not.
        turned = torch.linalg.qr(scaled @ block + 1e-12 * block)[0]
        moved = (turned - block @ (block.mT @ turned)).square().sum()
        block = turned
        if float(moved) < TOLERANCE**2:
            break
    values, inside = torch.linalg.eigh(block.mT @ scaled @ block)
    return size * values.flip(-1), block @ inside.flip(-1)


def orthonormal_weights(sketches: Tensor, axes: Tensor, gram: Tensor) -> Tensor:
    """Weights (b, r) of b gradients whose combinations are orthonormal, with sketches near to given axes.

    Least squares for the sketches, then Gram–Schmidt in the metric of the gradients themselves, axis by axis; what is
    no combination of the gradients, or one of axes before it, has weights of zero.

    Args:
        sketches: (k, b) float64, of the gradients.
        axes: (k, r).
        gram: (b, b) inner products of the gradients.
    """
    size = gram.diagonal().mean()
    if not (bool(gram.isfinite().all()) and size > 0):
        return gram.new_zeros(len(gram), axes.shape[1])
    wanted = torch.linalg.pinv(sketches, rtol=1e-6) @ axes
    done: list[Tensor] = []
    for weights in wanted.mT:
        full = torch.sqrt(weights @ gram @ weights)
        for _ in range(2):  # twice is enough
            for other in done:
                weights = weights - other * (other @ gram @ weights)
        length = torch.sqrt((weights @ gram @ weights).clamp_min(0))
        there = bool(length > 1e-6 * full) and bool(length > 0)
        done.append(weights / length if there else torch.zeros_like(weights))
    return torch.stack(done, 1)


def chance_of_changes(count: int, changes: int) -> tuple[float, float]:
    """Probabilities that signs drawn by chance change at most, and at least, so often.

    Args:
        count: of signs.
        changes: of sign between neighbours, which are count − 1.

    >>> chance_of_changes(5, 0), chance_of_changes(5, 4)
    ((0.0625, 1.0), (1.0, 0.0625))
    """
    pairs = max(count - 1, 0)
    chances = [math.comb(pairs, k) / 2**pairs for k in range(pairs + 1)]
    return sum(chances[: changes + 1]), sum(chances[changes:])


def slopes(paths: Tensor) -> list[int]:
    """What gradients do in directions: 1 in a valley, along its floor; −1 to and fro between walls; 0 neither.

    A test of signs, which assumes nothing of how gradients are distributed: along a floor their component keeps its
    sign more often than by chance, between walls it changes it more often, each at `LEVEL`.

    Args:
        paths: (B, r) components of the last B gradients along r directions.

    >>> slopes(torch.tensor([[1.0, 1.0], [2.0, -1.0], [1.0, 2.0], [3.0, -1.0], [1.0, 1.0], [1.0, -2.0]]))
    [1, -1]
    """
    found = []
    for path in paths.mT:
        signs = path[path != 0].sign()
        few, many = chance_of_changes(len(signs), int((signs[1:] != signs[:-1]).sum()))
        found.append(1 if few <= LEVEL else -1 if many <= LEVEL else 0)
    return found
