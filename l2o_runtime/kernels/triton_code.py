"""The device code of the Triton kernel: features, LSTM and update of a block of coordinates in one pass.

A coordinate's state is read once and written once; everything between stays in registers. Blocks are powers of two:
a state of 20 numbers is worked on in a tile of 32, whose padding is neither read nor written. Padded weights and biases
are zero, so that the padding of h and c stays zero as well.

Without Triton the module can be imported, but not run.
"""

from __future__ import annotations  # `tl.constexpr` is not looked up where Triton is not installed

import math
from typing import Any

from l2o_runtime.rules.features import BETA, EPSILON, LOG_SIGN_P
from l2o_runtime.state import LARGEST

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # pragma: no cover

    def jit(function: Any) -> Any:
        """Stands in for Triton's decorator."""
        return function

else:
    # Triton lets a kernel see only those global numbers that are declared as constants.
    THRESHOLD = tl.constexpr(math.exp(-LOG_SIGN_P))
    INVERSE_P = tl.constexpr(1 / LOG_SIGN_P)
    KEEP = tl.constexpr(BETA)
    ADD = tl.constexpr(1 - BETA)
    CLIP = tl.constexpr(LARGEST)
    EPS = tl.constexpr(EPSILON)


@jit
def rounded(x, DTYPE: tl.constexpr):
    """To a dtype, to the nearest, ties to even.

    bfloat16 is rounded by hand, for Triton's interpreter would truncate; so it gets the same bits everywhere.
    """
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(DTYPE)


@jit
def sigmoid(x):
    """σ(x)."""
    return 1 / (1 + tl.exp(-x))


@jit
def tanh(x):
    """tanh x, with an odd polynomial near zero, where the quotient of exponentials would cancel."""
    decayed = tl.exp(-2 * tl.abs(x))
    far = (1 - decayed) / (1 + decayed)
    square = x * x
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@jit
def power_of_beta(step):
    """β^step for a whole number: from exact powers, as a device's exp2 is not good enough for 1 − β^step."""
    exponent = tl.minimum(step, 511.0).to(tl.int32)  # β^511 is nothing next to 1
    power = step * 0 + 1
    for bit in tl.static_range(9):
        power = tl.where((exponent >> bit) & 1 != 0, power * KEEP ** (2**bit), power)
    return power


@jit
def log_sign(g):
    """The two features of Andrychowicz et al. 2016."""
    magnitude = tl.abs(g)
    sign = tl.where(g < 0, -1.0, 1.0)
    logarithm = tl.log(tl.maximum(magnitude, THRESHOLD)) * INVERSE_P
    return logarithm, sign * (tl.minimum(magnitude, THRESHOLD) / THRESHOLD)


@jit
def normalized(g, m, v, step):
    """The two features of Lv et al. 2017, and the new averages."""
    g = tl.minimum(tl.maximum(g, -CLIP), CLIP)
    m = KEEP * m + ADD * g
    v = KEEP * v + ADD * (g * g)
    correction = 1 - power_of_beta(step + 1)
    root = tl.sqrt(v / correction) + EPS
    return m / correction / root, g / root, m, v


@jit
def gate(first, second, x, h, bias, weights, LAYER: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr):
    """Pre-activation of one gate, (BLOCK, PADDED).

    Args:
        first, second: (BLOCK,) features, which the first layer looks at.
        x: (BLOCK, PADDED) output of the layer below, which the others look at.
        h: (BLOCK, PADDED) of this layer.
        bias: of this gate, (PADDED,).
        weights: of this gate, (PADDED, PADDED) for x (features in the first two rows), the same for h behind all four.
    """
    units = tl.arange(0, PADDED)
    square = units[:, None] * PADDED + units[None, :]
    pre = tl.zeros_like(h) + tl.load(bias + units)[None, :]
    if LAYER == 0:
        pre += first[:, None] * tl.load(weights + units)[None, :]
        pre += second[:, None] * tl.load(weights + PADDED + units)[None, :]
    else:
        pre = tl.dot(x, tl.load(weights + square), pre, input_precision=PRECISION)
    return tl.dot(h, tl.load(weights + 4 * PADDED * PADDED + square), pre, input_precision=PRECISION)


