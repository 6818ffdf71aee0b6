"""Formulas are written once, for tensors and for the vectors of compiled code; here is what each rounds its own way.

All else they have in common, under torch's names. Vectors are of `l2o_runtime.kernels.emit`, which needs llvmlite; so
nothing here asks for their type.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def multiply_add(x: Any, factor: Any, term: Any) -> Any:
    """x · factor + term; of vectors in one instruction, rounded once, where the processor has it."""
    return x * factor + term if isinstance(x, Tensor) else x.fma(factor, term)


def quotients(values: Sequence[Any], divisor: Any) -> list[Any]:
    """Every value over the divisor; of vectors times its reciprocal, as divisions take the longest of all."""
    if isinstance(divisor, Tensor):
        return [x / divisor for x in values]
    inverse = divisor.reciprocal()
    return [x * inverse for x in values]


def at_least(x: Any, low: float) -> Any:
    """The larger of both, of numbers too."""
    return max(x, low) if isinstance(x, int | float) else x.clamp_min(low)


def at_most(x: Any, high: float) -> Any:
    """The smaller of both, of numbers too."""
    return min(x, high) if isinstance(x, int | float) else x.clamp_max(high)
