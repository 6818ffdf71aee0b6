"""The CPU kernel of the two-tier rule: its sums and its steps, on several threads; see `two_tier` for the code."""

import ctypes
import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from l2o_runtime.contexts import WindowContext
from l2o_runtime.features import lowest_root
from l2o_runtime.kernels.cpu import Scratch as Columns
from l2o_runtime.kernels.cpu import chunk_size, gradient, move, parameter, push
from l2o_runtime.kernels.emit import Compiled, widest
from l2o_runtime.kernels.threads import share
from l2o_runtime.kernels.two_tier import AVERAGES, BETAS, SCALARS, SUMS, WEIGHTS, scale_module
from l2o_runtime.parts import Part
from l2o_runtime.scale import SCALARS as IN_CONTEXT
from l2o_runtime.scale import ScaleRule

Code = dict[str, Callable[..., None]]
DECAYS = np.array(BETAS, dtype=np.float32)


@functools.cache
def compile_scale(width: int, dtypes: tuple[torch.dtype, ...]) -> tuple[Code, Compiled]:
    """The functions of `two_tier.scale_module`, and what keeps them alive; once per process."""
    compiled = Compiled(scale_module(width, dtypes))
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, *[ctypes.c_void_p] * (4 + len(AVERAGES)))
    return {name: kind(compiled.address(name)) for name in ("observe", "update")}, compiled


class ScaleKernel:
    """Sums and steps of one rule; see `l2o_runtime.kernels.Kernel`.

    Args:
        rule: frozen, on the CPU, in float32.
    """

    def __init__(self, rule: ScaleRule):
        self.rule = rule
        self.width = widest()
        self.first, last = (
            torch.cat([layer.weight, layer.bias.unsqueeze(-1)], dim=-1).detach().numpy()
            for layer in (rule.into, rule.out)
        )
        self.last = last.ravel()
        self.scratch: list[Scratch] = []

    def observe(self, part: Part) -> Tensor:
        """The sums of `ScaleRule.terms` over a part: (k,) float64, the same whichever thread adds up which chunk."""
        if not len(part.theta):
            return torch.zeros(SUMS, dtype=torch.float64)
        job = self._job(part, None)
        sums = torch.zeros(len(job.starts), SUMS, self.width, dtype=torch.float64)

        def work(index: int, thread: int) -> None:
            scratch = self.scratch[thread]
            columns = job.columns(index, scratch)
            job.call("observe", columns[:2], columns[2], sums[index], scratch)

        share(work, range(len(job.starts)))
        total = sums.sum((0, 2))
        total[0] = len(part.theta)  # the last vector is padded
        return total

    def __call__(self, part: Part, context: Tensor, good: Tensor, reach: float | None) -> None:
        """Advance a part."""
        if not len(part.theta) or not bool(good):
            return
        job = self._job(part, context.reshape(-1))
        window = part.state.get("window")

        def work(index: int, thread: int) -> None:
            scratch = self.scratch[thread]
            piece, (grad, theta, states) = job.piece(index), job.columns(index, scratch)
            delta = scratch.columns.delta[: len(grad)]
            job.call("update", (grad, theta), states, delta, scratch)
            if window is not None and isinstance(self.rule.context, WindowContext):
                push(window[piece], self.rule.context.snapshot(part.theta[piece], grad))
            move(part, part.theta[piece], delta, reach, scratch.columns)

        share(work, range(len(job.starts)))

    def _job(self, part: Part, context: Tensor | None) -> "_Job":
        """What is to be done, and room for every thread to do it."""
        while len(self.scratch) < torch.get_num_threads():
            self.scratch.append(Scratch(self.width))
        return _Job(part, self._numbers(part, context), self.width)

    def _numbers(self, part: Part, context: Tensor | None) -> np.ndarray:
        """What the code reads besides the coordinates; the weights with the tensor's gains and biases in them.

        In NumPy, whose calls on a handful of numbers take a fraction of torch's: a network has many small tensors.
        """
        numbers = np.zeros(SCALARS + WEIGHTS, dtype=np.float32)
        numbers[: len(BETAS)] = 1 - DECAYS ** np.float32(part.state["step"].item() + 1)
        if context is not None:
            size_root, size_fast, rho, magnitude = context[:IN_CONTEXT].tolist()
            lowest = lowest_root(context[0]).item()
            numbers[len(BETAS) : SCALARS] = lowest, size_root, 1 / rho, math.exp(-size_fast), magnitude
            gain, bias = context[IN_CONTEXT:].numpy().reshape(2, -1)
            first = numbers[SCALARS : SCALARS + self.first.size].reshape(self.first.shape)
            np.multiply(self.first, (1 + gain)[:, None], out=first)
            first[:, -1] += bias
            numbers[SCALARS + self.first.size :] = self.last
        return numbers


class Scratch:
    """What a thread needs: a chunk's gradients, parameters and steps, and one padded vector of everything."""

    def __init__(self, width: int):
        self.columns = Columns([])
        self.padded = {dtype: torch.zeros(3 + len(AVERAGES), width, dtype=dtype) for dtype in KINDS}


KINDS = (torch.float32, torch.bfloat16)


class _Job:
    """One part in one step."""

    def __init__(self, part: Part, numbers: np.ndarray, width: int):
        self.part, self.numbers, self.width = part, numbers, width  # numbers: to keep what is at the address
        self.address = numbers.ctypes.data
        self.states = [part.state[key] for key in AVERAGES]
        self.code, _ = compile_scale(width, tuple(state.dtype for state in self.states))
        self.size = -(-chunk_size(len(part.theta), torch.get_num_threads()) // width) * width
        self.starts = range(0, len(part.theta), self.size)

    def piece(self, index: int) -> slice:
        """The coordinates of a chunk."""
        return slice(self.starts[index], min(self.starts[index] + self.size, len(self.part.theta)))

    def columns(self, index: int, scratch: Scratch) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradients, parameters, both float32, and states of a chunk."""
        piece = self.piece(index)
        grad = gradient(self.part, piece, scratch.columns)
        return grad, parameter(self.part.theta[piece], scratch.columns), [state[piece] for state in self.states]

    def call(
        self, name: str, inputs: tuple[Tensor, Tensor], states: list[Tensor], out: Tensor, scratch: Scratch
    ) -> None:
        """Run the code on whole vectors where the data are, and on a padded copy of the rest."""
        count = len(inputs[0])
        blocks, rest = divmod(count, self.width)
        per_coordinate = name == "update"
        if blocks:
            self._call(name, blocks, [*inputs, *states, out])
        if not rest:
            return
        tail = slice(count - rest, count)
        own = [(tensor[tail], scratch.padded[tensor.dtype][k]) for k, tensor in enumerate([*inputs, *states])]
        for tensor, copy in own:
            copy[:rest] = tensor
            copy[rest:] = 0
        last = scratch.padded[torch.float32][-1] if per_coordinate else out
        self._call(name, 1, [*(copy for _, copy in own), last])
        if per_coordinate:
            out[tail] = last[:rest]
            for tensor, copy in own[2:]:
                tensor.copy_(copy[:rest])

    def _call(self, name: str, blocks: int, tensors: list[Tensor]) -> None:
        self.code[name](blocks, self.address, *(tensor.data_ptr() for tensor in tensors))


def make_kernel(rule: ScaleRule) -> ScaleKernel | None:
    """The kernel of a rule on the CPU; None if it is not in float32."""
    return ScaleKernel(rule) if all(p.dtype == torch.float32 for p in rule.parameters()) else None
