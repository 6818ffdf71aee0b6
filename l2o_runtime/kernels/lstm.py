"""The CPU kernel: machine code made by LLVM for this processor and this rule, on several threads."""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from l2o_runtime.config import NoneConfig
from l2o_runtime.contexts import WindowContext
from l2o_runtime.kernels import Kernel, features
from l2o_runtime.kernels.emit import function_module
from l2o_runtime.kernels.lstm_code import ROWS, UPDATED, Shape, choose_shape, pack, update_module
from l2o_runtime.kernels.machine import Compiled, once, widest
from l2o_runtime.kernels.threads import share
from l2o_runtime.rules.features import AVERAGES
from l2o_runtime.rules.lstm import CoordinateConfig, LSTMRule, usual
from l2o_runtime.rules.rnnprop import RNNPropRule
from l2o_runtime.stepping.parts import Part, full_precision

LARGEST = 64
"""Hidden units up to which the weights of a layer stay in the nearest caches; larger rules take the plain path."""

CHUNK = 16384
"""Coordinates that a thread advances at a time; a multiple of ROWS."""

SMALLEST = 2048
"""Fewer coordinates are not worth a second thread."""


@once
def compile_update(
    config: CoordinateConfig, shape: Shape, dtypes: tuple[torch.dtype, ...]
) -> tuple[Callable[..., None], Compiled]:
    """The function of `lstm.update_module`, and what keeps it alive; once per process, in a third of a second."""
    compiled = Compiled(update_module, config, shape, dtypes)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, *[ctypes.c_void_p] * (UPDATED + len(dtypes)))
    return kind(compiled.address("update")), compiled


