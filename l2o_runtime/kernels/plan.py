"""Where the code of the directional rule finds what: tables of addresses, most of which stay from step to step."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from l2o_runtime.kernels.directional_code import NUMBERS, TOTALS
from l2o_runtime.kernels.lstm import SMALLEST
from l2o_runtime.kernels.orthogonal_code import room
from l2o_runtime.kernels.pieces import Batch, batches_of
from l2o_runtime.kernels.steering_code import DOUBLES, FLOATS, KEPT, SCALARS, TOLD, WIDTH
from l2o_runtime.rules.agreement import FAST, MEMORY, SLOW
from l2o_runtime.rules.directional import MOMENTUM
from l2o_runtime.rules.geometry import ends, geometry
from l2o_runtime.rules.orthogonal import sides
from l2o_runtime.rules.statistics import BETAS
from l2o_runtime.rules.steering import MIXED, STATES
from l2o_runtime.stepping.interpolation import LAG
from l2o_runtime.stepping.parts import Part

FLOAT = 4
"""Bytes of a float32."""

CORRECTIONS = slice(len(BETAS))
ORTHOGONAL = len(BETAS)
WEIGHTS = slice(ORTHOGONAL + 1, ORTHOGONAL + 1 + MIXED)
LEFT, LENGTH = WEIGHTS.stop, WEIGHTS.stop + 1
TRAIL = slice(LENGTH + 1, NUMBERS)
"""Columns of a tensor's numbers: see `NUMBERS`."""

GRAD = 2
"""Column of a table of pieces."""

MATRIX_GRAD, MATRIX_MOMENTUM, WHOLE, ROOM = range(3, 7)
"""Columns of a table of matrices: see the modules with their code."""

SHARED = 2**18
"""Coordinates from which on threads share the work: for fewer it takes longer to tell them."""

CALLS = 4
"""For each thread; while one waits for the interpreter, its processor has nothing to do."""

WAVE = 2**20
"""Coordinates that are advanced together: what is written to them is still in the caches when it is read again."""


@dataclass
class Wave:
    """Parts that are advanced together: their directions are what a step needs room for.

    Attributes:
        parts: their numbers.
        pieces: those of their pieces.
        batches: of pieces, for threads.
        matrices: of those that are orthogonalised the number of the part, and their sides.
        table: of `orthogonalise`, a row for each of them, and
        rows: its rows for threads.
    """

    parts: slice
    pieces: slice
    batches: list[Batch]
    matrices: list[tuple[int, tuple[int, int]]]
    table: np.ndarray
    rows: list[np.ndarray]

    @property
    def numbers(self) -> list[int]:
        """Of the parts of its matrices."""
        return [index for index, _ in self.matrices]


