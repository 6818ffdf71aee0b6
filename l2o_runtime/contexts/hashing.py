"""Which bucket and which sign a coordinate gets in a CountSketch."""

import torch
from torch import Tensor

PRIME = 2**31 - 1
"""Modulus of the hash; small enough that a product of two residues fits int64 everywhere (ONNX included)."""

COEFFICIENTS = (
    (1_202_604_631, 911_382_323, 1_973_454_239, 487_640_299),
    (1_640_531_527, 374_761_393, 668_265_263, 1_540_483_477),
)
"""Two cubic polynomials modulo `PRIME`: one chooses buckets, the other signs. Part of the artifact format."""


def polynomial_hash(index: Tensor, coefficients: tuple[int, ...]) -> Tensor:
    """4-universal hash h(i) = Σ_k a_k i^k mod (2³¹ − 1), by Horner's rule in exact int64 arithmetic.

    Args:
        index: (n,) int64, non-negative.
        coefficients: (a_k) highest power first.

    Returns:
        (n,) int64 in 0 … 2³¹ − 2.

    Source: Wegman & Carter 1981; four-wise independence is what CountSketch's variance bound asks for.
    """
    index = index % PRIME
    value = torch.full_like(index, coefficients[0])
    for coefficient in coefficients[1:]:
        value = (value * index + coefficient) % PRIME
    return value
