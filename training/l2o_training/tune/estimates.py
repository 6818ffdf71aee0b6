"""What tuners share: from a trajectory of hypergradients to a step, and what they refuse."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from l2o_runtime.config import require
from l2o_training.meta.estimators.glocal import Foretold, foretell

Estimate = Literal["glocal", "local", "mean"]


def relative(estimate: Tensor, trajectory: Tensor) -> Tensor:
    """ĥ / mean |h_t|, within −1 … 1, by hyper-parameter: short where local hypergradients disagree.

    Args:
        estimate: (p,).
        trajectory: (τ, p).

    >>> relative(torch.tensor([0.3, 9.0]), torch.tensor([[1.0, 2.0], [-1.0, 2.0]]))
    tensor([0.3000, 1.0000])
    """
    size = trajectory.abs().mean(0)
    return torch.where(size > 0, estimate / size, 0.0).clamp(-1, 1)


def follow(
    trajectory: Tensor, estimate: Estimate, tolerance: float, delay: int | None = None
) -> tuple[Tensor, Foretold | None]:
    """The `relative` step that an estimate from a trajectory (τ, p) asks for, and what was foretold, if anything."""
    if estimate == "glocal":
        found = foretell(trajectory, tolerance, delay)
        return relative(found.value, trajectory), found
    return relative(trajectory[-1] if estimate == "local" else trajectory.mean(0), trajectory), None


def require_settings(what: str, tau: int, meta_lr: float, estimate: str, tolerance: float) -> None:
    """Refuse what nothing can be estimated with.

    Args:
        what: is measured τ times.
        tau, meta_lr, estimate, tolerance: as in `GlocalTuner`.

    Raises:
        ConfigError: a number is out of range, or there is no such estimate.
    """
    require(tau >= 3, f"tau: expected 3 {what} or more, got {tau}")
    require(meta_lr > 0, f"meta_lr: expected a positive number, got {meta_lr}")
    require(0 <= tolerance <= 1, f"tolerance: expected a number in 0..1, got {tolerance}")
    allowed = ", ".join(get_args(Estimate))
    require(estimate in get_args(Estimate), f"estimate: {estimate!r} is not one of {allowed}")


def gradients(what: str, loss: Any, params: list[Tensor], create_graph: bool = False) -> list[Tensor | None]:
    """Of a loss, None where it does not depend on a parameter."""
    good = isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad
    got = f"shape {tuple(loss.shape)}, graph: {loss.requires_grad}" if isinstance(loss, Tensor) else repr(loss)
    require(good, f"{what}: expected a loss of one number with its graph (no .item(), no no_grad), got {got}")
    return list(torch.autograd.grad(loss.sum(), params, create_graph=create_graph, allow_unused=True))
