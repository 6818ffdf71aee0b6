"""What a tile of coordinates needs, as LLVM code: products, and sums over coordinates.

All products are one loop, `Tile.products`: some vectors per turn, each times some single numbers. The derivative by
the weights sums over coordinates; for it the derivatives by the pre-activations change places, so that vectors hold
rows of weights.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from l2o_runtime.kernels.emit import (
    F32,
    I32,
    I64,
    Vector,
    broadcast,
    constant,
    expect,
    load,
    loop,
    shuffle,
    store,
)
from l2o_runtime.kernels.machine import widest

Sums = list[list[Vector]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a network and of a tile.

    Attributes:
        inputs, hidden, layers, outputs: of the network.
        learned: whether what it is given is asked for a gradient.
        width: floats of a vector.
        vectors: of coordinates in a tile.
        sums: vectors that are summed up at a time; they and what is multiplied have to fit into the registers.
    """

    inputs: int
    hidden: int
    layers: int
    outputs: int
    learned: bool
    width: int
    vectors: int
    sums: int

    @property
    def tile(self) -> int:
        """Coordinates."""
        return self.width * self.vectors

    @property
    def rows(self) -> int:
        """Pre-activations of a layer, up to whole vectors."""
        return -(-4 * self.hidden // self.width) * self.width

    def below(self, layer: int) -> int:
        """Numbers that a layer gets from below."""
        return self.hidden if layer else self.inputs

    def columns(self, layer: int) -> int:
        """Numbers that a layer gets, from below and from itself."""
        return self.below(layer) + self.hidden

    @property
    def scratch(self) -> int:
        """Floats that the gradient of a tile needs besides; the first `rows` · tile start as zeros."""
        return (2 * self.rows + self.hidden) * self.tile

    @property
    def gradient(self) -> int:
        """Floats of the derivatives by the weights.

        (columns + 1, rows) of every layer, the last column for the bias; then (hidden + 1, outputs, width) for the
        head, each of whose numbers is the sum of a vector.
        """
        layers = sum((self.columns(layer) + 1) * self.rows for layer in range(self.layers))
        return layers + (self.hidden + 1) * self.outputs * self.width


@functools.cache
def choose_shape(inputs: int, hidden: int, layers: int, outputs: int, learned: bool) -> Shape:
    """The tile for this processor: 32 registers of 16 floats, or 16 smaller ones."""
    many = widest() == 16
    return Shape(inputs, hidden, layers, outputs, learned, widest(), 4 if many else 2, 25 if many else 10)


class Tile:
    """The code for one tile.

    Args:
        builder: where to write.
        shape: sizes.
        n: floats from one unit to the next in the arrays.
    """

    def __init__(self, builder: Any, shape: Shape, n: Any):
        self.builder, self.shape, self.n = builder, shape, n

    def at(self, pointer: Any, *offsets: Any) -> Any:
        """An address so many floats further on."""
        for offset in offsets:
            pointer = self.builder.gep(pointer, [I64(offset) if isinstance(offset, int) else offset])
        return pointer

    def times(self, index: Any, step: Any) -> Any:
        """index · step; either may be known beforehand."""
        if isinstance(index, int) and isinstance(step, int):
            return index * step
        index, step = (I64(x) if isinstance(x, int) else x for x in (index, step))
        return self.builder.mul(index, step)

    def read(self, pointer: Any, count: int) -> list[Vector]:
        """Vectors that lie end to end."""
        return [load(self.builder, self.at(pointer, v * self.shape.width), self.shape.width) for v in range(count)]

    def write(self, vectors: Sequence[Vector], pointer: Any) -> None:
        """Write vectors end to end."""
        for v, vector in enumerate(vectors):
            store(self.builder, vector, self.at(pointer, v * self.shape.width))

    def expect(self, pointers: Sequence[Any]) -> None:
        """Ask for the same rows of the next tile; rows lie too far apart for the processor to guess them."""
        for pointer in pointers:
            offsets = range(0, 4 * self.shape.tile, 64)
            expect(self.builder, [self.at(pointer, self.shape.tile + offset // 4) for offset in offsets], locality=2)

    def spread(self, pointer: Any) -> Vector:
        """One number from memory, as often as a vector holds it."""
        return broadcast(self.builder, pointer, self.shape.width)

    def nothing(self) -> Vector:
        """Zeros."""
        return Vector(self.builder, constant(ir.VectorType(F32, self.shape.width), 0.0))

    def products(
        self, sums: Sums, count: Any, x: Any, step: Any, factors: Any, factor_step: Any, factor_apart: Any
    ) -> Sums:
        """sums[r] + Σ_i factors[i, r] x[i].

        Args:
            sums: some vectors for every r.
            count: of i, at least 1.
            x, step: address of the vectors for i = 0, and floats to the next.
            factors, factor_step, factor_apart: address of the first, and floats to the next i and r.
        """
        across = len(sums[0])

        def body(i: Any, flat: list[Any]) -> list[Any]:
            row = self.read(self.at(x, self.times(i, step)), across)
            here = self.at(factors, self.times(i, factor_step))
            new = []
            for r in range(len(sums)):
                factor = self.spread(self.at(here, self.times(r, factor_apart)))
                old = flat[r * across : (r + 1) * across]
                new += [row[v].fma(factor, Vector(self.builder, old[v])).value for v in range(across)]
            return new

        count = I64(count) if isinstance(count, int) else count
        flat = loop(self.builder, count, [vector.value for row in sums for vector in row], body)
        vectors = [Vector(self.builder, value) for value in flat]
        return [vectors[r * across : (r + 1) * across] for r in range(len(sums))]

    def activations(self, layer: int, unit: Any, x: Any, h: Any, weights: Sequence[Any]) -> Sums:
        """Pre-activations of a unit: its four gates, of all vectors of the tile.

        Args:
            layer, unit: which.
            x, h: addresses of what the layer gets, from below and from itself.
            weights: addresses of W_ih, W_hh and the bias.
        """
        hidden, (ih, hh, bias) = self.shape.hidden, weights
        here = self.at(bias, unit)
        sums = [[self.spread(self.at(here, gate * hidden))] * self.shape.vectors for gate in range(4)]
        for matrix, array, count in ((ih, x, self.shape.below(layer)), (hh, h, hidden)):
            row = self.at(matrix, self.times(unit, count))
            sums = self.products(sums, count, array, self.n, row, 1, hidden * count)
        return sums

    def rows(self, total: int, count: int, x: Any, step: Any, weights: Any, line: int, out: Any, apart: Any) -> None:
        """out[j] = Σ_i weights[i, j] x[i] for j < total.

        Args:
            total, count: of j and i.
            x, step: address of the vectors for i = 0, and floats to the next.
            weights, line: address of the matrix, and floats from one i to the next.
            out, apart: address of the result, and floats from one j to the next.
        """

        def some(j: Any, size: int) -> None:
            sums = [[self.nothing()] * self.shape.vectors for _ in range(size)]
            sums = self.products(sums, count, x, step, self.at(weights, j), line, 1)
            for r, vectors in enumerate(sums):
                self.write(vectors, self.at(out, self.times(j, apart), self.times(r, apart)))

        self.groups(total, self.shape.sums // self.shape.vectors, some)

    def groups(self, total: int, most: int, body: Callable[[Any, int], None]) -> None:
        """`body` with the first and the number of things out of `total`, nearly equally many, `most` at a time."""
        size = -(-total // -(-total // most))

        def turn(index: Any, _: list[Any]) -> list[Any]:
            body(self.times(index, size), size)
            return []

        loop(self.builder, I64(total // size), [], turn)
        if total % size:
            body(I64(total - total % size), total % size)

    def transpose(self, source: Any, target: Any) -> None:
        """(rows, tile) to (tile, rows)."""
        shape, width = self.shape, self.shape.width

        def body(block: Any, _: list[Any]) -> list[Any]:
            first = self.at(source, self.times(block, width * shape.tile))
            below = self.at(target, self.times(block, width))
            for v in range(shape.vectors):
                vectors = [self.read(self.at(first, r * shape.tile + v * width), 1)[0] for r in range(width)]
                for r, vector in enumerate(transposed(vectors)):
                    self.write([vector], self.at(below, (v * width + r) * shape.rows))
            return []

        loop(self.builder, I64(shape.rows // width), [], body)

    def outer(self, pre: Any, first: Any, total: int, factors: Any, apart: Any, target: Any) -> None:
        """target[j] += Σ_i factors[j, i] pre[i] for j < total, i from `first` to the end of the tile.

        Args:
            pre: address of (tile, rows).
            first: of the coordinates that were not there before.
            total: of j.
            factors, apart: address of the first, and floats to the next j.
            target: address of (total, rows).
        """
        shape = self.shape
        count = self.builder.sub(I64(shape.tile), first)
        pre = self.at(pre, self.times(first, shape.rows))
        factors = self.at(factors, first)

        def block(v: Any, across: int) -> None:
            column = self.times(v, shape.width)

            def some(j: Any, size: int) -> None:
                first_place = self.at(target, self.times(j, shape.rows), column)
                places = [self.at(first_place, r * shape.rows) for r in range(size)]
                sums = [self.read(place, across) for place in places]
                here = self.at(factors, self.times(j, apart))
                sums = self.products(sums, count, self.at(pre, column), shape.rows, here, 1, apart)
                for place, vectors in zip(places, sums, strict=True):
                    self.write(vectors, place)

            self.groups(total, shape.sums // across, some)

        self.groups(shape.rows // shape.width, 5, block)

    def bias(self, pre: Any, first: Any, target: Any) -> None:
        """target += Σ_i pre[i]; arguments as for `outer`."""
        shape = self.shape
        count = self.builder.sub(I64(shape.tile), first)

        def block(v: Any, across: int) -> None:
            column = self.times(v, shape.width)

            def add(i: Any, sums: list[Any]) -> list[Any]:
                row = self.at(pre, self.times(self.builder.add(i, first), shape.rows), column)
                return [(Vector(self.builder, s) + a).value for s, a in zip(sums, self.read(row, across), strict=True)]

            place = self.at(target, column)
            sums = loop(self.builder, count, [vector.value for vector in self.read(place, across)], add)
            self.write([Vector(self.builder, s) for s in sums], place)

        self.groups(shape.rows // shape.width, shape.sums, block)

    def head(self, grad_output: Any, h: Any, first: Any, target: Any) -> None:
        """target[k, o] += Σ_v grad_output[o, v] h[k, v], and target[hidden, o] += Σ_v grad_output[o, v].

        Args:
            grad_output, h: addresses of the tile in (outputs, n) and (hidden, n).
            first: of the coordinates that were not there before.
            target: address of (hidden + 1, outputs, width).
        """
        shape, builder = self.shape, self.builder
        integers = ir.VectorType(I64, shape.width)
        start = builder.insert_element(ir.Constant(integers, ir.Undefined), first, I32(0))
        start = builder.shuffle_vector(start, start, constant(ir.VectorType(I32, shape.width), 0))
        fresh = [
            builder.icmp_signed(">=", ir.Constant(integers, list(range(v * shape.width, (v + 1) * shape.width))), start)
            for v in range(shape.vectors)
        ]
        for o in range(shape.outputs):
            row = self.read(self.at(grad_output, self.times(o, self.n)), shape.vectors)
            row = [
                Vector(builder, builder.select(kept, vector.value, self.nothing().value))
                for kept, vector in zip(fresh, row, strict=True)
            ]

            def unit(k: Any, _: list[Any], o: int = o, row: list[Vector] = row) -> list[Any]:
                place = self.at(target, self.times(k, shape.outputs * shape.width), o * shape.width)
                total = self.read(place, 1)[0]
                for vector, factor in zip(
                    self.read(self.at(h, self.times(k, self.n)), shape.vectors), row, strict=True
                ):
                    total = vector.fma(factor, total)
                self.write([total], place)
                return []

            loop(builder, I64(shape.hidden), [], unit)
            place = self.at(target, (shape.hidden * shape.outputs + o) * shape.width)
            total = self.read(place, 1)[0]
            for factor in row:
                total = total + factor
            self.write([total], place)


def transposed(vectors: list[Vector]) -> list[Vector]:
    """As many vectors as each has elements, columns for rows.

    Vectors are interleaved with those half of them further on, which moves the highest bit of an element's place to
    the lowest; as often as there are bits, rows and columns have changed places.
    """
    width = len(vectors)
    low = [k // 2 + width * (k % 2) for k in range(width)]
    high = [k + width // 2 for k in low]
    for _ in range(width.bit_length() - 1):
        pairs = list(zip(vectors[: width // 2], vectors[width // 2 :], strict=True))
        vectors = [shuffle(a, b, order) for a, b in pairs for order in (low, high)]
    return vectors
