"""The CPU kernel of the tiered rule: its sums and its steps, on several threads; see `tiered_code` for the code.

A network has many small tensors, for which Python would take longer than the arithmetic. So everything is prepared for
all tensors at once, and the code goes through many of them in one call.
"""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from l2o_runtime.contexts import WindowContext
from l2o_runtime.kernels import Kernel
from l2o_runtime.kernels.emit import Compiled, widest
from l2o_runtime.kernels.lstm import Scratch, chunk_size, gradient, move, parameter, push
from l2o_runtime.kernels.threads import share
from l2o_runtime.kernels.tiered_code import FIELDS, SCALARS, TOTALS, WEIGHTS, tiered_module
from l2o_runtime.rules.features import lowest_root
from l2o_runtime.rules.tiered import SCALARS as IN_STEERING
from l2o_runtime.rules.tiered import TieredRule
from l2o_runtime.rules.tiered_features import AVERAGES, BETAS
from l2o_runtime.stepping.parts import Part

Code = dict[str, Callable[[int, int], None]]
Dtypes = tuple[torch.dtype, ...]
Pair = tuple[Tensor, Tensor]
DECAYS = np.array(BETAS, dtype=np.float32)


@functools.cache
def compile_tiered(width: int, dtypes: Dtypes, restrained: bool) -> tuple[Code, Compiled]:
    """The functions of `tiered_code.tiered_module`, and what keeps them alive; once per process."""
    compiled = Compiled(tiered_module(width, dtypes, restrained))
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p)
    return {name: kind(compiled.address(name)) for name in ("observe", "update")}, compiled


@dataclass(frozen=True)
class Piece:
    """Coordinates of a part that are worked on together.

    Attributes:
        index: of the part.
        part: it.
        start, stop: which of its coordinates.
        states: averages of all of its coordinates.
    """

    index: int
    part: Part
    start: int
    stop: int
    states: list[Tensor]

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def where(self) -> slice:
        """Its coordinates."""
        return slice(self.start, self.stop)

    @property
    def addresses(self) -> list[int]:
        """Where its averages begin."""
        return [state.data_ptr() + self.start * state.element_size() for state in self.states]


@dataclass(frozen=True)
class Batch:
    """Pieces that a thread takes together.

    Attributes:
        first: number of the first piece among all.
        pieces: at most as many coordinates as there is scratch for.
        dtypes: of their states.
    """

    first: int
    pieces: list[Piece]
    dtypes: Dtypes


