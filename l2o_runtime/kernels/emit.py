"""Vectors of float32, or float64, as Python values: what is computed with them becomes LLVM code.

LLVM turns the vectors into whatever registers the machine has, so the code that is written with them is portable.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, Union

from llvmlite import ir

F32, F64, I32, I64, VOID = ir.FloatType(), ir.DoubleType(), ir.IntType(32), ir.IntType(64), ir.VoidType()
POINTER = F32.as_pointer()

BF16 = ir.IntType(16)
"""bfloat16 by its bits, the upper half of a float32's: every processor rounds them alike."""

Real: TypeAlias = float
Number: TypeAlias = Union["Vector", Real]
Body: TypeAlias = Callable[[Any, list[Any]], Sequence[Any]]

BOUND = 8.2
"""tanh is 1 − 1.5e-7 there; beyond, that is taken for it."""

NUMERATOR = (0.999999962, 0.134255241, 0.00354893678, 2.1512518e-05, 1.46711673e-08)
DENOMINATOR = (1.0, 0.467588416, 0.0260785987, 0.000337389687, 8.30064351e-07)
"""P and Q of x P(x²) / Q(x²), the rational function nearest to tanh on ± BOUND: 7.4e-9 off, before rounding."""

MAGIC = 1.5 * 2**23
"""Added to a small number, it rounds it to a whole one, which then is in the lowest bits."""


