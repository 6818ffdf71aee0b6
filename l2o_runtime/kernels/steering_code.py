"""LLVM code of what the directional rule makes of its sums; vectors go along the tensors of parameters."""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from l2o_runtime.kernels.emit import (
    F64,
    I64,
    POINTER,
    VOID,
    Mask,
    Vector,
    broadcast,
    constant,
    each,
    load,
    loop,
    reduced,
    shuffle,
    store,
)
from l2o_runtime.rules import DirectionalConfig
from l2o_runtime.rules.agreement import Ages, Sums
from l2o_runtime.rules.geometry import PLACES, Ends, Geometry, by_place, is_gain
from l2o_runtime.rules.steering import INPUTS, MIXED, STATES, Seen, conclude, inputs_of, look

DOUBLES = ("theta", "xx", "xu", "uu", "xs", "ss", "fast", "slow", "count", "part", "weight", "mean")
"""Rows of float64: of `Sums`, of `Ages`, of `Geometry`."""

FLOATS = ("known", "share", "one", "matrix", "dimensions", "chance", "first", "last")
"""Rows of float32: of `Ages`, of `Geometry`, of `Ends`."""

SCALARS = ("matrices", "drawn", "noise")
"""Numbers of float64, of `Geometry`."""

KEPT = ("rho", "energy", "fast", "slow", "fast_log", "slow_log", "size")
"""Of `Seen`, from the first pass to the second."""

TOLD = 1 + MIXED
"""Rows that are made: the length of a step, and w."""

LARGEST_NETWORK = 32
"""Units whose products are written out one by one."""

WIDTH = 4
"""Numbers of a vector: there are few tensors, and constants are written out once for every number."""

DOUBLE = F64.as_pointer()


def steering_module(config: DirectionalConfig) -> ir.Module:
    """`steer(blocks, doubles, floats, scalars, states, network, told)`, for blocks · `WIDTH` tensors.

    All but scalars and network have a row for each of their names, of as many numbers as there are tensors: `DOUBLES`,
    `FLOATS`, `l2o_runtime.rules.steering.STATES`, which are written, and `TOLD` and `KEPT`, which are made. What is
    there only to fill up a block has to be 1 where something is divided by it, and counts with the share zero.

    Args:
        config: of the rule, with at most `LARGEST_NETWORK` units.
    """
    module = ir.Module(name="l2o")
    kinds = [I64, DOUBLE, POINTER, DOUBLE, POINTER, POINTER, POINTER]
    function = ir.Function(module, ir.FunctionType(VOID, kinds), name="steer")
    for argument in function.args[1:]:
        argument.add_attribute("noalias")
    builder = ir.IRBuilder(function.append_basic_block())
    _Code(builder, config, function.args).write()
    builder.ret_void()
    return module


