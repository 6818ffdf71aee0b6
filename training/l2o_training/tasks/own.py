"""Tasks of one's own: a Python function that makes a model and its loss.

`make(seed)` gives one instance of the problem: a module, and `loss(model, step)`, which draws a minibatch and gives its
loss. Whatever either of them draws by torch, numpy or `random` comes from a seed, so that an instance and its
minibatches can be met again: by the rule's next version, by Adam, after a restart.
"""

import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l2o_training.tasks.base import Instances, Seen, Task, generator
from l2o_training.tasks.networks import Forward, running_statistics
from l2o_training.tasks.places import Make, TaskError, find_make, name_of, theirs
from l2o_training.tasks.together import NotTogether, forwards, losses_together

EVALUATION, VALIDATION, TRAINING = 0, 2**29, 2**30
"""Seeds of instances, by what they are for, begin here: below 2³¹, which every library takes, and none is in two."""

VALIDATED = 2**31, 2**32
"""Numbers of validations, as `Task.instances` gets them, are from the first on and below the second."""

TRIED = 3
"""Instances by which it is found how to run several at once."""

ROUNDS = 12
"""Steps that `examine` times."""


@contextmanager
def own_randomness(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Leave the generators of torch, numpy and Python as they were; gives what seeds them."""
    devices = [device] if device.type == "cuda" else []
    before = random.getstate(), np.random.get_state()

    def seed(number: int) -> None:
        (torch.manual_seed if devices else torch.default_generator.manual_seed)(number)
        np.random.seed(number % 2**32)
        random.seed(number)

    with torch.random.fork_rng(devices):
        try:
            yield seed
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


class Problem:
    """One instance of a task: a model, and its loss.

    Args:
        make: the user's function.
        seed: of the instance.
        device: where the model goes.

    Attributes:
        make, seed, device: as they were given.
        params: tensors that are trained.
        buffers: running statistics of BatchNorm.
        validate: gives the loss on held-out data; None where there is none.

    Raises:
        TaskError: it is not one.
    """

    def __init__(self, make: Make, seed: int, device: torch.device):
        what = f"{getattr(make, '__name__', 'make')}({seed})"
        with own_randomness(device) as reseed, theirs(what):
            reseed(seed)
            made = make(seed)
        parts = made if isinstance(made, tuple) else (made,)
        fits = len(parts) in (2, 3) and isinstance(parts[0], nn.Module) and all(map(callable, parts[1:]))
        if not fits:
            got = ", ".join(type(part).__name__ for part in parts)
            raise TaskError(f"{what} has to return a module and a function loss(model, step), got ({got})")
        self.make, self.seed, self.device = make, seed, device
        self.model, self.loss, self.validate, *_ = (parts[0].to(device).train(), *parts[1:], None)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.buffers = list(running_statistics(self.model).values())
        lazy = [name for name, p in self.model.named_parameters() if nn.parameter.is_lazy(p)]
        if lazy:
            raise TaskError(f"{what}: {lazy[0]} has no shape yet: call the model once in it, as on torch.zeros(…)")
        if not any(p.numel() for p in self.params):
            raise TaskError(f"{what}: the model has no parameters with requires_grad: there is nothing to train")
        for name, p in self.model.named_parameters():
            if p.requires_grad and (p.is_complex() or p.layout != torch.strided):
                kind = "complex" if p.is_complex() else "sparse"
                raise TaskError(f"{what}: parameter {name} is {kind}, which rules do not move: make it real and dense")
            if p.requires_grad and any(step == 0 < size - 1 for size, step in zip(p.shape, p.stride(), strict=True)):
                raise TaskError(
                    f"{what}: numbers of parameter {name} lie in one place, as expand() does it: clone() it"
                )

    def anew(self) -> "Problem":
        """The same instance as it was made, whatever models and losses have kept of the steps since."""
        return Problem(self.make, self.seed, self.device)

    def __call__(self, step: int, model: Any = None) -> Tensor:
        """The loss of a step, a scalar; the generators have to be seeded.

        Args:
            step: number of the minibatch.
            model: what stands in for the model, if anything does.

        Raises:
            TaskError: it is something else.
        """
        with theirs(f"loss(model, {step}) of make({self.seed})"):
            loss = self.loss(self.model if model is None else model, step)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            advice = "take its mean()" if isinstance(loss, Tensor) else "return the tensor itself"
            raise TaskError(f"loss(model, {step}) has to return a scalar tensor, got {got}: {advice}")
        if loss.is_complex():
            raise TaskError(f"loss(model, {step}) has to return a real number, got {loss.dtype}: take its abs()")
        return loss

    def validated(self) -> float:
        """The loss on held-out data, in evaluation mode."""
        assert self.validate is not None
        self.model.eval()
        with torch.no_grad(), theirs("validate(model)"):
            found = float(self.validate(self.model))
        self.model.train()
        return found

    def grads(self, loss: Tensor) -> list[Tensor]:
        """Gradients of a loss, zero where it does not depend on a tensor.

        Raises:
            TaskError: it depends on none.
        """
        found: tuple[Tensor | None, ...] = (None,)
        if loss.requires_grad:
            with theirs("loss.backward()"):
                found = torch.autograd.grad(loss, self.params, allow_unused=True)
        if all(grad is None for grad in found):
            raise TaskError("the loss does not depend on the model's parameters: was it detached, or another model's?")
        if any(grad is not None and grad.layout != torch.strided for grad in found):
            raise TaskError("gradients are sparse, which rules do not take: leave out sparse=True")
        return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(self.params, found, strict=True)]


class OwnInstances(Instances):
    """Instances of a task of one's own; their modules are only a place to compute in.

    Running statistics begin with the number of minibatches so far, which `loss` is told.

    Args:
        problems: B of them, of equal shapes.
        rng: what the seeds of their minibatches are drawn with.
        device: where they live.

    Attributes:
        forward: of all models at once; None runs them one after the other.
    """

    def __init__(self, problems: list[Problem], rng: torch.Generator, device: torch.device):
        params = torch.stack([_flat(problem.params) for problem in problems])
        none = params.new_zeros(1)
        statistics = torch.stack([_flat([none, *problem.buffers]) for problem in problems])

        def draws() -> tuple[Tensor, ...]:
            return (torch.randint(2**62, (len(problems),), generator=rng),)

        shapes = [p.shape for p in problems[0].params]
        super().__init__(params, self._refuse, draws, rng, shapes, statistics)
        self.problems, self.device = problems, device
        self.forward: Forward | None = None

    @staticmethod
    def _refuse(*arguments: object) -> tuple[Tensor, Tensor]:
        raise NotImplementedError  # `look` asks the problems

    def part(self, start: int, stop: int) -> "OwnInstances":
        """As in `Instances`."""
        some = super().part(start, stop)
        assert isinstance(some, OwnInstances)
        some.problems = self.problems[start:stop]
        return some

    def look(self, params: Tensor, statistics: Tensor) -> Seen:
        """As in `Instances`."""
        inner = params.detach() if self._scale is None else params.detach() * self._scale
        (draws,) = self._batches()
        seen = self._together(inner, statistics, draws.tolist()) if self.forward else None
        seen = seen or self._one_by_one(inner, statistics, draws)
        return seen if self._scale is None else seen._replace(grad=seen.grad * self._scale)

    def _together(self, params: Tensor, statistics: Tensor, draws: list[int]) -> Seen | None:
        """All at once; None, from now on, where that cannot be."""
        assert self.forward is not None
        leaf, kept, score = params.requires_grad_(), statistics[:, 1:], None
        with own_randomness(self.device) as reseed:

            def of(problem: Problem, draw: int, step: int) -> Callable[[Any], Tensor]:
                def loss(model: Any) -> Tensor:
                    reseed(draw)
                    return problem(step, model)

                return loss

            steps = statistics[:, 0].int().tolist()
            losses = [of(*place) for place in zip(self.problems, draws, steps, strict=True)]
            try:
                with torch.enable_grad():
                    found, after = losses_together(self.forward, losses, leaf, kept, True)
                    (grad,) = torch.autograd.grad(found.sum(), leaf)
                if kept.shape[1]:
                    with torch.no_grad():
                        score, _ = losses_together(self.forward, losses, leaf, kept, False)
            except NotTogether:
                self.forward = None
                return None
        found = found.detach()
        after = torch.cat([statistics[:, :1] + 1, after.detach()], 1)
        return Seen(found, grad, found if score is None else score, after)

    def _one_by_one(self, inner: Tensor, statistics: Tensor, draws: Tensor) -> Seen:
        losses, grads, scores, after = [], [], [], []
        with own_randomness(self.device) as reseed, torch.enable_grad():
            for problem, row, kept, draw in zip(self.problems, inner, statistics, draws.tolist(), strict=True):
                step = int(kept[0])
                _fill(problem.params, row)
                _fill(problem.buffers, kept[1:])
                reseed(draw)
                loss = problem(step)
                grads.append(_flat(problem.grads(loss)))
                losses.append(loss.detach().float().reshape(()))
                after.append(_flat([kept[:1] + 1, *problem.buffers]))
                scores.append(self._score(problem, kept[1:], reseed, draw, step) if problem.buffers else losses[-1])
        return Seen(torch.stack(losses), torch.stack(grads), torch.stack(scores), torch.stack(after))

    @staticmethod
    def _score(problem: Problem, statistics: Tensor, reseed: Callable[[int], None], draw: int, step: int) -> Tensor:
        """The loss on the same minibatch in evaluation mode, with the running statistics from before it."""
        _fill(problem.buffers, statistics)
        problem.model.eval()
        reseed(draw)
        with torch.no_grad():
            score = problem(step).detach().float().reshape(())
        problem.model.train()
        return score


def _flat(tensors: list[Tensor]) -> Tensor:
    """One vector (n,) of float32."""
    return torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])


@torch.no_grad()
def _fill(tensors: list[Tensor], row: Tensor) -> None:
    """Put a vector (n,) back in its places."""
    for tensor, piece in zip(tensors, row.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(piece.view_as(tensor))


class OwnTask(Task):
    """A task of one's own.

    Args:
        place: of the function, see `find_make`.
        device: where instances live.
    """

    def __init__(self, place: str, device: torch.device):
        self.name, self.device = name_of(place), device
        self.make = find_make(place)
        self._way: int | None = None

    def instances(self, count: int, seed: int) -> Instances:
        """Instances of seeds of their own: those of a validation are never met in training.

        Raises:
            TaskError: one cannot be made, or shapes differ from instance to instance.
        """
        first, span = (VALIDATION, 2**29) if VALIDATED[0] <= seed < VALIDATED[1] else (TRAINING, 2**30)
        draw = random.Random(f"{seed}")
        seeds = [first + draw.randrange(span) for _ in range(count)]
        problems = [Problem(self.make, number, self.device) for number in seeds]
        shapes = [[tuple(p.shape) for p in problem.params] for problem in problems]
        for number, own in zip(seeds, shapes, strict=True):
            if own != shapes[0]:
                raise TaskError(
                    f"{self.name}: make({seeds[0]}) and make({number}) have parameters of different shapes: "
                    "give every architecture a function of its own, and each of them to --task"
                )
        made = OwnInstances(problems, generator(seed, torch.device("cpu")), self.device)
        if count > 1:
            trying = self._way is None
            made.forward = self._forward(problems)
            if trying:  # on modules that may keep what they have seen
                made.problems = [problem.anew() for problem in problems]
        return made

    @property
    def together(self) -> bool:
        """Whether models of several instances run at once; known after the first of them were made."""
        return bool(self._way)

    def _forward(self, problems: list[Problem]) -> Forward | None:
        """How to run their models at once: found by the first ones, where it has to give what they give one by one."""
        if self._way == 0:
            return None
        model = problems[0].model
        whole = len(list(model.parameters())) == len(problems[0].params)
        try:
            ways = [None, *forwards(model)] if whole else [None]
        except Exception:
            ways = [None]  # a module that cannot be copied, since it holds a lock for one
        if self._way is None:
            agreeing = (number for number, way in enumerate(ways[1:], 1) if self._agrees(problems, way))
            self._way = next(agreeing, 0)
        return ways[self._way]

    def _agrees(self, problems: list[Problem], way: Forward | None) -> bool:
        """Whether two steps are, up to rounding, those of one model after the other."""
        instances = OwnInstances(problems[:TRIED], generator(0, torch.device("cpu")), self.device)
        begun, seen = instances.rng.get_state(), []
        for forward in (None, way):
            instances.forward = forward
            instances.rng.set_state(begun)
            params, statistics = instances.params, instances.statistics
            for _ in range(2):
                try:
                    with warnings.catch_warnings():
                        if way is forward:  # of operators that are slow at once
                            warnings.simplefilter("error")
                        seen.append(instances.look(params, statistics))
                except Exception:
                    return False  # the way is not for this model; what is wrong with the task shows one by one
                params, statistics = params - 0.01 * seen[-1].grad, seen[-1].statistics
            if instances.forward is not forward:
                return False
        pairs = [pair for one, other in zip(seen[:2], seen[2:], strict=True) for pair in zip(one, other, strict=True)]
        return all(_close(*pair) for pair in pairs if pair[0].numel())


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by rounding; what is not finite does not."""
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(one.nan_to_num(0, 0, 0).abs().max()))


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What a first look at a task says.

    Attributes:
        name: of the task.
        model: class of the module.
        parameters, tensors: that are trained, in numbers.
        loss: the first.
        seconds: of a forward and a backward pass.
        deterministic: whether the same seeds gave the same loss twice.
        together: whether models of several instances run at once.
    """

    name: str
    model: str
    parameters: int
    tensors: int
    loss: float
    seconds: float
    deterministic: bool
    together: bool


def examine(task: OwnTask, seed: int = TRAINING) -> Examined:
    """Make an instance and take some steps of it, so that mistakes show before hours are spent.

    Raises:
        TaskError: it cannot be trained.
    """
    losses, times = [], []
    task.instances(2, seed)
    for _ in range(2):
        instances = task.instances(1, seed)
        seen = instances.look(instances.params, instances.statistics)
        losses.append(float(seen.loss))
    if not np.isfinite(losses[0]):
        raise TaskError(f"{task.name}: the loss is {losses[0]} at the start, before any step")
    if not bool(seen.grad.isfinite().all()):
        raise TaskError(f"{task.name}: gradients are not finite at the start, before any step")
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        instances.look(instances.params, instances.statistics)
        times.append(time.perf_counter() - begun)
    assert isinstance(instances, OwnInstances)
    return Examined(
        name=task.name,
        model=type(instances.problems[0].model).__name__,
        parameters=instances.params.shape[1],
        tensors=len(instances.shapes),
        loss=losses[0],
        seconds=median(times),
        deterministic=losses[0] == losses[1],
        together=task.together,
    )
