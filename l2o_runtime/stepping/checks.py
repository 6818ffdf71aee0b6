"""Whether gradients and states fit a parameter, and what stands in a group is what may stand there."""

import math
import re
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from l2o_runtime.state import CONTEXT, StateSpec
from l2o_runtime.stepping.distributed import local

OWN_NAMES = re.compile(rf"({CONTEXT}|tensor_|window$|[hc]\d+$|[mv]\d*$|log_lr$)")
"""How states of rules are called; those of other names belong to somebody else, and are carried along."""

FOREIGN = {"betas", "dampening", "eps", "etas", "lambd", "rho", "tolerance_grad"}
"""Of these, each of torch's optimizers has one in its groups."""


def whole_number(value: Any) -> bool:
    """Whether it is an integer, of NumPy's for one, and not a truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_group(group: dict[str, Any]) -> None:
    """Are the numbers of a group what they may be? Those of other kinds, such as NumPy's, become Python's.

    Raises:
        ValueError: they are not.
    """
    for key in ("lr", "weight_decay", "safeguard_lr"):
        value = group.get(key, 0.0)
        if isinstance(value, Real) and not isinstance(value, int | float):
            group[key] = value = float(value)
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{key}: expected a number or a tensor of one element, got shape {tuple(value.shape)}")
        if not (isinstance(value, Tensor | int | float) and math.isfinite(value) and value >= 0):
            raise ValueError(f"{key}: expected a finite number, 0 or more, got {value!r}")


def check_saved_groups(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Were saved groups written by an optimizer like this one? A plain SGD's have no states that would tell.

    Raises:
        ValueError: they were not.
    """
    for own, group in zip(groups, saved, strict=False):  # torch tells of a wrong number of them
        foreign = sorted(FOREIGN & group.keys() - own.keys())
        if foreign:
            raise ValueError(f"param_groups: they have {', '.join(foreign)}: saved with another optimizer")


def check_gradient(param: Tensor) -> None:
    """Does the gradient, if there is one, fit a parameter, which may have got another size or place?

    Raises:
        RuntimeError: it does not, or is sparse.
    """
    grad = param.grad
    if grad is None:
        return
    if grad.is_sparse:
        raise RuntimeError("LearnedOptimizer does not support sparse gradients: use sparse=False")
    if grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"the gradient is {tuple(grad.shape)} on {grad.device}, the parameter {tuple(param.shape)} on "
            f"{param.device}: call backward() after a parameter has changed, before step()"
        )


def check_states(param: Tensor, part: Tensor, state: dict[str, Any], spec: StateSpec, own: StateSpec) -> None:
    """Do states fit a parameter, which may have got another size, type or place? Kernels rely on it.

    Raises:
        RuntimeError: they do not.
    """
    for key, (trailing, dtype) in (spec | own).items():
        each = key in spec and key != "step"
        kept = local(state[key]) if each else state[key]
        shape = (*part.shape, *trailing) if each else trailing
        typed = kept.dtype.is_floating_point if each else kept.dtype == dtype
        # The step count may lie on the CPU, as torch's own optimizers keep it.
        if kept.shape != shape or not typed or (each and (kept.device != part.device or not kept.is_contiguous())):
            raise RuntimeError(
                f"state {key} is {tuple(kept.shape)}, {kept.dtype} on {kept.device}; the parameter {tuple(part.shape)} "
                f"needs {tuple(shape)}, {dtype} on {part.device}, contiguous: give states its new size and place, or "
                "remove optimizer.state[parameter] to begin afresh"
            )


def check_state(
    state: dict[str, Any],
    param: Tensor,
    coordinates: StateSpec,
    tensors: StateSpec,
    context: StateSpec,
    others: Collection[str] = (),
    foreign: bool = True,
) -> None:
    """Does a parameter's saved state, which may be empty, fit a rule? What others keep there under other names does.

    Args:
        state: of a parameter, mostly with the context's.
        param: the parameter.
        coordinates, tensors, context: the rule's states.
        others: what else of ours there may be.
        foreign: whether there may be states of others, under names that are not ours.

    Raises:
        ValueError: it does not.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    if "step" in state:
        wanted |= {key: (*param.shape, *shape) for key, (shape, _) in coordinates.items()} | {"step": ()}
        wanted |= {key: shape for key, (shape, _) in tensors.items()}
    wanted |= {CONTEXT + key: shape for key, (shape, _) in context.items() if CONTEXT + key in state}
    known = {"step", *coordinates, *tensors, *(CONTEXT + key for key in context), *others}
    unknown = sorted(key for key in map(str, state.keys() - known) if not foreign or OWN_NAMES.match(key))
    if unknown:
        raise ValueError(f"unknown state {', '.join(unknown)}: it was saved with another rule, or another optimizer")
    for key, shape in wanted.items():
        found = tuple(state[key].shape) if key in state else None
        if found != shape:
            raise ValueError(
                f"state {key} is {found or 'missing'}, expected {shape}: it was saved with another rule, or another "
                "optimizer, or for another model"
            )
