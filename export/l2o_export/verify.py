"""Does an exported file do what the rule does? Step by step from equal states, and running free.

*Step by step:* the rule trains a small network; at each of its steps the file gets what the rule got, and is to return
what the rule returned. That is sharp, since nothing adds up. *Running free:* the file trains the network alone. A rule
may amplify rounding so much that two correct programs part, so the distance at the end is held against that of the rule
from itself, started from parameters changed in the last bit.

Eager is `Rule.forward`, made of torch's operators; compiled kernels are off.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from typing import NamedTuple, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from l2o_export.formats import ExportError
from l2o_runtime.files.exported import ExportedRule
from l2o_runtime.files.untrusted import printable
from l2o_runtime.layout import Layout
from l2o_runtime.rules import Rule
from l2o_runtime.state import State, zeros

T = TypeVar("T")

STEPS = 200
"""Of the trajectory: windows of the presets are full after 21, clocks stop after 100."""

STEP_TOLERANCE = 1e-5
"""Of one step, relative: some hundred roundings of float32 (6e-8); a change in a formula's third digit is 1e-3."""

FREE_TOLERANCE = 1e-4
"""Of parameters after `STEPS` steps, relative, for rules that do not amplify rounding; others get `FREE_FACTOR`."""

FREE_FACTOR = 10.0
"""The file rounds at every step and everywhere, the changed copy of eager once and in its parameters alone."""

WIDE_FACTOR, WIDE_STEPS = 4, 25
"""A rule that treats networks of more than so many parameters differently also trains one of four times as many."""

WIDEST = 200_000
"""No network is made larger than that; what a rule does in such ones goes unverified."""

ROUNDINGS = 50.0
"""What rounding in one step may do, in terms of what changes of the last bits do to eager: its sums have about so many
terms (twice the hidden units, and the features), and each is rounded."""

DRAWS = 4
"""Of last bits that are changed, where one is not enough."""

SCALES = (1.0, 1e-5, 1e-9, 1e-15, 0.0)
"""Of inputs, and so of gradients: each goes through weights of its own, so that errors in small gradients (below the
e^−10 of `log_sign`, near ε, whose squares underflow) do not hide behind large ones. Two of the first kind are always
zero, like the border of an image."""

HIDDEN, INPUTS, OUTPUTS, POINTS, BATCH = 16, 12, 4, 512, 32
PER_UNIT = len(SCALES) * INPUTS + 1 + OUTPUTS
"""Parameters for every hidden unit."""


class Problem(NamedTuple):
    """A network to be trained.

    Attributes:
        shapes: of its tensors.
        start: (n,) its parameters, one tensor after the other.
        look: (θ, step) → gradient (n,) and loss () of that step's minibatch.
    """

    shapes: list[torch.Size]
    start: Tensor
    look: Callable[[Tensor, int], tuple[Tensor, Tensor]]


Got = tuple[Tensor, Tensor, Tensor, State, State, Layout | None]
"""param, grad, loss, coordinates, optimization, layout."""

Gave = tuple[Tensor, State, State]
"""Δ, and the new states of coordinates and of the optimization."""


class Step(NamedTuple):
    """One step of a rule."""

    got: Got
    gave: Gave


class Recorded(NamedTuple):
    """One step of eager.

    Attributes:
        got: what it got.
        gave: what it gave.
        changed: gives what it gives for the last bits changed of what it got, by the number of the draw.
    """

    got: Got
    gave: Gave
    changed: Callable[[int], Gave]


def make_problem(hidden: int = HIDDEN) -> Problem:
    """A classifier with one hidden tanh layer on minibatches of 32 out of 512 points, labelled by a random teacher."""
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(POINTS, INPUTS, generator=rng)
    labels = (inputs @ torch.randn(INPUTS, OUTPUTS, generator=rng)).argmax(-1)
    inputs[:, :2] = 0
    scaled = [scale * inputs for scale in SCALES]
    batches = torch.randint(POINTS, (STEPS, BATCH), generator=rng)
    shapes = [*[torch.Size([hidden, INPUTS])] * len(SCALES), torch.Size([hidden]), torch.Size([OUTPUTS, hidden])]
    shapes.append(torch.Size([OUTPUTS]))
    bounds = [1 / math.sqrt(shape[-1]) for shape in shapes]
    start = [(2 * torch.rand(shape, generator=rng) - 1) * bound for shape, bound in zip(shapes, bounds, strict=True)]

    def look(theta: Tensor, step: int) -> tuple[Tensor, Tensor]:
        theta = theta.detach().requires_grad_()
        parts = theta.split([shape.numel() for shape in shapes])
        *first, bias, second, last = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        batch = batches[step]
        sums = torch.stack([F.linear(x[batch], weight) for x, weight in zip(scaled, first, strict=True)]).sum(0)
        loss = F.cross_entropy(F.linear((sums + bias).tanh(), second, last), labels[batch])
        (grad,) = torch.autograd.grad(loss, theta)
        return grad, loss.detach()

    return Problem(shapes, torch.cat([tensor.flatten() for tensor in start]), look)


