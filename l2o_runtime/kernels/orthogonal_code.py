"""LLVM code that orthogonalises matrices, as `l2o_runtime.rules.orthogonal` does; vectors go along the k directions.

What goes through whole matrices is in `matrix_code`; here are the products of k × k numbers, and the order of it all.
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
    load,
    loop,
    shuffle,
    store,
)
from l2o_runtime.kernels.matrix_code import DOUBLE, MatrixCode
from l2o_runtime.kernels.pieces_code import rows_of
from l2o_runtime.rules.orthogonal import (
    COEFFICIENTS,
    ITERATIONS,
    RIDGE,
    SMALLEST_NORM,
    SMALLEST_REST,
)

LARGEST_RANK = 32
"""Directions whose sums stay in registers."""


def room(rank: int, rows: int, columns: int) -> int:
    """Float32 that the code needs besides a matrix of rows ≤ columns."""
    return rows + rank * (3 * rows + 2 * columns + 2 * 6 * rank)


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


class _Code(MatrixCode):
    """The functions; each is written once."""

    def __init__(self, module: ir.Module, rank: int, width: int):
        super().__init__(module, rank, width)
        self.gram = self._function("gram", [I64, POINTER, DOUBLE], self._gram)
        self.times = self._function("times", [I64, POINTER, DOUBLE, POINTER], self._times)
        self.product = self._function("product", [DOUBLE] * 3, self._product)
        self.whitening = self._function("whitening", [DOUBLE] * 3, self._whitening)

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
        seen, basis, mixed = (take(r) for _ in range(3))
        inside, across = take(c), take(c)
        signs = free
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
        with builder.if_else(flat) as (then, otherwise):
            with then:
                builder.call(self.rows_summed, [r, c, x, signs, across])
                builder.call(self.transposed_back, [c, across, inside])
            with otherwise:
                builder.call(self.columns_summed, [r, c, x, signs, inside])
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
        """The sign of every row of x, over ‖x‖²; see `l2o_runtime.rules.orthogonal`."""
        inverse = size.like(1.0).div(size * size)

        def body(row: Any, _: list[Any]) -> list[Any]:
            place, block = builder.urem(row, I64(self.rank)), builder.udiv(row, I64(self.rank))
            mixed = builder.add(builder.add(builder.mul(I64(31), block), builder.mul(I64(17), place)), I64(30))
            positive = builder.icmp_signed("<", builder.urem(builder.mul(mixed, block), I64(97)), I64(48))
            store(builder, inverse.where(Mask(builder, positive), -inverse), builder.gep(result, [row]))
            return []

        loop(builder, count, [], body)