class Plan:
    """Of the parts of a step.

    Args:
        parts: all of a step.
        width: coordinates of a vector.
        rank: of what is orthogonalised, 0 for nothing.
        threads: that share the work.

    Attributes:
        parts: of the step that is taken, with its gradients; none in between.
        waves: parts that are advanced together.
        batches: of pieces, of all waves.
        numbers: (parts, NUMBERS) float32, what the code reads of every part.
        sums: (pieces, TOTALS, width) float64, where it adds up.
        owned: (1 + STATES, parts) float32, copies of the step counts and of what belongs to whole tensors; there, and
            in what follows, parts are filled up to whole vectors.
        steps, aged: of it, (parts,), the step counts, and how often a tensor was steered.
        doubles, floats, scalars: what `l2o_runtime.kernels.steering_code` reads.
        told: and what it makes.
        steering, telling: addresses of all that it reads, and of what it makes.
        gather, scatter: tables that copy from there and back; gathering, scattering: their addresses.
        directions: (n,) room for those of any wave.
        free: float32 that a thread needs to orthogonalise any matrix.
        grads: of that step, the addresses of its gradients, if `regular`.
        alone: all of it is done in single calls.
        direct: parameters are contiguous float32, and all of them trail behind, or none.
        trails: all of them do.
        regular: nothing has to be converted before it is read.
    """

    def __init__(self, parts: list[Part], width: int, rank: int, threads: int):
        self.threads = threads
        self.origins = [part.origin for part in parts]
        trails = {LAG in part.state for part in parts}
        self.trails = trails == {True}
        plain = all(part.theta.dtype == torch.float32 and part.theta.is_contiguous() for part in parts)
        self.direct = plain and len(trails) == 1
        self.regular = self.direct and _regular(parts) and not any("window" in part.state for part in parts)
        # Pieces of what is looked at in every step anew have gradients; others would keep them from being freed.
        self.parts = [part.again(part.theta) for part in parts] if self.regular else parts
        parts = self.parts
        self.sizes = np.array([len(part.theta) for part in parts])
        self.alone = self.regular and self.sizes.sum() < SHARED
        self.offsets = np.zeros(len(parts), dtype=np.int64)
        self.numbers = np.zeros((len(parts), NUMBERS), dtype=np.float32)
        self.free = 0
        self.waves: list[Wave] = []
        for members in _waves(self.sizes, threads):
            self.waves.append(self._wave(members, rank))
        self.batches = [batch for wave in self.waves for batch in wave.batches]
        most = max(int(self.sizes[wave.parts].sum()) for wave in self.waves)
        self.directions = torch.empty(most, dtype=torch.float32, device="cpu")
        pieces = [piece for batch in self.batches for piece in batch.pieces]
        self.owners = np.array([piece.index for piece in pieces], dtype=np.int64)
        self.starts = FLOAT * np.array([piece.start for piece in pieces], dtype=np.int64)
        self.sums = np.zeros((len(pieces), TOTALS, width))
        places = self.directions.data_ptr() + FLOAT * self.offsets
        self.table = np.array(
            [
                [
                    len(piece),
                    self.numbers[piece.index].ctypes.data,
                    0,
                    piece.part.theta.data_ptr() + start,
                    *piece.addresses,
                    places[piece.index] + start,
                    piece.part.state[LAG].data_ptr() + start if self.trails else 0,
                    self.sums[row].ctypes.data,
                ]
                for row, (piece, start) in enumerate(zip(pieces, self.starts.tolist(), strict=True))
            ],
            dtype=np.int64,
        )
        self.place = self.table.ctypes.data
        for wave in self.waves:
            wave.table[:, WHOLE] = places[wave.numbers]
        self._steering()
        self._copies()

    def _wave(self, members: slice, rank: int) -> Wave:
        """Cut up parts and tabulate their matrices; small ones together, for calls take longer than the arithmetic."""
        sizes, first = self.sizes[members], members.start
        self.offsets[members] = np.cumsum(sizes) - sizes
        begun = sum(len(batch.pieces) for wave in self.waves for batch in wave.batches)
        batches = [
            replace(batch, first=begun + batch.first, pieces=[replace(p, index=first + p.index) for p in batch.pieces])
            for batch in batches_of(self.parts[members])
        ]
        if self.regular:  # there is nothing to convert, for which batches would have to be small
            batches = list(_joined(batches, 1 if self.alone else CALLS * self.threads))
        pieces = slice(begun, begun + sum(len(batch.pieces) for batch in batches))
        found = [(first + index, sides(part.shape)) for index, part in enumerate(self.parts[members])] if rank else []
        matrices = [(index, matrix) for index, matrix in found if matrix is not None]
        matrices.sort(key=lambda matrix: -int(self.sizes[matrix[0]]))
        self.numbers[[index for index, _ in matrices], ORTHOGONAL] = 1
        rows = [[min(matrix), max(matrix), matrix[0] <= matrix[1], 0, 0, 0, 0] for _, matrix in matrices]
        self.free = max([self.free, *(room(rank, row[0], row[1]) for row in rows)])
        table = np.array(rows, dtype=np.int64).reshape(len(rows), 7)
        large = 0 if self.alone else sum(int(self.sizes[index]) > SMALLEST for index, _ in matrices)
        ends = [*range(large + 1), *([len(rows)] if large < len(rows) else [])]
        return Wave(members, pieces, batches, matrices, table, [table[a:b] for a, b in pairwise(ends)])

    def _steering(self) -> None:
        """Make room for what tensors are steered by, and fill in what sizes and shapes say."""
        dimensions = torch.tensor([len(part.shape) for part in self.parts], dtype=torch.float32, device="cpu")
        self.doubles, self.floats, self.scalars = tables_of(torch.from_numpy(self.sizes).double(), dimensions)
        self.blocks = self.doubles.shape[1] // WIDTH
        self.told = np.zeros((TOLD + len(KEPT), self.blocks * WIDTH), dtype=np.float32)

    def _copies(self) -> None:
        """Make room for what belongs to whole tensors, and the tables that copy it."""
        own = [[part.state["step"], *(part.own[key] for key in STATES)] for part in self.parts]
        places = np.array([[tensor.data_ptr() for tensor in row] for row in own], dtype=np.int64).T.ravel()
        self.owned = np.zeros((1 + len(STATES), self.blocks * WIDTH), dtype=np.float32)
        self.steps, self.aged = self.owned[0, : len(own)], self.owned[1 + STATES.index("tensor_steps"), : len(own)]
        numbers = np.arange(self.owned.size).reshape(self.owned.shape)[:, : len(own)].ravel()
        copies = self.owned.ctypes.data + FLOAT * numbers
        self.gather, self.scatter = (
            np.stack([np.ones_like(places), *pair], axis=1) for pair in ((places, copies), (copies, places))
        )
        # NumPy takes as long to tell an address as the code takes for a small tensor.
        self.gathering, self.scattering = self.gather.ctypes.data, self.scatter.ctypes.data
        read = (self.doubles, self.floats, self.scalars, self.owned[1:])
        self.steering, self.telling = tuple(array.ctypes.data for array in read), self.told.ctypes.data

    def is_for(self, parts: list[Part], threads: int) -> bool:
        """Whether it holds for the parts of another step: these are where they were, and need no conversion."""
        return (
            self.regular
            and self.threads == threads
            and len(parts) == len(self.origins)
            and all(
                part.origin is origin and origin is not None for part, origin in zip(parts, self.origins, strict=True)
            )
            and _regular(parts)
        )

    def aim(self, parts: list[Part]) -> None:
        """Take the gradients of a step."""
        self.parts = parts
        if self.regular:
            self.grads = np.array([part.grad.data_ptr() for part in parts], dtype=np.int64)
            self.table[:, GRAD] = self.grads[self.owners] + self.starts

    def release(self) -> None:
        """Keep no gradients once a step is over."""
        self.parts = []

    def aim_matrices(self, wave: Wave) -> list[tuple[Tensor, Tensor]]:
        """Fill in the addresses of matrices; what lies there has to be kept."""
        parts = [self.parts[index] for index in wave.numbers]
        kept = [(part.gradient.contiguous(), part.state[MOMENTUM].float()) for part in parts]
        wave.table[:, MATRIX_GRAD:WHOLE] = [[grad.data_ptr(), momentum.data_ptr()] for grad, momentum in kept]
        return kept

    def rows(self, batch: Batch) -> np.ndarray:
        """Of the table of pieces."""
        return self.table[batch.first : batch.first + len(batch.pieces)]

    def address(self, batch: Batch) -> int:
        """Of its rows."""
        return self.place + batch.first * self.table.strides[0]

    def direction(self, index: int) -> Tensor:
        """(n,) room for that of a part, as long as its wave goes on."""
        start = int(self.offsets[index])
        return self.directions[start : start + int(self.sizes[index])]

    def total(self, count: int, pieces: slice = slice(None)) -> np.ndarray:
        """Sums over parts, (parts, count); of some pieces alone."""
        seen: np.ndarray = self.sums[pieces, :count].sum(-1)
        if len(seen) == len(self.sizes):  # a piece each
            return seen
        found = np.zeros((len(self.sizes), count))
        np.add.at(found, self.owners[pieces], seen)
        return found


