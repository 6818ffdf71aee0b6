"""Every formula that is written once gives the same on tensors and on the vectors of compiled code."""

import ctypes
import inspect
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from l2o_runtime import arithmetic
from l2o_runtime.contexts.progress import normalized_products
from l2o_runtime.rules import features, restraint, statistics, tiered_features
from l2o_runtime.state import LARGEST
from l2o_runtime.stepping import interpolation

pytest.importorskip("llvmlite", reason="vectors need llvmlite: pip install '.[fast]'")

from llvmlite import ir

from l2o_runtime.kernels import emit, machine

Formula = Callable[..., Sequence]
WIDTH = 8
COUNT = 4096

ATOL = {"moments": 5e-6}
"""Besides 1e-6: differences of logarithms, each of up to 44, round to 4e-6."""

NUMBERS = [0.0, -0.0, 1.0, -1.5, 3e-39, float("inf"), -float("inf"), float("nan")]


def compiled(formula: Formula, arrays: Sequence[Tensor]) -> list[Tensor]:
    """A formula over vectors of arrays, (n,) each, n a multiple of WIDTH."""
    module = ir.Module()
    pointer = emit.POINTER.as_pointer()
    function = ir.Function(module, ir.FunctionType(emit.VOID, [emit.I64, pointer, pointer]), name="apply")
    blocks, sources, targets = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    outputs = 0

    def body(index, _):
        nonlocal outputs
        at = builder.mul(index, emit.I64(WIDTH))

        def place(table, number):
            return builder.gep(builder.load(builder.gep(table, [emit.I64(number)])), [at])

        results = formula(*(emit.load(builder, place(sources, i), WIDTH) for i in range(len(arrays))))
        outputs = len(results)
        for i, result in enumerate(results):
            emit.store(builder, result, place(targets, i))
        return []

    emit.loop(builder, blocks, [], body)
    builder.ret_void()
    code = machine.Compiled(lambda: module)
    found = [torch.empty(len(arrays[0])) for _ in range(outputs)]
    tables = [(ctypes.c_void_p * len(some))(*(x.data_ptr() for x in some)) for some in (arrays, found)]
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, *[ctypes.c_void_p] * 2)
    kind(code.address("apply"))(len(arrays[0]) // WIDTH, *tables)
    return found


def everything(seen) -> list:
    """All numbers of a named tuple of numbers and sequences of them."""
    return [x for field in seen for x in (field if isinstance(field, list | tuple) else [field])]


def tiered_look(relative, grad, fast, slow, root, *tensor) -> tiered_features.Look:
    return tiered_features.look(relative, statistics.Averages(grad, fast, slow, root, []), *tensor)


def tiered_directions(relative, grad, fast, slow, root, floor, size, inverse_fast) -> list:
    seen = tiered_look(relative, grad, fast, slow, root, floor, size)
    return tiered_features.directions(seen, statistics.Averages(grad, fast, slow, root, []), inverse_fast)


# What is put in: θ, g and averages of all magnitudes, roots and squares that are not negative, 1 − βᵗ, outputs, logs.
DRAWS = {
    "x": lambda z, u: z * 10 ** (9 * u - 9),
    "v": lambda z, u: z.square() * 10 ** (18 * u - 18),
    "r": lambda z, u: z.abs() * 10 ** (9 * u - 9) + 1e-18,
    "c": lambda z, u: u.clamp(0.01, 1.0),
    "o": lambda z, u: 2 * z,
    "l": lambda z, u: 20 * u - 15,
}

# name → the kinds of its arguments, one letter each, and the formula with a list of results
FORMULAS: dict[str, tuple[str, Formula]] = {
    "multiply_add": ("ooo", lambda *x: [arithmetic.multiply_add(*x)]),
    "quotients": ("oor", lambda *x: arithmetic.quotients(x[:2], x[2])),
    "at_least": ("o", lambda x: [arithmetic.at_least(x, 0.5)]),
    "at_most": ("o", lambda x: [arithmetic.at_most(x, 0.5)]),
    "log_sign": ("x", lambda g: everything(features.log_sign(g))),
    "plain": ("x", lambda g: everything(features.plain(g))),
    "normalized": ("xxvcc", lambda g, *x: everything(features.normalized(g, x[:2], x[2:]))),
    "moments": (
        "xxxxvvvcccccl",
        lambda g, theta, *x: everything(
            features.moments(g, theta, x[:5], x[5:10], x[10], features.lowest_root(x[10])),
        ),
    ),
    "lowest_root": ("l", lambda level: [features.lowest_root(level)]),
    "combine": ("ooooxxxx", lambda *x: [features.combine(x[:4], x[4:])]),
    "step_size": ("o", lambda output: [features.step_size(output)]),
    "normalized_products": ("xxv", normalized_products),
    "average": ("xxxvccc", lambda g, *x: everything(statistics.average(g, x[:3], x[3:]))),
    "terms": ("xxxxr", tiered_features.terms),
    "directions": (
        "oxxxrrlo",
        lambda relative, *x: everything(tiered_look(relative, *x[:-1])) + tiered_directions(relative, *x),
    ),
    "restrain": ("oxxrr", lambda *x: [restraint.restrain(*x)]),
    "share": ("xxrr", restraint.share),
    "interpolated": ("ooccc", lambda *x: everything(interpolation.interpolated(*x))),
}

STATEFUL = {"features_of", "averages_of", "relative_size"}
"""Of tensors alone: they read a state, or are of whole tensors."""


def drawn(kinds: str, seed: int) -> list[Tensor]:
    """Arguments of these kinds; some coordinates are zero, some too large to be squared."""
    rng = torch.Generator().manual_seed(seed)
    arrays = []
    for kind in kinds:
        x = DRAWS[kind](torch.randn(COUNT, generator=rng), torch.rand(COUNT, generator=rng))
        if kind in "xv":
            x[::7] = 0
            x[::101] = LARGEST**2
        arrays.append(x)
    return arrays


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_are_the_same_for_tensors_and_vectors(name, seed):
    kinds, formula = FORMULAS[name]
    arrays = drawn(kinds, seed)
    expected, found = formula(*arrays), compiled(formula, arrays)
    assert len(found) == len(expected) > 0
    atol = ATOL.get(name, 1e-6)
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        torch.testing.assert_close(
            other, one.expand(COUNT), rtol=1e-5, atol=atol, equal_nan=True, msg=lambda m, i=index: f"{name}[{i}]: {m}"
        )


def test_every_formula_is_in_the_table():
    for module in (arithmetic, features, statistics, tiered_features, restraint):
        own = {n for n, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__}
        assert {n for n in own - STATEFUL if n != "look"} <= FORMULAS.keys()


OPERATIONS: dict[str, Formula] = {
    "add": lambda x, y: [x + y, x + 2.5],
    "subtract": lambda x, y: [x - y, x - 2.5],
    "multiply": lambda x, y: [x * y, x * 2.5],
    "divide": lambda x, y: [x / y, x / 4, x.div(3.0), x.reciprocal()],
    "sign": lambda x, y: [-x, x.abs(), x.relu()],
    "power": lambda x, y: [x.square(), x.sqrt()],
    "where": lambda x, y: [x.where(x < y, y), x.where(x > 0, 1.0), y.where(x > 1.0, x)],
    "masks": lambda x, y: [x.where((x < y) & (y > 0.5), 2.0), x.where((x < y) | (y > 1.0), y)],
    "clamp": lambda x, y: [x.clamp(-1, 1.25), x.clamp_min(0.5), x.clamp_max(0.5)],
    "clamp between vectors": lambda x, y: [x.clamp(-y.where(y > 0, 1.0), y.where(y > 0, 1.0))],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_vectors_are_those_of_torch(name):
    """Infinities, NaN, zeros of both signs and subnormal numbers in all pairs."""
    pairs = torch.cartesian_prod(torch.tensor(NUMBERS), torch.tensor(NUMBERS))
    arrays = [column.contiguous() for column in pairs.unbind(-1)]
    for one, other in zip(OPERATIONS[name](*arrays), compiled(OPERATIONS[name], arrays), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)
