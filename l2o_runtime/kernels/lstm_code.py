"""LLVM code of a rule's update: tiles of four coordinates, whose gates never leave the registers.

The weights are packed so that a vector holds all four gates of some units, [i … f … g … o …]. A tile keeps
`vectors` of them for each of its coordinates as running sums of the products, which are broadcasts of x and h
times rows of weights. Four such vectors are then transposed into one vector of each gate, whose units lie in the
order of the states h and c in memory; thus nothing but the states is read or written. States in bfloat16 are widened
when they are read and rounded when they are written; all between is float32.

Source: the blocking is that of Goto & van de Geijn 2008, section 5, on registers.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from llvmlite import ir
from torch import Tensor

from l2o_runtime.kernels.emit import (
    BF16,
    F32,
    I64,
    POINTER,
    VOID,
    Vector,
    broadcast,
    join,
    load,
    loop,
    shuffle,
    store,
)
from l2o_runtime.kernels.features import SHARED
from l2o_runtime.rules.features import AVERAGES, WIDTHS, Look, combine, look
from l2o_runtime.rules.lstm import CoordinateConfig
from l2o_runtime.rules.restraint import restrain
from l2o_runtime.rules.rnnprop import RNNPropConfig

ROWS = 4
"""Coordinates of a tile; as many as there are gates, for they change places."""

GATES = 4


@dataclass(frozen=True)
class Shape:
    """How the units of a layer are spread over vectors.

    Attributes:
        hidden: units.
        width: floats of a vector.
        vectors: vectors that a tile sums up at a time for each coordinate.
    """

    hidden: int
    width: int
    vectors: int

    @property
    def units(self) -> int:
        """Units of a vector."""
        return self.width // GATES

    @property
    def groups(self) -> int:
        """How many times `vectors` make up a layer."""
        return self.hidden // (self.units * self.vectors)


def choose_shape(hidden: int, widest: int) -> Shape:
    """The widest vectors that fit a number of units, as many as the registers hold.

    >>> choose_shape(20, 16)
    Shape(hidden=20, width=16, vectors=5)
    >>> choose_shape(7, 16)
    Shape(hidden=7, width=4, vectors=1)
    """
    width = widest
    while hidden % (width // GATES):
        width //= 2
    count = hidden // (width // GATES)
    most = 5 if widest == 16 else 2  # ROWS · most sums, and the factors, in 32 or 16 registers
    return Shape(hidden, width, max(v for v in range(1, most + 1) if count % v == 0))


def pack(weight: Tensor, shape: Shape) -> Tensor:
    """Rows in the order of the vectors, with the ½ of σ(x) = ½ tanh(x/2) + ½.

    Args:
        weight: (4 · hidden, k) or (4 · hidden,), gates in the order i, f, g, o.
        shape: of the layer.

    Returns:
        (groups, k, vectors · width) or (groups, 1, vectors · width), contiguous.
    """
    half = torch.tensor([0.5, 0.5, 1.0, 0.5], dtype=weight.dtype, device=weight.device)
    scaled = weight.reshape(GATES, shape.hidden, -1) * half[:, None, None]
    split = scaled.reshape(GATES, shape.groups, shape.vectors, shape.units, -1)
    return split.permute(1, 4, 2, 0, 3).reshape(shape.groups, -1, shape.vectors * shape.width).contiguous()


class Tile:
    """The code of one tile.

    Args:
        builder: where to write.
        config: of the rule.
        shape: of its layers.
    """

    def __init__(self, builder: Any, config: CoordinateConfig, shape: Shape):
        self.builder, self.config, self.shape = builder, config, shape
        with builder.goto_entry_block():
            self.features = builder.alloca(F32, WIDTHS[config.features] * ROWS)

    def at(self, pointer: Any, *offsets: Any) -> Any:
        """An address so many floats further on."""
        for offset in offsets:
            pointer = self.builder.gep(pointer, [I64(offset) if isinstance(offset, int) else offset])
        return pointer

    def times(self, index: Any, step: int) -> Any:
        """index · step."""
        return self.builder.mul(index, I64(step))

    def look(self, grad: Any, param: Any, averages: list[Any], numbers: list[Vector]) -> Look:
        """Write the features of four coordinates to `self.features`, (f, 4); the averages are advanced.

        Args:
            grad, param: addresses of (4,).
            averages: addresses of (4,) each.
            numbers: of `shared`, each as a vector.

        Returns:
            What was seen, vectors of (4,).
        """
        g, theta, *old = (load(self.builder, pointer, ROWS) for pointer in (grad, param, *averages))
        seen = look(self.config.features, g, theta, old, numbers[:-1])
        for average, pointer in zip(seen.averages, averages, strict=True):
            store(self.builder, average, pointer)
        for row, feature in enumerate(seen.features):
            store(self.builder, feature, self.at(self.features, row * ROWS))
        return seen

    def into(self, weights: Any) -> Any:
        """ELU(W x + b) of the features x of four coordinates.

        Args:
            weights: address of W (hidden, f), then b.

        Returns:
            Address of (hidden, ROWS).
        """
        count = WIDTHS[self.config.features]
        with self.builder.goto_entry_block():
            result = self.builder.alloca(F32, self.shape.hidden * ROWS)
        seen = [load(self.builder, self.at(self.features, row * ROWS), ROWS) for row in range(count)]
        biases = self.at(weights, count * self.shape.hidden)

        def body(unit: Any, _: list[Any]) -> list[Any]:
            total = broadcast(self.builder, self.at(biases, unit), ROWS)
            for row, feature in enumerate(seen):
                weight = self.at(weights, self.times(unit, count), row)
                total = broadcast(self.builder, weight, ROWS).fma(feature, total)
            store(self.builder, total.elu(), self.at(result, self.times(unit, ROWS)))
            return []

        loop(self.builder, I64(self.shape.hidden), [], body)
        return result

    def products(self, sums: list[Any], x: Any, steps: tuple[int, int], count: int, weights: Any) -> list[Any]:
        """Add x W to the running sums.

        Args:
            sums: ROWS · vectors of them.
            x: address of (count, ROWS) or (ROWS, count).
            steps: floats from one x to the next, and from one coordinate to the next.
            count: k.
            weights: address of (k, vectors · width).
        """
        shape = self.shape
        line = shape.vectors * shape.width

        def body(k: Any, sums: list[Any]) -> list[Any]:
            here = self.at(weights, self.times(k, line))
            row = [load(self.builder, self.at(here, v * shape.width), shape.width) for v in range(shape.vectors)]
            first = self.at(x, self.times(k, steps[0]))
            new = []
            for r in range(ROWS):
                factor = broadcast(self.builder, self.at(first, r * steps[1]), shape.width)
                for v in range(shape.vectors):
                    new.append(row[v].fma(factor, Vector(self.builder, sums[r * shape.vectors + v])).value)
            return new

        return loop(self.builder, I64(count), sums, body)

    def gates(self, sums: list[Any], c: Any, h: Any, group: Any) -> None:
        """c ← σ(f) c + σ(i) tanh(g), h ← σ(o) tanh(c), from the finished sums of a group."""
        shape = self.shape
        first = self.times(group, shape.vectors * shape.units)
        vectors = [Vector(self.builder, value) for value in sums]
        for t in range(shape.vectors):
            places = [divmod(q, shape.vectors) for q in range(GATES * t, GATES * (t + 1))]
            offsets = [r * shape.hidden + v * shape.units for r, v in places]
            i, f, g, o = transpose(vectors[GATES * t : GATES * (t + 1)], shape.units)
            cell = self.collect(c, first, offsets)
            (ni, di), (nf, df), (ng, dg), (no, do) = (gate.tanh_ratio() for gate in (i, f, g, o))
            # Three divisions in place of five: they are what the gates wait for.
            cell = (nf + df) * cell / (df + df) + (ni + di) * ng / ((di + di) * dg)
            nc, dc = cell.tanh_ratio()
            self.spread(cell, c, first, offsets)
            self.spread((no + do) * nc / ((do + do) * dc), h, first, offsets)

    def collect(self, base: Any, first: Any, offsets: list[int]) -> Vector:
        """Load the pieces of a vector, which lie side by side if a layer is one group."""
        if self.shape.groups == 1:
            return load(self.builder, self.at(base, offsets[0]), self.shape.width)
        return join([load(self.builder, self.at(base, first, offset), self.shape.units) for offset in offsets])

    def spread(self, vector: Vector, base: Any, first: Any, offsets: list[int]) -> None:
        """Store what `collect` loads."""
        if self.shape.groups == 1:
            store(self.builder, vector, self.at(base, offsets[0]))
            return
        for index, offset in enumerate(offsets):
            units = range(index * self.shape.units, (index + 1) * self.shape.units)
            store(self.builder, shuffle(vector, None, units), self.at(base, first, offset))

    def scratch(self) -> Any:
        """Memory for the h of a tile, (ROWS, hidden) float32."""
        with self.builder.goto_entry_block():
            return self.builder.alloca(F32, ROWS * self.shape.hidden)

    def copy(self, source: Any, target: Any) -> None:
        """Write the h of a tile elsewhere."""
        width = self.shape.width
        for offset in range(0, ROWS * self.shape.hidden, width):
            store(self.builder, load(self.builder, self.at(source, offset), width), self.at(target, offset))

    def layer(self, x: Any, steps: tuple[int, int], count: int, bias: Any, weights: Any, h: Any, c: Any) -> Any:
        """Advance one layer; h and c are written in place.

        Returns:
            Address of the new h, (ROWS, hidden) float32.
        """
        shape = self.shape
        line = shape.vectors * shape.width
        old = h
        if h.type != POINTER:
            old = self.scratch()
            self.copy(h, old)
        target = old if shape.groups == 1 else self.scratch()  # other groups still need the old h

        def body(group: Any, _: list[Any]) -> list[Any]:
            here = self.at(bias, self.times(group, line))
            start = [
                load(self.builder, self.at(here, v * shape.width), shape.width).value for v in range(shape.vectors)
            ]
            rows = self.at(weights, self.times(group, line * (count + shape.hidden)))
            sums = self.products(start * ROWS, x, steps, count, rows)
            sums = self.products(sums, old, (1, shape.hidden), shape.hidden, self.at(rows, line * count))
            self.gates(sums, c, target, group)
            return []

        loop(self.builder, I64(shape.groups), [], body)
        if target is not h:
            self.copy(target, h)
        return target

    def head(self, h: Any, weights: Any, seen: Look, noise: Vector) -> Vector:
        """The step of each coordinate, (4,): scale · output, of which there are as many as directions, if any."""
        directions = seen.directions
        outputs = len(directions) or 1
        biases = self.at(weights, outputs * self.shape.hidden)
        rows = [(self.at(weights, o * self.shape.hidden), self.at(biases, o)) for o in range(outputs)]
        output = [self.linear(h, weight, bias) for weight, bias in rows]
        if directions:
            delta = cast("Vector", combine(output, directions))
        else:
            delta = output[0].tanh() if self.config.bounded else output[0]
        delta = delta * self.config.output_scale
        if self.config.noise_floor is None:
            return delta
        gradient, mean, root = seen.relative
        return cast("Vector", restrain(delta, gradient, mean, root, noise))

    def linear(self, h: Any, weight: Any, bias: Any) -> Vector:
        """w · h + b of each coordinate, (4,)."""
        shape = self.shape
        piece = next(p for p in (4, 2, 1) if shape.hidden % p == 0)
        sums = []
        for r in range(ROWS):
            total = Vector(self.builder, ir.Constant(ir.VectorType(F32, piece), [0.0] * piece))
            for unit in range(0, shape.hidden, piece):
                factor = load(self.builder, self.at(weight, unit), piece)
                total = load(self.builder, self.at(h, r * shape.hidden + unit), piece).fma(factor, total)
            sums.append(total)
        flat = join(sums)
        columns = [shuffle(flat, None, [r * piece + j for r in range(ROWS)]) for j in range(piece)]
        output = broadcast(self.builder, bias, ROWS)
        for column in columns:
            output = output + column
        return output


def transpose(vectors: list[Vector], units: int) -> list[Vector]:
    """From four vectors of all gates of some units to one vector for each gate."""
    low, high = (join(vectors[half : half + 2]) for half in (0, 2))
    width = GATES * units
    result = []
    for gate in range(GATES):
        pick = [half * width + gate * units + unit for half in range(2) for unit in range(units)]
        result.append(join([shuffle(low, None, pick), shuffle(high, None, pick)]))
    return result


UPDATED = 6
"""Pointers that `update` takes before those of states."""


def update_module(config: CoordinateConfig, shape: Shape, dtypes: tuple[torch.dtype, ...]) -> ir.Module:
    """`update(tiles, weights, bias, shared, grad, param, delta, averages …, h0, c0, h1, …)` of a rule.

    `weights` are those of RNNprop's own layer, if it is one, the packed rows of all layers of the LSTM, one after the
    other, then the head's weights and biases;
    `bias` the packed biases of all layers, the first with the context's part; `shared` is of `features.shared`.
    All are float32 but for the states, averages and those of the layers, each of which has one of `dtypes`.
    """
    module = ir.Module(name="l2o")
    averages = len(AVERAGES[config.features])
    kept = [BF16.as_pointer() if dtype == torch.bfloat16 else POINTER for dtype in dtypes]
    function = ir.Function(module, ir.FunctionType(VOID, [I64] + [POINTER] * UPDATED + kept), name="update")
    for argument in function.args[1:]:
        argument.add_attribute("noalias")
    tiles, weights, bias, shared, grad, param, delta, *states = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    tile = Tile(builder, config, shape)
    line = GATES * shape.hidden
    start = builder.append_basic_block()
    builder.branch(start)
    builder.position_at_end(start)
    numbers = [broadcast(builder, tile.at(shared, i), ROWS) for i in range(SHARED[config.features])]

    def body(index: Any, _: list[Any]) -> list[Any]:
        row = tile.times(index, ROWS)
        moving = [tile.at(pointer, row) for pointer in states[:averages]]
        seen = tile.look(tile.at(grad, row), tile.at(param, row), moving, numbers)
        x, steps, count, weight = tile.features, (ROWS, 1), config.inputs, weights
        if isinstance(config, RNNPropConfig):
            x, weight = tile.into(weights), tile.at(weights, (WIDTHS[config.features] + 1) * shape.hidden)
        for layer in range(config.layers):
            block = tile.times(row, shape.hidden)
            h, c = (tile.at(pointer, block) for pointer in states[averages + 2 * layer :][:2])
            x = tile.layer(x, steps, count, tile.at(bias, layer * line), weight, h, c)
            weight = tile.at(weight, line * (count + shape.hidden))
            steps, count = (1, shape.hidden), shape.hidden
        store(builder, tile.head(x, weight, seen, numbers[-1]), tile.at(delta, row))
        return []

    loop(builder, tiles, [], body)
    builder.ret_void()
    return module
