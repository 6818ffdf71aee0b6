"""What the rule is trained on next: lanes of optimizations, each with a task, a horizon and a scaling of its own."""

import math
import random
from dataclasses import dataclass
from typing import Any

import torch

from l2o_runtime.rules import Rule
from l2o_training.config import TrainConfig
from l2o_training.meta.unroll import Inner, begin
from l2o_training.tasks import Task

VALIDATION_SEED = 2**31
"""Validation has seeds from here on, comparisons have smaller ones: PyTorch's CPU generator reads 32 bits of a seed."""


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
    seed = draw.randrange(2**40)  # of 32 bits that count: those of a validation come up once in 10⁸ episodes or so
    shown = [float(draw.random() >= config.hide_loss) for _ in range(config.batch)]
    scale = [math.exp(draw.uniform(-config.rescale, config.rescale)) for _ in range(config.batch)]
    low, high = (math.log(steps) for steps in (config.shortest or config.horizon, config.horizon))
    truncations = max(1, round(math.exp(draw.uniform(low, high)) / config.unroll))
    return Episode(task, seed, truncations * config.unroll, shown, scale)


class Lane:
    """Optimizations one after the other: those numbered index, index + lanes, index + 2 · lanes, …

    Every rank follows all lanes, as far as that is known from the configuration alone, and advances its own.

    Args:
        config: the run.
        tasks: what episodes are drawn from.
        index: of the lane.
        copies: how many optimizations of an episode go on side by side; estimators with particles need several.

    Attributes:
        number: of the current episode.
        episode: the current episode.
        done: its steps so far, those of the truncation that is being done included.
        inners: where the copies stand; empty between episodes, and on ranks that do not advance the lane.
    """

    def __init__(self, config: TrainConfig, tasks: list[Task], index: int, copies: int = 1):
        self.config, self.tasks, self.index, self.copies = config, tasks, index, copies
        self.number = index - config.lanes
        self.done = 0
        self.episode: Episode | None = None
        self.inners: list[Inner] = []

    def tick(self) -> bool:
        """Count one more truncation; whether it is the first of an episode."""
        fresh = not self.under_way
        if fresh:
            self.number, self.done, self.inners = self.number + self.config.lanes, 0, []
            self.episode = draw_episode(self.config, self.number)
        self.done += self.config.unroll
        return fresh

    def begun(self, rule: Rule) -> list[Inner]:
        """The optimizations whose truncation was counted; begun if it is the first."""
        if not self.inners:
            self.inners = self._begin(rule)
        return self.inners

    def abandon(self) -> None:
        """End the episode where it is; the next truncation is the first of another."""
        assert self.episode is not None
        self.done, self.inners = self.episode.horizon, []

    @property
    def seed(self) -> int:
        """Another one for every truncation."""
        return self.number * 2**20 + self.done

    def position(self) -> dict[str, int]:
        """Where the lane stands, as numbers; every rank knows those of all lanes."""
        return {"number": self.number, "done": self.done}

    def state_dict(self) -> dict[str, Any]:
        """Where its optimizations stand, as tensors; nothing between episodes."""
        if not self.inners or not self.under_way:
            return {}
        states = [
            {key: value for key, value in vars(inner).items() if key not in ("instances", "layout")}
            for inner in self.inners
        ]
        rngs = [inner.instances.rng.get_state() for inner in self.inners]
        return {"inners": [state | {"rng": rng} for state, rng in zip(states, rngs, strict=True)]}

    def go_to(self, position: dict[str, int]) -> None:
        """Go to a place that `position` gave."""
        self.number, self.done, self.inners = position["number"], position["done"], []
        self.episode = draw_episode(self.config, self.number) if self.number >= 0 else None

    @property
    def under_way(self) -> bool:
        """Whether the episode goes on with the next truncation."""
        return self.episode is not None and self.done < self.episode.horizon

    def load_state_dict(self, state: dict[str, Any], rule: Rule) -> None:
        """Go on with optimizations that `state_dict` gave, after `go_to`."""
        if not self.under_way:
            return
        inners = self._begin(rule)
        for index, inner in enumerate(inners):
            saved = state["inners"][str(index)]
            device = inner.params.device
            inner.instances.rng.set_state(saved["rng"])
            for key in vars(inner):
                if key in saved:
                    setattr(inner, key, _moved(saved[key], device))
        self.inners = inners

    def _begin(self, rule: Rule) -> list[Inner]:
        episode = self.episode
        assert episode is not None
        inners = []
        for _ in range(self.copies):
            instances = self.tasks[episode.task].instances(self.config.batch, episode.seed)
            device = instances.params.device
            if self.config.rescale:
                instances.rescale(torch.tensor(episode.scale, device=device))
            inners.append(begin(rule, instances, torch.tensor(episode.shown, device=device)))
        return inners


def _moved(value: Any, device: torch.device) -> Any:
    """A tensor, or a dictionary of them, on a device."""
    return {k: v.to(device) for k, v in value.items()} if isinstance(value, dict) else value.to(device)
