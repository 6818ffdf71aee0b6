"""What kernels share that go through many tensors in one call: pieces of tensors, and who works on which.

A network has many small tensors, for which Python would take longer than the arithmetic. So everything is prepared for
all tensors at once, and the code goes through many of them in one call.
"""

import ctypes
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2o_runtime.kernels import Kernel
from l2o_runtime.kernels.lstm import Scratch, chunk_size, gradient, parameter
from l2o_runtime.kernels.machine import Compiled, widest
from l2o_runtime.kernels.threads import share
from l2o_runtime.rules.statistics import AVERAGES, BETAS
from l2o_runtime.stepping.parts import Part

Code = dict[str, Callable[[int, int], None]]
Dtypes = tuple[torch.dtype, ...]
Pair = tuple[Tensor, Tensor]
DECAYS = np.array(BETAS, dtype=np.float32)


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


class PieceKernel(Kernel):
    """A kernel for rules with the averages of `statistics`, whose code takes a table of pieces.

    Attributes:
        totals: sums that its code "observe" gives, Σ|g| first.
        width: coordinates of a vector.
        scratch: of each thread.
    """

    totals: int

    def __init__(self) -> None:
        self.width = widest()
        self.scratch: list[Scratch] = []

    @abstractmethod
    def code(self, dtypes: Dtypes) -> Code:
        """Functions by name, for states of these types."""

    @abstractmethod
    def numbers(self, parts: list[Part], steering: Tensor | None) -> np.ndarray:
        """What the code reads besides the coordinates, a row of float32 for each part; `observe` has no steering."""

    def observe(self, parts: list[Part]) -> Tensor:
        """Σ|g| and the rule's sums: (parts, totals) float64, whichever thread adds up which piece."""
        batches, numbers = batches_of(parts), self.numbers(parts, None)
        owners = [piece.index for batch in batches for piece in batch.pieces]
        sums = np.zeros((len(owners), self.totals, self.width))
        place, size = sums.ctypes.data, sums.strides[0]

        def work(batch: Batch, thread: int) -> None:
            results = [place + size * (batch.first + index) for index in range(len(batch.pieces))]
            pairs = columns(batch, self.scratch[thread])
            self.call("observe", batch, numbers, reading(batch, pairs), results)

        self.share(work, batches)
        found = np.zeros((len(parts), self.totals))
        np.add.at(found, owners, sums.sum(-1))
        return torch.from_numpy(found)

    def share(self, work: Callable[[Batch, int], None], batches: list[Batch]) -> None:
        """Deal batches out to threads, each with scratch of its own."""
        while len(self.scratch) < torch.get_num_threads():
            self.scratch.append(Scratch([]))
        share(work, batches)

    def call(
        self, name: str, batch: Batch, numbers: np.ndarray, inputs: Sequence[Sequence[int]], results: Sequence[int]
    ) -> None:
        """Run code on pieces: each has a row of its size and the addresses of its numbers, inputs and result."""
        first, stride = numbers.ctypes.data, numbers.strides[0]
        table = np.array(
            [
                [len(piece), first + piece.index * stride, *addresses, result]
                for piece, addresses, result in zip(batch.pieces, inputs, results, strict=True)
            ],
            dtype=np.int64,
        )
        self.code(batch.dtypes)[name](len(table), table.ctypes.data)


def compiled(names: Sequence[str], write: Callable[..., Any], *given: object) -> tuple[Code, Compiled]:
    """Functions of a module of pieces, and what keeps them alive; see `Compiled`."""
    made = Compiled(write, *given)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p)
    return {name: kind(made.address(name)) for name in names}, made


def reading(batch: Batch, pairs: Sequence[Pair]) -> list[list[int]]:
    """Addresses of gradients, parameters and averages of each piece."""
    return [
        [grad.data_ptr(), param.data_ptr(), *piece.addresses]
        for piece, (grad, param) in zip(batch.pieces, pairs, strict=True)
    ]


def steps_of(parts: list[Part]) -> np.ndarray:
    """How many steps parts have taken, (parts,) float32."""
    return np.array([part.state["step"].item() for part in parts], dtype=np.float32)


def corrections(steps: np.ndarray) -> np.ndarray:
    """1 / (1 − βᵗ) of every average, (parts, 3) float32, t with this step in, after so many."""
    found: np.ndarray = 1 / (1 - DECAYS ** (steps[:, None] + 1))
    return found


def batches_of(parts: list[Part]) -> list[Batch]:
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


def columns(batch: Batch, scratch: Scratch) -> list[Pair]:
    """Gradients and parameters of pieces, contiguous float32."""
    pairs, start = [], 0
    for piece in batch.pieces:
        grad = gradient(piece.part, piece.where, scratch, start)
        pairs.append((grad, parameter(piece.part.theta[piece.where], scratch, start)))
        start += len(piece)
    return pairs