def tables_of(sizes: Tensor, dimensions: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `l2o_runtime.kernels.steering_code` reads, filled in where sizes and shapes say it, up to whole vectors.

    Args:
        sizes: (S,) float64 coordinates of tensors.
        dimensions: (S,) float32 theirs.
    """
    count = len(sizes)
    known = geometry(sizes, dimensions)._asdict() | ends(sizes, dimensions)._asdict()
    doubles = np.zeros((len(DOUBLES), -(-count // WIDTH) * WIDTH))
    floats = np.zeros((len(FLOATS), doubles.shape[1]), dtype=np.float32)
    doubles[DOUBLES.index("count")] = floats[FLOATS.index("known")] = 1
    for names, rows in ((DOUBLES, doubles), (FLOATS, floats)):
        for row, name in enumerate(names):
            if name in known:
                rows[row, :count] = known[name].numpy()
    return doubles, floats, np.array([float(known[name]) for name in SCALARS])


def fill(doubles: np.ndarray, floats: np.ndarray, sums: np.ndarray, before: np.ndarray) -> None:
    """Fill into tables of `tables_of`, or stacks of them, what is another in every step.

    Args:
        doubles, floats: (..., rows, S or more), written.
        sums: (..., S, 6) those of a step, without the number of coordinates.
        before: (..., S) how often tensors were steered.
    """
    doubles[..., :6, : sums.shape[-2]] = np.swapaxes(sums, -1, -2)
    age(doubles, floats, before)


def age(doubles: np.ndarray, floats: np.ndarray, before: np.ndarray) -> None:
    """The same for what depends on the number of steps alone."""
    count, steps = before.shape[-1], before.astype(np.float64) + 1
    doubles[..., 6, :count], doubles[..., 7, :count] = FAST**steps, SLOW**steps
    floats[..., 0, :count] = 1 - (1 - 1 / MEMORY) ** steps


def _joined(batches: list[Batch], count: int) -> Iterator[Batch]:
    """At most about so many batches of neighbours in their place, as alike in size as it gets."""
    sizes = [sum(len(piece) for piece in batch.pieces) for batch in batches]
    most, held, size = -(-sum(sizes) // count), list[Batch](), 0
    for batch, own in zip(batches, sizes, strict=True):
        if held and (size + own > most or held[0].dtypes != batch.dtypes):
            yield replace(held[0], pieces=[piece for one in held for piece in one.pieces])
            held, size = [], 0
        held.append(batch)
        size += own
    if held:
        yield replace(held[0], pieces=[piece for one in held for piece in one.pieces])


def _waves(sizes: np.ndarray, threads: int) -> Iterator[slice]:
    """Parts, in their order, that have about `WAVE` coordinates together; more for several threads, which take a matrix
    each.
    """
    start, count, most = 0, 0, WAVE * (1 if threads == 1 else CALLS * threads)
    for index, size in enumerate(sizes.tolist()):
        if count and count + size > most:
            yield slice(start, index)
            start, count = index, 0
        count += size
    yield slice(start, len(sizes))


def _regular(parts: list[Part]) -> bool:
    """Whether gradients can be read as they are."""
    return all(
        part.grad.dtype == torch.float32 and part.grad.is_contiguous() and not part.group["maximize"] for part in parts
    )
