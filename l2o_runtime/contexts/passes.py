"""Passes over coordinates that are compiled where numba is installed; `l2o_runtime.contexts.compiled` has them."""

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import cast

import numpy as np
import torch
from torch import Tensor


def turned_off() -> bool:
    """Whether the environment turns compiled code off, as it is now."""
    return os.environ.get("L2O_KERNELS") == "plain"


def traced() -> bool:
    """Whether what is computed becomes a graph, for which numbers must not be looked at."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())  # type: ignore


def compiled_pass(name: str, *tensors: Tensor) -> Callable[..., None] | None:
    """A compiled pass, for plain contiguous float32 tensors on the CPU, outside of traces and gradients.

    Args:
        name: of the function.
        tensors: what it is to read.

    Returns:
        The function, which takes numpy's arrays; None where torch's operators have to do.
    """
    if traced():
        return None
    for tensor in tensors:
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()
        if not plain or tensor.dtype != torch.float32 or tensor.requires_grad:
            return None
    module = None if turned_off() else _passes()
    return None if module is None else cast("Callable[..., None]", getattr(module, name))


def listed(tensor: Tensor, own: int) -> np.ndarray:
    """A contiguous tensor for a pass, in its own memory: all leading dimensions as one before the last `own`."""
    return tensor.unsqueeze(0).flatten(0, -1 - own).numpy()


@functools.cache
def _passes() -> ModuleType | None:
    if find_spec("numba") is None:
        return None
    from l2o_runtime.contexts import compiled as passes

    return passes
