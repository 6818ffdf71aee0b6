"""LLVM code of an LSTM's step and of its gradient, for meta-training: tile by tile, each through all layers.

Arrays are units × coordinates, so that a vector instruction takes as many coordinates as it holds numbers. Sums stay in
registers from the matrix products to the gates; what a tile needs besides the states lies in the nearest caches. The
gradient computes the gates again from the states, which takes less room than to keep them, and little time.

The last tile of a range begins before the end of the one before it, if the range is not a multiple of it: what is
written is written twice, and sums over coordinates leave out those that were there before.
"""

from typing import Any

from llvmlite import ir

from l2o_runtime.kernels.emit import I64, POINTER, VOID, loop
from l2o_training.fused import gates
from l2o_training.fused.tile import Shape, Tile

FORWARD, BACKWARD = 7, 11
"""Arrays of a layer: W_ih, W_hh and bias; h, c, and the new ones; then the derivatives by the new and by the old."""


def module_of(shape: Shape) -> ir.Module:
    """Both functions.

    `forward(m, n, head, head_bias, features, output, arrays …)` and
    `backward(m, n, scratch, gradient, head, features, grad_features, grad_output, arrays …)` for m coordinates, m at
    least a tile. `grad_features` is written if the shape says that features are learned.

    Weights and biases are as in `CoordinateLSTM`. Other arrays are (units, n), and their addresses those of the first
    of the m coordinates. `scratch` begins with zeros; sums over coordinates are added to `gradient`.
    """
    module = ir.Module(name="sweep")
    _forward(module, shape)
    _backward(module, shape)
    return module


def _begin(module: Any, name: str, shape: Shape, pointers: int) -> tuple[Any, Tile, list[Any]]:
    function = ir.Function(module, ir.FunctionType(VOID, [I64] * 2 + [POINTER] * pointers), name=name)
    for argument in function.args[2:]:
        argument.add_attribute("noalias")
    builder = ir.IRBuilder(function.append_basic_block())
    m, n, *arrays = function.args
    return m, Tile(builder, shape, n), arrays


def _tiles(tile: Tile, m: Any, body: Any) -> None:
    """`body` for all tiles, with the place of each, and of its first new coordinate in it."""
    builder, size = tile.builder, I64(tile.shape.tile)
    last = builder.sub(m, size)

    def turn(index: Any, _: list[Any]) -> list[Any]:
        place = builder.mul(index, size)
        at = builder.select(builder.icmp_signed("<", place, last), place, last)
        body(at, builder.sub(place, at))
        return []

    loop(builder, builder.sdiv(builder.add(m, I64(tile.shape.tile - 1)), size), [], turn)
    builder.ret_void()


def _forward(module: Any, shape: Shape) -> None:
    m, tile, (head, head_bias, features, output, *arrays) = _begin(module, "forward", shape, 4 + FORWARD * shape.layers)

    def body(at: Any, _: Any) -> None:
        x = tile.at(features, at)
        for layer in range(shape.layers):
            weights, states = arrays[FORWARD * layer :][:3], arrays[FORWARD * layer :][3:FORWARD]
            here = [tile.at(state, at) for state in states]

            def unit(
                k: Any, _: list[Any], layer: int = layer, x: Any = x, w: Any = weights, here: Any = here
            ) -> list[Any]:
                h, c, new_h, new_c = here
                row = tile.times(k, tile.n)
                tile.expect([tile.at(a, row) for a in here])
                sums = tile.activations(layer, k, x, h, w)
                old = tile.read(tile.at(c, row), shape.vectors)
                new = [gates.forward([gate[v] for gate in sums], old[v]) for v in range(shape.vectors)]
                tile.write([hidden for hidden, _ in new], tile.at(new_h, row))
                tile.write([cell for _, cell in new], tile.at(new_c, row))
                return []

            loop(tile.builder, I64(shape.hidden), [], unit)
            x = here[2]

        def some(j: Any, size: int) -> None:
            sums = [[tile.spread(tile.at(head_bias, j, r))] * shape.vectors for r in range(size)]
            row = tile.at(head, tile.times(j, shape.hidden))
            sums = tile.products(sums, shape.hidden, x, tile.n, row, 1, shape.hidden)
            for r, vectors in enumerate(sums):
                tile.write(vectors, tile.at(output, at, tile.times(j, tile.n), tile.times(r, tile.n)))

        tile.groups(shape.outputs, shape.sums // shape.vectors, some)

    _tiles(tile, m, body)


def _backward(module: Any, shape: Shape) -> None:
    m, tile, all_arrays = _begin(module, "backward", shape, 6 + BACKWARD * shape.layers)
    pre, gradient, head, features, grad_features, grad_output, *arrays = all_arrays
    hidden, size = shape.hidden, shape.tile
    turned, down = tile.at(pre, shape.rows * size), tile.at(pre, 2 * shape.rows * size)
    targets = [gradient]
    for layer in range(shape.layers):
        targets.append(tile.at(targets[-1], (shape.columns(layer) + 1) * shape.rows))

    def body(at: Any, first: Any) -> None:
        above = tile.at(grad_output, at)
        tile.rows(hidden, shape.outputs, above, tile.n, head, hidden, down, size)
        tile.head(above, tile.at(arrays[BACKWARD * (shape.layers - 1) + 5], at), first, targets[-1])
        for layer in reversed(range(shape.layers)):
            weights, states = arrays[BACKWARD * layer :][:3], arrays[BACKWARD * layer :][3:BACKWARD]
            here = [tile.at(state, at) for state in states]
            x = tile.at(arrays[BACKWARD * (layer - 1) + 5] if layer else features, at)
            below, h, old_h, target = shape.below(layer), here[0], here[6], targets[layer]

            def unit(
                k: Any, _: list[Any], layer: int = layer, x: Any = x, w: Any = weights, here: Any = here
            ) -> list[Any]:
                h, c, _, new_c, grad_h, grad_c, _, old_c = here
                row, own = tile.times(k, tile.n), tile.times(k, size)
                tile.expect([tile.at(a, row) for a in here])
                sums = tile.activations(layer, k, x, h, w)
                others = [
                    tile.read(a, shape.vectors)
                    for a in (tile.at(down, own), *(tile.at(a, row) for a in (c, new_c, grad_h, grad_c)))
                ]
                results = [
                    gates.backward([gate[v] for gate in sums], *(other[v] for other in others))
                    for v in range(shape.vectors)
                ]
                for gate in range(4):
                    tile.write([by_sum[gate] for by_sum, _ in results], tile.at(pre, own, gate * hidden * size))
                tile.write([by_c for _, by_c in results], tile.at(old_c, row))
                return []

            loop(tile.builder, I64(hidden), [], unit)
            tile.rows(hidden, 4 * hidden, pre, size, weights[1], hidden, old_h, tile.n)
            if layer:
                tile.rows(below, 4 * hidden, pre, size, weights[0], below, down, size)
            elif shape.learned:
                tile.rows(below, 4 * hidden, pre, size, weights[0], below, tile.at(grad_features, at), tile.n)
            tile.transpose(pre, turned)
            tile.outer(turned, first, below, x, tile.n, target)
            tile.outer(turned, first, hidden, h, tile.n, tile.at(target, below * shape.rows))
            tile.bias(turned, first, tile.at(target, (below + hidden) * shape.rows))

    _tiles(tile, m, body)
