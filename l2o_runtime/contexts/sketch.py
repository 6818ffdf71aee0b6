"""CountSketch: a linear map from any number of coordinates to a few, which keeps inner products."""

import torch
from torch import Tensor

from l2o_runtime.contexts.hashing import COEFFICIENTS, polynomial_hash
from l2o_runtime.contexts.passes import compiled_pass, listed


def count_sketch(vector: Tensor, size: int, offset: int | Tensor = 0) -> Tensor:
    """CountSketch (Sx)_b = Σ_{i : h(i) = b} s(i) x_i, with E⟨Sx, Sy⟩ = ⟨x, y⟩ and standard deviation ≲ ‖x‖‖y‖·√(2/d).

    Linear, so the sketches of the parts of a vector (tensors, chunks, shards) sum to the sketch of the whole
    when every part says at which global coordinate it starts. Hash and sign depend on the coordinate's global
    index alone, so all processes and all export formats agree.

    Args:
        vector: (..., n) coordinates.
        size: d, the number of buckets.
        offset: global index of the first coordinate, or (n,) global minus local index of each.

    Returns:
        (..., d), same dtype as `vector`.

    Source: Charikar, Chen & Farach-Colton 2002.

    >>> x = torch.arange(5.0)
    >>> parts = count_sketch(x[:2], 8) + count_sketch(x[2:], 8, offset=2)
    >>> torch.equal(count_sketch(x, 8), parts)
    True
    """
    add_sketch = compiled_pass("add_sketch", vector)
    if add_sketch is not None and not isinstance(offset, Tensor):
        out = vector.new_zeros((*vector.shape[:-1], size))
        add_sketch(listed(vector, 1), offset, *COEFFICIENTS, listed(out, 1))
        return out
    bucket, signed = _drawn(vector, size, offset)
    return vector.new_zeros((*vector.shape[:-1], size)).index_add(-1, bucket, signed)


def count_sketches(vector: Tensor, size: int, owner: Tensor, tensors: int) -> Tensor:
    """A CountSketch for every tensor that a flat vector is made of.

    Args:
        vector: (..., n) all coordinates.
        size: d.
        owner: (n,) number of each coordinate's tensor.
        tensors: S.

    Returns:
        (..., S, d).
    """
    bucket, signed = _drawn(vector, size, 0)
    rows = vector.new_zeros((*vector.shape[:-1], tensors, size))
    return rows.flatten(-2).index_add(-1, owner * size + bucket, signed).reshape(rows.shape)


def _drawn(vector: Tensor, size: int, offset: int | Tensor) -> tuple[Tensor, Tensor]:
    """Buckets (n,) of coordinates, and coordinates (..., n) with their signs."""
    index = torch.arange(vector.shape[-1], device=vector.device) + offset
    sign = 1 - 2 * (polynomial_hash(index, COEFFICIENTS[1]) % 2)
    return polynomial_hash(index, COEFFICIENTS[0]) % size, vector * sign.to(vector.dtype)
