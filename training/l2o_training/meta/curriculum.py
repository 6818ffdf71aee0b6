"""Curricula: which optimizations a solver is trained on, one after the other, and when that changes."""

import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass

from l2o_training.config import TrainConfig

VALIDATION_SEED = 2**31
"""Validation has seeds from here on, comparisons have smaller ones: PyTorch's CPU generator reads 32 bits of a seed."""


@dataclass(frozen=True)
class Episode:
    """One optimization, as it was drawn: all that is needed to begin it.

    Attributes:
        task: index of the task.
        seed: of its instances.
        horizon: steps until the next episode, a multiple of the truncation.
        shown: per instance, 1 if the solver sees its loss, else 0.
        scale: per instance, its parameters' scale.
    """

    task: int
    seed: int
    horizon: int
    shown: list[float]
    scale: list[float]


@dataclass(frozen=True)
class Stage:
    """A part of meta-training that a curriculum begins.

    Attributes:
        name: for the record.
    """

    name: str


class Curriculum(ABC):
    """What is done next. All ranks ask it the same, and a resumed run tells it the scores so far once more."""

    @abstractmethod
    def draw(self, number: int) -> Episode:
        """The episode of a number. It depends on nothing but the number and the stage; one under way goes on as it is.

        Args:
            number: 0, 1, 2, …; of L task slots, slot i does i, i + L, i + 2 L, …
        """

    @abstractmethod
    def advance(self, score: float) -> Stage | None:
        """Hear the score of a validation.

        Returns:
            The stage that begins with it; None to go on.
        """


class RandomEpisodes(Curriculum):
    """Tasks by chance, and always alike: it has no stages.

    Horizons are log-uniform in shortest … T, some losses are hidden, and parameters get a log-uniform scale.

    Args:
        config: the run.
    """

    def __init__(self, config: TrainConfig):
        self.config = config

    def draw(self, number: int) -> Episode:
        """From random numbers of its own, of the run's seed and the number."""
        config, draw = self.config, random.Random(f"{self.config.seed}/{number}")
        task = draw.choice(range(len(config.tasks)))
        seed = draw.randrange(2**40)  # of 32 bits that count: those of a validation come up once in 10⁸ episodes or so
        shown = [float(draw.random() >= config.hide_loss) for _ in range(config.batch)]
        scale = [math.exp(draw.uniform(-config.rescale, config.rescale)) for _ in range(config.batch)]
        low, high = (math.log(steps) for steps in (config.shortest or config.horizon, config.horizon))
        unit = config.unroll or 1
        truncations = max(1, round(math.exp(draw.uniform(low, high)) / unit))
        return Episode(task, seed, truncations * unit, shown, scale)

    def advance(self, score: float) -> Stage | None:
        """Always None."""
        return None


def make_curriculum(config: TrainConfig) -> Curriculum:
    """The curriculum of a run."""
    return RandomEpisodes(config)
