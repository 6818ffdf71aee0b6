"""The CPU kernel of the directional rule: whole steps, on several threads.

The code is in `directional_code` and, for matrices, in `orthogonal_code`.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from l2o_runtime.config import NoneConfig
from l2o_runtime.contexts import WindowContext
from l2o_runtime.kernels.directional_code import SCALARS, TOTALS, directional_module
from l2o_runtime.kernels.emit import Compiled
from l2o_runtime.kernels.lstm import SMALLEST, Scratch, push
from l2o_runtime.kernels.orthogonal_code import LARGEST_RANK, orthogonal_module, room
from l2o_runtime.kernels.pieces import Batch, Code, Dtypes, PieceKernel, batches_of, columns, compiled, corrections
from l2o_runtime.rules.directional import MOMENTUM, DirectionalRule, nesterov
from l2o_runtime.rules.orthogonal import orthogonalise_each, sides
from l2o_runtime.rules.statistics import BETAS
from l2o_runtime.rules.steering import STATES, TINY, Network, Sums, steered
from l2o_runtime.stepping.parts import Part

KEYS = ("step", *STATES)
"""Numbers that a whole step reads and writes for every tensor."""

FLOAT = 4
"""Bytes of a float32."""


@functools.cache
def compile_directional(width: int, dtypes: Dtypes) -> tuple[Code, Compiled]:
    """The functions of `directional_code.directional_module`, and what keeps them alive; once per process."""
    return compiled(directional_module(width, dtypes), ("observe", "update", "move", "copy"))


@functools.cache
def compile_orthogonal(rank: int, width: int) -> tuple[Code, Compiled]:
    """The function of `orthogonal_code.orthogonal_module`, and what keeps it alive; once per process."""
    return compiled(orthogonal_module(rank, width), ("orthogonalise",))


class DirectionalKernel(PieceKernel):
    """Sums and steps of one rule; see `l2o_runtime.kernels.Kernel`. It is for whole tensors, not for shards.

    Args:
        rule: frozen, on the CPU, in float32.
    """

    totals = TOTALS

    def __init__(self, rule: DirectionalRule):
        super().__init__()
        self.rule = rule
        self.whole = isinstance(rule.config.context, NoneConfig)
        weights = (rule.into.weight, rule.into.bias, rule.head.weight, rule.head.bias)
        self.network = Network(*(weight.detach().numpy() for weight in weights))

    def code(self, dtypes: Dtypes) -> Code:
        """As in `PieceKernel`."""
        return compile_directional(self.width, dtypes)[0]

    def numbers(self, parts: list[Part], corrected: np.ndarray, steering: np.ndarray | None) -> np.ndarray:
        """As in `PieceKernel`."""
        numbers = np.zeros((len(parts), SCALARS), dtype=np.float32)
        numbers[:, : len(BETAS)] = corrected
        if steering is not None:
            numbers[:, len(BETAS)] = [self._matrix(part) is not None for part in parts]
            numbers[:, len(BETAS) + 1 :] = steering[:, 1:]
        return numbers

    def _matrix(self, part: Part) -> tuple[int, int] | None:
        """Sides of what is orthogonalised."""
        return sides(part.shape) if self.rule.config.rank else None

    def step(self, parts: list[Part], loss: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As in `Kernel`: in between of compiled code the few numbers of every tensor are arrays of NumPy."""
        batches = batches_of(parts)
        owned = self._owned(parts)
        before = self._copied(batches, owned)
        state = dict(zip(KEYS, before, strict=True))
        corrected = corrections(parts, state["step"])
        totals = self.looked(batches, self.numbers(parts, corrected, None))
        pulse, finite = totals[:, 0].sum(), bool(np.isfinite(totals[:, 1:]).all())
        flags = torch.tensor([not np.isfinite(pulse), not bool(loss.isfinite()), not finite, pulse == 0])
        good = not bool(flags.any())
        if good:
            dimensions = np.array([len(part.shape) for part in parts])
            length, weights, new = steered(self.rule.config, self.network, Sums(*totals.T[1:]), dimensions, state)
            new["step"] = state["step"] + 1
            self._advance(parts, batches, np.concatenate([length[:, None], weights], axis=1), corrected)
            self._copied(batches, owned, np.stack([new[key] for key in KEYS]))
            for part in parts:
                part.write_back()
        return torch.tensor(good), list(flags.unbind())

    def _owned(self, parts: list[Part]) -> np.ndarray:
        """Addresses of `KEYS` of all parts, one key after the other."""
        own = [[part.state["step"], *(part.own[key] for key in STATES)] for part in parts]
        return np.array([[tensor.data_ptr() for tensor in row] for row in own], dtype=np.int64).T

    def _copied(self, batches: list[Batch], owned: np.ndarray, new: np.ndarray | None = None) -> np.ndarray:
        """The numbers at addresses; or write new ones there."""
        numbers = np.empty(owned.shape, dtype=np.float32) if new is None else new.astype(np.float32)
        own = numbers.ctypes.data + FLOAT * np.arange(numbers.size)
        pair = (owned.ravel(), own) if new is None else (own, owned.ravel())
        table = np.stack([np.ones(numbers.size, dtype=np.int64), *pair], axis=1)
        self.code(batches[0].dtypes)["copy"](len(table), table.ctypes.data)
        return numbers

    def update(self, parts: list[Part], steering: list[Tensor], good: Tensor) -> None:
        """Advance parts."""
        if bool(good):
            self._advance(parts, batches_of(parts), torch.cat(steering).numpy(), corrections(parts))

    def _advance(self, parts: list[Part], batches: list[Batch], told: np.ndarray, corrected: np.ndarray) -> None:
        """Advance parts, whose steering is (parts, c)."""
        sizes = [len(part.theta) for part in parts]
        room = torch.empty(sum(sizes))
        directions = room.split(sizes)
        self._orthogonalise(parts, directions)

        def inputs(batch: Batch, scratch: Scratch) -> list[list[int]]:
            found = []
            for piece, (grad, _) in zip(batch.pieces, columns(batch, scratch), strict=True):
                whole = directions[piece.index].data_ptr() + FLOAT * piece.start
                found.append([grad.data_ptr(), *piece.addresses, whole])
                window = piece.part.state.get("window")
                if window is not None and isinstance(self.rule.context, WindowContext):
                    push(window[piece.where], self.rule.context.snapshot(piece.part.theta[piece.where], grad))
            return found

        squares = self.summed("update", batches, self.numbers(parts, corrected, told), inputs, 1)[:, 0]
        lengths = -told[:, 0] / np.maximum(np.sqrt(squares / sizes), TINY)
        left = [1 - float(part.lr * part.decay) for part in parts]
        moves = np.array([left, lengths * [float(part.lr) for part in parts]], dtype=np.float32).T.copy()

        def work(batch: Batch, _: int) -> None:
            rows = []
            for piece in batch.pieces:
                part, direction = piece.part, directions[piece.index]
                if part.theta.dtype == torch.float32 and part.theta.is_contiguous():
                    places = (moves[piece.index].ctypes.data, direction.data_ptr(), part.theta.data_ptr())
                    rows.append([len(piece), places[0], *(place + FLOAT * piece.start for place in places[1:])])
                else:
                    at = piece.where
                    # Half precision is rounded once, at the end.
                    part.move(part.theta[at], direction[at] * float(lengths[piece.index]), torch.tensor(True))
            if rows:
                table = np.array(rows, dtype=np.int64)
                self.code(batch.dtypes)["move"](len(table), table.ctypes.data)

        self.share(work, batches)

    def _orthogonalise(self, parts: list[Part], directions: Sequence[Tensor]) -> None:
        """Write the orthogonalised momentum of matrices."""
        matrices = [
            (part.gradient.contiguous(), part.state[MOMENTUM].float(), direction, *matrix)
            for part, direction in zip(parts, directions, strict=True)
            if (matrix := self._matrix(part)) is not None
        ]
        rank = self.rule.config.rank
        if rank > LARGEST_RANK:
            for grad, momentum, direction, rows, columns in matrices:
                found = orthogonalise_each([nesterov(grad, momentum).view(rows, columns)], rank)[0]
                direction.view(rows, columns).copy_(found)
            return
        code = compile_orthogonal(rank, self.width)[0]["orthogonalise"]
        free = max((room(rank, min(row[3:]), max(row[3:])) for row in matrices), default=0)

        def work(items: Sequence[tuple[Tensor, Tensor, Tensor, int, int]], thread: int) -> None:
            place = self.scratch[thread].room(free)
            table = np.array(
                [
                    [min(sides), max(sides), sides[0] <= sides[1], *(t.data_ptr() for t in tensors), place.data_ptr()]
                    for *tensors, rows, columns in items
                    for sides in [(rows, columns)]
                ],
                dtype=np.int64,
            )
            code(len(table), table.ctypes.data)

        # Small ones all in one call, for Python would take longer than the arithmetic.
        items = [[row] for row in matrices if len(row[0]) > SMALLEST]
        items.append([row for row in matrices if len(row[0]) <= SMALLEST])
        self.share(work, sorted(filter(None, items), key=lambda item: -sum(len(row[0]) for row in item)))


def make_kernel(rule: DirectionalRule) -> DirectionalKernel | None:
    """The kernel of a rule on the CPU; None if it is not in float32."""
    return DirectionalKernel(rule) if all(p.dtype == torch.float32 for p in rule.parameters()) else None