class Vector:
    """A vector of float32 or float64, with arithmetic under torch's names, so that formulas serve both."""

    def __init__(self, builder: Any, value: Any):
        self.builder = builder
        self.value = value

    def like(self, other: Number) -> "Vector":
        """A number as a vector of this type."""
        return other if isinstance(other, Vector) else Vector(self.builder, constant(self.value.type, other))

    def __add__(self, other: Number) -> "Vector":
        return Vector(self.builder, self.builder.fadd(self.value, self.like(other).value))

    def __sub__(self, other: Number) -> "Vector":
        return Vector(self.builder, self.builder.fsub(self.value, self.like(other).value))

    def __mul__(self, other: Number) -> "Vector":
        return Vector(self.builder, self.builder.fmul(self.value, self.like(other).value))

    def __truediv__(self, other: Number) -> "Vector":
        """By a number: times its reciprocal, as divisions take the longest of all."""
        return self.div(other) if isinstance(other, Vector) else self * (1 / other)

    def div(self, other: Number) -> "Vector":
        """The quotient, rounded once."""
        return Vector(self.builder, self.builder.fdiv(self.value, self.like(other).value))

    def __neg__(self) -> "Vector":
        return self * -1.0

    def __lt__(self, other: Number) -> "Mask":
        """Condition for `where`; false where either is NaN."""
        return Mask(self.builder, self.builder.fcmp_ordered("<", self.value, self.like(other).value))

    def __gt__(self, other: Number) -> "Mask":
        """Condition for `where`; false where either is NaN."""
        return self.like(other) < self

    def fma(self, factor: Number, term: Number) -> "Vector":
        """self · factor + term, in one instruction where there is one."""
        return self._call("llvm.fmuladd", self.like(factor), self.like(term))

    def lerp(self, end: "Vector", weight: Real) -> "Vector":
        """self + weight · (end − self)."""
        return (end - self).fma(weight, self)

    def reciprocal(self) -> "Vector":
        """1 / self."""
        return self.like(1.0) / self

    def square(self) -> "Vector":
        """self · self."""
        return self * self

    def sqrt(self) -> "Vector":
        """Square root."""
        return self._call("llvm.sqrt")

    def abs(self) -> "Vector":
        """Magnitude."""
        return self._call("llvm.fabs")

    def where(self, condition: "Mask", other: Number) -> "Vector":
        """This where the condition holds, `other` elsewhere."""
        return Vector(self.builder, self.builder.select(condition.value, self.value, self.like(other).value))

    def maximum(self, other: "Vector") -> "Vector":
        """The larger of both; NaN stays NaN if it is here."""
        return self.clamp_min(other)

    def minimum(self, other: "Vector") -> "Vector":
        """The smaller of both; NaN stays NaN if it is here."""
        return self.clamp_max(other)

    def float(self) -> "Vector":
        """In float32."""
        narrow = ir.VectorType(F32, self.value.type.count)
        return self if self.value.type == narrow else Vector(self.builder, self.builder.fptrunc(self.value, narrow))

    def double(self) -> "Vector":
        """In float64."""
        wide = ir.VectorType(F64, self.value.type.count)
        return self if self.value.type == wide else Vector(self.builder, self.builder.fpext(self.value, wide))

    def clamp_min(self, low: Number) -> "Vector":
        """The larger of both; NaN stays NaN."""
        return self.like(low).where(self < low, self)

    def clamp_max(self, high: Number) -> "Vector":
        """The smaller of both; NaN stays NaN."""
        return self.like(high).where(self > high, self)

    def clamp(self, low: Number, high: Number) -> "Vector":
        """Between two bounds; NaN stays NaN."""
        return self.clamp_min(low).clamp_max(high)

    def relu(self) -> "Vector":
        """The larger of this and zero; NaN stays NaN."""
        return self.clamp_min(0.0)

    def polynomial(self, coefficients: Sequence[Real]) -> "Vector":
        """Σ c_k selfᵏ, by Horner's rule."""
        total = self.like(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            total = total.fma(self, coefficient)
        return total

    def tanh_ratio(self) -> tuple["Vector", "Vector"]:
        """Numerator and denominator of tanh; both are finite, the latter at least 1."""
        x = self.clamp(-BOUND, BOUND)
        square = x * x
        return x * square.polynomial(NUMERATOR), square.polynomial(DENOMINATOR)

    def tanh(self) -> "Vector":
        """tanh, to 5e-7."""
        numerator, denominator = self.tanh_ratio()
        return numerator / denominator

    def log(self) -> "Vector":
        """Natural logarithm of positive normal numbers: e ln 2 + 2 artanh((m − 1) / (m + 1)), √½ ≤ m < √2."""
        builder, width = self.builder, self.value.type
        integers = ir.VectorType(I32, width.count)
        bits = builder.bitcast(self.value, integers)
        half = ir.Constant(integers, [0x3F3504F3] * width.count)
        exponent = builder.ashr(builder.sub(bits, half), ir.Constant(integers, [23] * width.count))
        shifted = builder.shl(exponent, ir.Constant(integers, [23] * width.count))
        mantissa = Vector(builder, builder.bitcast(builder.sub(bits, shifted), width))
        ratio = (mantissa - 1.0) / (mantissa + 1.0)
        series = (ratio * ratio).polynomial([2 / k for k in (1, 3, 5, 7, 9, 11)])
        return Vector(builder, builder.sitofp(exponent, width)).fma(math.log(2), ratio * series)

    def exp(self) -> "Vector":
        """e^x for |x| ≤ 80, to 1e-6: 2ᵏ Σ rʲ/j!, x = k ln 2 + r, |r| ≤ ½ ln 2."""
        builder, width = self.builder, self.value.type
        integers = ir.VectorType(I32, width.count)
        shifted = self.fma(1 / math.log(2), MAGIC)
        rest = (shifted - MAGIC).fma(-math.log(2), self)
        series = rest.polynomial([1 / math.factorial(j) for j in range(8)])
        exponent = builder.shl(builder.bitcast(shifted.value, integers), constant(integers, 23))
        power = builder.bitcast(builder.add(exponent, constant(integers, 0x3F800000)), width)
        return series * Vector(builder, power)

    def elu(self) -> "Vector":
        """This where it is positive, e^x − 1 elsewhere, to 1e-7; NaN stays NaN."""
        return self.where(self > 0.0, self.clamp(-80.0, 0.0).exp() - 1.0)

    def _call(self, name: str, *others: "Vector") -> "Vector":
        """Call an intrinsic, which takes and gives vectors of one type."""
        kind, module = self.value.type, self.builder.module
        name = f"{name}.v{kind.count}{'f32' if kind.element == F32 else 'f64'}"
        if name not in module.globals:
            ir.Function(module, ir.FunctionType(kind, [kind] * (1 + len(others))), name=name)
        arguments = [self.value, *(other.value for other in others)]
        return Vector(self.builder, self.builder.call(module.globals[name], arguments))


class Mask:
    """Conditions, one for every number of a vector."""

    def __init__(self, builder: Any, value: Any):
        self.builder = builder
        self.value = value

    def __and__(self, other: "Mask") -> "Mask":
        return Mask(self.builder, self.builder.and_(self.value, other.value))

    def __or__(self, other: "Mask") -> "Mask":
        return Mask(self.builder, self.builder.or_(self.value, other.value))


def constant(kind: Any, number: float) -> Any:
    """A number as a constant of a scalar or vector type."""
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def load(builder: Any, pointer: Any, width: int) -> Vector:
    """`width` numbers, of bfloat16 as float32, from an address that need not be aligned to more than a float32."""
    kind = ir.VectorType(pointer.type.pointee, width)
    narrow = kind.element == BF16
    value = builder.load(builder.bitcast(pointer, kind.as_pointer()), align=2 if narrow else 4)
    return widened(builder, value) if narrow else Vector(builder, value)


def store(builder: Any, vector: Vector, pointer: Any) -> None:
    """Write a vector as what the address holds: it is rounded to bfloat16, and else of that type already."""
    narrow = pointer.type.pointee == BF16
    value = rounded(builder, vector) if narrow else vector.value
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=2 if narrow else 4)


