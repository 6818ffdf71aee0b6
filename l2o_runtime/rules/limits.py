"""How long steps may be in networks that are larger than a rule knows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from l2o_runtime.config import require
from l2o_runtime.state import LARGEST


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """How steps are held back in networks of N parameters, more than a rule knows from its meta-training.

    Steps are multiplied by κ = (known_parameters / N)^¼: a relative step that changes what a layer gives by a certain
    share is shorter by the root of its width, and of more layers each has to do less. In step t, e^(2 s) is at least
    (1 − κ) / √(1 + t / fading): that it shrinks at once was learned where a few hundred steps are enough. And no
    coordinate of a direction exceeds `largest`: those whose gradients are nothing but rounding would go far.

    Attributes:
        known_parameters: up to so many nothing is limited.
        fading: steps after which the least length begins to fall, with the root of their number.
        largest: bound on every coordinate of a direction, beside a root mean square of 1.

    Source: the root of the width as in Yang et al. 2022 (μP); that of the time as in stochastic approximation
    (Zinkevich 2003).
    """

    known_parameters: int
    fading: float = 25.0
    largest: float = 40.0

    def __post_init__(self) -> None:
        known = self.known_parameters
        require(1 <= known <= 10**15, f"known_parameters: must be in 1..10**15, got {known}")
        require(0 < self.fading <= 1e9, f"fading: must be in (0, 1e9], got {self.fading}")
        require(1 <= self.largest <= 1e9, f"largest: must be in [1, 1e9], got {self.largest}")

    def trust(self, count: Tensor) -> Tensor:
        """κ = min(1, (known_parameters / N)^¼), float32, for N parameters (...)."""
        return (self.known_parameters / count).clamp_max(1.0).pow(0.25).float()

    def lengthen(self, length: Tensor, trust: Tensor, steps: Tensor) -> Tensor:
        """e^(2 s), but at least what may be left of it after so many steps; all (..., S) or what broadcasts to it."""
        return torch.maximum(length, (1 - trust) / (1 + steps / self.fading).sqrt())

    def bound(self, trust: Tensor) -> Tensor:
        """What no coordinate of a direction exceeds, in the shape of κ."""
        return torch.where(trust < 1, torch.full_like(trust, self.largest), LARGEST)