class _Code:
    """Writes the function."""

    def __init__(self, builder: Any, config: DirectionalConfig, arguments: Sequence[Any]):
        self.builder, self.config, self.width = builder, config, WIDTH
        self.blocks, self.doubles, self.floats, scalars, self.states, self.network, self.told = arguments
        self.count = builder.mul(self.blocks, I64(WIDTH))
        self.matrices, self.drawn, noise = (
            broadcast(builder, builder.gep(scalars, [I64(i)]), WIDTH) for i in range(len(SCALARS))
        )
        self.noise = noise.float()

    def write(self) -> None:
        """Both passes; in between of them, and before, what is summed over all tensors."""
        everything, mean, gains = self._sums(3, self._zeroth)
        everywhere, signal = self._sums(2, lambda at: self._first(at, everything, mean))
        self._each(lambda at: self._second(at, everywhere.float(), signal.float(), gains))

    def _each(self, body: Callable[[Any], None]) -> None:
        each(self.builder, self.width, I64(0), self.blocks, body)

    def _sums(self, count: int, terms: Callable[[Any], Sequence[Vector]]) -> list[Vector]:
        """So many sums over all tensors, in all numbers of a vector."""
        zero = constant(ir.VectorType(F64, self.width), 0.0)

        def block(index: Any, before: list[Any]) -> list[Any]:
            found = terms(self.builder.mul(index, I64(self.width)))
            return [(Vector(self.builder, old) + term).value for old, term in zip(before, found, strict=True)]

        found = []
        for value in loop(self.builder, self.blocks, [zero] * count, block):
            total = reduced(Vector(self.builder, value), Vector.__add__)
            found.append(shuffle(total, None, [0] * self.width))
        return found

    def _place(self, pointer: Any, row: int, at: Any) -> Any:
        return self.builder.gep(pointer, [self.builder.add(self.builder.mul(self.count, I64(row)), at)])

    def _double(self, at: Any, name: str) -> Vector:
        return load(self.builder, self._place(self.doubles, DOUBLES.index(name), at), self.width)

    def _float(self, at: Any, name: str) -> Vector:
        return load(self.builder, self._place(self.floats, FLOATS.index(name), at), self.width)

    def _mask(self, at: Any, name: str) -> Mask:
        return self._float(at, name) > 0.5

    def _state(self, at: Any) -> dict[str, Vector]:
        places = (self._place(self.states, row, at) for row in range(len(STATES)))
        return {key: load(self.builder, place, self.width) for key, place in zip(STATES, places, strict=True)}

    def _shapes(self, at: Any) -> Geometry:
        return Geometry(
            count=self._double(at, "count"),
            share=self._float(at, "share"),
            one=self._mask(at, "one"),
            matrix=self._mask(at, "matrix"),
            part=self._double(at, "part"),
            dimensions=self._float(at, "dimensions"),
            matrices=self.matrices,
            drawn=self.drawn,
            noise=self.noise,
            chance=self._float(at, "chance"),
            weight=None,
            mean=None,
        )

    def _age(self, at: Any, state: dict[str, Vector]) -> Ages:
        steps = state["tensor_steps"] + 1.0
        return Ages(steps, self._double(at, "fast"), self._double(at, "slow"), self._float(at, "known"))

    def _keep(self, at: Any, values: Sequence[Vector], pointer: Any, first: int) -> None:
        for row, value in enumerate(values, first):
            store(self.builder, value, self._place(pointer, row, at))

    def _zeroth(self, at: Any) -> list[Vector]:
        """Tell gains; what is summed before tensors are seen is returned."""
        state, theta = self._state(at), self._double(at, "theta")
        gain = is_gain(theta, self._shapes(at), self._age(at, state).steps, state["tensor_gain"])
        self._keep(at, [gain], self.states, STATES.index("tensor_gain"))
        return [theta * self._double(at, "weight"), theta * self._double(at, "mean"), gain.double()]

    def _first(self, at: Any, everything: Vector, mean: Vector) -> list[Vector]:
        """See the tensors of a block; what is summed over all is returned."""
        sums = Sums(None, *(self._double(at, name) for name in DOUBLES[:6]))
        state, shapes = self._state(at), self._shapes(at)
        seen = look(sums, shapes, self._age(at, state), everything, mean, state)
        self._keep(at, [getattr(seen, name) for name in KEPT], self.told, TOLD)
        self._keep(at, seen.averages, self.states, 0)
        self._keep(at, [seen.initial], self.states, len(STATES) - 1)
        return [(value * shapes.share).double() for value in (seen.slow, seen.slow_log)]

    def _second(self, at: Any, everywhere: Vector, signal: Vector, gains: Vector) -> None:
        """Steer the tensors of a block."""
        rows = range(TOLD, TOLD + len(KEPT))
        kept = [load(self.builder, self._place(self.told, row, at), self.width) for row in rows]
        state, shapes = self._state(at), self._shapes(at)
        seen = Seen(initial=state["tensor_initial_rho"], averages=[], **dict(zip(KEPT, kept, strict=True)))
        said = self._said(inputs_of(seen, everywhere, signal, shapes))
        if self.config.places:
            ends = Ends(self._mask(at, "first"), self._mask(at, "last"))
            said[0] = said[0] + by_place(self._weights(len(PLACES), self._network), shapes.matrix, ends)
        gain, age = state["tensor_gain"], self._age(at, state)
        told, new = conclude(self.config, seen, said, everywhere, gain, gains, age, shapes, state)
        self._keep(at, told, self.told, 0)
        self._keep(at, new, self.states, len(STATES) - len(new))

    def _said(self, inputs: Sequence[Vector]) -> list[Vector]:
        """The network: weights and biases of one layer after the other, row by row."""
        hidden = self._layer(list(inputs), self.config.hidden, 0)
        return self._layer([unit.relu() for unit in hidden], TOLD, self.config.hidden * (INPUTS + 1))

    @property
    def _network(self) -> int:
        """How many weights and biases it has; what tensors have by their place follows."""
        return self.config.hidden * (INPUTS + 1) + TOLD * (self.config.hidden + 1)

    def _weights(self, count: int, start: int) -> list[Vector]:
        """So many weights from a place on, each in all numbers of a vector."""
        return [
            broadcast(self.builder, self.builder.gep(self.network, [I64(place)]), self.width)
            for place in range(start, start + count)
        ]

    def _layer(self, values: list[Vector], count: int, start: int) -> list[Vector]:
        """Sums of products, whose weights begin at a place, followed by biases."""
        inner, found = len(values), []
        for row in range(count):
            total = self._weights(1, start + count * inner + row)[0]
            factors = self._weights(inner, start + row * inner)
            for factor, value in zip(factors, values, strict=True):
                total = factor.fma(value, total)
            found.append(total)
        return found
