"""Fast implementations of a rule's update, one per kind of device; without one, the plain loop does the work.

A kernel advances all coordinates of a part in place, exactly as the plain loop of `l2o_runtime.stepping.engine.advance`
does but for rounding. The environment variable L2O_KERNELS=plain turns all of them off. What is for GPUs has run on
none yet and has to be asked for: L2O_KERNELS=triton is the LSTM's kernel; `foreach`, or `compiled`, the directional
rule's step in few operators, which runs on CPUs too, for tests.
"""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from l2o_runtime.contexts.passes import turned_off
from l2o_runtime.rules import DirectionalRule, LSTMRule, RNNPropRule, Rule, TieredRule
from l2o_runtime.stepping.parts import Part

ASKED = ("", "plain", "foreach", "compiled", "triton")
"""What L2O_KERNELS may be."""

LOADED = time.time()
"""When this package was imported."""


class Kernel(ABC):
    """A fast implementation of one rule, for many parts at once.

    Attributes:
        whole: whether it has a `step`.
    """

    whole: bool = False

    def step(self, parts: list[Part], loss: Tensor) -> Tensor:
        """A whole step of all parts, as `observe`, `diagnose` and `advance` of `l2o_runtime.stepping.engine` take it.

        Args:
            parts: of which `fits` holds, all on one device.
            loss: (), on that device.

        Returns:
            The verdict: see `diagnose`.
        """
        raise NotImplementedError

    def forget(self) -> None:
        """Keep nothing of earlier steps."""
        return

    def observe(self, parts: list[Part]) -> Tensor | None:
        """Σ|g| and the rule's own sums over every part, those of its context aside: (parts, 1 + k) float64.

        None where the plain loop sums up.
        """
        return None

    @abstractmethod
    def update(self, parts: list[Part], steering: list[Tensor], good: Tensor) -> None:
        """Advance states and parameters of parts in place, if good; `Part.finish` is left to the caller.

        Args:
            parts: of which `fits` holds, all on one device.
            steering: of each part, (1, c), on that device.
            good: () bool, on that device.
        """


def select(rule: Rule, device: torch.device) -> Kernel | None:
    """The kernel for a frozen rule on a device, None where there is none.

    Args:
        rule: on that device.
        device: of the parameters.

    Raises:
        ValueError: the environment asks for something else.
    """
    asked = os.environ.get("L2O_KERNELS", "")
    if asked not in ASKED:
        raise ValueError(f"L2O_KERNELS: expected {', '.join(ASKED[1:])} or nothing, got {asked!r}")
    if turned_off():
        return None
    if asked in ("foreach", "compiled") and isinstance(rule, DirectionalRule):
        from l2o_runtime.kernels import foreach

        return foreach.make_kernel(rule, torch.compile) if asked == "compiled" else foreach.make_kernel(rule)
    if device.type == "cuda" and asked == "triton" and find_spec("triton") is not None:
        from l2o_runtime.kernels import triton

        return triton.TritonKernel(rule) if triton.supported(rule) else None
    if device.type == "cpu" and find_spec("llvmlite") is not None:
        from l2o_runtime.kernels import directional, lstm, tiered

        makers: dict[type, Callable[..., Kernel | None]] = {
            LSTMRule: lstm.make_kernel,
            RNNPropRule: lstm.make_kernel,
            TieredRule: tiered.make_kernel,
            DirectionalRule: directional.make_kernel,
        }
        return makers[type(rule)](rule) if type(rule) in makers else None
    return None


def fits(part: Part) -> bool:
    """Whether a part is what kernels expect: plain tensors, its state contiguous and in float32 or bfloat16.

    Gradients that are negated lazily, or zeros without memory, do not lie where their address says.
    """
    grad = part.grad
    return part.plain and type(grad) is Tensor and not grad.is_neg() and not grad._is_zerotensor()
