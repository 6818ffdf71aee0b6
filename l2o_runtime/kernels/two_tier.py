"""LLVM code of the two-tier rule: `l2o_runtime.scale.ScaleRule.terms`, summed, and its `update`.

There is no state to be transposed, so that vectors go along the coordinates, as many as a register holds.
"""

from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir

from l2o_runtime.contexts.progress import Progress
from l2o_runtime.features import LARGEST
from l2o_runtime.kernels import features
from l2o_runtime.kernels.emit import BF16, I64, POINTER, VOID, Vector, broadcast, constant, load, loop, store
from l2o_runtime.rule import OUTPUTS
from l2o_runtime.scale import INPUTS, SPANS, TERMS, UNITS

F64 = ir.DoubleType()

AVERAGES = [f"{kind}{span}" for kind, spans in SPANS.items() for span in spans]
"""States, in the order in which they are handed over."""

BETAS = [1 - 1 / span for spans in SPANS.values() for span in spans]

SUMS = Progress.STATISTICS + TERMS

SCALARS = len(BETAS) + 5
"""Numbers before the weights: 1 − βᵗ, then lowest root, log of the tensor's root, 1/ρ, 1/RMS m̂₁₀, magnitude."""

WEIGHTS = UNITS * (INPUTS + 1) + OUTPUTS * (UNITS + 1)
"""Of both layers, rows of weights with their bias last."""


class Averages:
    """As `l2o_runtime.scale.average`: `grad`, and of the averages with it in `new`, `fast`, `slow` and `root`."""

    def __init__(self, grad: Vector, old: Sequence[Vector], corrections: Sequence[Vector]):
        self.grad = grad.clamp(-LARGEST, LARGEST)
        values = [self.grad, self.grad, self.grad * self.grad]
        self.new = [s + (x - s) * (1 - beta) for s, x, beta in zip(old, values, BETAS, strict=True)]
        self.fast, self.slow, square = (s / c for s, c in zip(self.new, corrections, strict=True))
        self.root = square.sqrt()


def terms(param: Vector, old: Sequence[Vector], new: Averages) -> list[Vector]:
    """As `l2o_runtime.scale.ScaleRule.terms`."""
    g, fast, slow, root = new.grad, new.fast, new.slow, new.root
    before = old[2].sqrt()
    zero, one = g.like(0.0), g.like(1.0)
    inverse = zero.where_less(before, one / before, zero)
    normal, averaged = ((x * inverse).clamp(-100, 100) for x in (g, old[0]))
    u = zero.where_less(root, fast / root, zero)
    progress = [one, g * g, normal * averaged, normal * normal, averaged * averaged]
    products = [root * root, param * param, fast * fast, slow * slow, fast * slow, fast * param, u * u, g * param]
    return [*progress, *products]


def step(param: Vector, new: Averages, numbers: Sequence[Vector], weight: Any) -> Vector:
    """Δ, as in `l2o_runtime.scale.ScaleRule.update`.

    Args:
        param: θ.
        new: averages.
        numbers: lowest root, log of the tensor's root, 1/ρ, 1/RMS m̂₁₀, magnitude.
        weight: gives a weight of either layer as a vector.
    """
    floor, size_root, inverse_rho, inverse_fast, magnitude = numbers
    root = new.root + floor
    inverse = root.like(1.0) / root
    g, fast, slow = ((x * inverse).clamp(-5, 5) for x in (new.grad, new.fast, new.slow))
    relative = param * inverse_rho
    seen = [
        g,
        fast,
        slow,
        (g * fast).clamp(-3, 3),
        (root.log() - size_root).clamp(-6, 6) * (1 / 3),
        (slow.abs() + 1e-3).log() * (1 / 3) + 1.0,
        (relative.abs() + 1e-3).log() * (1 / 3) + 1.0,
        relative.clamp(-3, 3),
    ]
    hidden = [total.at_least(0.0) for total in layer(seen, UNITS, weight, 0)]
    output = layer(hidden, OUTPUTS, weight, UNITS * (INPUTS + 1))
    plain = (new.fast * inverse_fast).clamp(-5, 5)
    return magnitude * features.combine(output, [fast, plain, slow, g])


