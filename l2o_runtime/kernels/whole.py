"""Whole steps of few coordinates in one call: where the code of `whole_code` finds what."""

import ctypes
from collections.abc import Callable, Mapping

import numpy as np
import torch

from l2o_runtime.kernels.directional_code import TOTALS
from l2o_runtime.kernels.machine import Compiled, once
from l2o_runtime.kernels.orthogonal_code import LARGEST_RANK
from l2o_runtime.kernels.plan import MATRIX_GRAD, MATRIX_MOMENTUM, ROOM, Plan
from l2o_runtime.kernels.whole_code import CALLS, FOUND, FRAME, LOSS, PULSE, ZERO, whole_module
from l2o_runtime.rules.directional import MOMENTUM

LOSS_AT = FRAME.index("loss")
"""Where a frame has whether the loss is finite."""


@once
def compile_whole(width: int) -> tuple[Callable[[int], int], Compiled]:
    """The function of `whole_code.whole_module`, and what keeps it alive; once per process."""
    made = Compiled(whole_module, width)
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(made.address("step")), made


def at_once(plan: Plan, rank: int) -> bool:
    """Whether a step of a plan can be taken in one call: it is small, and nothing has to be converted before."""
    return (
        plan.alone
        and len(plan.batches) == len(plan.waves) == 1
        and rank <= LARGEST_RANK
        and all(part.state[MOMENTUM].dtype == torch.float32 for part in plan.parts)
    )


class Frame:
    """All that the code reads of a plan, which it belongs to.

    Args:
        plan: with `at_once`; its table of matrices is filled up.
        code: addresses of the functions that it calls, by name; without matrices there is none for them.
        network: address of the weights of the network of tensors.

    Attributes:
        rates: (parts,) float64, lr, to be filled in.
    """

    def __init__(self, plan: Plan, code: Mapping[str, int], network: int):
        (wave,) = plan.waves
        self.plan, self.table, self.matrices = plan, wave.table, np.array(wave.numbers, dtype=np.int64)
        self.room = torch.empty(plan.free, dtype=torch.float32, device="cpu")
        self.table[:, MATRIX_MOMENTUM] = [plan.parts[index].state[MOMENTUM].data_ptr() for index in wave.numbers]
        self.table[:, ROOM] = self.room.data_ptr()
        self.totals = np.zeros((len(plan.parts), TOTALS))
        self.sizes, self.rates = plan.sizes.astype(np.float64), np.zeros(len(plan.parts))
        doubles, floats, scalars, states = plan.steering
        counts = {"parts": len(plan.parts), "pieces": len(plan.owners), "matrices": len(self.matrices)}
        tables: dict[str, np.ndarray] = {
            "table": plan.table,
            "owners": plan.owners,
            "sums": plan.sums,
            "totals": self.totals,
            "numbers": plan.numbers,
            "sizes": self.sizes,
            "rates": self.rates,
            "matrix": self.table,
            "steps": plan.owned,
        }
        known = {
            **dict.fromkeys(CALLS, 0),
            **code,
            **counts,
            **{name: array.ctypes.data for name, array in tables.items()},
            **{"blocks": plan.blocks, "copies": len(plan.scatter), "scatter": plan.scattering, "loss": 1},
            **{"doubles": doubles, "floats": floats, "scalars": scalars, "states": states},
            **{"network": network, "told": plan.telling},
        }
        self.values = np.array([known[name] for name in FRAME], dtype=np.int64)
        self.address = self.values.ctypes.data

    def step(self, call: Callable[[int], int], loss: bool) -> list[bool]:
        """Take a step of what the plan aims at.

        Args:
            call: the code.
            loss: whether the loss is finite.

        Returns:
            What is against it, as in `Kernel.step`; if nothing is, it was taken.
        """
        self.table[:, MATRIX_GRAD] = self.plan.grads[self.matrices]
        self.values[LOSS_AT] = loss
        found = call(self.address)
        return [bool(found & bit) for bit in (PULSE, LOSS, FOUND, ZERO)]
