"""Tasks of one's own as what optimizers are compared on: fresh instances, trained one by one with torch optimizers."""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2o_runtime.config import require
from l2o_training.bench.memory import state_bytes
from l2o_training.compare.code import code_version
from l2o_training.compare.contenders import Contender
from l2o_training.compare.scripts import ROUNDS, WARMUP, Racer, advance, probe_lr, quiet, race
from l2o_training.compare.workloads import Curves, Group, TimedWorkload, looks
from l2o_training.tasks.base import generator
from l2o_training.tasks.own import EVALUATION, VALIDATION, Problem, own_randomness
from l2o_training.tasks.places import Make, find_make, name_of, text_of

CPU = torch.device("cpu")


class OwnWorkload(TimedWorkload):
    """A task of one's own; its runs are made one after the other, on the CPU.

    Args:
        place: of the function, see `l2o_training.tasks.own.find_make`.
    """

    def __init__(self, place: str):
        self.place, self.name, self.data = place, name_of(place), None
        self.description = f"{place}, instances that no meta-training sees"
        self.make: Make = find_make(place)

    def prepare(self) -> None:
        """Take a step of an instance, so that mistakes show at once."""
        problem = Problem(self.make, EVALUATION, CPU)
        with own_randomness(CPU) as reseed:
            reseed(0)
            loss = problem(0)
            problem.grads(loss)
        require(
            loss.item() > 0,
            f"{self.name}: its first loss is {loss.item():.4g}: comparisons take ratios of losses, which have to stay "
            "above 0; add a constant to it",
        )

    @property
    def validates(self) -> bool:  # type: ignore[override]
        """Whether the user's function gives a validation loss."""
        return Problem(self.make, EVALUATION, CPU).validate is not None

    def own_key(self) -> dict[str, Any]:
        """The text of the user's file, and the code of the loop."""
        text = hashlib.sha256(text_of(self.make)).hexdigest()
        return {"task": self.place.rpartition(":")[2], "text": text, "code": code_version(f"{__name__}:train")}

    def measure(self, contender: Contender, lr: float, group: Group, steps: int) -> Curves:
        """Train the instance of the group's seed."""
        with quiet([contender]):
            return train(self.make, contender.optimizer, lr, group.seed, steps)

    def times(self, contenders: list[Contender]) -> dict[str, tuple[float, float]]:
        """Medians over rounds in which all take turns."""
        with own_randomness(CPU) as reseed:

            def losses(problem: Problem) -> Iterator[Tensor]:
                for turn in itertools.count():
                    reseed(turn)
                    yield problem(turn)

            racers: list[Racer] = []
            for contender in contenders:
                problem = Problem(self.make, EVALUATION, CPU)
                optimizer, _ = contender.optimizer(problem.params, probe_lr(contender), WARMUP + ROUNDS)
                racers.append((contender, optimizer, losses(problem).__next__))
            return race(racers, ROUNDS, WARMUP)


def train(make: Make, optimizer_of: Callable[..., Any], lr: float, seed: int, steps: int) -> Curves:
    """Train the instance of a seed on its minibatches; a run ends where its loss is not finite.

    Args:
        make: the user's function.
        optimizer_of: parameters, learning rate and number of steps → optimizer and schedule.
        lr: its learning rate.
        seed: of instance and minibatches.
        steps: of the optimizer.
    """
    problem, draws = Problem(make, EVALUATION + seed % VALIDATION, CPU), generator(seed, CPU)
    optimizer, schedule = optimizer_of(problem.params, lr, steps)
    losses, validation, wanted = [], [], looks(steps) if problem.validate else []
    with own_randomness(CPU) as reseed:
        for step in range(steps):
            optimizer.zero_grad()
            reseed(int(torch.randint(2**62, (), generator=draws)))
            loss = problem(step)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
            loss.backward()
            advance(optimizer, loss)
            if schedule is not None:
                schedule.step()
            if step + 1 in wanted:
                reseed(seed)
                validation.append(problem.validated())
    count = sum(param.numel() for param in problem.params)
    held = np.full((1, len(wanted)), math.nan)
    held[0, : len(validation)] = validation
    curve = np.full((1, steps), math.nan)
    curve[0, : len(losses)] = losses
    return Curves(curve, held, np.empty((1, 0)), parameters=count, state_bytes=state_bytes(optimizer) / count)
