"""Timing: several optimizers in turn, so that what disturbs the machine disturbs all alike."""

import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.optim import Optimizer

from l2o_runtime import HorizonWarning
from l2o_training.bench.memory import allocated_peak, resident_peak, state_bytes
from l2o_training.bench.models import Shapes, count, random_tensors
from l2o_training.bench.racers import Racer, stepper

WARM_UP = (2, 22)
"""Fewest and most untimed steps; the most fill a context's window of 20."""

WARM_UP_SECONDS = 1.0

FEWEST = 3
"""Rounds that are run whatever the budget."""

COPY_BYTES = 2**28
"""Largest buffer of the copy probe; beyond the caches of most machines."""


@dataclass
class Lane:
    """An optimizer under test, with parameters of its own.

    Attributes:
        racer: who.
        optimizer: made from it.
        step: what is timed.
        seconds: of every timed step.
        state, allocated, resident: bytes kept, and bytes taken for a moment by both measures.
    """

    racer: Racer
    optimizer: Optimizer
    step: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    state: int = 0
    allocated: int = 0
    resident: int | None = None


@dataclass(frozen=True)
class Rates:
    """What the machine can do, at best: FLOP/s of a float32 matrix product, bytes/s read and written by a copy."""

    gemm: float
    copy: float


class Gradients:
    """One set of gradients for all lanes: every step finds the same, whatever the previous optimizer did to them."""

    def __init__(self, shapes: Shapes, device: torch.device):
        self._kept = random_tensors(shapes, 1e-2, 1, device)
        self.tensors = [grad.clone() for grad in self._kept]

    def restore(self) -> None:
        """Write the gradients anew."""
        torch._foreach_copy_(self.tensors, self._kept)


def clock(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def open_lane(racer: Racer, shapes: Shapes, gradients: Gradients, device: torch.device) -> Lane:
    """Make an optimizer with its parameters."""
    params = [param.requires_grad_() for param in random_tensors(shapes, 0.1, 0, device)]
    for param, grad in zip(params, gradients.tensors, strict=True):
        param.grad = grad
    optimizer = racer.make(params)
    return Lane(racer, optimizer, stepper(optimizer, torch.ones((), device=device)))


def warm_up(lane: Lane, gradients: Gradients, device: torch.device) -> None:
    """Untimed steps: states are made, windows filled as far as time allows."""
    spent = 0.0
    for done in range(WARM_UP[1]):
        if done >= WARM_UP[0] and spent > WARM_UP_SECONDS:
            break
        gradients.restore()
        spent += clock(lane.step, device)


def weigh(lane: Lane, gradients: Gradients, device: torch.device, *, resident: bool = True) -> None:
    """Count the bytes of state, and those of a step's peak, for which up to three more steps are taken."""
    lane.state = state_bytes(lane.optimizer)

    def step() -> None:
        gradients.restore()
        lane.step()

    lane.allocated = allocated_peak(step, device)
    if resident and device.type == "cpu":
        lane.resident = resident_peak(step)


class Probes:
    """The machine's floors, measured in turn with the optimizers; the best of all rounds counts.

    Args:
        parameters: of the model; the copied buffer is as large as the state of a 2×20 rule, up to `COPY_BYTES`.
        device: where.
    """

    def __init__(self, parameters: int, device: torch.device):
        self.device = device
        side = 1024 if device.type == "cpu" else 8192
        self.a, self.b, self.c = (torch.randn(side, side, device=device) for _ in range(3))
        self.source = torch.randn(min(80 * parameters, COPY_BYTES // 4), device=device)
        self.target = torch.empty_like(self.source).copy_(self.source)
        self.gemm: list[float] = []
        self.copy: list[float] = []

    def measure(self) -> None:
        """One product, and one pass over the buffer of either kind."""
        self.gemm.append(clock(lambda: torch.mm(self.a, self.b, out=self.c), self.device))
        # In place there is no target to be fetched before it is written, as in an optimizer's update of its state.
        self.copy.append(clock(lambda: self.target.copy_(self.source), self.device))
        self.copy.append(clock(lambda: self.target.neg_(), self.device))

    def rates(self) -> Rates:
        """Best of all rounds but the first, which warms up."""
        return Rates(
            gemm=2 * len(self.a) ** 3 / min(self.gemm[1:]),
            copy=2 * self.source.numel() * self.source.element_size() / min(self.copy[2:]),
        )


def race(
    racers: list[Racer],
    shapes: Shapes,
    *,
    steps: int,
    seconds: float,
    device: torch.device,
    report: Callable[[str], None] = lambda text: None,
) -> tuple[list[Lane], Rates]:
    """Time racers in turn, one step each per round, in a new order every round.

    Args:
        racers: all of them are in memory at once.
        shapes: of the parameters.
        steps: rounds at most.
        seconds: after which no further round is begun, once there are `FEWEST`.
        device: where.
        report: told what is going on.
    """
    gradients = Gradients(shapes, device)
    lanes = []
    order = random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HorizonWarning)
        for racer in racers:
            report(f"{racer.name}: warm-up and memory")
            lane = open_lane(racer, shapes, gradients, device)
            warm_up(lane, gradients, device)
            weigh(lane, gradients, device)
            lanes.append(lane)
        probes = Probes(count(shapes), device)
        probes.measure()
        started = time.perf_counter()
        for done in range(steps):
            if done >= FEWEST and time.perf_counter() - started > seconds:
                break
            report(f"round {done + 1} of up to {steps}")
            probes.measure()
            for lane in order.sample(lanes, len(lanes)):
                gradients.restore()
                lane.seconds.append(clock(lane.step, device))
    return lanes, probes.rates()


def overhead(lane: Lane, base: Lane) -> float:
    """Relative extra time of a lane over another, the median over rounds: in one round both find the same machine."""
    return statistics.median(a / b - 1 for a, b in zip(lane.seconds, base.seconds, strict=True))
