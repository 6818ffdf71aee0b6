"""LLVM code of whole steps of few coordinates: what else Python would call one after the other, with sums in between.

For a network of four tensors the arithmetic of a step takes a tenth of what it takes Python to hand it on.
"""

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from l2o_runtime.kernels.directional_code import NUMBERS, TOTALS
from l2o_runtime.kernels.emit import F32, F64, I32, I64, VOID, Vector, constant, each, load, loop, shuffle, store
from l2o_runtime.kernels.plan import LENGTH, WEIGHTS
from l2o_runtime.kernels.steering_code import DOUBLES, WIDTH
from l2o_runtime.rules.steering import MIXED, TINY

CALLS = ("observe", "orthogonalise", "update", "move", "copy", "steer")
"""Functions whose addresses a frame has: of `directional_code`, `orthogonal_code` and `steering_code`."""

COUNTS = ("parts", "pieces", "matrices", "blocks", "copies", "loss")
"""Whole numbers that it has; `loss` is whether that is finite."""

TABLES = ("table", "owners", "sums", "totals", "numbers", "sizes", "rates", "matrix", "scatter", "steps")
"""Addresses that it has: see `Plan`; `totals` (parts, TOTALS) are written to, and `sizes` and `rates` are float64."""

STEERING = {"doubles": F64, "floats": F32, "scalars": F64, "states": F32, "network": F32, "told": F32}
"""And of what `steer` reads and writes."""

FRAME = (*CALLS, *COUNTS, *TABLES, *STEERING)

SUMMED = DOUBLES.index("fast")
"""Sums that steer, the last of the totals."""

PULSE, LOSS, FOUND, ZERO = 1, 2, 4, 8
"""What is against a step: Σ|g| or the loss is not finite, or another sum; or all gradients are zero."""

EVENS, ODDS = (0, 2, 4, 6), (1, 3, 5, 7)
"""NumPy adds up eight numbers side by side, and then neighbours."""


def whole_module(width: int) -> ir.Module:
    """`step(frame)` → what is against it, 0 if it was taken; a frame has an int64 for each of `FRAME`.

    Args:
        width: coordinates of a vector.
    """
    module = ir.Module(name="l2o")
    function = ir.Function(module, ir.FunctionType(I64, [I64.as_pointer()]), name="step")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(_Code(builder, function.args[0], width).write())
    return module


