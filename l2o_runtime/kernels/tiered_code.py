"""LLVM code of the tiered rule: `l2o_runtime.rules.tiered.TieredRule.terms`, summed, and its `update`.

There is no state to be transposed, so that vectors go along the coordinates, as many as a register holds.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from llvmlite import ir

from l2o_runtime.contexts.progress import Progress, normalized_products
from l2o_runtime.kernels.emit import F64, I64, POINTER, Vector, broadcast, load, loop, store
from l2o_runtime.kernels.pieces_code import module_of_pieces, observing, pointers
from l2o_runtime.rules.base import OUTPUTS
from l2o_runtime.rules.features import combine
from l2o_runtime.rules.restraint import restrain
from l2o_runtime.rules.statistics import BETAS, Averages, average
from l2o_runtime.rules.tiered import UNITS
from l2o_runtime.rules.tiered_features import INPUTS, TERMS, directions, look, terms

Weight: TypeAlias = Callable[[int], Vector]
"""Gives a weight by its number."""

TOTALS = 1 + Progress.SUMS + TERMS
"""Σ|g|, then the sums of `terms`."""

SCALARS = len(BETAS) + 7
"""Numbers before the weights: 1 / (1 − βᵗ), then lowest root, log of the tensor's root, 1/ρ, 1/RMS m̂₁₀, noise, bound,
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

    A row of the table, of int64, is a piece: its number of coordinates and the addresses of `SCALARS` +
    `WEIGHTS` float32, of gradients, parameters and states, each of these of one of `dtypes`, and of the result: the
    steps, or `TOTALS` vectors of float64, to which is added. States are written. Steps may be restrained.
    """
    read = [POINTER, POINTER, POINTER, *pointers(dtypes)]
    return module_of_pieces(
        width,
        {
            "observe": ([*read, F64.as_pointer()], observing(TOTALS, _seen)),
            "update": ([*read, POINTER], partial(_update, restrained)),
        },
    )


def _seen(theta: Vector, old: Sequence[Vector], new: Averages) -> list[Vector]:
    """What is summed over a tensor."""
    progress = [theta.like(1.0), new.grad.square(), *normalized_products(new.grad, old[0], old[2])]
    return [*progress, *terms(theta, *new[:-1])]


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
