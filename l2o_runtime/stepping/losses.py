"""The loss of a step: what a script passes, or its closure returns, as one number that all ranks have in common."""

from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from l2o_runtime.stepping.distributed import ALONE, Groups, mean_loss, meeting_place

RANKS = (
    "pass process_group=torch.distributed.group.WORLD if they step together (DDP), for the mean of their losses; "
    f"or process_group={ALONE!r} if this one trains by itself"
)
"""What to do where it is not known which ranks step together."""

Loss = Tensor | float | None
"""What `step` takes."""


def evaluate(closure: Callable[[], Any] | None, loss: Loss) -> tuple[Any, Loss]:
    """What the closure returned, and the loss of the step: the given one, else the closure's.

    Raises:
        TypeError: the closure cannot be called, or what it returned is no loss.
    """
    if closure is None:
        return None, loss
    if not callable(closure):
        raise TypeError("step: expected a closure; pass the loss by keyword, step(loss=loss)")
    with torch.enable_grad():
        returned = closure()
    if not (returned is None or isinstance(returned, (Tensor, Real))):
        raise TypeError(f"closure: expected it to return the loss, got a {type(returned).__name__}")
    given: Loss = returned if loss is None else loss  # type: ignore[assignment]  # NumPy's numbers are Real
    if isinstance(given, Tensor) and given.is_complex():
        raise TypeError(f"closure: expected it to return a real loss, got one of {given.dtype}")
    return returned, given


def common_loss(
    loss: Loss, param_groups: list[dict[str, Any]], near: Iterable[Tensor], groups: Groups | None, wanted: bool = True
) -> Tensor:
    """The mean loss of the ranks that step together, to be minimized.

    It is 0 where there is none; where it is not known who steps together, for with losses of their own ranks would
    drift apart; and where ranks would exchange what nobody wants.

    Args:
        loss: this rank's.
        param_groups: of the optimizer; the first says whether it maximizes.
        near: parameters; the loss is put beside the first of them.
        groups: from `loss_groups`; all of their ranks have to call.
        wanted: whether anybody looks at it.

    Returns:
        () float32.

    Raises:
        TypeError: the loss is no number.
        ValueError: it is more than one.
    """
    if not (loss is None or isinstance(loss, (Tensor, Real))):
        raise TypeError(f"loss: expected a number or a tensor of one element, got a {type(loss).__name__}")
    given, device = loss is not None, meeting_place(near, groups or ())
    if not isinstance(loss, Tensor):  # filled in, not copied, for which a device would be waited for
        loss = torch.full((), float(loss or 0.0), dtype=torch.float64, device=device)
    value = loss.detach().to(device, torch.float32)
    if value.numel() != 1:
        raise ValueError(f"loss: expected one number, got shape {tuple(value.shape)}")
    value = value.reshape(())
    if groups is None or (groups and not wanted):
        return torch.zeros_like(value)
    value = mean_loss(value, given, groups)
    return -value if param_groups[0].get("maximize") else value
