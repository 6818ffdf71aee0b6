"""LLVM code of the tiered rule: `l2o_runtime.rules.tiered.TieredRule.terms`, summed, and its `update`.

There is no state to be transposed, so that vectors go along the coordinates, as many as a register holds.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from llvmlite import ir

from l2o_runtime.contexts.progress import Progress, normalized_products
from l2o_runtime.kernels.emit import BF16, I64, POINTER, VOID, Vector, broadcast, constant, load, loop, store
from l2o_runtime.rules.base import OUTPUTS
from l2o_runtime.rules.features import combine
from l2o_runtime.rules.restraint import restrain
from l2o_runtime.rules.tiered import UNITS
from l2o_runtime.rules.tiered_features import AVERAGES, BETAS, INPUTS, TERMS, average, directions, look, terms

F64 = ir.DoubleType()

Weight: TypeAlias = Callable[[int], Vector]
"""Gives a weight by its number."""

Write: TypeAlias = Callable[[Any, Sequence[Any], int, Any, Any, int], None]
"""Writes the code for some coordinates of a piece; see `module_of_pieces`."""

TOTALS = 1 + Progress.SUMS + TERMS
"""Σ|g|, then the sums of `terms`."""

FIELDS = 4 + len(AVERAGES) + 1
"""Numbers of a row that tells of a piece."""

SCALARS = len(BETAS) + 7
"""Numbers before the weights: 1 − βᵗ, then lowest root, log of the tensor's root, 1/ρ, 1/RMS m̂₁₀, noise, bound,
magnitude.
"""

WEIGHTS = UNITS * (INPUTS + 1) + OUTPUTS * (UNITS + 1)
"""Of both layers, rows of weights with their bias last."""


def network(features: Sequence[Vector], weight: Weight) -> tuple[list[Vector], list[Vector]]:
    """Hidden units and outputs of the network of coordinates, from its features and the weights of either layer."""
    hidden = [total.relu() for total in layer(features, UNITS, weight, 0)]
    return hidden, layer(hidden, OUTPUTS, weight, UNITS * (INPUTS + 1))


def layer(x: Sequence[Vector], outputs: int, weight: Weight, first: int) -> list[Vector]:
    """W x + b, whose rows [w b] begin at weight `first`."""
    size = len(x) + 1
    result = []
    for row in range(outputs):
        total = weight(first + row * size + len(x))
        for column, value in enumerate(x):
            total = value.fma(weight(first + row * size + column), total)
        result.append(total)
    return result


def tiered_module(width: int, dtypes: tuple[torch.dtype, ...], restrained: bool) -> ir.Module:
    """`observe(rows, table)` and `update(rows, table)`, which go through pieces of tensors.

    A row of the table, of `FIELDS` int64, is a piece: its number of coordinates and the addresses of `SCALARS` +
    `WEIGHTS` float32, of gradients, parameters and states, each of these of one of `dtypes`, and of the result: the
    steps, or `TOTALS` vectors of float64, to which is added. States are written. Steps may be restrained.
    """
    kept = [BF16.as_pointer() if dtype == torch.bfloat16 else POINTER for dtype in dtypes]
    read = [POINTER, POINTER, POINTER, *kept]
    return module_of_pieces(
        width,
        {"observe": ([*read, F64.as_pointer()], _observe), "update": ([*read, POINTER], partial(_update, restrained))},
    )


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
        whole = builder.mul(builder.sdiv(count, I64(width)), I64(width))
        for size, start, stop in ((width, I64(0), whole), (1, whole, count)):
            with builder.if_then(builder.icmp_signed("<", start, stop)):
                write(builder, inner.args[1:], size, start, builder.sdiv(builder.sub(stop, start), I64(size)), width)
        builder.ret_void()
        _rows(module, name, inner)
    return module


def _rows(module: ir.Module, name: str, inner: Any) -> None:
    """Call a function for every row of a table."""
    function = ir.Function(module, ir.FunctionType(VOID, [I64, I64.as_pointer()]), name=name)
    builder = ir.IRBuilder(function.append_basic_block())
    rows, table = function.args

    def body(index: Any, _: list[Any]) -> list[Any]:
        first = builder.mul(index, I64(len(inner.args)))
        count, *addresses = (
            builder.load(builder.gep(table, [builder.add(first, I64(field))])) for field in range(len(inner.args))
        )
        pointers = [
            builder.inttoptr(address, argument.type)
            for address, argument in zip(addresses, inner.args[1:], strict=True)
        ]
        builder.call(inner, [count, *pointers])
        return []

    loop(builder, rows, [], body)
    builder.ret_void()


def _observe(builder: Any, arguments: Sequence[Any], size: int, start: Any, blocks: Any, width: int) -> None:
    """Add to the totals, `size` coordinates at a time."""
    numbers, grad, param, *states, sums = arguments
    wide = ir.VectorType(F64, size)
    corrections = [broadcast(builder, builder.gep(numbers, [I64(i)]), size) for i in range(len(BETAS))]
    places = [builder.bitcast(builder.gep(sums, [I64(i * width)]), wide.as_pointer()) for i in range(TOTALS)]

    def body(index: Any, totals: list[Any]) -> list[Any]:
        at = [builder.add(start, builder.mul(index, I64(size)))]
        g, theta, *old = (load(builder, builder.gep(pointer, at), size) for pointer in (grad, param, *states))
        # What is not finite is found by the sum of |g|; elsewhere it counts as zero, as in the plain loop.
        finite = builder.fcmp_ordered("ord", g.value, g.value)
        there = Vector(builder, builder.select(finite, g.value, constant(g.value.type, 0.0)))
        new = average(there, old, corrections)
        progress = [g.like(1.0), new.grad.square(), *normalized_products(new.grad, old[0], old[2])]
        seen = [g.abs(), *progress, *terms(theta, *new[:-1])]
        return [builder.fadd(total, builder.fpext(term.value, wide)) for total, term in zip(totals, seen, strict=True)]

    totals = loop(builder, blocks, [builder.load(place, align=8) for place in places], body)
    for total, place in zip(totals, places, strict=True):
        builder.store(total, place, align=8)


def _update(
    restrained: bool, builder: Any, arguments: Sequence[Any], size: int, start: Any, blocks: Any, width: int
) -> None:
    """Write states and steps, `size` coordinates at a time."""
    numbers, grad, param, *states, delta = arguments
    scalars = [broadcast(builder, builder.gep(numbers, [I64(i)]), size) for i in range(SCALARS)]

    def weight(index: int) -> Vector:
        return broadcast(builder, builder.gep(numbers, [I64(SCALARS + index)]), size)

    def body(index: Any, _: list[Any]) -> list[Any]:
        at = [builder.add(start, builder.mul(index, I64(size)))]
        places = [builder.gep(pointer, at) for pointer in states]
        g, theta, *old = (
            load(builder, pointer, size) for pointer in (builder.gep(grad, at), builder.gep(param, at), *places)
        )
        new = average(g, old, scalars[: len(BETAS)])
        for value, place in zip(new.new, places, strict=True):
            store(builder, value, place)
        floor, size_root, inverse_rho, inverse_fast, noise, longest, magnitude = scalars[len(BETAS) :]
        seen = look(theta * inverse_rho, new, floor, size_root)
        _, output = network(seen.features, weight)
        step = magnitude * combine(output, directions(seen, new, inverse_fast)).clamp(-longest, longest)
        store(builder, restrain(step, *seen.relative, noise) if restrained else step, builder.gep(delta, at))
        return []

    loop(builder, blocks, [], body)
