"""Training scripts: ordinary networks in ordinary loops, with torch optimizers; and what their steps take."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from l2o_training.bench.memory import state_bytes
from l2o_training.bench.racers import takes_loss
from l2o_training.compare.code import code_version
from l2o_training.compare.contenders import Contender
from l2o_training.compare.workloads import Curves, Group, TimedWorkload, looks
from l2o_training.tasks.data import Datasets
from l2o_training.tasks.scripts.base import Batch, Recipe, Script

ROUNDS, WARMUP = 30, 5
"""Timed and untimed steps per optimizer and script."""


Racer = tuple[Contender, Optimizer, Callable[[], Tensor]]
"""Who is timed, its optimizer, and what gives its next loss."""


class ScriptWorkload(TimedWorkload):
    """A training script; its runs are made one after the other.

    Args:
        recipe: how the script is made.
        load: gives the data set of a name.
    """

    validates = True

    def __init__(self, recipe: Recipe, load: Datasets):
        self.recipe, self.load = recipe, load
        self.name, self.description, self.data = recipe.name, recipe.description, recipe.data
        self._script: Script | None = None

    @property
    def script(self) -> Script:
        """The script with its data, built once."""
        if self._script is None:
            self._script = self.recipe.build(self.load)
        return self._script

    def prepare(self) -> None:
        """Load the data; what a script makes itself can wait."""
        if self.data is not None:
            self.load.prepare(self.data)

    def own_key(self) -> dict[str, Any]:
        """The script, its data, and the code of script and loop."""
        build = self.recipe.build
        code = code_version(f"{build.__module__}:{build.__name__}", "l2o_training.compare.scripts:train")
        data = None if self.data is None else str(Path(self.load.root).resolve())
        return {"task": self.name, "code": code, "data": data}

    def measure(self, contender: Contender, lr: float, group: Group, steps: int) -> Curves:
        """Train once from the group's seed."""
        with quiet([contender]):
            return train(self.script, contender.optimizer, lr, group.seed, steps)

    def times(self, contenders: list[Contender]) -> dict[str, tuple[float, float]]:
        """Medians over rounds in which all take turns."""
        return step_times(self.script, contenders, ROUNDS, WARMUP)


