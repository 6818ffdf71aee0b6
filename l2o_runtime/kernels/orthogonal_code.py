"""LLVM code that orthogonalises matrices, as `l2o_runtime.rules.orthogonal` does; vectors go along the k directions.

With a vector for the k numbers of a row, a matrix and its transpose differ in nothing but strides, and no number of
rows or columns leaves a remainder, except where coordinates are gone through end to end.
"""

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
    Mask,
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
from l2o_runtime.kernels.pieces_code import rows_of
from l2o_runtime.rules.agreement import FAST
from l2o_runtime.rules.orthogonal import (
    COEFFICIENTS,
    ITERATIONS,
    RIDGE,
    SMALLEST_NORM,
    SMALLEST_REST,
    SMALLEST_SIZE,
)
from l2o_runtime.state import LARGEST

ROWS = 4
"""Rows that are gone through together, so that what they are multiplied with is loaded once."""

LARGEST_RANK = 32
"""Directions whose sums stay in registers."""

DOUBLE = F64.as_pointer()


def room(rank: int, rows: int, columns: int) -> int:
    """Float32 that the code needs besides a matrix of rows ≤ columns."""
    return rank * (4 * rows + 2 * columns + 2 * 6 * rank)


def orthogonal_module(rank: int, width: int) -> ir.Module:
    """`orthogonalise(rows, table)`, which goes through matrices.

    A row of the table, of int64, is a matrix of r ≤ c: r, c, whether its numbers lie end to end along its rows (1) or
    its columns (0); and the addresses of gradients, of their average, of the result, and of `room`. What is
    orthogonalised is Nesterov's momentum, and the result has a root mean square of about 1.

    Args:
        rank: k, at most `LARGEST_RANK`.
        width: coordinates of a vector where those of a matrix are gone through.
    """
    module = ir.Module(name="l2o")
    code = _Code(module, rank, width)
    rows_of(module, "orthogonalise", code.orthogonalise())
    return module


