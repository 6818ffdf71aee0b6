"""Tasks of one's own: a Python function that makes a model and its loss.

`make(seed)` gives one instance of the problem: a module, and `loss(model, step)`, which draws a minibatch and gives its
loss. Whatever either of them draws by torch, numpy or `random` comes from a seed, so that an instance and its
minibatches can be met again: by the rule's next version, by Adam, after a restart.
"""

import importlib
import importlib.util
import inspect
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l2o_runtime.config import ConfigError, require
from l2o_training.tasks.base import Instances, Seen, Task, generator
from l2o_training.tasks.networks import running_statistics

Make = Callable[[int], tuple[Any, ...]]
"""From a seed to (model, loss), or (model, loss, validate): a module, `loss(model, step)` and `validate(model)`."""

EVALUATION, VALIDATION, TRAINING = 0, 2**29, 2**30
"""Seeds of instances, by what they are for, begin here: below 2³¹, which every library takes, and none is in two."""

VALIDATED = 2**31, 2**32
"""Numbers of validations, as `Task.instances` gets them, are from the first on and below the second."""

ROUNDS = 12
"""Steps that `examine` times."""


class TaskError(ValueError):
    """A task of the user's own cannot be used.

    Args:
        message: one line.
        trace: where their code failed, if it did; from their first line on.
    """

    def __init__(self, message: str, trace: str = ""):
        super().__init__(message)
        self.trace = trace


@contextmanager
def _theirs(what: str) -> Iterator[None]:
    """Their code: what it raises is told with their traceback."""
    try:
        yield
    except TaskError:
        raise
    except (Exception, SystemExit) as error:
        own = str(Path(__file__).parent.parent)
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _within(frame.filename, own)]
        kept = [frame for frame in frames if "importlib" not in frame.filename]
        lines = ["Traceback (most recent call last):\n", *traceback.format_list(kept)] if kept else []
        lines += traceback.format_exception_only(error)
        raise TaskError(f"{what} failed: {type(error).__name__}: {error}", "".join(lines)) from None


def _within(file: str, folder: str) -> bool:
    return file.startswith(folder)


def is_place(text: str) -> bool:
    """Whether a text is "file.py:function" or "package.module:function", rather than a task's name."""
    return ":" in text


def name_of(place: str) -> str:
    """What tables call a task: its file or module, and the function unless that is `make`.

    >>> name_of("examples/gallery/siren.py:make"), name_of("mine.tasks:small")
    ('siren', 'tasks.small')
    """
    where, _, function = place.rpartition(":")
    stem = Path(where).stem if where.endswith(".py") else where.rpartition(".")[2]
    return stem if function == "make" else f"{stem}.{function}"


def find_make(place: str) -> Make:
    """The function of a place, whose file or module is run.

    Args:
        place: "file.py:function" or "package.module:function".

    Raises:
        ConfigError: there is no such file, module or function.
        TaskError: running the file failed.
    """
    where, colon, name = place.rpartition(":")
    require(bool(colon and where and name), f"task {place!r}: expected file.py:function or package.module:function")
    module = _run_file(Path(where)) if where.endswith(".py") else _imported(where)
    make = getattr(module, name, None)
    if make is None:
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        own = [key for key in functions if getattr(vars(module)[key], "__module__", None) == module.__name__]
        raise ConfigError(f"task {place}: {where} has no {name!r}; it has {', '.join(own) or 'no functions'}")
    require(callable(make), f"task {place}: {name} is of type {type(make).__name__}, not a function")
    return make  # type: ignore[no-any-return]


def _run_file(path: Path) -> ModuleType:
    require(path.is_file(), f"task file {path} does not exist (looked in {Path.cwd()})")
    if str(path.parent.resolve()) not in sys.path:  # as when Python runs a file, so that it may import its neighbours
        sys.path.insert(0, str(path.parent.resolve()))
    name = f"l2o_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _theirs(f"task file {path}"):
        spec.loader.exec_module(module)
    return module


def _imported(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    if str(Path.cwd()) not in sys.path:  # as with `python -m`
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):
        found = None
    require(found is not None, f"task module {name!r} is not found: give file.py:function, or install the package")
    with _theirs(f"task module {name}"):
        return importlib.import_module(name)


