"""Context from Dynamic Mode Decomposition: eigenvalues of the best linear model of the last m steps."""

from typing import ClassVar

import torch
from torch import Tensor

from l2o_runtime.config import DMDConfig
from l2o_runtime.contexts.base import WindowContext
from l2o_runtime.contexts.gram import GramWindow, LossWindow, difference_gram
from l2o_runtime.contexts.passes import traced
from l2o_runtime.contexts.spectra import dmd, trace
from l2o_runtime.state import LARGEST, State, StateSpec

CLIP = 5.0
"""Bound on every scaled feature."""


def scaled_features(re: Tensor, im: Tensor, residual: Tensor, window: int) -> Tensor:
    """[m·log|λ|, m·arg λ, residual, 1]: growth and rotation of each mode over one window.

    Both are clipped to ±5; a mode that was dropped (λ = 0) gives zeros.

    Args:
        re, im: (..., R) eigenvalues, im ≥ 0.
        residual: (...) relative residual of the linear model.
        window: m.

    Returns:
        (..., 2R + 2).
    """
    modulus = (re.square() + im.square()).sqrt()
    there = (modulus > 1e-12).to(re.dtype)
    growth = window * modulus.clamp_min(1e-12).log()
    # arg λ = 2 atan(im / (|λ| + re)), since ONNX has no atan2, and onnxruntime no atan of doubles.
    rotation = window * 2 * (im / (modulus + re).clamp_min(1e-12)).float().atan().to(re.dtype)
    rotation = torch.where((im == 0) & (re < 0), torch.full_like(rotation, CLIP), rotation)
    modes = torch.cat([growth.clamp(-CLIP, CLIP) * there, rotation.clamp(-CLIP, CLIP) * there], dim=-1)
    return torch.cat([modes, residual.unsqueeze(-1), torch.ones_like(residual).unsqueeze(-1)], dim=-1)


class DMD(WindowContext):
    """Eigenvalues of the window, as features; zero until the window is full.

    Attributes:
        elementary: use the solver made of elementary operations (set for ONNX export).
    """

    def __init__(self, config: DMDConfig):
        losses = config.snapshots == "loss"
        super().__init__(LossWindow(config.window, config.delay) if losses else GramWindow(config))
        self.config = config
        self.elementary = False

    @property
    def context_spec(self) -> StateSpec:
        """The window's state and, where it is not recomputed every step, the features being held."""
        held: StateSpec = {"held": ((self.config.width,), torch.float32)} if self.config.every > 1 else {}
        return super().context_spec | held

    def snapshot(self, param: Tensor, grad: Tensor) -> Tensor:
        """θ, or g: zero where it is no number, and clipped to ± `LARGEST`, so that inner products are finite."""
        return grad.nan_to_num().clamp(-LARGEST, LARGEST) if self.config.snapshots == "gradient" else param

    def read(self, statistics: Tensor, loss: Tensor, state: State) -> tuple[Tensor, State]:
        """Advance the window and read its eigenvalues."""
        new = self.window.advance(statistics, loss, state)
        every = self.config.every
        if every == 1:
            return self.features(new), new
        # The first full window is always looked at.
        due = (new["count"] - self.window.size) % every == 0
        if traced() or bool(due.any()):
            new["held"] = torch.where(due.unsqueeze(-1), self.features(new), state["held"])
        else:
            new["held"] = state["held"]
        return new["held"], new

    def features(self, state: State) -> Tensor:
        """Features (..., c) float32 of the window in `state`."""
        gram = self.window.snapshot_gram(state)
        if self.config.snapshots == "delta":
            gram = difference_gram(gram)
        re, im, residual = dmd(gram, self.config.rank, elementary=self.elementary)
        if self.config.features == "scaled":
            features = scaled_features(re, im, residual, self.config.window)
        else:
            features = torch.cat([re, im], dim=-1)
        ready = self.window.full(state) & (trace(gram) > 0)
        return torch.where(ready.unsqueeze(-1), features, torch.zeros_like(features)).float()


class TensorDMD(DMD):
    """`DMD` of every tensor by itself."""

    per_tensor: ClassVar[bool] = True

    def observe_tensors(self, param: Tensor, grad: Tensor, state: State, owner: Tensor, tensors: int) -> Tensor:
        """`observe` of every tensor: (..., S, k)."""
        assert isinstance(self.window, GramWindow)
        return self.window.observe_tensors(self.snapshot(param, grad), state, owner, tensors).double()
