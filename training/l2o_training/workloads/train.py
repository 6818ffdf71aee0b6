"""The training loop of a workload, and what is recorded of it."""

import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, median

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from l2o_runtime import HorizonWarning, LearnedOptimizer
from l2o_training.benchmark.memory import state_bytes
from l2o_training.workloads.base import Batch, Problem
from l2o_training.workloads.entrants import Entrant

LOOKS = 5
"""Times at which the validation loss is taken, evenly spaced; the last is the end."""


@dataclass(frozen=True)
class Run:
    """What one training gave.

    Attributes:
        train: (steps,) loss of each minibatch, before its step; NaN after the loss was not finite.
        validation: loss on all validation examples after the steps `looks(steps)`, in evaluation mode.
        batch_validation: the same with the statistics of minibatches in place of BatchNorm's running ones; empty
            without any.
        state_bytes: bytes of the optimizer's state tensors per parameter.
        parameters: their number.
    """

    train: list[float]
    validation: list[float]
    batch_validation: list[float]
    state_bytes: float
    parameters: int


def looks(steps: int) -> list[int]:
    """Numbers of steps after which the validation loss is taken.

    >>> looks(100), looks(3)
    ([20, 40, 60, 80, 100], [1, 2, 3])
    """
    return sorted({max(1, round(steps * (i + 1) / LOOKS)) for i in range(LOOKS)})


def train(problem: Problem, entrant: Entrant, lr: float, seed: int, steps: int) -> Run:
    """Train a network from the seed's initial weights on the seed's minibatches.

    All optimizers get the same weights, minibatches and noise. A run ends where its loss is not finite.

    Args:
        problem: what to train.
        entrant: whose optimizer.
        lr: its learning rate.
        seed: of weights, minibatches and noise.
        steps: of the optimizer.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", HorizonWarning)  # reports say where a rule is run beyond its horizon
        torch.manual_seed(seed)
        model = problem.make_model()
        optimizer, schedule = entrant.optimizer(model.parameters(), lr, steps)
        norms = tracking(model)
        losses, validation, batch_validation, wanted = [], [], [], looks(steps)
        for batch, step in zip(problem.batches(seed), range(1, steps + 1), strict=False):
            optimizer.zero_grad()
            loss = problem.loss(model, batch)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
            loss.backward()
            advance(optimizer, loss)
            if schedule is not None:
                schedule.step()
            if step in wanted:
                validation.append(validate(problem, model))
                if norms:
                    batch_validation.append(validate_by_batches(problem, model, norms))
        count = sum(param.numel() for param in model.parameters())
        losses += [math.nan] * (steps - len(losses))
        for found in (validation, batch_validation) if norms else (validation,):
            found += [math.nan] * (len(wanted) - len(found))
        return Run(losses, validation, batch_validation, state_bytes(optimizer) / count, count)


def advance(optimizer: Optimizer, loss: Tensor) -> None:
    """One step; learned rules are handed the loss."""
    if isinstance(optimizer, LearnedOptimizer):
        optimizer.step(loss=loss)
    else:
        optimizer.step()


@torch.no_grad()
def validate(problem: Problem, model: nn.Module) -> float:
    """Mean loss over the validation examples, in evaluation mode."""
    model.eval()
    loss = problem.loss(model, problem.validation).item()
    model.train()
    return loss


def tracking(model: nn.Module) -> list[nn.Module]:
    """Layers with running statistics."""
    return [layer for layer in model.modules() if getattr(layer, "running_mean", None) is not None]


@torch.no_grad()
def validate_by_batches(problem: Problem, model: nn.Module, norms: list[nn.Module]) -> float:
    """`validate`, but that some layers take the statistics of minibatches of the training's size.

    What it differs by is what running statistics do: they follow the weights late, and lag far behind what runs away.

    Args:
        problem: gives the examples; a last minibatch that would be smaller is left out.
        model: the network, in training mode, and afterwards as it was.
        norms: the layers, whose running statistics stay as they are.
    """
    model.eval()
    for layer in norms:
        layer.train().track_running_stats = False  # type: ignore[assignment]
    batches = zip(*(tensor.split(problem.batch_size) for tensor in problem.validation), strict=True)
    losses = [problem.loss(model, batch).item() for batch in batches if len(batch[0]) == problem.batch_size]
    for layer in norms:
        layer.track_running_stats = True  # type: ignore[assignment]
    model.train()
    return mean(losses)


def step_times(
    problem: Problem, entrants: Iterable[Entrant], rounds: int, warmup: int
) -> dict[str, tuple[float, float]]:
    """Seconds of a training step and of the optimizer's part of it, medians over rounds in which all take turns.

    Args:
        problem: what is trained.
        entrants: whose optimizers.
        rounds: timed steps of each.
        warmup: steps of each before that.
    """
    racers = []
    for entrant in entrants:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = problem.make_model()
        optimizer, _ = entrant.optimizer(model.parameters(), 1.0 if entrant.learned else 1e-6, rounds)
        racers.append((entrant, model, optimizer, problem.batches(0)))
    taken: dict[str, list[tuple[float, float]]] = {racer[0].name: [] for racer in racers}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", HorizonWarning)
        for turn in range(warmup + rounds):
            for entrant, model, optimizer, batches in racers:
                times = _timed_step(problem, model, optimizer, next(batches))
                if turn >= warmup:
                    taken[entrant.name].append(times)
    return {name: (median(t[0] for t in times), median(t[1] for t in times)) for name, times in taken.items()}


def _timed_step(problem: Problem, model: nn.Module, optimizer: Optimizer, batch: Batch) -> tuple[float, float]:
    start = time.perf_counter()
    optimizer.zero_grad()
    loss = problem.loss(model, batch)
    loss.backward()
    middle = time.perf_counter()
    advance(optimizer, loss)
    end = time.perf_counter()
    return end - start, end - middle