class _Code:
    """The functions; each is written once."""

    def __init__(self, module: ir.Module, rank: int, width: int):
        self.module, self.rank, self.width = module, rank, width
        passes = [I64] * 4 + [POINTER] * 3
        self.rowwise = self._function("rowwise", passes, self._rowwise)
        self.columnwise = self._function("columnwise", passes, self._columnwise)
        self.gram = self._function("gram", [I64, POINTER, DOUBLE], self._gram)
        self.times = self._function("times", [I64, POINTER, DOUBLE, POINTER], self._times)
        self.product = self._function("product", [DOUBLE] * 3, self._product)
        self.whitening = self._function("whitening", [DOUBLE] * 3, self._whitening)
        self.transposed = self._function("transposed", [I64, POINTER, POINTER], self._transposed)
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

    def _gram(self, builder: Any, count: Any, rows: Any, result: Any) -> None:
        """result = Σ_i rows[i, :]ᵀ rows[i, :], in float64."""

        def line(place: Any, _: list[Any]) -> list[Any]:
            def body(index: Any, sums: list[Any]) -> list[Any]:
                row, one = self._load(builder, rows, index).double(), self._number(builder, rows, index, place).double()
                return [one.fma(row, Vector(builder, sums[0])).value]

            (total,) = loop(builder, count, [self._zero(builder, F64).value], body)
            self._store(builder, Vector(builder, total), result, place)
            return []

        loop(builder, I64(self.rank), [], line)

    def _product(self, builder: Any, left: Any, right: Any, result: Any) -> None:
        """result = left right, (k, k) float64 each."""

        def line(row: Any, _: list[Any]) -> list[Any]:
            def body(place: Any, sums: list[Any]) -> list[Any]:
                one, line = self._number(builder, left, row, place), self._load(builder, right, place)
                return [one.fma(line, Vector(builder, sums[0])).value]

            (total,) = loop(builder, I64(self.rank), [self._zero(builder, F64).value], body)
            self._store(builder, Vector(builder, total), result, row)
            return []

        loop(builder, I64(self.rank), [], line)

    def _transposed(self, builder: Any, count: Any, rows: Any, result: Any) -> None:
        """result[a, i] = rows[i, a]."""

        def body(index: Any, _: list[Any]) -> list[Any]:
            row = self._row(builder, rows, index)

            def inner(place: Any, _: list[Any]) -> list[Any]:
                one = builder.load(builder.gep(row, [place]), align=4)
                builder.store(one, builder.gep(result, [builder.add(builder.mul(place, count), index)]), align=4)
                return []

            loop(builder, I64(self.rank), [], inner)
            return []

        loop(builder, count, [], body)

    def _times(self, builder: Any, count: Any, rows: Any, matrix: Any, result: Any) -> None:
        """result[i, :] = Σ_a rows[i, a] matrix[a, :], in float64 but for what is written."""

        def body(index: Any, _: list[Any]) -> list[Any]:
            def inner(place: Any, sums: list[Any]) -> list[Any]:
                one = self._number(builder, rows, index, place).double()
                return [one.fma(self._load(builder, matrix, place), Vector(builder, sums[0])).value]

            (total,) = loop(builder, I64(self.rank), [self._zero(builder, F64).value], inner)
            self._store(builder, Vector(builder, total).float(), result, index)
            return []

        loop(builder, count, [], body)

    def _whitening(self, builder: Any, gram: Any, inverse: Any, result: Any) -> None:
        """result = L⁻ᵀ of L Lᵀ, which a little is added to; `gram` and `inverse` are written too.

        Row j of Lᵀ is what is left of row j over the root of its diagonal; taken off the rows below, from the identity
        too, it leaves L⁻¹ there.
        """
        rank = I64(self.rank)
        ridge = self._trace(builder, gram) * RIDGE + SMALLEST_NORM

        def prepare(row: Any, _: list[Any]) -> list[Any]:
            one = ridge.like(1.0)
            self._store(builder, self._load(builder, gram, row) + self._unit(builder, row, ridge), gram, row)
            self._store(builder, self._unit(builder, row, one), inverse, row)
            return []

        def eliminate(row: Any, _: list[Any]) -> list[Any]:
            pivot = self._number(builder, gram, row, row).clamp_min(SMALLEST_NORM).sqrt()
            upper, lower = (self._load(builder, matrix, row).div(pivot) for matrix in (gram, inverse))
            self._store(builder, upper, gram, row)
            self._store(builder, lower, inverse, row)
            below = builder.add(row, I64(1))
            with builder.if_then(builder.icmp_signed("<", below, rank)):

                def take(index: Any, _: list[Any]) -> list[Any]:
                    other = builder.add(below, index)
                    share = -self._number(builder, gram, row, other)
                    for matrix, line in ((gram, upper), (inverse, lower)):
                        self._store(builder, share.fma(line, self._load(builder, matrix, other)), matrix, other)
                    return []

                loop(builder, builder.sub(rank, below), [], take)
            return []

        loop(builder, rank, [], prepare)
        loop(builder, rank, [], eliminate)
        self._transposed(builder, rank, inverse, result)

    def _trace(self, builder: Any, matrix: Any) -> Vector:
        """Of (k, k) float64, as a vector of one."""
        total = load(builder, matrix, 1)
        for place in range(1, self.rank):
            total += load(builder, builder.gep(matrix, [I64(place * (self.rank + 1))]), 1)
        return total

    def _change(self, builder: Any, left: Any, longer: Vector, gram: Any, free: Sequence[Any]) -> tuple[Any, Vector]:
        """√(longer side) (T − 1/σ) and √(longer side) / σ, as in `l2o_runtime.rules.orthogonal.change`.

        Args:
            builder: where to write.
            left: r − k.
            longer: a vector of one float64, √ of the longer side.
            gram: B Bᵀ, is written.
            free: room for four (k, k).
        """
        rank = I64(self.rank)
        one = longer.like(1.0)
        rest = (one - self._trace(builder, gram)).clamp_min(0.0)
        many = Vector(builder, builder.insert_element(one.value, builder.sitofp(left, F64), I32(0)))
        sigma = rest.div(many.clamp_min(1.0)).sqrt().clamp_min(SMALLEST_REST)
        scale = one.div(sigma).where(many > 0.0, 0.0)
        whole, other, step, spare = free

        def each(write: Callable[[Any], Vector], matrix: Any) -> None:
            def body(row: Any, _: list[Any]) -> list[Any]:
                self._store(builder, write(row), matrix, row)
                return []

            loop(builder, rank, [], body)

        a, b, c = COEFFICIENTS
        each(lambda row: self._unit(builder, row, one), whole)
        for _ in range(ITERATIONS):
            builder.call(self.product, [gram, gram, other])
            each(
                lambda row: (
                    self._load(builder, gram, row) * b
                    + self._load(builder, other, row) * c
                    + self._unit(builder, row, one * a)
                ),
                step,
            )
            builder.call(self.product, [step, whole, spare])
            whole, spare = spare, whole
            builder.call(self.product, [step, gram, other])
            builder.call(self.product, [other, step, gram])  # `step` is symmetric

        def scaled(row: Any) -> Vector:
            changed = self._load(builder, whole, row) - self._unit(builder, row, scale)
            return changed * shuffle(longer, None, [0] * self.rank)

        each(scaled, spare)
        return spare, scale * longer

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

    def orthogonalise(self) -> Any:
        """The function for one matrix."""
        function = ir.Function(self.module, ir.FunctionType(VOID, [I64] * 3 + [POINTER] * 4), name="orthogonalise_one")
        function.linkage = "internal"
        for argument in function.args[3:]:
            argument.add_attribute("noalias")
        r, c, rows, grad, momentum, x, free = function.args
        builder = ir.IRBuilder(function.append_basic_block())
        k, one = I64(self.rank), I64(1)
        flat = builder.icmp_signed("==", rows, one)
        by_row, by_column = builder.select(flat, c, one), builder.select(flat, one, r)

        def take(count: Any, kind: Any = POINTER) -> Any:
            """Room for rows of k numbers."""
            nonlocal free
            start, size = free, builder.mul(count, k)
            free = builder.gep(free, [builder.add(size, size) if kind == DOUBLE else size])
            return builder.bitcast(start, kind)

        gram, *spare = (take(k, DOUBLE) for _ in range(6))
        signs, seen, basis, mixed = (take(r) for _ in range(4))
        inside, across = take(c), take(c)
        number = builder.alloca(F32)

        def combine(outer: Any, inner: Any, so: Any, si: Any, end_to_end: Any, factors: Any, result: Any) -> None:
            arguments = [outer, inner, so, si, x, factors, result]
            with builder.if_else(end_to_end) as (then, otherwise):
                with then:
                    builder.call(self.rowwise, arguments)
                with otherwise:
                    builder.call(self.columnwise, arguments)

        size = self._prepared(builder, builder.mul(r, c), grad, momentum, x)
        self._signs(builder, r, size, signs)
        combine(c, r, by_column, by_row, builder.not_(flat), signs, inside)
        combine(r, c, by_row, by_column, flat, inside, seen)
        builder.call(self.gram, [r, seen, gram])
        builder.call(self.whitening, [gram, *spare[:2]])
        builder.call(self.times, [r, seen, spare[1], basis])

        def over_size(row: Any, _: list[Any]) -> list[Any]:
            divided = self._load(builder, basis, row).div(shuffle(size, None, [0] * self.rank))
            self._store(builder, divided, mixed, row)
            return []

        loop(builder, r, [], over_size)
        combine(c, r, by_column, by_row, builder.not_(flat), mixed, inside)
        builder.call(self.gram, [c, inside, gram])
        side = ir.Constant(ir.VectorType(F64, 1), ir.Undefined)
        longer = Vector(builder, builder.insert_element(side, builder.sitofp(c, F64), I32(0))).sqrt()
        changed, rest = self._change(builder, builder.sub(r, k), longer, gram, spare[:4])
        builder.call(self.times, [r, basis, changed, mixed])
        store(builder, rest.float().div(size), number)
        with builder.if_else(flat) as (then, otherwise):
            with then:
                builder.call(self.transposed, [c, inside, across])
                builder.call(self.composed, [r, c, number, mixed, across, x])
            with otherwise:
                builder.call(self.transposed, [r, mixed, across])
                builder.call(self.composed, [c, r, number, inside, across, x])
        builder.ret_void()
        return function

    def _signs(self, builder: Any, count: Any, size: Vector, result: Any) -> None:
        """Row i has the sign of row i of x over ‖x‖² at i mod k; see `l2o_runtime.rules.orthogonal`."""
        inverse = size.like(1.0).div(size * size)

        def body(row: Any, _: list[Any]) -> list[Any]:
            place, block = builder.urem(row, I64(self.rank)), builder.udiv(row, I64(self.rank))
            mixed = builder.add(builder.add(builder.mul(I64(31), block), builder.mul(I64(17), place)), I64(30))
            positive = builder.icmp_signed("<", builder.urem(builder.mul(mixed, block), I64(97)), I64(48))
            self._store(
                builder, self._unit(builder, place, inverse.where(Mask(builder, positive), -inverse)), result, row
            )
            return []

        loop(builder, count, [], body)

    def _prepared(self, builder: Any, count: Any, grad: Any, momentum: Any, x: Any) -> Vector:
        """x = Nesterov's momentum over its largest number; its norm, a vector of one float32."""
        sizes = (self.width, 1)
        largest, squares = ({size: self._slot(builder, size) for size in sizes} for _ in range(2))

        def average(at: Any, size: int) -> None:
            new = load(builder, builder.gep(grad, [at]), size).clamp(-LARGEST, LARGEST)
            value = load(builder, builder.gep(momentum, [at]), size) * (FAST * FAST) + new * (1 - FAST * FAST)
            store(builder, value, builder.gep(x, [at]))
            most = Vector(builder, builder.load(largest[size]))
            builder.store(most.clamp_min(value.abs()).value, largest[size])

        along(builder, count, self.width, average)
        most = self._reduced(builder, largest, Vector.clamp_min).clamp_min(SMALLEST_NORM)
        inverse = most.like(1.0).div(most)

        def normed(at: Any, size: int) -> None:
            place = builder.gep(x, [at])
            value = load(builder, place, size) * shuffle(inverse, None, [0] * size)
            store(builder, value, place)
            builder.store(value.fma(value, Vector(builder, builder.load(squares[size]))).value, squares[size])

        along(builder, count, self.width, normed)
        return self._reduced(builder, squares, Vector.__add__).sqrt().clamp_min(SMALLEST_SIZE)

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
