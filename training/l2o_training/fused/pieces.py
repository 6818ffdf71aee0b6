"""Pieces of the tensors of several instances, which compiled code for meta-training goes through in one call."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from l2o_runtime.kernels.threads import share
from l2o_runtime.layout import Layout

Code = Callable[[int, int], None]
"""Goes through the rows of a table: their number, and its address."""

PIECE = 8192
"""Coordinates of a tensor that are summed up in one go, at most."""


class Pieces:
    """The tensors of all instances, cut up.

    Args:
        sizes: of the tensors of an instance.
        lead: leading dimensions, of instances.

    Attributes:
        owners, starts, counts: of every piece the number of its tensor among all of them, its first coordinate among
            all, and how many there are.
    """

    def __init__(self, sizes: tuple[int, ...], lead: torch.Size):
        self.lead, self.tensors = lead, len(sizes)
        firsts = [sum(sizes[:index]) for index in range(len(sizes))]
        cuts = [
            (owner, first + low, min(PIECE, size - low))
            for owner, (first, size) in enumerate(zip(firsts, sizes, strict=True))
            for low in range(0, size, PIECE)
        ]
        owners, starts, counts = np.array(cuts).T
        copies = np.arange(lead.numel())[:, None]
        self.owners = (owners + self.tensors * copies).ravel()
        self.starts = (starts + sum(sizes) * copies).ravel()
        self.counts = np.tile(counts, len(copies))

    @classmethod
    def of(cls, layout: Layout, lead: torch.Size) -> "Pieces":
        """The pieces of a layout, which are the same in every step."""
        return _pieces(tuple(layout.shapes[:, 1].long().tolist()), lead)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.counts)

    def run(self, code: Code, numbers: Tensor, arrays: Sequence[Tensor], results: Tensor | None = None) -> None:
        """Call code for all pieces.

        Args:
            code: goes through the rows of a table.
            numbers: (..., S, k) float32.
            arrays: (..., n) float32 each, contiguous.
            results: (pieces, …), a row for each, if there are sums.
        """
        numbers = numbers.detach().contiguous()
        columns = [self.counts, numbers.data_ptr() + 4 * numbers.shape[-1] * self.owners]
        columns += [array.data_ptr() + 4 * self.starts for array in arrays]
        if results is not None:
            columns.append(results.data_ptr() + results[0].nbytes * np.arange(self.count))
        table = np.stack(columns, axis=1)
        size = -(-self.count // torch.get_num_threads())

        def work(first: int, _: int) -> None:
            code(min(size, self.count - first), table[first:].ctypes.data)

        share(work, range(0, self.count, size))

    def collect(self, results: Tensor) -> Tensor:
        """Sums over the pieces of every tensor: (..., S, k), from (pieces, k, width)."""
        total = results.new_zeros(self.lead.numel() * self.tensors, results.shape[1])
        return total.index_add_(0, torch.from_numpy(self.owners), results.sum(-1)).view(*self.lead, self.tensors, -1)


_pieces = functools.lru_cache(maxsize=256)(Pieces)