def apply(name: Literal["tanh", "exp", "log"], x: Tensor) -> Tensor:
    """The kernel's own tanh, exp or log, for comparison.

    Args:
        name: of the function.
        x: (n,) float32.
    """
    width = widest()
    compiled = Compiled(function_module, name, width)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    padded = torch.nn.functional.pad(x, (0, -len(x) % width + width))
    result = torch.empty_like(padded)
    kind(compiled.address("apply"))(len(padded) // width, padded.data_ptr(), result.data_ptr())
    return result[: len(x)]


class Scratch:
    """What a thread needs besides the states: a chunk's gradients and steps, and one padded tile of both and θ.

    Args:
        widths: numbers per coordinate of each state.
    """

    def __init__(self, widths: list[int]):
        with torch.device("cpu"):
            self.grad = torch.zeros(CHUNK, dtype=torch.float32)
            self.delta = torch.zeros(CHUNK, dtype=torch.float32)
            self.states = [torch.zeros(ROWS, width, dtype=torch.float32) for width in widths]
            self.tile = torch.zeros(3, ROWS, dtype=torch.float32)
        self._wide: dict[torch.dtype, Tensor] = {}
        self._room = torch.empty(0, dtype=torch.float32, device="cpu")

    def room(self, count: int) -> Tensor:
        """Float32 for anything, `count` at least; it is kept."""
        if len(self._room) < count:
            self._room = torch.empty(count, dtype=torch.float32, device="cpu")
        return self._room

    def wide(self, dtype: torch.dtype) -> Tensor:
        """A chunk of another type."""
        if dtype not in self._wide:
            self._wide[dtype] = torch.zeros(CHUNK, dtype=dtype, device="cpu")
        return self._wide[dtype]


class CPUKernel(Kernel):
    """The update of one rule; see `l2o_runtime.kernels.Kernel`.

    Args:
        rule: frozen, on the CPU, in float32.
    """

    def __init__(self, rule: LSTMRule | RNNPropRule):
        self.rule = rule
        config, cell = rule.config, rule.cell
        self.shape = shape = choose_shape(config.hidden, widest())
        rows = [torch.cat([cell.weight_ih[i], cell.weight_hh[i]], 1) for i in range(config.layers)]
        packed = [pack(row, shape).reshape(-1) for row in rows]
        into = [rule.into.weight.reshape(-1), rule.into.bias] if isinstance(rule, RNNPropRule) else []
        self.weights = torch.cat([*into, *packed, cell.head.weight.reshape(-1), cell.head.bias]).detach()
        self.bias = torch.cat([pack(bias, shape).reshape(-1) for bias in cell.bias]).detach()
        self.first_bias = self.bias[: 4 * config.hidden]
        self.fixed_bias = self.first_bias.clone()
        columns = [pack(column, shape).reshape(-1) for column in cell.weight_context.unbind(1)]
        self.weight_context = torch.stack(columns, 1).detach() if columns else None
        averages = AVERAGES[config.features]
        self.keys = averages + [f"{name}{layer}" for layer in range(config.layers) for name in "hc"]
        self.widths = [1] * len(averages) + [config.hidden] * (2 * config.layers)
        self.scratch: list[Scratch] = []
        self.updates: dict[tuple[torch.dtype, ...], Callable[..., None]] = {}

    def update(self, parts: list[Part], steering: list[Tensor], good: Tensor) -> None:
        """Advance parts, one after the other; all are steered alike."""
        if not bool(good):
            return
        context = steering[0].squeeze(0)
        if self.weight_context is not None:
            with full_precision(context.device):
                seen = context[-self.weight_context.shape[1] :]  # the level is not for the network
                torch.addmv(self.fixed_bias, self.weight_context, seen, out=self.first_bias)
        level = float(context[0]) if self.rule.progress else 0.0
        for part in parts:
            if len(part.theta):
                self._advance(part, level)

    def _advance(self, part: Part, level: float) -> None:
        """Advance a part; its chunks are dealt out to as many threads as torch uses."""
        n, config = len(part.theta), self.rule.config
        shared = features.shared(config.features, float(part.state["step"]), level, config.noise_floor or 0.0)
        states = [part.state[key] for key in self.keys]
        strides = [width * state.element_size() for width, state in zip(self.widths, states, strict=True)]
        job = _Job(part, states, strides, self._update(states), shared)
        threads = torch.get_num_threads()
        size = chunk_size(n, threads)
        while len(self.scratch) < threads:
            self.scratch.append(Scratch(self.widths))

        def work(start: int, thread: int) -> None:
            self._chunk(job, start, min(start + size, n), self.scratch[thread])

        share(work, range(0, n, size))

    def _update(self, states: list[Tensor]) -> Callable[..., None]:
        """The code for states of these dtypes."""
        dtypes = tuple(state.dtype for state in states)
        if dtypes not in self.updates:
            self.updates[dtypes], _ = compile_update(_architecture(self.rule.config), self.shape, dtypes)
        return self.updates[dtypes]

    def _chunk(self, job: "_Job", start: int, stop: int, scratch: Scratch) -> None:
        piece = slice(start, stop)
        theta = job.part.theta[piece]
        grad = gradient(job.part, piece, scratch)
        delta = scratch.delta[: stop - start]
        columns = [grad, parameter(theta, scratch) if self.rule.progress else grad, delta]
        full = (stop - start) // ROWS
        if full:
            self._call(job, full, columns, job.places(start))
        if (stop - start) % ROWS:
            self._tail(job, [column[full * ROWS :] for column in columns], start + full * ROWS, scratch)
        if job.window is not None and isinstance(self.rule.context, WindowContext):
            push(job.window[piece], self.rule.context.snapshot(theta, grad))
        move(job.part, theta, delta, scratch)

    def _tail(self, job: "_Job", columns: list[Tensor], start: int, scratch: Scratch) -> None:
        """The last coordinates, fewer than a tile's, on a padded copy."""
        grad, param, delta = columns
        count = len(grad)
        scratch.tile[0, :count].copy_(grad)
        if self.rule.progress:
            scratch.tile[1, :count].copy_(param)
        copies = [copy.data_ptr() for copy in scratch.states]
        places = job.places(start)
        sizes = [count * stride for stride in job.strides]
        for place, copy, size in zip(places, copies, sizes, strict=True):
            ctypes.memmove(copy, place, size)  # a tenth of the time of a tensor's copy_
        self._call(job, 1, list(scratch.tile), copies)
        delta.copy_(scratch.tile[2, :count])
        for place, copy, size in zip(places, copies, sizes, strict=True):
            ctypes.memmove(place, copy, size)

    def _call(self, job: "_Job", tiles: int, columns: list[Tensor], states: list[int]) -> None:
        """Run the code on gradients, parameters, room for the steps, and the states at these addresses."""
        tensors = [self.weights, self.bias, job.shared, *columns]
        job.update(tiles, *(tensor.data_ptr() for tensor in tensors), *states)


def chunk_size(n: int, threads: int) -> int:
    """Coordinates of a chunk, so that all threads get as many chunks of one size as they share the work."""
    rounds = -(-n // (threads * CHUNK)) if n > threads * SMALLEST else 0
    chunks = max(1, threads * rounds if rounds else n // SMALLEST)
    return max(1, -(-n // (chunks * ROWS))) * ROWS


class _Job:
    """One part in one step.

    Attributes:
        addresses: of the states.
        strides: bytes per coordinate of each.
    """

    def __init__(
        self,
        part: Part,
        states: list[Tensor],
        strides: list[int],
        update: Callable[..., None],
        shared: Tensor,
    ):
        self.part, self.update, self.shared = part, update, shared
        self.addresses = [state.data_ptr() for state in states]
        self.strides = strides
        self.window = part.state.get("window")

    def places(self, start: int) -> list[int]:
        """Addresses of the states of a coordinate."""
        return [address + start * stride for address, stride in zip(self.addresses, self.strides, strict=True)]


def _architecture(config: CoordinateConfig) -> CoordinateConfig:
    """What the code depends on, so that rules that differ in nothing else share it."""
    return replace(config, context=NoneConfig(), horizon=1, needs_loss=False)


def push(window: Tensor, newest: Tensor) -> None:
    """`gram.push` in place: as rows lie end to end, moving all of them by one number drops the oldest of each.

    Args:
        window: (n, m + 1) contiguous, n > 0.
        newest: (n,).
    """
    start, size = window.data_ptr(), window.element_size()
    ctypes.memmove(start, start + size, size * (window.numel() - 1))
    window[:, -1].copy_(newest)


def gradient(part: Part, piece: slice, scratch: Scratch, start: int = 0) -> Tensor:
    """The direction to go down, contiguous float32, as in `Part.chunks`; if need be a copy, from `start` on."""
    grad = part.grad[piece]
    if grad.dtype == torch.float32 and grad.is_contiguous() and not part.group["maximize"]:
        return grad
    copy = scratch.grad[start : start + len(grad)].copy_(grad)
    return copy.neg_() if part.group["maximize"] else copy


def parameter(theta: Tensor, scratch: Scratch, start: int = 0) -> Tensor:
    """θ, contiguous float32; if need be a copy, from `start` on."""
    if theta.dtype == torch.float32 and theta.is_contiguous():
        return theta
    return scratch.wide(torch.float32)[start : start + len(theta)].copy_(theta)


def move(part: Part, theta: Tensor, delta: Tensor, scratch: Scratch) -> None:
    """`Part.move` of a good step, without new memory."""
    lr, decay = float(part.lr), float(part.decay)
    if decay:
        theta.mul_(1 - lr * decay)
    if theta.dtype == torch.float32:
        theta.add_(delta, alpha=lr)
    elif theta.dtype == torch.float64:
        theta.add_(scratch.wide(torch.float64)[: len(delta)].copy_(delta), alpha=lr)
    else:  # half precision is rounded once, at the end
        theta.copy_(scratch.wide(torch.float32)[: len(delta)].copy_(theta).add_(delta, alpha=lr))


def make_kernel(rule: LSTMRule | RNNPropRule) -> CPUKernel | None:
    """The kernel of a rule on the CPU; None for rules that are too large, not in float32, or of another p than 10."""
    small = rule.config.hidden <= LARGEST and usual(rule.config)
    return CPUKernel(rule) if small and all(p.dtype == torch.float32 for p in rule.parameters()) else None
