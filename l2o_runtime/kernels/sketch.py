"""CountSketch on the CPU in one compiled pass; `l2o_runtime.sketch` is its definition."""

import numba
from numba import int64, uint64

PRIME = 2**31 - 1


@numba.njit(inline="always")
def _reduce(value):  # type: ignore[no-untyped-def]
    """A number below 2⁶² modulo 2³¹ − 1: a Mersenne prime needs no division."""
    value = (value & uint64(PRIME)) + (value >> uint64(31))
    value = (value & uint64(PRIME)) + (value >> uint64(31))
    return value - uint64(PRIME) if value >= uint64(PRIME) else value


@numba.njit(inline="always")
def _hash(index, a, b, c, d):  # type: ignore[no-untyped-def]
    value = _reduce(uint64(a) * index + uint64(b))
    value = _reduce(value * index + uint64(c))
    return _reduce(value * index + uint64(d))


@numba.njit(cache=True)
def add_sketch(vector, start, buckets, signs, out):  # type: ignore[no-untyped-def]
    """Add the sketch of coordinates start, start + 1, … to `out`.

    Args:
        vector: (n,) float32.
        start: global index of the first.
        buckets, signs: coefficients of the two polynomials.
        out: (d,) float32, written.
    """
    size = uint64(len(out))
    mask = size - uint64(1) if size & (size - uint64(1)) == uint64(0) else uint64(0)
    for i in range(len(vector)):
        index = _reduce(uint64(start + i))
        place = _hash(index, buckets[0], buckets[1], buckets[2], buckets[3])
        place = place & mask if mask else place % size
        odd = _hash(index, signs[0], signs[1], signs[2], signs[3]) & uint64(1)
        out[int64(place)] += -vector[i] if odd else vector[i]
