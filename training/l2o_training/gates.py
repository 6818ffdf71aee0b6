"""What is between the matrix products of an LSTM layer, compiled: the gates forward, and their derivatives.

Arrays are units × coordinates, so that a vector instruction takes as many coordinates as it holds numbers.
σ(x) = ½ (1 + tanh(x/2)), and tanh is a quotient of polynomials. Divisions are what the processor waits for, so
quotients are brought to a common denominator.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from torch import Tensor

from l2o_runtime.kernels.emit import I64, POINTER, VOID, Compiled, Vector, load, loop, store, widest

LEAST = 16
"""Coordinates that a block has to have: a vector of the widest kind."""

LINES = {"forward": (1, 3), "backward": (3, 5)}
"""How many arrays hold the m coordinates of the block, and how many all n."""


def forward(start: int, sums: Tensor, c: Tensor, new_h: Tensor, new_c: Tensor) -> None:
    """h' = σ(o) tanh(c'), c' = σ(f) c + σ(i) tanh(g), for m of n coordinates.

    Args:
        start: the first of the coordinates in the arrays with n of them.
        sums: (4H, m) pre-activations, in the order i, f, g, o; m ≥ 16.
        c: (H, n).
        new_h, new_c: (H, n), written; none of the arrays overlap.
    """
    _call("forward", start, (sums,), (c, new_h, new_c))


def backward(
    start: int,
    sums: Tensor,
    down: Tensor,
    pre: Tensor,
    c: Tensor,
    new_c: Tensor,
    grad_h: Tensor,
    grad_c: Tensor,
    grad_old: Tensor,
) -> None:
    """Derivatives by the pre-activations and by c, for m of n coordinates; the gates are computed again.

    Args:
        start: the first of the coordinates in the arrays with n of them.
        sums: (4H, m) pre-activations; m ≥ 16.
        down: (H, m) derivative by h' from the layer above.
        pre: (4H, m) derivatives by the pre-activations, written.
        c, new_c: (H, n).
        grad_h, grad_c: (H, n) derivatives by h' and c' from the next step.
        grad_old: (H, n) derivative by c, written; none of the arrays overlap.
    """
    _call("backward", start, (sums, down, pre), (c, new_c, grad_h, grad_c, grad_old))


def _call(name: str, start: int, block: tuple[Tensor, ...], whole: tuple[Tensor, ...]) -> None:
    assert all(t.is_contiguous() for t in (*block, *whole))
    assert block[0].shape[1] >= LEAST
    pointers = [t.data_ptr() for t in block] + [t.data_ptr() + 4 * start for t in whole]
    _compile()[0][name](whole[0].shape[0], block[0].shape[1], whole[0].shape[1], *pointers)


@functools.cache
def _compile() -> tuple[dict[str, Callable[..., None]], Compiled]:
    """Both functions, and what keeps them alive; once per process."""
    module = ir.Module(name="gates")
    _function(module, "forward", _forward)
    _function(module, "backward", _backward)
    compiled = Compiled(module)
    kinds = {n: ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * sum(k)) for n, k in LINES.items()}
    return {name: kind(compiled.address(name)) for name, kind in kinds.items()}, compiled


def _function(module: ir.Module, name: str, body: Callable[..., None]) -> None:
    """`name(H, m, n, arrays…)`: `body` for every unit and every vector of coordinates.

    The last vector of a unit begins before the end of the one before it, if m is not a multiple of its width.
    """
    narrow, wide = LINES[name]
    function = ir.Function(module, ir.FunctionType(VOID, [I64] * 3 + [POINTER] * (narrow + wide)), name=name)
    for argument in function.args[3:]:
        argument.add_attribute("noalias")
    hidden, m, n, *arrays = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    width = I64(widest())
    turns = builder.sdiv(builder.add(m, I64(widest() - 1)), width)
    last = builder.sub(m, width)

    def line(k: Any, _: list[Any]) -> list[Any]:
        def vector(turn: Any, _: list[Any]) -> list[Any]:
            at = builder.mul(turn, width)
            at = builder.select(builder.icmp_signed("<", at, last), at, last)

            def place(array: Any, stride: Any, gate: int = 0) -> Any:
                row = builder.add(k, builder.mul(hidden, I64(gate)))
                return builder.gep(array, [builder.add(builder.mul(row, stride), at)])

            sums, *others = arrays
            gates = [load(builder, place(sums, m, gate), widest()) for gate in range(4)]
            rest = [place(array, m) for array in others[: narrow - 1]] + [place(a, n) for a in others[narrow - 1 :]]
            if name == "backward":
                rest[1] = [place(others[1], m, gate) for gate in range(4)]
            body(builder, gates, *rest)
            return []

        loop(builder, turns, [], vector)
        return []

    loop(builder, hidden, [], line)
    builder.ret_void()


def _ratios(gates: list[Vector]) -> list[tuple[Vector, Vector]]:
    """Numerators and denominators of tanh(i/2), tanh(f/2), tanh(g), tanh(o/2)."""
    return [(gate if index == 2 else gate * 0.5).tanh_ratio() for index, gate in enumerate(gates)]


def _forward(builder: Any, gates: list[Vector], c: Any, new_h: Any, new_c: Any) -> None:
    (ni, di), (nf, df), (ng, dg), (no, do) = _ratios(gates)
    both = di * dg
    cell = ((nf + df) * load(builder, c, widest()) * both + (ni + di) * ng * df) / ((df + df) * both)
    nc, dc = cell.tanh_ratio()
    store(builder, cell, new_c)
    store(builder, (no + do) * nc / ((do + do) * dc), new_h)


def _backward(
    builder: Any, gates: list[Vector], down: Any, pre: list[Any], c: Any, new_c: Any, grad_h: Any, grad_c: Any, old: Any
) -> None:
    ratios = [*_ratios(gates), load(builder, new_c, widest()).tanh_ratio()]
    i, f, g, o, t = _divide(ratios)
    i, f, o = (x.fma(0.5, 0.5) for x in (i, f, o))
    d = load(builder, grad_h, widest()) + load(builder, down, widest())
    through = d * o
    e = (through - through * t * t) + load(builder, grad_c, widest())
    ei, eg = e * i, e * g
    ef = e * f
    store(builder, eg * (i - i * i), pre[0])
    store(builder, ef * load(builder, c, widest()) * (i.like(1.0) - f), pre[1])
    store(builder, ei - ei * g * g, pre[2])
    store(builder, d * t * (o - o * o), pre[3])
    store(builder, ef, old)


def _divide(ratios: list[tuple[Vector, Vector]]) -> list[Vector]:
    """All quotients with one division: 1/a = b (1/(a b)), and so on."""
    products = [ratios[0][1]]
    for _, denominator in ratios[1:]:
        products.append(products[-1] * denominator)
    inverse = products[-1].like(1.0) / products[-1]
    quotients = []
    for (numerator, denominator), before in zip(reversed(ratios[1:]), reversed(products[:-1]), strict=True):
        quotients.append(numerator * (inverse * before))
        inverse = inverse * denominator
    return [ratios[0][0] * inverse, *reversed(quotients)]
