"""LLVM code that goes through matrices: products with k vectors, and what is needed before and after them.

With a vector for the k numbers of a row, a matrix and its transpose differ in nothing but strides, and no number of
rows or columns leaves a remainder, except where coordinates are gone through end to end.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from l2o_runtime.kernels.emit import (
    F32,
    F64,
    I32,
    I64,
    POINTER,
    VOID,
    Vector,
    along,
    broadcast,
    constant,
    load,
    loop,
    reduced,
    shuffle,
    store,
)
from l2o_runtime.rules.agreement import FAST
from l2o_runtime.rules.orthogonal import (
    SMALLEST_NORM,
    SMALLEST_SIZE,
)
from l2o_runtime.state import LARGEST

DOUBLE = F64.as_pointer()

ROWS = 4
"""Rows that are gone through together, so that what they are multiplied with is loaded once."""


ORDINARY = 1e8
"""Matrices whose largest number is below this, and above its inverse, are not divided by it: that is a pass for itself,
and squares of others might leave float32.
"""


class MatrixCode:
    """Writes functions that go through a matrix once, beside k numbers for every row or column of it.

    Args:
        module: where they are written.
        rank: k.
        width: coordinates of a vector where those of a matrix are gone through.
    """

    def __init__(self, module: ir.Module, rank: int, width: int):
        self.module, self.rank, self.width = module, rank, width
        passes = [I64] * 4 + [POINTER] * 3
        self.rowwise = self._function("rowwise", passes, self._rowwise)
        self.columnwise = self._function("columnwise", passes, self._columnwise)
        summed = [I64] * 2 + [POINTER] * 3
        self.rows_summed = self._function("rows_summed", summed, self._rows_summed)
        self.columns_summed = self._function("columns_summed", summed, self._columns_summed)
        turned = [I64] + [POINTER] * 2
        self.transposed = self._function("transposed", turned, self._transposed)
        self.transposed_back = self._function("transposed_back", turned, functools.partial(self._transposed, back=True))
        self.composed = self._function("composed", [I64, I64] + [POINTER] * 4, self._composed)

    def _function(self, name: str, kinds: Sequence[Any], write: Callable[..., None]) -> Any:
        function = ir.Function(self.module, ir.FunctionType(VOID, kinds), name=name)
        function.linkage = "internal"
        function.attributes.add("noinline")  # once is enough: LLVM takes its time
        for argument in function.args:
            if isinstance(argument.type, ir.PointerType):
                argument.add_attribute("noalias")
        builder = ir.IRBuilder(function.append_basic_block())
        write(builder, *function.args)
        builder.ret_void()
        return function

    def _row(self, builder: Any, pointer: Any, row: Any) -> Any:
        """Address of a row of k numbers."""
        return builder.gep(pointer, [builder.mul(row, I64(self.rank))])

    def _load(self, builder: Any, pointer: Any, row: Any) -> Vector:
        return load(builder, self._row(builder, pointer, row), self.rank)

    def _store(self, builder: Any, vector: Vector, pointer: Any, row: Any) -> None:
        store(builder, vector, self._row(builder, pointer, row))

    def _number(self, builder: Any, pointer: Any, *index: Any) -> Vector:
        """A number k times; an index of two numbers is of a row of k and a place in it."""
        at = index[0] if len(index) == 1 else builder.add(builder.mul(index[0], I64(self.rank)), index[1])
        return broadcast(builder, builder.gep(pointer, [at]), self.rank)

    def _zero(self, builder: Any, kind: Any) -> Vector:
        return Vector(builder, constant(ir.VectorType(kind, self.rank), 0.0))

    def _unit(self, builder: Any, place: Any, number: Vector) -> Vector:
        """A row of zeros but for one number, which is a vector of one."""
        zero = self._zero(builder, number.value.type.element)
        one = builder.extract_element(number.value, I32(0))
        return Vector(builder, builder.insert_element(zero.value, one, builder.trunc(place, I32)))

    def _rowwise(
        self, builder: Any, outer: Any, inner: Any, so: Any, si: Any, x: Any, factors: Any, result: Any
    ) -> None:
        """result[o, :] = Σ_i x[o, i] factors[i, :], where numbers of x lie end to end along i."""

        def block(first: Any, count: int) -> None:
            starts = [builder.gep(x, [builder.mul(builder.add(first, I64(row)), so)]) for row in range(count)]

            def body(index: Any, sums: list[Any]) -> list[Any]:
                factor = self._load(builder, factors, index)
                at = builder.mul(index, si)
                return [
                    self._number(builder, start, at).fma(factor, Vector(builder, total)).value
                    for start, total in zip(starts, sums, strict=True)
                ]

            zero = self._zero(builder, F32).value
            for row, total in enumerate(loop(builder, inner, [zero] * count, body)):
                self._store(builder, Vector(builder, total), result, builder.add(first, I64(row)))

        along(builder, outer, ROWS, block)

    def _columnwise(
        self, builder: Any, outer: Any, inner: Any, so: Any, si: Any, x: Any, factors: Any, result: Any
    ) -> None:
        """The same where numbers of x lie end to end along o."""

        def clear(index: Any, _: list[Any]) -> list[Any]:
            self._store(builder, self._zero(builder, F32), result, index)
            return []

        loop(builder, outer, [], clear)

        def block(first: Any, count: int) -> None:
            rows = [builder.add(first, I64(row)) for row in range(count)]
            starts = [builder.gep(x, [builder.mul(row, si)]) for row in rows]
            given = [self._load(builder, factors, row) for row in rows]

            def body(index: Any, _: list[Any]) -> list[Any]:
                total, at = self._load(builder, result, index), builder.mul(index, so)
                for start, factor in zip(starts, given, strict=True):
                    total = self._number(builder, start, at).fma(factor, total)
                self._store(builder, total, result, index)
                return []

            loop(builder, outer, [], body)

        along(builder, inner, ROWS, block)

    def _rows_summed(self, builder: Any, r: Any, c: Any, x: Any, signs: Any, result: Any) -> None:
        """result[a, i] = Σ_o signs[o] x[o, i] over rows o ≡ a mod k, where numbers of x lie end to end along i."""
        rank = I64(self.rank)

        def bucket(place: Any, _: list[Any]) -> list[Any]:
            count = builder.sdiv(builder.add(builder.sub(r, place), I64(self.rank - 1)), rank)

            def body(at: Any, size: int) -> None:
                def add(number: Any, sums: list[Any]) -> list[Any]:
                    row = builder.add(place, builder.mul(number, rank))
                    sign = broadcast(builder, builder.gep(signs, [row]), size)
                    given = load(builder, builder.gep(x, [builder.add(builder.mul(row, c), at)]), size)
                    return [sign.fma(given, Vector(builder, sums[0])).value]

                (total,) = loop(builder, count, [constant(ir.VectorType(F32, size), 0.0)], add)
                target = builder.gep(result, [builder.add(builder.mul(place, c), at)])
                store(builder, Vector(builder, total), target)

            along(builder, c, self.width, body)
            return []

        few = builder.icmp_signed("<", r, rank)
        with builder.if_then(few):
            along(builder, builder.mul(rank, c), self.width, functools.partial(_clear, builder, result))
        loop(builder, builder.select(few, r, rank), [], bucket)

    def _columns_summed(self, builder: Any, r: Any, c: Any, x: Any, signs: Any, result: Any) -> None:
        """result[i, a] = Σ_o signs[o] x[o, i] over rows o ≡ a mod k, where numbers of x lie end to end along o."""
        rank = I64(self.rank)
        blocks = builder.sdiv(r, rank)
        whole = builder.mul(blocks, rank)

        def column(index: Any, _: list[Any]) -> list[Any]:
            start, row = builder.gep(x, [builder.mul(index, r)]), self._row(builder, result, index)

            def add(number: Any, sums: list[Any]) -> list[Any]:
                sign, given = (self._load(builder, pointer, number) for pointer in (signs, start))
                return [sign.fma(given, Vector(builder, sums[0])).value]

            def rest(place: Any, _: list[Any]) -> list[Any]:
                at, target = builder.add(whole, place), builder.gep(row, [place])
                sign, given = (load(builder, builder.gep(pointer, [at]), 1) for pointer in (signs, start))
                store(builder, sign.fma(given, load(builder, target, 1)), target)
                return []

            store(builder, self._zero(builder, F32), row)
            with builder.if_then(builder.icmp_signed(">", blocks, I64(0))):
                (total,) = loop(builder, blocks, [self._zero(builder, F32).value], add)
                store(builder, Vector(builder, total), row)
            with builder.if_then(builder.icmp_signed("<", whole, r)):
                loop(builder, builder.sub(r, whole), [], rest)
            return []

        loop(builder, c, [], column)

    def _transposed(self, builder: Any, count: Any, source: Any, result: Any, back: bool = False) -> None:
        """result[a, i] = source[i, a] of `count` rows i of k numbers; back from there result[i, a] = source[a, i]."""

        def body(index: Any, _: list[Any]) -> list[Any]:
            row = self._row(builder, result if back else source, index)

            def inner(place: Any, _: list[Any]) -> list[Any]:
                near = builder.gep(row, [place])
                far = builder.gep(source if back else result, [builder.add(builder.mul(place, count), index)])
                here, there = (far, near) if back else (near, far)
                builder.store(builder.load(here, align=4), there, align=4)
                return []

            loop(builder, I64(self.rank), [], inner)
            return []

        loop(builder, count, [], body)

    def _composed(self, builder: Any, outer: Any, inner: Any, scale: Any, left: Any, right: Any, x: Any) -> None:
        """x[o, i] ← scale x[o, i] + Σ_a left[o, a] right[a, i]; numbers of x and `right` lie end to end along i."""

        def block(first: Any, count: int) -> None:
            rows = [builder.add(first, I64(row)) for row in range(count)]
            starts = [builder.gep(x, [builder.mul(row, inner)]) for row in rows]
            lines = [self._row(builder, left, row) for row in rows]

            def body(at: Any, size: int) -> None:
                places = [builder.gep(start, [at]) for start in starts]
                factor = broadcast(builder, scale, size)

                def add(place: Any, sums: list[Any]) -> list[Any]:
                    given = load(builder, builder.gep(right, [builder.add(builder.mul(place, inner), at)]), size)
                    shares = [builder.gep(line, [place]) for line in lines]
                    return [
                        broadcast(builder, share, size).fma(given, Vector(builder, total)).value
                        for share, total in zip(shares, sums, strict=True)
                    ]

                sums = [(load(builder, place, size) * factor).value for place in places]
                for total, place in zip(loop(builder, I64(self.rank), sums, add), places, strict=True):
                    store(builder, Vector(builder, total), place)

            along(builder, inner, self.width, body)

        along(builder, outer, ROWS, block)

    def _prepared(self, builder: Any, count: Any, grad: Any, momentum: Any, x: Any) -> Vector:
        """x = Nesterov's momentum, over its largest number where need be; its norm, a vector of one float32."""
        sizes = (self.width, 1)
        largest, squares = ({size: self._slot(builder, size) for size in sizes} for _ in range(2))

        def average(at: Any, size: int) -> None:
            new = load(builder, builder.gep(grad, [at]), size).clamp(-LARGEST, LARGEST)
            value = load(builder, builder.gep(momentum, [at]), size) * (FAST * FAST) + new * (1 - FAST * FAST)
            store(builder, value, builder.gep(x, [at]))
            most = Vector(builder, builder.load(largest[size]))
            builder.store(most.clamp_min(value.abs()).value, largest[size])
            add(value, size)

        def add(value: Vector, size: int) -> None:
            builder.store(value.fma(value, Vector(builder, builder.load(squares[size]))).value, squares[size])

        along(builder, count, self.width, average)
        most = self._reduced(builder, largest, Vector.clamp_min)
        norm = self._slot(builder, 1)
        builder.store(self._reduced(builder, squares, Vector.__add__).sqrt().value, norm)
        ordinary = (most > 1 / ORDINARY) & (most < ORDINARY)
        with builder.if_then(builder.not_(builder.extract_element(ordinary.value, I32(0)))):
            most = most.clamp_min(SMALLEST_NORM)
            inverse = most.like(1.0).div(most)
            for size in sizes:
                builder.store(constant(ir.VectorType(F32, size), 0.0), squares[size])

            def normed(at: Any, size: int) -> None:
                place = builder.gep(x, [at])
                value = load(builder, place, size) * shuffle(inverse, None, [0] * size)
                store(builder, value, place)
                add(value, size)

            along(builder, count, self.width, normed)
            found = self._reduced(builder, squares, Vector.__add__).sqrt().clamp_min(SMALLEST_SIZE)
            builder.store(found.value, norm)
        return Vector(builder, builder.load(norm))

    def _slot(self, builder: Any, size: int) -> Any:
        """Room for a vector, zero."""
        kind = ir.VectorType(F32, size)
        slot = builder.alloca(kind)
        builder.store(constant(kind, 0.0), slot)
        return slot

    def _reduced(self, builder: Any, slots: dict[int, Any], join: Callable[[Vector, Vector], Vector]) -> Vector:
        """All numbers in slots as one, a vector of one."""
        many = reduced(Vector(builder, builder.load(slots[self.width])), join)
        return join(many, Vector(builder, builder.load(slots[1])))


def _clear(builder: Any, pointer: Any, at: Any, size: int) -> None:
    """Zeros."""
    store(builder, Vector(builder, constant(ir.VectorType(F32, size), 0.0)), builder.gep(pointer, [at]))
