"""LLVM code of the directional rule: its sums, and its directions with the sum of their squares."""

from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir

from l2o_runtime.kernels.emit import F64, I64, POINTER, Vector, broadcast, each, load, store
from l2o_runtime.kernels.pieces_code import add_up, expect_ahead, module_of_pieces, observing, pointers
from l2o_runtime.rules.agreement import SUMS
from l2o_runtime.rules.directional import mixture, relative, terms
from l2o_runtime.rules.statistics import BETAS, Averages, average
from l2o_runtime.rules.steering import MIXED
from l2o_runtime.stepping.interpolation import interpolated

TOTALS = 1 + SUMS
"""Σ|g|, then `l2o_runtime.rules.agreement.Sums`."""

TRAIL = 3
"""Numbers of the schedule's interpolation: see `l2o_runtime.stepping.interpolation.weights`."""

NUMBERS = len(BETAS) + 1 + MIXED + 2 + TRAIL
"""Numbers of a tensor: 1 / (1 − βᵗ), 1 if it was orthogonalised, w, what decay leaves of θ, or the negative of what it
takes where θ follows, −length · lr / RMS(d), and those of the interpolation.
"""


def directional_module(width: int, dtypes: tuple[torch.dtype, ...]) -> ir.Module:
    """`observe(rows, table)`, `update(rows, table)`, `move(rows, table)` and `follow(rows, table)`: go through pieces.

    A row of the table, of int64, is a piece: its number of coordinates, and the addresses of `NUMBERS` float32, of
    gradients, of parameters, of states, each of one of `dtypes`, of the orthogonalised momentum, of e if there is one,
    and of sums, vectors of float64 that are added to: `TOTALS`, or one. `update` writes states, and directions where
    the momentum was; `move` takes these and writes parameters, and `follow` writes parameters that trail behind, and e.

    `copy(rows, table)` takes numbers of float32 and the addresses of what is copied and of where it goes.
    """
    kinds = [POINTER, POINTER, POINTER, *pointers(dtypes), POINTER, POINTER, F64.as_pointer()]
    return module_of_pieces(
        width,
        {
            "observe": (kinds, observing(TOTALS, _seen)),
            "update": (kinds, _update),
            "move": (kinds, _move),
            "follow": (kinds, _follow),
            "copy": ([POINTER, POINTER], _copy),
        },
    )


def _seen(theta: Vector, old: Sequence[Vector], new: Averages) -> list[Vector]:
    """What is summed over a tensor."""
    return [theta.like(1.0), *terms(theta, *relative(new))]


def _update(builder: Any, arguments: Sequence[Any], size: int, start: Any, blocks: Any, width: int) -> None:
    """Write states and directions, and add up squares, `size` coordinates at a time."""
    numbers, grad, _, *states, whole, _, sums = arguments
    scalars = [broadcast(builder, builder.gep(numbers, [I64(i)]), size) for i in range(len(BETAS) + 1 + MIXED)]
    orthogonal, *weights = scalars[len(BETAS) :]

    def squares(at: list[Any]) -> list[Vector]:
        expect_ahead(builder, at, (grad, *states, whole))
        places = [builder.gep(pointer, at) for pointer in (*states, whole)]
        g, momentum, *old = (
            load(builder, pointer, size) for pointer in (builder.gep(grad, at), places[-1], *places[:-1])
        )
        new = average(g, old, scalars[: len(BETAS)])
        x, u, s = relative(new)
        direction = mixture(momentum.where(orthogonal > 0.5, u), x, u, s, weights)
        for value, place in zip([*new.new, direction], places, strict=True):
            store(builder, value, place)
        return [direction.square()]

    add_up(builder, sums, 1, size, start, blocks, width, squares)


def _move(builder: Any, arguments: Sequence[Any], size: int, start: Any, blocks: Any, width: int) -> None:
    """θ ← left · θ + length · d."""
    numbers, _, theta, *_, direction, _, _ = arguments
    left, length, *_ = _ends(builder, numbers, size)

    def body(at: Any) -> None:
        place = builder.gep(theta, [at])
        moved = load(builder, place, size) * left
        store(builder, load(builder, builder.gep(direction, [at]), size).fma(length, moved), place)

    each(builder, size, start, blocks, body)


def _follow(builder: Any, arguments: Sequence[Any], size: int, start: Any, blocks: Any, width: int) -> None:
    """θ and e follow a step of length · d − taken · θ."""
    numbers, _, theta, *_, direction, lag, _ = arguments
    taken, length, *trail = _ends(builder, numbers, size)

    def body(at: Any) -> None:
        places = [builder.gep(pointer, [at]) for pointer in (theta, lag, direction)]
        here, behind, d = (load(builder, place, size) for place in places)
        moved, kept = interpolated(d.fma(length, here * taken), behind, *trail)
        store(builder, here + moved, places[0])
        store(builder, kept, places[1])

    each(builder, size, start, blocks, body)


def _ends(builder: Any, numbers: Any, size: int) -> list[Vector]:
    """The last numbers of a tensor, from that of decay on."""
    places = range(NUMBERS - 2 - TRAIL, NUMBERS)
    return [broadcast(builder, builder.gep(numbers, [I64(i)]), size) for i in places]


def _copy(builder: Any, arguments: Sequence[Any], size: int, start: Any, blocks: Any, width: int) -> None:
    """Copy numbers."""
    source, target = arguments

    def body(at: Any) -> None:
        store(builder, load(builder, builder.gep(source, [at]), size), builder.gep(target, [at]))

    each(builder, size, start, blocks, body)