def train(script: Script, make: Callable[..., Any], lr: float, seed: int, steps: int) -> Curves:
    """Train a network from the seed's initial weights on the seed's minibatches.

    All optimizers get the same weights, minibatches and noise. A run ends where its loss is not finite.

    Args:
        script: what to train.
        make: parameters, learning rate and number of steps → optimizer and schedule.
        lr: its learning rate.
        seed: of weights, minibatches and noise.
        steps: of the optimizer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = script.make_model()
        optimizer, schedule = make(model.parameters(), lr, steps)
        norms = tracking(model)
        losses, validation, batch_validation, wanted = [], [], [], looks(steps)
        for batch, step in zip(script.batches(seed), range(1, steps + 1), strict=False):
            optimizer.zero_grad()
            loss = script.loss(model, batch)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
            loss.backward()
            advance(optimizer, loss)
            if schedule is not None:
                schedule.step()
            if step in wanted:
                with judged(optimizer):
                    validation.append(validate(script, model))
                    if norms:
                        batch_validation.append(validate_by_batches(script, model, norms))
        count = sum(param.numel() for param in model.parameters())
        return Curves(
            _filled(losses, steps),
            _filled(validation, len(wanted)),
            _filled(batch_validation, len(wanted) if norms else 0),
            parameters=count,
            state_bytes=state_bytes(optimizer) / count,
        )


def _filled(values: list[float], count: int) -> np.ndarray:
    """One run (1, count), NaN after its end."""
    return np.array([values + [math.nan] * (count - len(values))], dtype=float)


def advance(optimizer: Optimizer, loss: Tensor) -> None:
    """One step, with the loss if the optimizer takes one, as learned rules do."""
    if takes_loss(type(optimizer)):  # type: ignore[arg-type]  # a class, whose instances' __hash__ mypy looks at
        optimizer.step(loss=loss)  # type: ignore[call-overload]
    else:
        optimizer.step()


@contextmanager
def judged(optimizer: Any) -> Iterator[None]:
    """The weights that an optimizer wants to be judged by, where it trains with others, as schedule-free ones do."""
    switches = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    if switches:
        optimizer.eval()
    yield
    if switches:
        optimizer.train()


@torch.no_grad()
def validate(script: Script, model: nn.Module) -> float:
    """Mean loss over the validation examples, in evaluation mode."""
    model.eval()
    loss = script.loss(model, script.validation).item()
    model.train()
    return loss


def tracking(model: nn.Module) -> list[nn.Module]:
    """Layers with running statistics."""
    return [layer for layer in model.modules() if getattr(layer, "running_mean", None) is not None]


@torch.no_grad()
def validate_by_batches(script: Script, model: nn.Module, norms: list[nn.Module]) -> float:
    """`validate`, but that some layers take the statistics of minibatches of the training's size.

    What it differs by is what running statistics do: they follow the weights late, and lag far behind what runs away.

    Args:
        script: gives the examples; a last minibatch that would be smaller is left out.
        model: the network, in training mode, and afterwards as it was.
        norms: the layers, whose running statistics stay as they are.
    """
    model.eval()
    for layer in norms:
        layer.train().track_running_stats = False  # type: ignore[assignment]
    batches = zip(*(tensor.split(script.batch_size) for tensor in script.validation), strict=True)
    losses = [script.loss(model, batch).item() for batch in batches if len(batch[0]) == script.batch_size]
    for layer in norms:
        layer.track_running_stats = True  # type: ignore[assignment]
    model.train()
    return mean(losses)


def step_times(
    script: Script, contenders: Iterable[Contender], rounds: int, warmup: int
) -> dict[str, tuple[float, float]]:
    """Seconds of a training step and of the optimizer's part of it, medians over rounds in which all take turns.

    Args:
        script: what is trained.
        contenders: whose optimizers.
        rounds: timed steps of each.
        warmup: steps of each before that.
    """
    racers: list[Racer] = []
    for contender in contenders:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = script.make_model()
        optimizer, _ = contender.optimizer(model.parameters(), probe_lr(contender), warmup + rounds)
        racers.append((contender, optimizer, partial(_next_loss, script, model, script.batches(0))))
    with torch.random.fork_rng(devices=[]):
        return race(racers, rounds, warmup)


def _next_loss(script: Script, model: nn.Module, batches: Iterator[Batch]) -> Tensor:
    return script.loss(model, next(batches))


def probe_lr(contender: Contender) -> float:
    """A learning rate at which nothing much happens while steps are timed."""
    return 1.0 if contender.learned else 1e-6


def race(racers: list[Racer], rounds: int, warmup: int) -> dict[str, tuple[float, float]]:
    """Seconds of a training step and of the optimizer's part of it, medians over rounds in which all take turns."""
    taken: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender, *_ in racers}
    with quiet(contender for contender, *_ in racers):
        for turn in range(warmup + rounds):
            for contender, optimizer, next_loss in racers:
                times = _timed_step(optimizer, next_loss)
                if turn >= warmup:
                    taken[contender.name].append(times)
    return {name: (median(t[0] for t in times), median(t[1] for t in times)) for name, times in taken.items()}


@contextmanager
def quiet(contenders: Iterable[Contender]) -> Iterator[None]:
    """Without the warnings that reports tell in their own words."""
    with warnings.catch_warnings():
        for category in {category for contender in contenders for category in contender.quiet}:
            warnings.simplefilter("ignore", category)
        yield


def _timed_step(optimizer: Optimizer, next_loss: Callable[[], Tensor]) -> tuple[float, float]:
    start = time.perf_counter()
    optimizer.zero_grad()
    loss = next_loss()
    loss.backward()
    middle = time.perf_counter()
    advance(optimizer, loss)
    end = time.perf_counter()
    return end - start, end - middle
