"""Where a linear recurrence that some snapshots follow comes to rest: an affine combination of the snapshots.

Reduced-rank extrapolation, with a ridge. Only inner products of the snapshots' differences are needed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from l2o_runtime.contexts.gram import difference_gram

CHUNK = 2**15
"""Coordinates whose float64 differences are in memory at a time: few enough for a cache."""

TINY = 1e-300
"""Added to a Gram matrix of zeros, so that it can be solved with."""


def step_gram(snapshots: Sequence[Tensor], oldest: int = 0) -> Tensor:
    """G_ij = Δ_i · Δ_j of the successive differences Δ_i = s_{i+1} − s_i, summed over tensors.

    Differences, from the oldest, are formed before products, in float64: the products of the snapshots themselves would
    lose the digits in which neighbours differ.

    Args:
        snapshots: of every tensor, (m + 1, …), a ring in chronological order.
        oldest: where the ring begins.

    Returns:
        (m, m) float64, on the CPU.
    """
    gram = torch.zeros((), dtype=torch.float64)
    for tensor in snapshots:
        for piece in tensor.flatten(1).split(CHUNK, 1):
            gaps = piece.double()
            gaps = gaps - gaps[oldest]
            gram = gram + (gaps @ gaps.mT).cpu()
    return difference_gram(gram.roll((-oldest, -oldest), (0, 1)))


def resting_weights(gram: Tensor, ridge: float) -> Tensor:
    """c = argmin ‖Σ c_i Δ_i‖² + ridge · g ‖c‖² with Σ c_i = 1, where g is the mean of ‖Δ_i‖²: c ∝ (G + ridge g I)⁻¹ 1.

    Σ c_i s_{i+1} is then where steps vanish: where s_{i+1} − s* = A (s_i − s*) with fewer than m modes and no ridge,
    it is s* exactly. Slow modes, whose λ is near 1, are followed to their end; those at λ = 1 are what stays. A large
    ridge gives the mean of the window.

    Args:
        gram: (m, m) float64, from `step_gram`.
        ridge: ≥ 0.

    Returns:
        (m,) float64, of the snapshots but the first.

    Source: Eddy 1979, Mešina 1977 (reduced-rank extrapolation); Scieur et al. 2016 (the ridge), arXiv 1606.04133.

    >>> s = 3 + 0.5 ** torch.arange(3, dtype=torch.float64)  # comes to rest at 3
    >>> round(float(resting_weights(step_gram([s[:, None]]), 0.0) @ s[1:]), 12)
    3.0
    """
    sizes, directions = torch.linalg.eigh(gram / gram.diagonal().mean().clamp_min(TINY))
    sizes = sizes.clamp_min(torch.finfo(torch.float64).eps) + ridge
    weights: Tensor = directions @ (directions.sum(0) / sizes)
    return weights / weights.sum()


def combine(snapshots: Tensor, weights: Tensor, oldest: int = 0) -> Tensor:
    """Σ c_i s_{i+1}, float64 inside, in the snapshots' dtype.

    Args:
        snapshots: (m + 1, …), a ring.
        weights: (m,) that sum to 1.
        oldest: where the ring begins.
    """
    flat, place = snapshots.flatten(1), torch.cat([weights.new_zeros(1), weights]).roll(oldest).to(snapshots.device)
    out = torch.empty_like(flat[0])
    for piece, into in zip(flat.split(CHUNK, 1), out.split(CHUNK), strict=True):
        exact = piece.double()
        into.copy_(exact[oldest] + place @ (exact - exact[oldest]))
    return out.view_as(snapshots[0])
