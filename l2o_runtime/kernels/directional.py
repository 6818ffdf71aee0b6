"""The CPU kernel of the directional rule: its sums and its steps, on several threads; see `directional_code`.

Matrices are orthogonalised by torch in between, whose matrix products are as fast as they get.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from l2o_runtime.contexts import WindowContext
from l2o_runtime.kernels.directional_code import SCALARS, TOTALS, directional_module
from l2o_runtime.kernels.emit import Compiled
from l2o_runtime.kernels.lstm import Scratch, move, push
from l2o_runtime.kernels.pieces import Batch, Code, Dtypes, PieceKernel, columns, compiled, corrections
from l2o_runtime.rules.directional import MOMENTUM, DirectionalRule, nesterov
from l2o_runtime.rules.orthogonal import orthogonalise_each, sides
from l2o_runtime.rules.statistics import BETAS
from l2o_runtime.stepping.parts import Part


@functools.cache
def compile_directional(width: int, dtypes: Dtypes) -> tuple[Code, Compiled]:
    """The functions of `directional_code.directional_module`, and what keeps them alive; once per process."""
    return compiled(directional_module(width, dtypes))


class DirectionalKernel(PieceKernel):
    """Sums and steps of one rule; see `l2o_runtime.kernels.Kernel`. It is for whole tensors, not for shards.

    Args:
        rule: frozen, on the CPU, in float32.
    """

    totals = TOTALS

    def __init__(self, rule: DirectionalRule):
        super().__init__()
        self.rule = rule

    def code(self, dtypes: Dtypes) -> Code:
        """As in `PieceKernel`."""
        return compile_directional(self.width, dtypes)[0]

    def numbers(self, parts: list[Part], steering: Tensor | None) -> np.ndarray:
        """As in `PieceKernel`."""
        numbers = np.zeros((len(parts), SCALARS), dtype=np.float32)
        numbers[:, : len(BETAS)] = corrections(parts)
        if steering is not None:
            numbers[:, len(BETAS)] = [self._matrix(part) is not None for part in parts]
            numbers[:, len(BETAS) + 1 :] = steering[:, 1:].numpy()
        return numbers

    def _matrix(self, part: Part) -> tuple[int, int] | None:
        """Sides of what is orthogonalised."""
        return sides(part.shape) if self.rule.config.rank else None

    def update(self, parts: list[Part], steering: list[Tensor], good: Tensor) -> None:
        """Advance parts."""
        if not bool(good):
            return
        told = torch.cat(steering)
        directions = torch.empty(sum(len(part.theta) for part in parts)).split([len(part.theta) for part in parts])
        self._orthogonalise(parts, directions)

        def inputs(batch: Batch, scratch: Scratch) -> list[list[int]]:
            found = []
            for piece, (grad, _) in zip(batch.pieces, columns(batch, scratch), strict=True):
                whole = directions[piece.index][piece.where]
                found.append([grad.data_ptr(), *piece.addresses, whole.data_ptr()])
                window = piece.part.state.get("window")
                if window is not None and isinstance(self.rule.context, WindowContext):
                    push(window[piece.where], self.rule.context.snapshot(piece.part.theta[piece.where], grad))
            return found

        squares = self.summed("update", parts, self.numbers(parts, told), inputs, 1)
        counts = torch.tensor([[len(part.theta)] for part in parts])
        lengths = self.rule.finish(torch.ones(len(parts), 1), (squares / counts).float(), told.unsqueeze(1))
        torch._foreach_mul_(directions, lengths.flatten().tolist())
        for part, direction in zip(parts, directions, strict=True):
            # Half precision is rounded once, at the end: what other kernels do chunk by chunk.
            if part.theta.dtype == torch.float32:
                move(part, part.theta, direction, self.scratch[0])
            else:
                part.move(part.theta, direction, good)

    def _orthogonalise(self, parts: list[Part], directions: Sequence[Tensor]) -> None:
        """Write the orthogonalised momentum of matrices."""
        found = [
            (nesterov(part.gradient, part.state[MOMENTUM].float()).view(matrix), direction.view(matrix))
            for part, direction in zip(parts, directions, strict=True)
            if (matrix := self._matrix(part)) is not None
        ]
        if found:
            momenta, places = zip(*found, strict=True)
            torch._foreach_copy_(list(places), orthogonalise_each(momenta, self.rule.config.rank))


def make_kernel(rule: DirectionalRule) -> DirectionalKernel | None:
    """The kernel of a rule on the CPU; None if it is not in float32."""
    return DirectionalKernel(rule) if all(p.dtype == torch.float32 for p in rule.parameters()) else None