def widened(builder: Any, bits: Any) -> Vector:
    """bfloat16 as float32, exactly."""
    wide = ir.VectorType(I32, bits.type.count)
    shifted = builder.shl(builder.zext(bits, wide), constant(wide, 16))
    return Vector(builder, builder.bitcast(shifted, ir.VectorType(F32, bits.type.count)))


def rounded(builder: Any, vector: Vector) -> Any:
    """float32 as bfloat16, to the nearest, ties to even; NaN stays NaN."""
    wide = ir.VectorType(I32, vector.value.type.count)
    bits = builder.bitcast(vector.value, wide)
    odd = builder.and_(builder.lshr(bits, constant(wide, 16)), constant(wide, 1))
    nearest = builder.add(builder.add(bits, constant(wide, 0x7FFF)), odd)
    unordered = builder.fcmp_unordered("uno", vector.value, vector.value)
    kept = builder.select(unordered, constant(wide, 0x7FC00000), nearest)
    return builder.trunc(builder.lshr(kept, constant(wide, 16)), ir.VectorType(BF16, wide.count))


def broadcast(builder: Any, pointer: Any, width: int) -> Vector:
    """One float from memory, `width` times."""
    kind = ir.VectorType(pointer.type.pointee, width)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), builder.load(pointer, align=4), I32(0))
    return shuffle(Vector(builder, first), None, [0] * width)


def shuffle(one: Vector, other: Vector | None, indices: Sequence[int]) -> Vector:
    """Pick elements of two vectors of the same width, counted through."""
    second = ir.Constant(one.value.type, ir.Undefined) if other is None else other.value
    mask = ir.Constant(ir.VectorType(I32, len(indices)), list(indices))
    return Vector(one.builder, one.builder.shuffle_vector(one.value, second, mask))


