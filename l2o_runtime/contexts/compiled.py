"""What contexts observe, on the CPU in one compiled pass; `sketch` and `gram` beside it define it."""

import numba
import numpy as np
from numba import int64, uint64

from l2o_runtime.contexts.hashing import PRIME

BLOCK = 512


@numba.njit(inline="always")
def _reduce(value):  # type: ignore[no-untyped-def]
    """A number below 2⁶² modulo 2³¹ − 1: a Mersenne prime needs no division."""
    value = (value & uint64(PRIME)) + (value >> uint64(31))
    value = (value & uint64(PRIME)) + (value >> uint64(31))
    return min(value, value - uint64(PRIME))  # unsigned: what is below 0 wraps around


@numba.njit(inline="always")
def _hash(index, a, b, c, d):  # type: ignore[no-untyped-def]
    value = _reduce(uint64(a) * index + uint64(b))
    value = _reduce(value * index + uint64(c))
    return _reduce(value * index + uint64(d))


@numba.njit(cache=True)
def add_sketch(vectors, start, buckets, signs, out):  # type: ignore[no-untyped-def]
    """Add the sketches of coordinates start, start + 1, … of several optimizations to `out`.

    Args:
        vectors: (B, n) float32.
        start: global index of the first.
        buckets, signs: coefficients of the two polynomials.
        out: (B, d) float32, written.
    """
    size = uint64(out.shape[1])
    mask = size - uint64(1) if size & (size - uint64(1)) == uint64(0) else uint64(0)
    places, odd = np.empty(BLOCK, np.uint64), np.empty(BLOCK, np.uint64)
    a0, a1, a2, a3 = buckets
    b0, b1, b2, b3 = signs
    n = vectors.shape[1]
    for first in range(0, n, BLOCK):
        count = min(BLOCK, n - first)
        # Hashes first, once for all rows, in a loop that compiles to vector instructions; additions, which may collide,
        # after them.
        for i in range(count):
            index = _reduce(uint64(start + first + i))
            places[i] = _hash(index, a0, a1, a2, a3)
            odd[i] = _hash(index, b0, b1, b2, b3) & uint64(1)
        for row in range(len(vectors)):
            for i in range(count):
                place = places[i] & mask if mask else places[i] % size
                value = vectors[row, first + i]
                out[row, int64(place)] += -value if odd[i] else value


@numba.njit(cache=True)
def add_products(theta, window, out):  # type: ignore[no-untyped-def]
    """Add the inner products of the newest snapshot with those that stay in the window, and with itself, to `out`.

    Args:
        theta: (n,) float32.
        window: (n, m + 1) float32, of which the first column is about to be dropped.
        out: (m + 1,) float64, written.
    """
    size = window.shape[1]
    sums = np.zeros(size)  # memory of its own, so that the compiler knows that it overlaps with nothing
    square = 0.0
    for i in range(len(theta)):
        value = np.float64(theta[i])
        square += value * value
        for k in range(size):
            sums[k] += value * np.float64(window[i, k])
    for k in range(1, size):
        out[k - 1] += sums[k]
    out[size - 1] += square