class _Code:
    """Writes the function."""

    def __init__(self, builder: Any, frame: Any, width: int):
        self.builder, self.width = builder, width
        self.frame = {name: builder.load(builder.gep(frame, [I64(i)])) for i, name in enumerate(FRAME)}
        self.parts, self.pieces = self.frame["parts"], self.frame["pieces"]
        self.steered = builder.mul(self.frame["blocks"], I64(WIDTH))

    def write(self) -> Any:
        """Look; go on if nothing is against it."""
        self._clear(TOTALS)
        self._call("observe", self.pieces, "table")
        self._total(TOTALS)
        against = self._against()
        with self.builder.if_then(self.builder.icmp_signed("==", against, I64(0))):
            self._steer()
            self._clear(1)
            with self.builder.if_then(self.builder.icmp_signed(">", self.frame["matrices"], I64(0))):
                self._call("orthogonalise", self.frame["matrices"], "matrix")
            self._call("update", self.pieces, "table")
            self._total(1)
            self._lengths()
            self._call("move", self.pieces, "table")
            self._count()
        return against

    def _each(self, count: Any, body: Callable[[Any], None]) -> None:
        each(self.builder, 1, I64(0), count, body)

    def _at(self, name: str, index: Any, kind: Any = F64) -> Any:
        """Address of a number of a table."""
        return self.builder.gep(self.builder.inttoptr(self.frame[name], kind.as_pointer()), [index])

    def _row(self, row: Any, size: int, place: Any = 0) -> Any:
        """Index of a number in a row of so many."""
        place = I64(place) if isinstance(place, int) else place
        return self.builder.add(self.builder.mul(row, I64(size)), place)

    def _number(self, name: str, index: Any, kind: Any = F64) -> Vector:
        return load(self.builder, self._at(name, index, kind), 1)

    def _call(self, name: str, count: Any, table: str) -> None:
        """A function of rows of a table."""
        kind = ir.FunctionType(VOID, [I64, I64.as_pointer()])
        function = self.builder.inttoptr(self.frame[name], kind.as_pointer())
        self.builder.call(function, [count, self._at(table, I64(0), I64)])

    def _clear(self, count: int) -> None:
        """Sums of pieces, the first so many, are zero."""
        zero = Vector(self.builder, constant(ir.VectorType(F64, self.width), 0.0))

        def piece(index: Any) -> None:
            for which in range(count):
                place = self._row(index, TOTALS * self.width, which * self.width)
                store(self.builder, zero, self._at("sums", place))

        self._each(self.pieces, piece)

    def _total(self, count: int) -> None:
        """The first so many sums of parts, in the order in which NumPy adds up."""
        zero = Vector(self.builder, constant(ir.VectorType(F64, 1), 0.0))

        def part(index: Any) -> None:
            for which in range(count):
                store(self.builder, zero, self._at("totals", self._row(index, TOTALS, which)))

        def piece(index: Any) -> None:
            owner = self.builder.load(self._at("owners", index, I64))
            for which in range(count):
                place = self._at("sums", self._row(index, TOTALS * self.width, which * self.width))
                total = self._at("totals", self._row(owner, TOTALS, which))
                own = _added(load(self.builder, place, self.width))
                store(self.builder, load(self.builder, total, 1) + own, total)

        self._each(self.parts, part)
        self._each(self.pieces, piece)

    def _against(self) -> Any:
        """What is against a step."""
        builder, none = self.builder, constant(ir.VectorType(F64, 1), 0.0)

        def part(index: Any, before: list[Any]) -> list[Any]:
            pulse, rest = (Vector(builder, value) for value in before)
            pulse = pulse + self._number("totals", self._row(index, TOTALS))
            for which in range(1, TOTALS):  # 0 · x is NaN where x is not finite
                rest = rest + self._number("totals", self._row(index, TOTALS, which)) * 0.0
            return [pulse.value, rest.value]

        pulse, rest = loop(builder, self.parts, [none, none], part)
        finite = (Vector(builder, pulse) * 0.0).value
        found = [
            (builder.fcmp_unordered("une", finite, none), PULSE),
            (builder.fcmp_unordered("une", rest, none), FOUND),
            (builder.fcmp_ordered("==", pulse, none), ZERO),
        ]
        bits = builder.select(builder.icmp_signed("!=", self.frame["loss"], I64(0)), I64(0), I64(LOSS))
        for condition, bit in found:
            here = builder.extract_element(condition, I32(0))
            bits = builder.or_(bits, builder.select(here, I64(bit), I64(0)))
        return bits

    def _steer(self) -> None:
        """Hand the sums on, and take the weights of directions."""

        def sums(index: Any) -> None:
            for row in range(SUMMED):
                value = self._number("totals", self._row(index, TOTALS, TOTALS - SUMMED + row))
                place = self.builder.add(self.builder.mul(self.steered, I64(row)), index)
                store(self.builder, value, self._at("doubles", place))

        def weights(index: Any) -> None:
            for row in range(MIXED):
                place = self.builder.add(self.builder.mul(self.steered, I64(1 + row)), index)
                target = self._row(index, NUMBERS, WEIGHTS.start + row)
                store(self.builder, self._number("told", place, F32), self._at("numbers", target, F32))

        self._each(self.parts, sums)
        kinds = [kind.as_pointer() for kind in STEERING.values()]
        tables = [self.builder.inttoptr(self.frame[n], kind) for n, kind in zip(STEERING, kinds, strict=True)]
        kind = ir.FunctionType(VOID, [I64, *kinds])
        function = self.builder.inttoptr(self.frame["steer"], kind.as_pointer())
        self.builder.call(function, [self.frame["blocks"], *tables])
        self._each(self.parts, weights)

    def _lengths(self) -> None:
        """−length · lr / RMS(d)."""

        def part(index: Any) -> None:
            squares = self._number("totals", self._row(index, TOTALS))
            deviation = (squares.div(self._number("sizes", index))).sqrt().clamp_min(TINY)
            length = (-self._number("told", index, F32)).double().div(deviation) * self._number("rates", index)
            store(self.builder, length.float(), self._at("numbers", self._row(index, NUMBERS, LENGTH), F32))

        self._each(self.parts, part)

    def _count(self) -> None:
        """One step more, and write what belongs to whole tensors where it belongs."""

        def step(index: Any) -> None:
            place = self._at("steps", index, F32)
            store(self.builder, load(self.builder, place, 1) + 1.0, place)

        self._each(self.parts, step)
        self._call("copy", self.frame["copies"], "scatter")


def _added(vector: Vector) -> Vector:
    """The sum of a vector's numbers, in the order in which NumPy adds them up."""
    width = vector.value.type.count
    if width < len(EVENS + ODDS):
        numbers = [shuffle(vector, None, [index]) for index in range(width)]
        return functools.reduce(Vector.__add__, numbers)
    while width > len(EVENS + ODDS):
        width //= 2
        vector = shuffle(vector, None, range(width)) + shuffle(vector, None, range(width, 2 * width))
    while width > 1:
        width //= 2
        vector = shuffle(vector, None, EVENS[:width]) + shuffle(vector, None, ODDS[:width])
    return vector
