"""The coordinatewise LSTM for meta-training on the CPU, in tiles that stay in cache.

Written with tensor operations, a step and its gradient carry some 1,500 numbers per coordinate through memory, and
that is what meta-training waits for. Here a tile of coordinates goes through all layers before the next one comes, in
code that LLVM compiles for the network; only the states are kept for the gradient.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from l2o_runtime.contexts.passes import turned_off
from l2o_runtime.rules import DirectionalRule, LSTMRule, RNNPropRule, Rule, TieredRule
from l2o_runtime.rules.coordinate_lstm import CoordinateLSTM
from l2o_runtime.state import State

try:
    from l2o_runtime.kernels.lstm import LARGEST
    from l2o_runtime.kernels.machine import Compiled
    from l2o_runtime.kernels.threads import share
    from l2o_training.fused.directional import FusedDirectionalRule
    from l2o_training.fused.sweep import BACKWARD, FORWARD, module_of
    from l2o_training.fused.tiered import FusedTieredRule
    from l2o_training.fused.tile import Shape, choose_shape
except ImportError:  # llvmlite is not installed
    choose_shape = None  # type: ignore[assignment]

M = TypeVar("M", bound=nn.Module)

RANGE = 1024
"""Coordinates that a thread takes at a time, about; derivatives by the weights are summed within, then over ranges."""


def fuse(rule: Rule) -> Rule:
    """A rule on the CPU with fast code and the same parameters; as it is without llvmlite or with kernels off."""
    if choose_shape is None or turned_off() or next(rule.parameters()).device.type != "cpu":
        return rule
    match rule:
        case TieredRule():
            return _become(FusedTieredRule, rule)
        case DirectionalRule():
            return _become(FusedDirectionalRule, rule)
        case LSTMRule() | RNNPropRule():
            rule.cell = _become(FusedLSTM, rule.cell)
            rule.cell.learned = isinstance(rule, RNNPropRule)
    return rule


def _become(kind: type[M], module: nn.Module) -> M:
    """The same module, parameters and all, with the methods of a subclass of its own."""
    fused = object.__new__(kind)
    fused.__dict__ = module.__dict__
    return fused


class FusedLSTM(CoordinateLSTM):
    """A `CoordinateLSTM` whose gradient is written by hand; float32 on the CPU.

    Attributes:
        learned: whether features are learned, and get a gradient; else they are constants of the rule.
    """

    learned: bool = False

    @property
    def shape(self) -> "Shape":
        """Sizes of the network and of a tile."""
        outputs = self.head.out_features
        return choose_shape(self.weight_ih[0].shape[1], self.hidden, self.layers, outputs, self.learned)

    def forward(self, features: Tensor, context: Tensor, state: State) -> tuple[Tensor, State]:
        """As `CoordinateLSTM.forward`."""
        lead, n = features.shape[:-2], features.shape[-2]
        if n < self.shape.tile or self.hidden > LARGEST:
            return super().forward(features, context, state)
        groups = lead.numel()
        bias = self.bias[0].expand(groups, -1)
        if self.weight_context.shape[1]:
            bias = F.linear(context, self.weight_context, self.bias[0]).reshape(groups, -1)
        keys = [f"{name}{layer}" for layer in range(self.layers) for name in "hc"]
        # Coordinates come last in memory; what the next step gets are views, which it need not copy.
        states = [state[key].reshape(groups, n, self.hidden).mT for key in keys]
        parameters = [*self.weight_ih, *self.weight_hh, bias, *self.bias[1:], self.head.weight, self.head.bias]
        columns = features.reshape(groups, n, -1).mT
        output, *new = _Step.apply(self.shape, columns, *parameters, *states)
        return output.mT.reshape(*lead, n, -1), {key: s.mT.view(*lead, n, -1) for key, s in zip(keys, new, strict=True)}


class _Step(torch.autograd.Function):
    """Features (B, f, n); W_ih, W_hh, biases (the first (B, 4H)) by layer; head (K, H), (K,); h0, c0 (B, H, n), …"""

    @staticmethod
    def forward(ctx: Any, shape: "Shape", features: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        layers, (groups, _, n) = shape.layers, features.shape
        parameters, states = rest[: -2 * layers], [_laid_out(s) for s in rest[-2 * layers :]]
        features, output, new = _laid_out(features), _room(groups, shape.outputs, n), [_room(*s.shape) for s in states]
        run, step = _compile(shape)[0], output.stride(1)
        places = [*map(_same, parameters[-2:]), _columns(features), _columns(output)]
        places += _places(shape, parameters, states, new)

        def advance(part: tuple[int, int, int], _: int) -> None:
            b, start, stop = part
            run(stop - start, step, *_at(places, b, start))

        share(advance, _ranges(groups, n, shape.tile))
        ctx.shape = shape
        ctx.save_for_backward(features, *parameters, *states, *new)
        return output, *new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *grad_new: Tensor) -> tuple[Tensor | None, ...]:
        shape, (features, *rest) = ctx.shape, ctx.saved_tensors
        layers, (groups, _, n) = shape.layers, features.shape
        parameters, states, new = rest[: -4 * layers], rest[-4 * layers : -2 * layers], rest[-2 * layers :]
        grad_output, grad_new = _laid_out(grad_output), tuple(_laid_out(g) for g in grad_new)
        grad_states = [_room(*s.shape) for s in states]
        grad_features = _room(*features.shape) if shape.learned else None
        parts = _ranges(groups, n, shape.tile)
        sums = features.new_zeros(len(parts), shape.gradient)
        run, step = _compile(shape)[1], features.stride(1)
        written = features if grad_features is None else grad_features
        places = [_same(parameters[-2]), _columns(features), _columns(written), _columns(grad_output)]
        places += _places(shape, parameters, states, new, grad_new, grad_states)

        def advance(item: tuple[tuple[int, int, int], Tensor], _: int) -> None:
            (b, start, stop), total = item
            scratch = total.new_zeros(shape.scratch)
            run(stop - start, step, scratch.data_ptr(), total.data_ptr(), *_at(places, b, start))

        share(advance, list(zip(parts, sums, strict=True)))
        return None, grad_features, *_unpack(shape, sums.view(groups, -1, shape.gradient).sum(1)), *grad_states


Place = tuple[int, int, int]
"""An address, and bytes from one instance and from one coordinate to the next."""


def _same(array: Tensor) -> Place:
    """One for all instances and coordinates."""
    return array.data_ptr(), 0, 0


def _own(array: Tensor) -> Place:
    """(B, k), one row for each instance."""
    return array.data_ptr(), 4 * array.stride(0), 0


def _columns(array: Tensor) -> Place:
    """(B, units, n), a column for every coordinate of every instance."""
    return array.data_ptr(), 4 * array.stride(0), 4


def _places(shape: "Shape", parameters: Sequence[Tensor], *kinds: Sequence[Tensor]) -> list[Place]:
    """Layer by layer its weights and biases, and h and c of every kind."""
    result = []
    for k in range(shape.layers):
        ih, hh, bias = parameters[k : 3 * shape.layers : shape.layers]
        result += [_same(ih), _same(hh), _same(bias) if k else _own(bias)]
        result += [_columns(array) for kind in kinds for array in kind[2 * k : 2 * k + 2]]
    return result


def _at(places: Sequence[Place], b: int, start: int) -> list[int]:
    """Addresses for coordinate `start` of instance b, and those after it."""
    return [first + b * own + start * each for first, own, each in places]


def _unpack(shape: "Shape", sums: Tensor) -> list[Tensor]:
    """Derivatives by all parameters, the first bias (B, 4H), from sums (B, …) over the instances' coordinates."""
    sizes = [(shape.columns(layer) + 1) * shape.rows for layer in range(shape.layers)]
    *parts, head = sums.sum(0).split([*sizes, shape.gradient - sum(sizes)])
    layers = [part.view(-1, shape.rows)[:, : 4 * shape.hidden].mT for part in parts]
    below = [part[:, : shape.below(layer)] for layer, part in enumerate(layers)]
    own = [part[:, shape.below(layer) : -1] for layer, part in enumerate(layers)]
    first = sums[:, sizes[0] - shape.rows :][:, : 4 * shape.hidden]
    top = head.view(-1, shape.outputs, shape.width).sum(-1)
    return [*below, *own, first, *(part[:, -1] for part in layers[1:]), top[:-1].mT, top[-1]]


