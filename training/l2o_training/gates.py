"""What is between the matrix products of an LSTM layer, compiled: the gates forward, and their derivatives.

σ(x) = ½ tanh(x/2) + ½, and tanh is the rational function of `l2o_runtime.kernels.emit`.
"""

import numba
from numba import float32 as f32

from l2o_runtime.kernels.emit import BOUND, DENOMINATOR, NUMERATOR

# The layer that survives a fork; only the thread that trains calls what is compiled here.
numba.config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]

FAST = {"contract", "arcp", "nsz"}
P0, P1, P2, P3, P4 = NUMERATOR
Q0, Q1, Q2, Q3, Q4 = DENOMINATOR


def set_threads(count: int) -> None:
    """Use so many threads, as far as there are."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


@numba.njit(fastmath=FAST, inline="always")
def _tanh(x):  # type: ignore[no-untyped-def]
    x = f32(BOUND) if x > f32(BOUND) else x  # unlike min and max, these compile to vector instructions
    x = f32(-BOUND) if x < f32(-BOUND) else x
    s = x * x
    p = f32(P0) + s * (f32(P1) + s * (f32(P2) + s * (f32(P3) + s * f32(P4))))
    q = f32(Q0) + s * (f32(Q1) + s * (f32(Q2) + s * (f32(Q3) + s * f32(Q4))))
    return x * p / q


@numba.njit(fastmath=FAST, inline="always")
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return f32(0.5) + f32(0.5) * _tanh(f32(0.5) * x)


@numba.njit(fastmath=FAST, cache=True, parallel=True)
def forward(sums, bias, c, gates, new_h, new_c):  # type: ignore[no-untyped-def]
    """h' = σ(o) tanh(c'), c' = σ(f) c + σ(i) tanh(g).

    Nothing is written in place: the compiler makes vectors of what it knows not to overlap.

    Args:
        sums: (n, 4H) products, in the order i, f, g, o.
        bias: (4H,).
        c: (n, H).
        gates: (n, 4H), written: σ(i), σ(f), tanh(g), σ(o).
        new_h, new_c: (n, H), written.
    """
    n, hidden = c.shape
    for r in numba.prange(n):
        for k in range(hidden):
            i = _sigmoid(sums[r, k] + bias[k])
            f = _sigmoid(sums[r, hidden + k] + bias[hidden + k])
            g = _tanh(sums[r, 2 * hidden + k] + bias[2 * hidden + k])
            o = _sigmoid(sums[r, 3 * hidden + k] + bias[3 * hidden + k])
            cell = f * c[r, k] + i * g
            gates[r, k], gates[r, hidden + k] = i, f
            gates[r, 2 * hidden + k], gates[r, 3 * hidden + k] = g, o
            new_c[r, k], new_h[r, k] = cell, o * _tanh(cell)


@numba.njit(fastmath=FAST, cache=True, parallel=True)
def backward(gates, c, new_c, grad_h, grad_c, grad_sums, grad_old):  # type: ignore[no-untyped-def]
    """Derivatives by the products and by c.

    Args:
        gates: (n, 4H) from `forward`.
        c, new_c: (n, H).
        grad_h, grad_c: (n, H) derivatives by h' and c'.
        grad_sums, grad_old: (n, 4H) by the products and (n, H) by c, written.
    """
    n, hidden = c.shape
    one = f32(1)
    for r in numba.prange(n):
        for k in range(hidden):
            i, f = gates[r, k], gates[r, hidden + k]
            g, o = gates[r, 2 * hidden + k], gates[r, 3 * hidden + k]
            t, d = _tanh(new_c[r, k]), grad_h[r, k]
            e = grad_c[r, k] + d * o * (one - t * t)
            grad_sums[r, k] = e * g * i * (one - i)
            grad_sums[r, hidden + k] = e * c[r, k] * f * (one - f)
            grad_sums[r, 2 * hidden + k] = e * i * (one - g * g)
            grad_sums[r, 3 * hidden + k] = d * t * o * (one - o)
            grad_old[r, k] = e * f
