"""Fast implementations of a rule's update, one per kind of device; without one, the plain loop does the work.

A kernel advances all coordinates of a part in place, exactly as the plain loop of `l2o_runtime.stepping.engine.advance`
does but for rounding. The environment variable L2O_KERNELS=plain turns all of them off; the Triton kernel, which has
run in its interpreter but on no GPU yet, has to be asked for: L2O_KERNELS=triton.
"""

import os
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from l2o_runtime.contexts.passes import turned_off
from l2o_runtime.rules.lstm import Rule
from l2o_runtime.rules.tiered import ScaleRule
from l2o_runtime.stepping.parts import STATE_DTYPES, Part


class Kernel(Protocol):
    """A fast `update` of one rule."""

    def __call__(self, part: Part, context: Tensor, good: Tensor) -> None:
        """Advance the recurrent state, the features' state and the parameter of a part in place, if good.

        Args:
            part: of which `fits` holds; `Part.finish` is left to the caller.
            context: (c,), on the part's device.
            good: () bool, on the part's device.
        """


class TensorKernel(Protocol):
    """Fast statistics and a fast `update` of a rule with a network per tensor."""

    def observe(self, parts: list[Part]) -> Tensor:
        """Σ|g| and the sums of `ScaleRule.terms` over every part: (parts, 1 + k) float64."""

    def __call__(self, parts: list[Part], contexts: list[Tensor], good: Tensor) -> None:
        """As `Kernel`, for many parts at once, each with its context (1, c)."""


def select(rule: Rule, device: torch.device) -> Kernel | TensorKernel | None:
    """The kernel for a frozen rule on a device, None where there is none.

    Args:
        rule: on that device.
        device: of the parameters.
    """
    if turned_off():
        return None
    if device.type == "cuda" and os.environ.get("L2O_KERNELS") == "triton" and find_spec("triton") is not None:
        from l2o_runtime.kernels import triton

        return triton.TritonKernel(rule) if triton.supported(rule) else None
    if device.type == "cpu" and find_spec("llvmlite") is not None:
        from l2o_runtime.kernels import lstm as cpu
        from l2o_runtime.kernels import tiered as scale

        return scale.make_kernel(rule) if isinstance(rule, ScaleRule) else cpu.make_kernel(rule)
    return None


def fits(part: Part) -> bool:
    """Whether a part is what kernels expect: plain tensors, its state contiguous and in float32 or bfloat16."""
    tensors = [part.theta, part.grad, *part.state.values()]
    return all(type(t) is Tensor for t in tensors) and all(
        t.dtype in STATE_DTYPES and t.is_contiguous() for t in part.state.values()
    )
