"""LLVM code that goes through many pieces of tensors in one call; vectors go along the coordinates."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from llvmlite import ir

from l2o_runtime.kernels.emit import (
    BF16,
    F32,
    F64,
    I64,
    POINTER,
    VOID,
    Vector,
    broadcast,
    constant,
    expect,
    load,
    loop,
    spans,
)
from l2o_runtime.rules.statistics import BETAS, Averages, average

Write: TypeAlias = Callable[[Any, Sequence[Any], int, Any, Any, int], None]
"""Writes the code for some coordinates of a piece; see `module_of_pieces`."""

AHEAD = 128
"""Coordinates before which memory is asked for those to come: it is slow to answer where five arrays are read."""

TOGETHER = 8
"""Summands that are added up in float32 before the sum of them is added in float64, which takes four times as long."""

See: TypeAlias = Callable[[Vector, Sequence[Vector], Averages], list[Vector]]
"""What is summed: from θ, the averages before this step, and those with the newest gradient in."""


def pointers(dtypes: Sequence[torch.dtype]) -> list[Any]:
    """To states of these types."""
    return [BF16.as_pointer() if dtype == torch.bfloat16 else POINTER for dtype in dtypes]


def module_of_pieces(width: int, functions: dict[str, tuple[Sequence[Any], Write]]) -> ir.Module:
    """Functions that go through the rows of a table: each a number of coordinates, then addresses.

    Args:
        width: coordinates of a vector.
        functions: by name the types of the addresses, and what writes the code for some coordinates of a row. That is
            given the builder, the addresses, the coordinates of a block, the first of them, the number of blocks, and
            `width`.
    """
    module = ir.Module(name="l2o")
    for name, (kinds, write) in functions.items():
        inner = ir.Function(module, ir.FunctionType(VOID, [I64, *kinds]), name=f"{name}_piece")
        inner.linkage = "internal"
        for argument in inner.args[1:]:
            argument.add_attribute("noalias")
        builder = ir.IRBuilder(inner.append_basic_block())
        count = inner.args[0]
        for size, start, blocks in spans(builder, count, width):
            write(builder, inner.args[1:], size, start, blocks, width)
        builder.ret_void()
        rows_of(module, name, inner)
    return module


def rows_of(module: ir.Module, name: str, inner: Any) -> None:
    """Call a function for every row of a table: its numbers and addresses."""
    function = ir.Function(module, ir.FunctionType(VOID, [I64, I64.as_pointer()]), name=name)
    builder = ir.IRBuilder(function.append_basic_block())
    rows, table = function.args

    def body(index: Any, _: list[Any]) -> list[Any]:
        first = builder.mul(index, I64(len(inner.args)))
        count, *addresses = (
            builder.load(builder.gep(table, [builder.add(first, I64(field))])) for field in range(len(inner.args))
        )
        pointers = [
            address if argument.type == I64 else builder.inttoptr(address, argument.type)
            for address, argument in zip(addresses, inner.args[1:], strict=True)
        ]
        builder.call(inner, [count, *pointers])
        return []

    loop(builder, rows, [], body)
    builder.ret_void()


def expect_ahead(builder: Any, at: Sequence[Any], arrays: Sequence[Any]) -> None:
    """Ask for what comes `AHEAD` coordinates after a place in some arrays."""
    expect(builder, [builder.gep(array, [builder.add(at[0], I64(AHEAD))]) for array in arrays])


def observing(totals: int, see: See) -> Write:
    """Code that adds Σ|g| and sums of what is seen.

    Its addresses are numbers, g, θ, averages, what else there may be, and the sums.

    Args:
        totals: sums altogether.
        see: gives all but |g|.
    """

    def write(builder: Any, arguments: Sequence[Any], size: int, start: Any, blocks: Any, width: int) -> None:
        numbers, grad, param, *others, sums = arguments
        states = others[: len(BETAS)]
        corrections = [broadcast(builder, builder.gep(numbers, [I64(i)]), size) for i in range(len(BETAS))]

        def seen(at: list[Any]) -> list[Vector]:
            expect_ahead(builder, at, (grad, param, *states))
            g, theta, *old = (load(builder, builder.gep(pointer, at), size) for pointer in (grad, param, *states))
            # What is not finite is found by the sum of |g|; elsewhere it counts as zero, as in the plain loop.
            finite = builder.fcmp_ordered("ord", g.value, g.value)
            there = Vector(builder, builder.select(finite, g.value, constant(g.value.type, 0.0)))
            return [g.abs(), *see(theta, old, average(there, old, corrections))]

        add_up(builder, sums, totals, size, start, blocks, width, seen)

    return write


def add_up(
    builder: Any,
    sums: Any,
    totals: int,
    size: int,
    start: Any,
    blocks: Any,
    width: int,
    seen: Callable[[list[Any]], list[Vector]],
) -> None:
    """Add what is seen to sums in memory, `size` coordinates at a time.

    The first summand, which may be as large as a float32 can be, is added up in float64 throughout.

    Args:
        builder: where to write.
        sums: address of `totals` vectors of float64.
        totals: how many.
        size, start, blocks, width: as `Write` has them.
        seen: gives the summands at a place.
    """
    wide, zero = ir.VectorType(F64, size), constant(ir.VectorType(F32, size), 0.0)
    places = [builder.bitcast(builder.gep(sums, [I64(i * width)]), wide.as_pointer()) for i in range(totals)]

    def some(number: Any, before: list[Any]) -> list[Any]:
        first = builder.mul(number, I64(TOGETHER))
        left = builder.sub(blocks, first)
        count = builder.select(builder.icmp_signed("<", left, I64(TOGETHER)), left, I64(TOGETHER))

        def body(index: Any, partial: list[Any]) -> list[Any]:
            at = builder.add(start, builder.mul(builder.add(first, index), I64(size)))
            exact, *terms = (term.value for term in seen([at]))
            added = builder.fadd(partial[0], builder.fpext(exact, wide))
            return [added, *(builder.fadd(total, term) for total, term in zip(partial[1:], terms, strict=True))]

        exact, *partial = loop(builder, count, [before[0]] + [zero] * (totals - 1), body)
        return [exact, *(builder.fadd(a, builder.fpext(b, wide)) for a, b in zip(before[1:], partial, strict=True))]

    chunks = builder.sdiv(builder.add(blocks, I64(TOGETHER - 1)), I64(TOGETHER))
    after = loop(builder, chunks, [builder.load(place, align=8) for place in places], some)
    for total, place in zip(after, places, strict=True):
        builder.store(total, place, align=8)