def join(parts: Sequence[Vector]) -> Vector:
    """Vectors of one width end to end; a power of two of them."""
    while len(parts) > 1:
        width = 2 * parts[0].value.type.count
        parts = [shuffle(a, b, range(width)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def reduced(vector: Vector, join: Callable[[Vector, Vector], Vector]) -> Vector:
    """All numbers of a vector, a power of two of them, as one: a vector of one."""
    half = vector.value.type.count // 2
    while half:
        vector = join(shuffle(vector, None, range(half)), shuffle(vector, None, range(half, 2 * half)))
        half //= 2
    return vector


def spans(builder: Any, count: Any, width: int) -> Iterator[tuple[int, Any, Any]]:
    """Whole blocks of numbers and then what is left, one by one; what is written meanwhile runs only if there are any.

    Args:
        builder: where to write.
        count: i64, of the numbers.
        width: of a block.

    Yields:
        How many numbers a block has, the place of the first, and the number of blocks.
    """
    whole = builder.mul(builder.sdiv(count, I64(width)), I64(width))
    for size, start, stop in ((width, I64(0), whole), (1, whole, count)):
        with builder.if_then(builder.icmp_signed("<", start, stop)):
            yield size, start, builder.sdiv(builder.sub(stop, start), I64(size))


def each(builder: Any, size: int, start: Any, blocks: Any, body: Callable[[Any], None]) -> None:
    """Do something with every block of a span; it is given the place of its first number."""

    def one(index: Any, _: list[Any]) -> list[Any]:
        body(builder.add(start, builder.mul(index, I64(size))))
        return []

    loop(builder, blocks, [], one)


def expect(builder: Any, places: Sequence[Any], locality: int = 3) -> None:
    """Ask for what lies at some addresses before it is read; beyond the end of an array that does no harm.

    Args:
        builder: where to write.
        places: addresses of float32.
        locality: how long it is kept in caches, 0 to 3.
    """
    module, name = builder.module, "llvm.prefetch.p0"
    if name not in module.globals:
        ir.Function(module, ir.FunctionType(VOID, [POINTER] + [I32] * 3), name=name)
    for place in places:
        builder.call(module.globals[name], [builder.bitcast(place, POINTER), I32(0), I32(locality), I32(1)])


def along(builder: Any, count: Any, width: int, body: Callable[[Any, int], None]) -> None:
    """Go through numbers, `width` at a time and then one by one; `body` is given a place and how many there are."""
    for size, start, blocks in spans(builder, count, width):
        each(builder, size, start, blocks, functools.partial(_sized, body, size))


def _sized(body: Callable[[Any, int], None], size: int, at: Any) -> None:
    body(at, size)


def loop(
    builder: Any, count: Any, carried: Sequence[Any], body: Callable[[Any, list[Any]], Sequence[Any]]
) -> list[Any]:
    """Run `body` for i = 0 … count − 1, at least once.

    Args:
        builder: where to write.
        count: i64.
        carried: values that one turn hands to the next.
        body: from i and the carried values to the new ones.

    Returns:
        The values carried out of the last turn.
    """
    before, inside = builder.block, builder.append_basic_block()
    builder.branch(inside)
    builder.position_at_end(inside)
    index = builder.phi(I64)
    index.add_incoming(I64(0), before)
    phis = [builder.phi(value.type) for value in carried]
    for phi, value in zip(phis, carried, strict=True):
        phi.add_incoming(value, before)
    new = body(index, list(phis))
    following, end = builder.add(index, I64(1)), builder.block
    index.add_incoming(following, end)
    for phi, value in zip(phis, new, strict=True):
        phi.add_incoming(value, end)
    after = builder.append_basic_block()
    builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
    builder.position_at_end(after)
    return list(new)


def function_module(name: Literal["tanh", "exp", "log"], width: int) -> ir.Module:
    """`apply(blocks, x, y)`: the kernel's own tanh, exp or log of blocks · width numbers."""
    module = ir.Module(name="l2o")
    function = ir.Function(module, ir.FunctionType(VOID, [I64, POINTER, POINTER]), name="apply")
    blocks, x, y = function.args
    builder = ir.IRBuilder(function.append_basic_block())

    def body(index: Any, _: list[Any]) -> list[Any]:
        at = builder.mul(index, I64(width))
        vector = load(builder, builder.gep(x, [at]), width)
        store(builder, getattr(vector, name)(), builder.gep(y, [at]))
        return []

    loop(builder, blocks, [], body)
    builder.ret_void()
    return module