def text_of(make: Make) -> bytes:
    """The text of the file that a function is in; of one without a file, as in a notebook, its own."""
    file = inspect.getsourcefile(make)
    return Path(file).read_bytes() if file is not None and Path(file).is_file() else inspect.getsource(make).encode()


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
        seed: of the instance.
        params: tensors that are trained.
        buffers: running statistics of BatchNorm.
        validate: gives the loss on held-out data; None where there is none.

    Raises:
        TaskError: it is not one.
    """

    def __init__(self, make: Make, seed: int, device: torch.device):
        what = f"{getattr(make, '__name__', 'make')}({seed})"
        with own_randomness(device) as reseed, _theirs(what):
            reseed(seed)
            made = make(seed)
        parts = made if isinstance(made, tuple) else (made,)
        fits = len(parts) in (2, 3) and isinstance(parts[0], nn.Module) and all(map(callable, parts[1:]))
        if not fits:
            got = ", ".join(type(part).__name__ for part in parts)
            raise TaskError(f"{what} has to return a module and a function loss(model, step), got ({got})")
        self.seed = seed
        self.model, self.loss, self.validate, *_ = (parts[0].to(device).train(), *parts[1:], None)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.buffers = list(running_statistics(self.model).values())
        if not self.params:
            raise TaskError(f"{what}: the model has no parameters with requires_grad: there is nothing to train")

    def __call__(self, step: int) -> Tensor:
        """The loss of a step, a scalar; the generators have to be seeded.

        Raises:
            TaskError: it is something else.
        """
        with _theirs(f"loss(model, {step})"):
            loss = self.loss(self.model, step)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TaskError(f"loss(model, {step}) has to return a scalar tensor, got {got}: take its mean()")
        return loss

    def validated(self) -> float:
        """The loss on held-out data, in evaluation mode."""
        assert self.validate is not None
        self.model.eval()
        with torch.no_grad(), _theirs("validate(model)"):
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
            with _theirs("loss.backward()"):
                found = torch.autograd.grad(loss, self.params, allow_unused=True)
        if all(grad is None for grad in found):
            raise TaskError("the loss does not depend on the model's parameters: was it detached, or another model's?")
        return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(self.params, found, strict=True)]


class OwnInstances(Instances):
    """Instances of a task of one's own, one after the other; their modules are only a place to compute in.

    Running statistics begin with the number of minibatches so far, which `loss` is told.

    Args:
        problems: B of them, of equal shapes.
        rng: what the seeds of their minibatches are drawn with.
        device: where they live.
    """

    def __init__(self, problems: list[Problem], rng: torch.Generator, device: torch.device):
        params = torch.stack([_flat(problem.params) for problem in problems])
        statistics = torch.stack([torch.cat([params.new_zeros(1), _flat(problem.buffers)]) for problem in problems])

        def draws() -> tuple[Tensor, ...]:
            return (torch.randint(2**62, (len(problems),), generator=rng),)

        shapes = [p.shape for p in problems[0].params]
        super().__init__(params, self._refuse, draws, rng, shapes, statistics)
        self.problems, self.device = problems, device

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
                after.append(torch.cat([kept[:1] + 1, _flat(problem.buffers)]))
                scores.append(self._score(problem, kept[1:], reseed, draw, step) if problem.buffers else losses[-1])
        grad = torch.stack(grads)
        grad = grad if self._scale is None else grad * self._scale
        return Seen(torch.stack(losses), grad, torch.stack(scores), torch.stack(after))

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
    parts = [tensor.detach().reshape(-1).float() for tensor in tensors]
    return torch.cat(parts) if parts else torch.zeros(0)


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
        return OwnInstances(problems, generator(seed, torch.device("cpu")), self.device)


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
    """

    name: str
    model: str
    parameters: int
    tensors: int
    loss: float
    seconds: float
    deterministic: bool


def examine(task: OwnTask, seed: int = TRAINING) -> Examined:
    """Make an instance and take some steps of it, so that mistakes show before hours are spent.

    Raises:
        TaskError: it cannot be trained.
    """
    losses, times = [], []
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
    )
