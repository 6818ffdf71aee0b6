"""Curricula: which optimizations a solver is trained on, one after the other, and when that changes."""

import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass

from l2o_training.config import TrainConfig
from l2o_training.curricula import GrowingConfig, LayerwiseConfig

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
    """A part of meta-training.

    Attributes:
        name: for the record.
        number: 0, 1, …
        horizon: inner steps per epoch, and of the longest optimization.
        validated: inner steps of a validation.
        lr: factor on the outer learning rate.
        trained: where given, only parameters whose names end so are trained.
        updates: outer updates of an epoch, where optimizations are whole.
    """

    name: str
    number: int
    horizon: int
    validated: int
    lr: float = 1.0
    trained: tuple[str, ...] = ()
    updates: int = 1


class Curriculum(ABC):
    """What is done next. All ranks ask it the same, and a resumed run tells it the scores so far once more.

    Attributes:
        stage: the present one.
        over: whether the last stage is, before the run has done all its epochs.
    """

    stage: Stage
    over: bool = False

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
            The stage that begins with it, from the best of the stage before; None to go on.
        """


class RandomEpisodes(Curriculum):
    """Tasks by chance, and always alike: it has a single stage.

    Horizons are log-uniform in shortest … T, some losses are hidden, and parameters get a log-uniform scale.

    Args:
        config: the run.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.stage = Stage("", 0, config.horizon, config.horizon)

    def draw(self, number: int) -> Episode:
        """From random numbers of its own, of the run's seed and the number."""
        config, draw = self.config, random.Random(f"{self.config.seed}/{number}")
        task = draw.choice(range(len(config.tasks)))
        seed = draw.randrange(2**40)  # of 32 bits that count: those of a validation come up once in 10⁸ episodes or so
        if VALIDATION_SEED <= seed < 2 * VALIDATION_SEED:  # never, with tasks of one's own, which read all of them
            seed += 2 * VALIDATION_SEED
        shown = [float(draw.random() >= config.hide_loss) for _ in range(config.batch)]
        scale = [math.exp(draw.uniform(-config.rescale, config.rescale)) for _ in range(config.batch)]
        longest = self.stage.horizon
        low, high = (math.log(steps) for steps in (config.shortest or longest, longest))
        unit = config.unroll or 1
        truncations = max(1, round(math.exp(draw.uniform(low, high)) / unit))
        return Episode(task, seed, truncations * unit, shown, scale)

    def advance(self, score: float) -> Stage | None:
        """Always None."""
        return None


class Stages(RandomEpisodes):
    """Random tasks in stages one after the other, each from the best of the one before; the run ends with the last.

    Args:
        config: the run.
        stages: all of them.

    Attributes:
        scores: of the present stage; one that is no number counts as the worst.
    """

    def __init__(self, config: TrainConfig, stages: list[Stage]):
        super().__init__(config)
        self.stages, self.stage, self.scores = stages, stages[0], list[float]()

    @abstractmethod
    def ends(self, score: float) -> bool:
        """Whether the present stage ends with its latest score, which stands among `scores`."""

    def advance(self, score: float) -> Stage | None:
        """The next stage, as soon as this one helps no more."""
        self.scores.append(score if score == score else math.inf)
        if not self.ends(score):
            return None
        if self.stage is self.stages[-1]:
            self.over = True
            return None
        self.stage, self.scores = self.stages[self.stage.number + 1], []
        return self.stage


class GrowingHorizons(Stages):
    """Random tasks, and horizons that grow: a stage trains at a length and is validated at the next one.

    A stage that has been validated `patience` times ends where the latest score is not its best. The next one begins
    with the weights of the best. The last stage is validated at its own length, and the run ends with it.

    Source: Chen et al. 2020, "Training Stronger Baselines for Learning to Optimize", section 3.1.
    """

    def __init__(self, config: TrainConfig, growing: GrowingConfig):
        lengths, self.patience = growing.lengths(config.horizon), growing.patience
        stages = [
            Stage(f"horizon {length}", number, length, lengths[min(number + 1, len(lengths) - 1)])
            for number, length in enumerate(lengths)
        ]
        super().__init__(config, stages)

    def ends(self, score: float) -> bool:
        """Whether the latest score is not the best, after enough of them."""
        return len(self.scores) >= self.patience and not score <= min(self.scores)


class Layerwise(Stages):
    """Layers one after the other: those before stay as they are, then all are trained, at lower and lower rates.

    A stage ends with `patience` validations that were not its best, or with the `longest`; the next one begins with its
    best. The run ends with the last layer's last stage.

    Source: Chen, Liu, Wang & Yin 2018, section 4, and the code of Liu et al. 2019 (ALISTA).
    """

    def __init__(self, config: TrainConfig, layerwise: LayerwiseConfig):
        self.layerwise, stages = layerwise, list[Stage]()
        for layer in range(config.horizon):
            names = tuple(f".{index}" for index in range(layer + 1))
            for rate in (1.0, *layerwise.decays):
                new = rate == 1.0
                name = f"layer {layer + 1}" if new else f"layers 1 to {layer + 1}, lr × {rate:g}"
                trained = names[-1:] if new else names
                stages.append(Stage(name, len(stages), layer + 1, layer + 1, rate, trained, layerwise.updates))
        super().__init__(config, stages)

    def ends(self, score: float) -> bool:
        """Whether the best score is `patience` scores ago, or there were the `longest`."""
        since = len(self.scores) - 1 - self.scores.index(min(self.scores))
        return since >= self.layerwise.patience or len(self.scores) >= self.layerwise.longest


def make_curriculum(config: TrainConfig) -> Curriculum:
    """The curriculum of a run."""
    match config.curriculum:
        case GrowingConfig() as growing:
            return GrowingHorizons(config, growing)
        case LayerwiseConfig() as layerwise:
            return Layerwise(config, layerwise)
    return RandomEpisodes(config)
