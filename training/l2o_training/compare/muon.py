"""Muon as people use it: for matrices, with AdamW for all else."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from l2o_runtime.rules.orthogonal import sides


def is_matrix(param: Tensor) -> bool:
    """Whether a parameter, flattened to its first dimension × the rest, has both sides above 1."""
    return sides(param.shape) is not None


class MuonAdamW(Optimizer):
    """torch's Muon for all matrices, convolutions flattened to out × rest, and torch's AdamW for the rest.

    One learning rate serves both: Muon's updates are scaled to the size of AdamW's. Embeddings and output layers are
    matrices here, where language models' recipes leave them to AdamW: an optimizer that is given tensors does not know.

    Source: Liu et al. 2025 (arXiv 2502.16982), section 2.2, for the scaling.

    Args:
        params: tensors, not groups of them; matrices are contiguous.
        lr: learning rate.
        weight_decay: of both, decoupled.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.01):
        params = list(params)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        # Muon takes two dimensions only: it is shown views, which share the memory of the parameters.
        self.views = [(param, param.detach().view(len(param), -1)) for param in params if is_matrix(param)]
        rest = [param for param in params if not is_matrix(param)]
        self.parts: list[Optimizer] = []
        if self.views:
            views = [view for _, view in self.views]
            self.parts.append(Muon(views, lr, weight_decay, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self.parts.append(AdamW(rest, lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """A step of both, at the learning rate of the group."""
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure: call backward, and then step()")
        for param, view in self.views:
            view.grad = None if param.grad is None else param.grad.view_as(view)
        for part in self.parts:
            part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            part.step()
            self.state.update(part.state)  # theirs is this one's, so that its bytes are counted
