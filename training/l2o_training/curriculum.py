"""What the rule is trained on next: lanes of optimizations, each with a task, a horizon and a scaling of its own."""

import math
import random
from dataclasses import dataclass
from typing import Any

import torch

from l2o_runtime.rule import Rule
from l2o_training.config import TrainConfig
from l2o_training.tasks import Task
from l2o_training.unroll import Inner, begin

VALIDATION_SEED = 2**40
"""Instances of validation never coincide with those of meta-training, whose seeds are smaller."""


@dataclass(frozen=True)
class Episode:
    """One optimization, as it was drawn: all that is needed to begin it.

    Attributes:
        task: index of the task.
        seed: of its instances.
        horizon: steps until the next episode, a multiple of the truncation.
        shown: per instance, 1 if the rule sees its loss, else 0.
        scale: per instance, its parameters' scale.
    """

    task: int
    seed: int
    horizon: int
    shown: list[float]
    scale: list[float]


def draw_episode(config: TrainConfig, number: int) -> Episode:
    """The episode of a number, the same whoever draws it: horizon log-uniform in shortest … T, scale log-uniform."""
    draw = random.Random(f"{config.seed}/{number}")
    task = draw.choice(range(len(config.tasks)))
    seed = draw.randrange(VALIDATION_SEED)
    shown = [float(draw.random() >= config.hide_loss) for _ in range(config.batch)]
    scale = [math.exp(draw.uniform(-config.rescale, config.rescale)) for _ in range(config.batch)]
    low, high = (math.log(steps) for steps in (config.shortest or config.horizon, config.horizon))
    truncations = max(1, round(math.exp(draw.uniform(low, high)) / config.unroll))
    return Episode(task, seed, truncations * config.unroll, shown, scale)


class Lane:
    """Optimizations one after the other: those numbered index, index + lanes, index + 2 · lanes, …

    Attributes:
        number: of the current episode.
        episode: the current episode.
        done: its steps so far.
        inner: where it stands.
    """

    def __init__(self, config: TrainConfig, tasks: list[Task], index: int):
        self.config, self.tasks = config, tasks
        self.number = index - config.lanes
        self.done = 0
        self.episode: Episode | None = None
        self.inner: Inner | None = None

    def advance(self, rule: Rule) -> Inner:
        """The optimization whose next truncation is due; a new one if the last is over."""
        if self.inner is None or self.episode is None or self.done >= self.episode.horizon:
            self.number, self.done = self.number + self.config.lanes, 0
            self.episode = draw_episode(self.config, self.number)
            self.inner = self._begin(rule, self.episode)
        self.done += self.config.unroll
        return self.inner

    @property
    def seed(self) -> int:
        """Another one for every truncation."""
        return self.number * 2**20 + self.done

    def state_dict(self) -> dict[str, Any]:
        """Where the lane stands, as tensors and numbers."""
        if self.inner is None or self.episode is None or self.done >= self.episode.horizon:
            return {"number": self.number, "done": self.done}
        inner = {key: value for key, value in vars(self.inner).items() if key not in ("instances", "layout")}
        return {"number": self.number, "done": self.done, "inner": inner, "rng": self.inner.instances.rng.get_state()}

    def load_state_dict(self, state: dict[str, Any], rule: Rule) -> None:
        """Go on from there."""
        self.number, self.done = state["number"], state["done"]
        if "inner" not in state:
            return
        self.episode = draw_episode(self.config, self.number)
        self.inner = self._begin(rule, self.episode)
        vars(self.inner).update(state["inner"])
        self.inner.instances.rng.set_state(state["rng"].cpu())

    def _begin(self, rule: Rule, episode: Episode) -> Inner:
        instances = self.tasks[episode.task].instances(self.config.batch, episode.seed)
        device = instances.params.device
        if self.config.rescale:
            instances.rescale(torch.tensor(episode.scale, device=device))
        return begin(rule, instances, torch.tensor(episode.shown, device=device))
