"""The CPU kernel of the tiered rule: its sums and its steps, on several threads; see `tiered_code` for the code."""

import numpy as np
import torch
from torch import Tensor

from l2o_runtime.contexts import WindowContext
from l2o_runtime.kernels.lstm import move, push
from l2o_runtime.kernels.machine import Compiled, once
from l2o_runtime.kernels.pieces import (
    Batch,
    Code,
    Dtypes,
    PieceKernel,
    batches_of,
    columns,
    compiled,
    corrections,
    reading,
    steps_of,
)
from l2o_runtime.kernels.tiered_code import SCALARS, TOTALS, WEIGHTS, tiered_module
from l2o_runtime.rules.features import lowest_root
from l2o_runtime.rules.statistics import BETAS
from l2o_runtime.rules.tiered import SCALARS as IN_STEERING
from l2o_runtime.rules.tiered import TieredRule
from l2o_runtime.stepping.parts import Part


@once
def compile_tiered(width: int, dtypes: Dtypes, restrained: bool) -> tuple[Code, Compiled]:
    """The functions of `tiered_code.tiered_module`, and what keeps them alive; once per process."""
    return compiled(("observe", "update"), tiered_module, width, dtypes, restrained)


class TieredKernel(PieceKernel):
    """Sums and steps of one rule; see `l2o_runtime.kernels.Kernel`.

    Args:
        rule: frozen, on the CPU, in float32.
    """

    totals = TOTALS

    def __init__(self, rule: TieredRule):
        super().__init__()
        self.rule = rule
        self.first, last = (
            torch.cat([layer.weight, layer.bias.unsqueeze(-1)], dim=-1).detach().numpy()
            for layer in (rule.into, rule.out)
        )
        self.last = last.ravel()

    def code(self, dtypes: Dtypes) -> Code:
        """As in `PieceKernel`."""
        return compile_tiered(self.width, dtypes, self.rule.config.noise_floor is not None)[0]

    def update(self, parts: list[Part], steering: list[Tensor], good: Tensor) -> None:
        """Advance parts."""
        if not bool(good):
            return
        numbers = self.numbers(parts, torch.cat(steering))

        def work(batch: Batch, thread: int) -> None:
            scratch = self.scratch[thread]
            pairs, sizes = columns(batch, scratch), [len(piece) for piece in batch.pieces]
            deltas = scratch.delta[: sum(sizes)].split(sizes)
            self.call("update", batch, numbers, reading(batch, pairs), [delta.data_ptr() for delta in deltas])
            for piece, (grad, _), delta in zip(batch.pieces, pairs, deltas, strict=True):
                theta, window = piece.part.theta[piece.where], piece.part.state.get("window")
                if window is not None and isinstance(self.rule.context, WindowContext):
                    push(window[piece.where], self.rule.context.snapshot(theta, grad))
                move(piece.part, theta, delta, scratch)

        self.share(work, batches_of(parts))

    def numbers(self, parts: list[Part], steering: Tensor | None) -> np.ndarray:
        """As in `PieceKernel`: the weights of the network have the gains and biases of their tensor in them.

        In NumPy, whose calls on a handful of numbers take a fraction of torch's.
        """
        numbers = np.zeros((len(parts), SCALARS + WEIGHTS), dtype=np.float32)
        numbers[:, : len(BETAS)] = corrections(steps_of(parts))
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


def make_kernel(rule: TieredRule) -> TieredKernel | None:
    """The kernel of a rule on the CPU; None if it is not in float32."""
    return TieredKernel(rule) if all(p.dtype == torch.float32 for p in rule.parameters()) else None
