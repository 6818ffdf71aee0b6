"""The directional rule for meta-training on the CPU: whole steps in compiled code, where nothing is differentiated.

Evolution strategies, the cross-entropy method and validation ask for steps alone. With torch's operators these are some
four hundred on a few numbers each, which take several times as long as the loss and gradient of a small network. The
code is that of `l2o_runtime.kernels`; here it goes through the tensors of all instances in one call.
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from l2o_runtime.kernels.directional import (
    compile_directional,
    compile_orthogonal,
    compile_steering,
    network_of,
    steers,
)
from l2o_runtime.kernels.directional_code import NUMBERS, TOTALS
from l2o_runtime.kernels.machine import widest
from l2o_runtime.kernels.orthogonal_code import LARGEST_RANK, room
from l2o_runtime.kernels.pieces import corrections
from l2o_runtime.kernels.plan import CORRECTIONS, ORTHOGONAL, WEIGHTS, fill, tables_of
from l2o_runtime.kernels.steering_code import KEPT, TOLD, WIDTH
from l2o_runtime.kernels.threads import share
from l2o_runtime.layout import Layout
from l2o_runtime.rules.directional import MOMENTUM, DirectionalConfig, DirectionalRule
from l2o_runtime.rules.statistics import AVERAGES
from l2o_runtime.rules.steering import STATES, TINY
from l2o_runtime.state import State
from l2o_training.fused.pieces import Pieces

DTYPES = (torch.float32,) * len(AVERAGES)


class FusedDirectionalRule(DirectionalRule):
    """A `DirectionalRule` whose steps are compiled where no gradient is asked for; float32 on the CPU."""

    def forward(
        self,
        param: Tensor,
        grad: Tensor,
        loss: Tensor,
        coordinates: State,
        optimization: State,
        layout: Layout | None = None,
    ) -> tuple[Tensor, State, State]:
        """As `Rule.forward`."""
        assert layout is not None
        if torch.is_grad_enabled() or not _known(self.config):
            return super().forward(param, grad, loss, coordinates, optimization, layout)
        lead, code = param.shape[:-1], compile_directional(widest(), DTYPES)[0]
        pieces, tensors = Pieces.of(layout, lead), Tensors.of(layout)
        steps = coordinates["step"][..., 0].reshape(-1).numpy()
        numbers = np.zeros((len(steps), pieces.tensors, NUMBERS), dtype=np.float32)
        numbers[..., CORRECTIONS] = corrections(steps)[:, None]
        numbers[:, tensors.owners, ORTHOGONAL] = self.config.rank > 0
        end_to_end = torch.contiguous_format
        delta = torch.empty_like(param, memory_format=end_to_end)
        new = {key: coordinates[key].clone(memory_format=end_to_end) for key in AVERAGES}
        arrays = [grad.contiguous(), param.contiguous(), *new.values(), delta, delta]  # nobody trails: e is not read
        sums = torch.zeros(pieces.count, TOTALS, widest(), dtype=torch.float64)
        pieces.run(code["observe"], torch.from_numpy(numbers), arrays, sums)
        told, optimization = self._steer(pieces.collect(sums)[..., 1:], tensors, optimization)
        numbers[..., WEIGHTS] = told[..., 1:]
        self._orthogonalise(tensors, arrays[0], new[MOMENTUM], delta)
        squares = torch.zeros(pieces.count, 1, widest(), dtype=torch.float64)
        pieces.run(code["update"], torch.from_numpy(numbers), arrays, squares)
        roots = (pieces.collect(squares)[..., 0] / layout.shapes[:, 1].clamp_min(1)).sqrt().clamp_min(TINY)
        lengths = torch.from_numpy(told[..., 0]).reshape(roots.shape) / roots.float()
        delta *= -lengths.index_select(-1, layout.owner)
        return delta, {"step": coordinates["step"] + 1} | new, optimization

    def _steer(self, sums: Tensor, tensors: "Tensors", state: State) -> tuple[np.ndarray, State]:
        """Of every tensor of every instance the length of its step, then w: (B, S, 1 + 4); and the new state.

        Args:
            sums: (..., S, k).
            tensors: of an instance.
            state: of tensors, (..., S) each.
        """
        lead, count = sums.shape[:-2], sums.shape[-2]
        kept = torch.stack([state[key] for key in STATES], dim=-2).reshape(-1, len(STATES), count)
        states = np.zeros((len(kept), len(STATES), tensors.room), dtype=np.float32)
        states[..., :count] = kept.numpy()
        doubles, floats = (np.repeat(rows[None], len(kept), axis=0) for rows in (tensors.doubles, tensors.floats))
        own = sums[..., 1:].reshape(len(kept), count, -1).numpy()
        fill(doubles, floats, own, states[:, STATES.index("tensor_steps"), :count])
        network = network_of(self)
        told = np.zeros((len(kept), TOLD + len(KEPT), tensors.room), dtype=np.float32)
        steer = compile_steering(_architecture(self.config))[0]
        rows = [(array.ctypes.data, array.strides[0]) for array in (doubles, floats, states, told)]
        for index in range(len(kept)):
            doubled, floated, stated, telling = (first + index * stride for first, stride in rows)
            scalars = tensors.scalars.ctypes.data
            steer(tensors.room // WIDTH, doubled, floated, scalars, stated, network.data_ptr(), telling)
        found = told[:, :TOLD, :count].transpose(0, 2, 1)
        found[..., 0] *= self.config.output_scale
        new = torch.from_numpy(states[..., :count]).view(*lead, len(STATES), count)
        return found, state | dict(zip(STATES, new.unbind(-2), strict=True))

    def _orthogonalise(self, tensors: "Tensors", grad: Tensor, momentum: Tensor, whole: Tensor) -> None:
        """Write the orthogonalised momentum of matrices where it belongs in `whole`, (..., n) each."""
        rank, threads = self.config.rank, torch.get_num_threads()
        if not rank or not len(tensors.matrices):
            return
        code = compile_orthogonal(rank, widest())[0]["orthogonalise"]
        copies = 4 * grad.shape[-1] * np.arange(grad[..., 0].numel())[:, None]
        table = np.zeros((len(copies), len(tensors.matrices), 7), dtype=np.int64)
        table[..., :3] = tensors.matrices[:, 1:]
        for column, array in zip((3, 4, 5), (grad, momentum, whole), strict=True):
            table[..., column] = array.data_ptr() + 4 * tensors.matrices[:, 0] + copies
        lines = table.reshape(-1, 7)
        threads = min(threads, len(lines))  # none of them gets nothing, which the code does not take
        free = torch.empty(threads, max(room(rank, *sides) for sides in tensors.matrices[:, 1:3].tolist()))

        def work(rows: np.ndarray, thread: int) -> None:
            rows[:, -1] = free[thread].data_ptr()
            code(len(rows), rows.ctypes.data)

        share(work, np.array_split(lines, threads))


def _known(config: DirectionalConfig) -> bool:
    """Whether there is code for it."""
    return steers(config) and config.rank <= LARGEST_RANK


@functools.cache
def _architecture(config: DirectionalConfig) -> DirectionalConfig:
    """What the code of a rule depends on; it is the same for all lengths of steps, of which many are tried."""
    return replace(config, horizon=1, needs_loss=False, output_scale=1.0)


class Matrix(NamedTuple):
    """A matrix of r ≤ c among the tensors of an instance.

    Attributes:
        first: its first coordinate.
        rows, columns: r and c.
        along: whether its numbers lie end to end along its rows (1) or its columns (0).
    """

    first: int
    rows: int
    columns: int
    along: int


class Tensors:
    """What sizes and shapes say of the tensors of an instance, as the code reads it.

    Args:
        shapes: numbers of dimensions and of coordinates.
        matrices: among them.

    Attributes:
        room: number of tensors, filled up to whole vectors.
        doubles, floats, scalars: as in `l2o_runtime.kernels.steering_code`.
        matrices: (M, 4) int64, a `Matrix` each.
        owners: (M,) the numbers of their tensors.
    """

    def __init__(self, shapes: tuple[tuple[float, float], ...], matrices: tuple[Matrix, ...]):
        dimensions, sizes = torch.tensor(shapes).unbind(-1)
        self.doubles, self.floats, self.scalars = tables_of(sizes.double(), dimensions)
        self.room = self.doubles.shape[1]
        self.matrices = np.array(matrices, dtype=np.int64).reshape(-1, len(Matrix._fields))
        ends = sizes.long().cumsum(0).numpy()
        self.owners = np.searchsorted(ends, self.matrices[:, 0], side="right")

    @classmethod
    def of(cls, layout: Layout) -> "Tensors":
        """Those of a layout, which are the same in every step."""
        assert layout.grid is not None
        there = layout.grid >= 0
        sides = [layout.grid[:, 0, 0], there[:, :, 0].sum(1), there[:, 0].sum(1), layout.grid[:, 0, 1]]
        rows = [row for row in torch.stack(sides, dim=1).tolist() if row[1]]
        matrices = tuple(Matrix(first, r, c, int(second == first + 1)) for first, r, c, second in rows)
        return _tensors(tuple(map(tuple, layout.shapes.tolist())), matrices)


_tensors = functools.lru_cache(maxsize=256)(Tensors)
