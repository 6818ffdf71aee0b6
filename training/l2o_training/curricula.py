"""Curricula as configuration: what a preset's `curriculum` may hold."""

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from l2o_runtime.config import require


@dataclass(frozen=True, kw_only=True)
class RandomConfig:
    """Optimizations drawn by chance, from the first epoch to the last alike."""

    kind: ClassVar[str] = "random"


@dataclass(frozen=True, kw_only=True)
class GrowingConfig:
    """Optimizations that become longer whenever training at a length helps no more at the next one.

    Attributes:
        horizons: lengths, those below that of the run, whose own comes last.
        patience: validations of a stage before it may end; it ends where the latest is not the best.

    Source: Chen et al. 2020, "Training Stronger Baselines for Learning to Optimize", section 3.1.
    """

    kind: ClassVar[str] = "growing"
    horizons: tuple[int, ...] = (100, 200, 500, 1000, 1500, 2000, 2500, 3000)
    patience: int = 3

    def __post_init__(self) -> None:
        rises = len(self.horizons) > 0 and list(self.horizons) == sorted({*self.horizons}) and self.horizons[0] >= 1
        require(rises, f"horizons: must be one length or more that increase, got {self.horizons}")
        require(self.patience >= 1, f"patience: must be 1 or more, got {self.patience}")

    def lengths(self, horizon: int) -> list[int]:
        """Of the stages of a run.

        >>> GrowingConfig().lengths(400)
        [100, 200, 400]
        """
        return [*(length for length in self.horizons if length < horizon), horizon]


@dataclass(frozen=True, kw_only=True)
class LayerwiseConfig:
    """Layers of an unrolled solver, trained one after the other: the new one, then all of them at lower rates.

    Attributes:
        updates: outer updates of an epoch, each on whole optimizations of fresh instances.
        decays: of lr, for each stage in which all layers so far are trained.
        patience: validations that are not the best of their stage, one after the other, which end it.
        longest: validations of a stage at the most.

    Source: Chen, Liu, Wang & Yin 2018, "Theoretical Linear Convergence of Unfolded ISTA", section 4.
    """

    kind: ClassVar[str] = "layerwise"
    updates: int = 400
    decays: tuple[float, ...] = (0.2, 0.02)
    patience: int = 5
    longest: int = 1000

    def __post_init__(self) -> None:
        for key in ("updates", "patience", "longest"):
            require(getattr(self, key) >= 1, f"{key}: must be 1 or more, got {getattr(self, key)}")
        lower = all(0 < decay < 1 for decay in self.decays)
        require(lower, f"decays: must be between 0 and 1 each, got {self.decays}")


CurriculumConfig: TypeAlias = RandomConfig | GrowingConfig | LayerwiseConfig
"""How optimizations are drawn, told apart by its `kind`."""