def run(rule: Rule | ExportedRule, problem: Problem, start: Tensor, steps: int = STEPS) -> Iterator[Step]:
    """Train with a rule; every other step gets the loss, so that both ways of calling it are in it."""
    theta, layout = start, rule.layout(problem.shapes) if rule.per_tensor else None
    coordinates = zeros(rule.spec.coordinate, (len(start),))
    optimization = zeros(rule.spec.model, ()) | zeros(rule.spec.tensor, (len(problem.shapes),))
    for number in range(steps):
        grad, loss = problem.look(theta, number)
        got = (theta, grad, loss if number % 2 else torch.zeros(()), coordinates, optimization, layout)
        delta, coordinates, optimization = gave = _call(rule, got)
        yield Step(got, gave)
        theta = theta + delta


def in_last_bits(got: Got, rng: torch.Generator) -> Got:
    """What a rule got, with every number that is not 0 a little larger or smaller, at random, in its last bit."""

    def change(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        signs = torch.randint(0, 2, value.shape, generator=rng).mul_(2).sub_(1)
        return value * (1 + torch.finfo(value.dtype).eps * signs.to(value.dtype))

    param, grad, loss, *states, layout = got
    coordinates, optimization = ({key: change(value) for key, value in state.items()} for state in states)
    return change(param), change(grad), change(loss), coordinates, optimization, layout


def record(rule: Rule, problem: Problem, steps: int = STEPS) -> Iterator[Recorded]:
    """Train with eager, and see at every step what it returns for the last bits changed of what it got."""

    def change(got: Got, number: int, draw: int) -> Gave:
        return _call(rule, in_last_bits(got, torch.Generator().manual_seed(DRAWS * number + draw)))

    for number, step in enumerate(run(rule, problem, problem.start, steps), 1):
        yield Recorded(step.got, step.gave, cache(partial(change, step.got, number)))


def relative_error(ours: Tensor, theirs: Tensor, *changed: Tensor) -> float:
    """‖theirs − ours‖ / max(‖ours‖, ROUNDINGS / STEP_TOLERANCE · ‖changed − ours‖, √k · 2⁻¹²⁶) for k numbers.

    Where a quantity is ill-conditioned (a sum whose terms cancel, an eigenvalue beside another), two correct programs
    may differ by more than 1e-5 of it; by how much, the last bits of what it is made of tell. Numbers below the
    smallest normal one, 2⁻¹²⁶, lack digits, so that is the least to be measured by. Integers have to be equal: 0, or ∞.

    Args:
        ours, theirs: of eager and of the file.
        changed: of eager, from states and gradients that were changed in the last bit; the farthest counts.
    """
    if not ours.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else math.inf
    ours, theirs = ours.double(), theirs.double()
    floor = math.sqrt(ours.numel()) * torch.finfo(torch.float32).tiny
    own = max(float((other.double() - ours).norm()) for other in changed) * ROUNDINGS / STEP_TOLERANCE
    error = float((theirs - ours).norm()) / max(float(ours.norm()), own, floor)
    return error if math.isfinite(error) else math.inf


def step_error(rule: Rule | ExportedRule, shapes: list[torch.Size], number: int, step: Recorded) -> tuple[float, str]:
    """The largest relative error of a step, from equal states, and what it is of.

    Δ and every state are measured by themselves, and of what there is of every coordinate (or tensor) the part of each
    tensor. Counters that are integers have to be equal; those in floating point are whole numbers up to `STEPS`, where
    one that is off by one is off by 5e-3. Of a single number, one draw of last bits may happen to do next to nothing:
    where the first allows too little, others are looked at.

    Args:
        rule: the file.
        shapes: of the network that eager trained.
        number: of the step, from 1.
        step: of eager.
    """
    theirs = _call(rule, step.got)
    found = _largest(rule, shapes, number, step.gave, theirs, step.changed(0))
    if found[0] > STEP_TOLERANCE:
        found = _largest(rule, shapes, number, step.gave, theirs, *map(step.changed, range(DRAWS)))
    return found


def _largest(rule: Rule | ExportedRule, shapes: list[torch.Size], number: int, *gave: Gave) -> tuple[float, str]:
    """The largest relative error of a step, from what eager, the file, and eager with changed bits gave."""
    sizes, found = [shape.numel() for shape in shapes], []
    named = list(map(_named, gave))
    for key in named[0]:
        whole = key in rule.spec.model
        tensors = [each[key] for each in named]
        cut = [(x,) if whole else x.split(1 if key in rule.spec.tensor else sizes) for x in tensors]
        for index, parts in enumerate(zip(*cut, strict=True)):
            place = f"{key} of step {number}" + ("" if whole else f", tensor {index}")
            found.append((relative_error(*parts), place))
    return max(found)


class Reference(NamedTuple):
    """What files of a rule are held against.

    Attributes:
        rule: eager.
        problem: that the rule and its files run free on.
        end: (n,) where it came to.
        own: relative distance from `end` of where it comes to from parameters changed in the last bit.
    """

    rule: Rule
    problem: Problem
    end: Tensor
    own: float

    @property
    def steps(self) -> int:
        """Of the optimization that files are held against."""
        return STEPS

    @property
    def tolerance(self) -> float:
        """What a step may be off."""
        return STEP_TOLERANCE

    def recorded(self) -> Iterator[tuple[list[torch.Size], int, Recorded]]:
        """A network's shapes, number of a step, from 1, and that step of eager.

        They are not kept, for the state of a large rule takes much memory.
        """
        for problem, steps in self.trainings():
            for number, step in enumerate(record(self.rule, problem, steps), 1):
                yield problem.shapes, number, step

    def trainings(self) -> Iterator[tuple[Problem, int]]:
        """Networks that are trained, and for how many steps."""
        yield self.problem, STEPS
        limits = getattr(self.rule.config, "limits", None)
        known = None if limits is None else limits.known_parameters
        if known is not None and WIDE_FACTOR * known <= WIDEST:
            yield make_problem(WIDE_FACTOR * known // PER_UNIT + 1), WIDE_STEPS


class Parity(NamedTuple):
    """How a file compares with eager.

    Attributes:
        step_error: the largest relative error of a step; that of the first step whose error is not allowed, if any.
        where: what it is the error of, and in which step.
        distance: ‖θ − θ'‖ / ‖θ‖ after `STEPS` steps running free; ∞ where a step failed already.
        allowed: what that may be.
    """

    step_error: float
    where: str
    distance: float
    allowed: float

    @property
    def complaint(self) -> str | None:
        """What is wrong, if anything."""
        if self.step_error > STEP_TOLERANCE:
            most = f"at most {STEP_TOLERANCE:.0e} is allowed"
            return (
                f"from equal states it differs from eager in {self.where}, by {self.step_error:.2e} (relative; {most})"
            )
        if self.distance > self.allowed:
            most = f"at most {self.allowed:.1e} is allowed"
            return f"running free it ends {self.distance:.1e} from eager after {STEPS} steps (relative; {most})"
        return None


def make_reference(rule: Rule) -> Reference:
    """Train with the rule itself: as it is, and from parameters changed in the last bit.

    Raises:
        ExportError: it diverges, so that there is nothing to hold files against.
    """
    problem = make_problem()
    end = _end(run(rule, problem, problem.start))
    own = _distance(end, _end(run(rule, problem, torch.nextafter(problem.start, torch.tensor(math.inf)))))
    if not math.isfinite(own):
        raise ExportError(f"the rule itself diverges within {STEPS} steps on the network that verifies its files")
    return Reference(rule, problem, end, own)


def verify(reference: Reference, files: Mapping[str, Rule | ExportedRule]) -> dict[str, Parity | ExportError]:
    """Hold files, read back, against eager; one that fails step by step does not run free.

    They go side by side: most of the time is eager's, which so trains once for all of them.

    Args:
        reference: eager.
        files: by any names.

    Returns:
        How each compares, or why it cannot be run.
    """
    worst: dict[str, tuple[float, str]] = dict.fromkeys(files, (0.0, "nothing"))
    parities: dict[str, Parity | ExportError] = {}
    for shapes, number, step in reference.recorded():
        running = [name for name in files if name not in parities and worst[name][0] <= STEP_TOLERANCE]
        if not running:
            break
        for name in running:
            error = _attempt(partial(step_error, files[name], shapes, number, step))
            if isinstance(error, ExportError):
                parities[name] = error
            else:
                worst[name] = max(worst[name], error)
    for name in files.keys() - parities.keys():
        parities[name] = _attempt(partial(_compare, reference, files[name], worst[name]))
    return {name: parities[name] for name in files}


def _compare(reference: Reference, file: Rule | ExportedRule, worst: tuple[float, str]) -> Parity:
    """A file whose steps are known: it runs free where they pass."""
    allowed, distance = max(FREE_FACTOR * reference.own, FREE_TOLERANCE), math.inf
    if worst[0] <= STEP_TOLERANCE:
        distance = _distance(reference.end, _end(run(file, reference.problem, reference.problem.start)))
    return Parity(*worst, distance, allowed)


def _attempt(action: Callable[[], T]) -> T | ExportError:
    """What an action gives, or why it fails: programs of torch and onnxruntime raise classes of many kinds."""
    try:
        return action()
    except Exception as error:
        return ExportError(f"could not be run ({type(error).__name__}: {printable(error)})")


def _call(rule: Rule | ExportedRule, got: Got) -> Gave:
    with torch.no_grad(), mock.patch.dict(os.environ, L2O_KERNELS="plain"):
        return rule(*got)


def _named(gave: Gave) -> dict[str, Tensor]:
    delta, coordinates, optimization = gave
    return {"delta": delta, **coordinates, **optimization}


def _end(steps: Iterable[Step]) -> Tensor:
    """The parameters after the last step."""
    *_, last = steps
    return last.got[0] + last.gave[0]


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖ours‖, ∞ where it is no number."""
    found = float((ours - theirs).norm() / ours.norm())
    return found if math.isfinite(found) else math.inf