def layer(x: Sequence[Vector], outputs: int, weight: Any, first: int) -> list[Vector]:
    """W x + b, whose rows [w b] begin at weight `first`."""
    size = len(x) + 1
    result = []
    for row in range(outputs):
        total = weight(first + row * size + len(x))
        for column, value in enumerate(x):
            total = value.fma(weight(first + row * size + column), total)
        result.append(total)
    return result


def scale_module(width: int, dtypes: tuple[torch.dtype, ...]) -> ir.Module:
    """`observe(blocks, numbers, grad, param, m10, m100, v100, sums)` and `update(…, delta)`.

    Both are on blocks · width coordinates. `numbers` are `SCALARS` and `WEIGHTS` float32; `sums` are `SUMS` vectors of
    float64, to which is added; `delta` and the states, each of one of `dtypes`, are written.
    """
    module = ir.Module(name="l2o")
    kept = [BF16.as_pointer() if dtype == torch.bfloat16 else POINTER for dtype in dtypes]
    for name, last in (("observe", F64.as_pointer()), ("update", POINTER)):
        kinds = [I64, POINTER, POINTER, POINTER, *kept, last]
        function = ir.Function(module, ir.FunctionType(VOID, kinds), name=name)
        for argument in function.args[1:]:
            argument.add_attribute("noalias")
        (_observe if name == "observe" else _update)(function, width)
    return module


def _observe(function: Any, width: int) -> None:
    blocks, numbers, grad, param, *states, sums = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    wide = ir.VectorType(F64, width)
    corrections = [broadcast(builder, builder.gep(numbers, [I64(i)]), width) for i in range(len(BETAS))]
    places = [builder.bitcast(builder.gep(sums, [I64(i * width)]), wide.as_pointer()) for i in range(SUMS)]

    def body(index: Any, totals: list[Any]) -> list[Any]:
        at = [builder.mul(index, I64(width))]
        g, theta, *old = (load(builder, builder.gep(pointer, at), width) for pointer in (grad, param, *states))
        # What is not finite is found by the sum of |g|; here it counts as zero, as in the plain loop.
        finite = builder.fcmp_ordered("ord", g.value, g.value)
        g = Vector(builder, builder.select(finite, g.value, constant(g.value.type, 0.0)))
        seen = terms(theta, old, Averages(g, old, corrections))
        return [builder.fadd(total, builder.fpext(term.value, wide)) for total, term in zip(totals, seen, strict=True)]

    totals = loop(builder, blocks, [builder.load(place, align=8) for place in places], body)
    for total, place in zip(totals, places, strict=True):
        builder.store(total, place, align=8)
    builder.ret_void()


def _update(function: Any, width: int) -> None:
    blocks, numbers, grad, param, *states, delta = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    scalars = [broadcast(builder, builder.gep(numbers, [I64(i)]), width) for i in range(SCALARS)]

    def weight(index: int) -> Vector:
        return broadcast(builder, builder.gep(numbers, [I64(SCALARS + index)]), width)

    def body(index: Any, _: list[Any]) -> list[Any]:
        at = [builder.mul(index, I64(width))]
        places = [builder.gep(pointer, at) for pointer in states]
        g, theta, *old = (
            load(builder, pointer, width) for pointer in (builder.gep(grad, at), builder.gep(param, at), *places)
        )
        new = Averages(g, old, scalars[: len(BETAS)])
        for value, place in zip(new.new, places, strict=True):
            store(builder, value, place)
        store(builder, step(theta, new, scalars[len(BETAS) :], weight), builder.gep(delta, at))
        return []

    loop(builder, blocks, [], body)
    builder.ret_void()