@functools.cache
def _compile(shape: "Shape") -> tuple[Callable[..., None], Callable[..., None], "Compiled"]:
    """Both functions of `sweep.module_of`, and what keeps them alive; once per process and network."""
    compiled = Compiled(module_of, shape)
    counts = {"forward": 4 + FORWARD * shape.layers, "backward": 6 + BACKWARD * shape.layers}
    forward, backward = (
        ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 2, *[ctypes.c_void_p] * count)(compiled.address(name))
        for name, count in counts.items()
    )
    return forward, backward, compiled


def _stride(n: int) -> int:
    """Floats from one unit to the next: n or a few more, an odd number of cache lines.

    So vectors do not cross lines, and the same coordinates of all units do not compete for the same places in a cache.
    """
    return 16 * (-(-n // 16) | 1)


def _room(groups: int, units: int, n: int) -> Tensor:
    """(B, units, n), not yet written."""
    return torch.empty(groups, units, _stride(n))[..., :n]


def _laid_out(array: Tensor) -> Tensor:
    """(B, units, n) as `_room` lays it out in memory, copied if it is not."""
    groups, units, n = array.shape
    if array.stride() == (units * _stride(n), _stride(n), 1) and array.data_ptr() % 64 == 0:
        return array
    return _room(groups, units, n).copy_(array)


def _ranges(groups: int, n: int, tile: int) -> list[tuple[int, int, int]]:
    """Instance, first coordinate and end of every range; all but the last of an instance are whole tiles."""
    tiles, count = n // tile, -(-n // RANGE)
    bounds = [tile * (tiles * i // count) for i in range(count)] + [n]
    return [(b, low, high) for b in range(groups) for low, high in pairwise(bounds) if low < high]