@jit
def moved(theta, delta, lr, decay, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """θ · (1 − lr · decay) + lr · Δ, rounded where the plain loop rounds: after the decay, and at the end."""
    theta = rounded(theta.to(WIDE) * (1 - lr * decay).to(WIDE), DTYPE)
    return rounded(theta.to(WIDE) + delta.to(WIDE) * lr.to(WIDE), DTYPE)


@jit
def advance(
    theta,
    grad,
    m,
    v,
    h,
    c,
    step,
    good,
    bias,
    more_bias,
    weights,
    head,
    lr,
    decay,
    n,
    HIDDEN: tl.constexpr,
    PADDED: tl.constexpr,
    LAYERS: tl.constexpr,
    NORMALIZED: tl.constexpr,
    TANH: tl.constexpr,
    SCALE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of BLOCK coordinates, in place, if `good`.

    Args:
        theta, grad: (n,).
        m, v: (n,) averages of the normalized features, or None.
        h, c: (n, HIDDEN) for each layer.
        step, good: (1,) or ().
        bias: (4, PADDED) of the first layer, with the context's part.
        more_bias: (LAYERS, 4, PADDED), of which the first layer's are not read.
        weights: (LAYERS, 2, 4, PADDED, PADDED): of the input and of h, gate by gate, transposed.
        head: (PADDED + 1,), the head's bias last.
        lr, decay: numbers, or () each if ON_DEVICE.
        WIDE: the dtype in which θ is moved.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    rows = tl.arange(0, BLOCK)
    units = tl.arange(0, PADDED)
    live = rows < tl.where(tl.load(good), n, 0) - start  # in a bad step no row is
    cells = start * HIDDEN + rows[:, None] * HIDDEN + units[None, :]
    held = live[:, None] & (units < HIDDEN)[None, :]
    rows += start

    g = tl.load(grad + rows, mask=live, other=0.0).to(tl.float32)
    if MAXIMIZE:
        g = -g
    if NORMALIZED:
        old_m = tl.load(m + rows, mask=live, other=0.0).to(tl.float32)
        old_v = tl.load(v + rows, mask=live, other=0.0).to(tl.float32)
        first, second, new_m, new_v = normalized(g, old_m, old_v, tl.load(step))
        tl.store(m + rows, rounded(new_m, m.dtype.element_ty), mask=live)
        tl.store(v + rows, rounded(new_v, v.dtype.element_ty), mask=live)
    else:
        first, second = log_sign(g)

    x = tl.zeros((BLOCK, PADDED), tl.float32)
    for layer in tl.static_range(LAYERS):
        old_h = tl.load(h[layer] + cells, mask=held, other=0.0).to(tl.float32)
        old_c = tl.load(c[layer] + cells, mask=held, other=0.0).to(tl.float32)
        b = bias if layer == 0 else more_bias + 4 * layer * PADDED
        w = weights + 8 * layer * PADDED * PADDED
        size = PADDED * PADDED
        i = gate(first, second, x, old_h, b, w, layer, PADDED, PRECISION)
        f = gate(first, second, x, old_h, b + PADDED, w + size, layer, PADDED, PRECISION)
        p = gate(first, second, x, old_h, b + 2 * PADDED, w + 2 * size, layer, PADDED, PRECISION)
        o = gate(first, second, x, old_h, b + 3 * PADDED, w + 3 * size, layer, PADDED, PRECISION)
        new_c = sigmoid(f) * old_c + sigmoid(i) * tanh(p)
        x = sigmoid(o) * tanh(new_c)
        tl.store(h[layer] + cells, rounded(x, h[layer].dtype.element_ty), mask=held)
        tl.store(c[layer] + cells, rounded(new_c, c[layer].dtype.element_ty), mask=held)

    delta = tl.sum(x * tl.load(head + units)[None, :], axis=1) + tl.load(head + PADDED)
    if TANH:
        delta = tanh(delta)
    delta *= SCALE
    if ON_DEVICE:
        lr, decay = tl.load(lr), tl.load(decay)
    else:
        lr, decay = tl.full((), lr, tl.float64), tl.full((), decay, tl.float64)
    old = tl.load(theta + rows, mask=live, other=0.0)
    tl.store(theta + rows, moved(old, delta, lr, decay, theta.dtype.element_ty, WIDE), mask=live)