class TieredKernel(Kernel):
    """Sums and steps of one rule; see `l2o_runtime.kernels.Kernel`.

    Args:
        rule: frozen, on the CPU, in float32.
    """

    def __init__(self, rule: TieredRule):
        self.rule = rule
        self.width = widest()
        self.first, last = (
            torch.cat([layer.weight, layer.bias.unsqueeze(-1)], dim=-1).detach().numpy()
            for layer in (rule.into, rule.out)
        )
        self.last = last.ravel()
        self.scratch: list[Scratch] = []

    def observe(self, parts: list[Part]) -> Tensor:
        """Σ|g| and the sums of `TieredRule.terms`: (parts, 1 + k) float64, whichever thread adds up which piece."""
        batches, numbers = _batches(parts), self._numbers(parts, None)
        owners = torch.tensor([piece.index for batch in batches for piece in batch.pieces], dtype=torch.int64)
        sums = torch.zeros(len(owners), TOTALS, self.width, dtype=torch.float64)
        place, size = sums.data_ptr(), sums.element_size() * TOTALS * self.width

        def work(batch: Batch, thread: int) -> None:
            results = [place + size * (batch.first + index) for index in range(len(batch.pieces))]
            self._call("observe", batch, numbers, _columns(batch, self.scratch[thread]), results)

        self._share(work, batches)
        return torch.zeros(len(parts), TOTALS, dtype=torch.float64).index_add_(0, owners, sums.sum(-1))

    def update(self, parts: list[Part], steering: list[Tensor], good: Tensor) -> None:
        """Advance parts."""
        if not bool(good):
            return
        numbers = self._numbers(parts, torch.cat(steering))

        def work(batch: Batch, thread: int) -> None:
            scratch = self.scratch[thread]
            columns, sizes = _columns(batch, scratch), [len(piece) for piece in batch.pieces]
            deltas = scratch.delta[: sum(sizes)].split(sizes)
            self._call("update", batch, numbers, columns, [delta.data_ptr() for delta in deltas])
            for piece, (grad, _), delta in zip(batch.pieces, columns, deltas, strict=True):
                theta, window = piece.part.theta[piece.where], piece.part.state.get("window")
                if window is not None and isinstance(self.rule.context, WindowContext):
                    push(window[piece.where], self.rule.context.snapshot(theta, grad))
                move(piece.part, theta, delta, scratch)

        self._share(work, _batches(parts))

    def _share(self, work: Callable[[Batch, int], None], batches: list[Batch]) -> None:
        while len(self.scratch) < torch.get_num_threads():
            self.scratch.append(Scratch([]))
        share(work, batches)

    def _call(self, name: str, batch: Batch, numbers: np.ndarray, columns: list[Pair], results: list[int]) -> None:
        """Run the code on pieces, whose results are to be written to these addresses."""
        first, stride = numbers.ctypes.data, numbers.strides[0]
        table = np.array(
            [
                [len(piece), first + piece.index * stride, grad.data_ptr(), param.data_ptr(), *piece.addresses, result]
                for piece, (grad, param), result in zip(batch.pieces, columns, results, strict=True)
            ],
            dtype=np.int64,
        )
        assert table.shape == (len(batch.pieces), FIELDS)
        restrained = self.rule.config.noise_floor is not None
        compile_tiered(self.width, batch.dtypes, restrained)[0][name](len(table), table.ctypes.data)

    def _numbers(self, parts: list[Part], steering: Tensor | None) -> np.ndarray:
        """What the code reads besides the coordinates: a row per part, its weights with gains and biases in them.

        In NumPy, whose calls on a handful of numbers take a fraction of torch's.
        """
        numbers = np.zeros((len(parts), SCALARS + WEIGHTS), dtype=np.float32)
        steps = np.array([part.state["step"].item() for part in parts], dtype=np.float32)
        numbers[:, : len(BETAS)] = 1 - DECAYS ** (steps[:, None] + 1)
        if steering is not None:
            size_root, size_fast, rho, noise, longest, magnitude = steering[:, :IN_STEERING].numpy().T
            lowest = lowest_root(steering[:, 0]).numpy()
            scalars = [lowest, size_root, 1 / rho, np.exp(-size_fast), noise, longest, magnitude]
            numbers[:, len(BETAS) : SCALARS] = np.stack(scalars, axis=1)
            gain, bias = steering[:, IN_STEERING:].numpy().reshape(len(parts), 2, -1).swapaxes(0, 1)
            first = self.first * (1 + gain)[:, :, None]
            first[:, :, -1] += bias
            numbers[:, SCALARS : SCALARS + self.first.size] = first.reshape(len(parts), -1)
            numbers[:, SCALARS + self.first.size :] = self.last
        return numbers


def _batches(parts: list[Part]) -> list[Batch]:
    """Parts cut up, and pieces put together, so that all threads get much the same number of coordinates."""
    size = chunk_size(sum(len(part.theta) for part in parts), torch.get_num_threads())
    batches: list[Batch] = []
    room, count = 0, 0
    for index, part in enumerate(parts):
        states = [part.state[key] for key in AVERAGES]
        dtypes = tuple(state.dtype for state in states)
        for start in range(0, len(part.theta), size):
            piece = Piece(index, part, start, min(start + size, len(part.theta)), states)
            if len(piece) > room or batches[-1].dtypes != dtypes:
                batches.append(Batch(count, [], dtypes))
                room = size
            batches[-1].pieces.append(piece)
            room, count = room - len(piece), count + 1
    return batches


def _columns(batch: Batch, scratch: Scratch) -> list[Pair]:
    """Gradients and parameters of pieces, contiguous float32."""
    pairs, start = [], 0
    for piece in batch.pieces:
        grad = gradient(piece.part, piece.where, scratch, start)
        pairs.append((grad, parameter(piece.part.theta[piece.where], scratch, start)))
        start += len(piece)
    return pairs


def make_kernel(rule: TieredRule) -> TieredKernel | None:
    """The kernel of a rule on the CPU; None if it is not in float32."""
    return TieredKernel(rule) if all(p.dtype == torch.float32 for p in rule.parameters()) else None
