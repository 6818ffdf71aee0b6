"""Task slots: places side by side in which a curriculum's optimizations are done one after the other."""

import random
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from l2o_runtime.solvers import Solver
from l2o_runtime.state import State
from l2o_training.config import TrainConfig
from l2o_training.meta.checkpoints import flatten
from l2o_training.meta.curriculum import Curriculum, Episode
from l2o_training.meta.imitation import EXPERT
from l2o_training.meta.unroll import Inner, begin
from l2o_training.tasks import Instances, Task
from l2o_training.tasks.base import generator


class TaskSlot:
    """Optimizations one after the other: those numbered index, index + slots, index + 2 · slots, …

    Every rank follows all slots, as far as that is known from the curriculum alone, and advances its own.

    Args:
        config: the run; it calls slots lanes.
        curriculum: gives the episodes.
        tasks: what episodes are drawn from.
        index: of the slot.
        copies: how many optimizations of an episode go on side by side; estimators with particles need several.

    Attributes:
        number: of the current episode.
        episode: the current episode.
        done: its steps so far, those of the truncation that is being done included.
        inners: where the copies stand; empty between episodes, and on ranks that do not advance the slot.
    """

    def __init__(self, config: TrainConfig, curriculum: Curriculum, tasks: list[Task], index: int, copies: int = 1):
        self.config, self.curriculum, self.tasks, self.index, self.copies = config, curriculum, tasks, index, copies
        self.number = index - config.lanes
        self.done = 0
        self.episode: Episode | None = None
        self.inners: list[Inner] = []

    def tick(self) -> bool:
        """Count one more truncation; whether it is the first of an episode."""
        fresh = not self.under_way
        if fresh:
            self.number, self.done, self.inners = self.number + self.config.lanes, 0, []
            self.episode = self.curriculum.draw(self.number)
        self.done += self.span
        return fresh

    @property
    def span(self) -> int:
        """Steps of a truncation."""
        assert self.episode is not None
        return self.config.unroll or self.episode.horizon

    def begun(self, solver: Solver) -> list[Inner]:
        """The optimizations whose truncation was counted; begun if it is the first."""
        if not self.inners:
            self.inners = self._begin(solver)
        return self.inners

    def anew(self, solver: Solver) -> Inner:
        """An optimization of the episode at its beginning, with the same instances and minibatches."""
        return self._begin(solver)[0]

    def abandon(self) -> None:
        """End the episode where it is; the next truncation is the first of another."""
        assert self.episode is not None
        self.done, self.inners = self.episode.horizon, []

    @property
    def seed(self) -> int:
        """Another one for every truncation."""
        return self.number * 2**20 + self.done

    @property
    def under_way(self) -> bool:
        """Whether the episode goes on with the next truncation."""
        return self.episode is not None and self.done < self.episode.horizon

    def position(self) -> dict[str, Any]:
        """Where the slot stands, as plain data; every rank knows that of all slots."""
        episode = {} if self.episode is None else {"episode": asdict(self.episode)}
        return {"number": self.number, "done": self.done} | episode

    def go_to(self, position: dict[str, Any]) -> None:
        """Go to a place that `position` gave. Older versions kept no episode: theirs is drawn once more."""
        self.number, self.done, self.inners = position["number"], position["done"], []
        self.episode = None
        if self.number >= 0:
            kept = position.get("episode")
            self.episode = self.curriculum.draw(self.number) if kept is None else Episode(**kept)

    def state_dict(self) -> dict[str, Any]:
        """Where its optimizations stand, as tensors; nothing between episodes."""
        if not self.inners or not self.under_way:
            return {}
        states = [{key: value for key, value in vars(inner).items() if key != "instances"} for inner in self.inners]
        rngs = [inner.instances.rng.get_state() for inner in self.inners]
        return {"inners": [state | {"rng": rng} for state, rng in zip(states, rngs, strict=True)]}

    def load_state_dict(self, state: dict[str, Any], solver: Solver) -> None:
        """Go on with optimizations that `state_dict` gave, after `go_to`."""
        if not self.under_way:
            return
        inners = self._begin(solver)
        for index, inner in enumerate(inners):
            _restore(inner, state["inners"][str(index)])
        self.inners = inners

    def _begin(self, solver: Solver) -> list[Inner]:
        episode = self.episode
        assert episode is not None
        inners = []
        for _ in range(self.copies):
            instances = self.tasks[episode.task].instances(self.config.batch, episode.seed)
            instances.steps, device = episode.horizon, instances.params.device
            if self.config.rescale or self.config.rescale_tensors or self.config.rescale_coordinates:
                instances.rescale(self._scale(instances))
            inners.append(begin(solver, instances, torch.tensor(episode.shown, device=device)))
        return inners

    def _scale(self, instances: Instances) -> Tensor:
        """Scales (B, 1) or (B, n) of the coordinates, the same for all copies: of instances, of tensors, and by one."""
        assert self.episode is not None
        config, (count, n), device = self.config, instances.params.shape, instances.params.device
        scale = torch.tensor(self.episode.scale, device=device).unsqueeze(-1)
        # Numbers of their own: those of the seed itself made the weights, which scales would follow.
        rng = generator(random.Random(f"{self.episode.seed}/scale").getrandbits(32), device)
        if config.rescale_tensors:
            sizes = torch.tensor([shape.numel() for shape in instances.shapes], device=device)
            drawn = torch.rand(count, len(sizes), generator=rng, device=device)
            scale = scale * (config.rescale_tensors * (2 * drawn - 1)).exp().repeat_interleave(sizes, dim=1)
        if config.rescale_coordinates:
            drawn = torch.rand(count, n, generator=rng, device=device)
            scale = scale * (config.rescale_coordinates * (2 * drawn - 1)).exp()
        return scale


def _restore(inner: Inner, saved: dict[str, Any]) -> None:
    """Put a freshly begun optimization where another one stood, as far as that was kept."""
    device = inner.params.device
    inner.instances.rng.set_state(saved["rng"])
    for key, value in vars(inner).items():
        if isinstance(value, Tensor) and key in saved:
            setattr(inner, key, saved[key].to(device))
    # Older versions kept the states of a rule, whose names begin as those of `Descent` do, beside all else.
    kept: State = flatten(saved.get("state", saved))
    # Torch optimizers lay out their state with their first step.
    laid_out = {key: value for key, value in kept.items() if key.startswith(EXPERT)}
    inner.state = {key: kept.get(key, value).to(device) for key, value in (laid_out | inner.state).items()}
