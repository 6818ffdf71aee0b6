"""How the size of steps changes over a run, where a rule leaves that to a schedule.

Three cases, in this order: `total_steps` is known; a scheduler of torch drives lr, which leaves `initial_lr` in the
group, and from whose pace the length is guessed; nobody says anything. Factors are tensors, so that nothing has to wait
for a device and a step compiles.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2o_runtime.arithmetic import at_least, at_most

WARM_UP = 0.02
"""Share of a run of known length in which steps grow."""

RISE = 20
"""Steps in which they grow where nobody knows how long the run is."""

LENGTH = 2500
"""Shorter runs than this have longer steps: with more of them a network gets as far with shorter ones."""

LONGEST = 3.0
"""How much longer they may be."""

ANYTIME = 1.5
"""How long steps would be at the beginning of such a run, beside the longest where the length is known."""

FADING = 250.0
"""Steps after which they begin to fall, with the ¾-th power of their number."""

POWER = 0.75
"""More than a half, so that the noise of long runs ends; less than one, or they would stop."""

SMALLEST_RATE = 1e-30
"""Learning rates are divided by at least this."""


def linear(step: Any, total: int | Tensor) -> Any:
    """min(1, t / 0.02 T) (1 − t/T), and 0 from T on.

    >>> linear(torch.tensor([1, 10, 250, 500, 501]), 500)
    tensor([0.0998, 0.9800, 0.5000, 0.0000, 0.0000])
    """
    return at_most(step / at_least(WARM_UP * total, 1.0), 1.0) * at_least(1 - step / total, 0.0)


def longer(short: Any) -> Any:
    """The root of how many times shorter a run is than 2,500 steps, within 1 … 3: how much longer its steps are."""
    return at_most(at_least(short, 1.0), LONGEST**2) ** 0.5


def told(step: Any, total: int | Tensor) -> Any:
    """`linear`, times √(2500 / T) in shorter runs than 2,500 steps, but at most 3.

    >>> told(torch.tensor(50), 100), told(torch.tensor(500), 625), told(torch.tensor(5000), 10_000)
    (tensor(1.5000), tensor(0.4000), tensor(0.5000))
    """
    return longer(LENGTH / total) * linear(step, total)


def paced(step: Any, left: Any) -> Any:
    """√(2500 (1 − f) / t), within 1 … 3, beside a scheduler that has left f of lr in step t.

    A scheduler does not say how long the run is. It would take t / (1 − f) steps if lr fell along a line, at the pace
    that it has had so far. While lr rises, nothing is known.

    >>> paced(torch.tensor([1, 50, 2000]), torch.tensor([1.0, 0.9, 0.2]))
    tensor([1.0000, 2.2361, 1.0000])
    """
    return longer((1 - left) * LENGTH / step)


def anytime(step: Any) -> Any:
    """3/2 min(1, t/20) / (1 + t/250)^¾: falls for ever, as in stochastic approximation.

    >>> anytime(torch.tensor([10, 1000, 3750]))
    tensor([0.7283, 0.4486, 0.1875])
    """
    return ANYTIME * at_most(step / RISE, 1.0) / (1 + step / FADING) ** POWER


@dataclass(frozen=True)
class Schedule:
    """What lr is multiplied by.

    Attributes:
        total: the number of steps of the run, if it is known.
        fades: whether a rule leaves the size of its steps to this: they are longer in short runs, also where a
            scheduler makes them shorter, and become shorter by themselves where nobody says anything.
    """

    total: int | None = None
    fades: bool = False

    def factor(self, group: dict[str, Any], done: Callable[[], Tensor]) -> Tensor | float:
        """On a group's lr in the next step.

        Args:
            group: of parameters.
            done: gives the number () of steps so far; it is asked only where that matters.
        """
        if self.total is None and not self.fades:
            return 1.0
        before = done()
        # Python takes a tenth of the time that operators take, where nothing has to be waited for.
        here = before.device.type == "cpu" and not torch.compiler.is_compiling()
        at: Tensor | float = before.item() + 1 if here else before.double() + 1
        found: Tensor | float
        if self.total is not None:
            found = self._length(at, self.total)
        elif self.anytime(group):
            found = anytime(at)
        else:
            found = paced(at, _left(group))
        return found

    def anytime(self, group: dict[str, Any]) -> bool:
        """Whether nobody says how long the run is; then parameters follow: `l2o_runtime.stepping.interpolation`."""
        return self.fades and self.total is None and "initial_lr" not in group

    @property
    def _length(self) -> Callable[[Tensor | float, int], Tensor | float]:
        """Of the steps of a run of known length."""
        return told if self.fades else linear

    def fall(self, done: Callable[[], Tensor]) -> float:
        """For optimizers that have their own size: `linear` in a run of known length, else 1."""
        return 1.0 if self.total is None else float(linear(done().double() + 1, self.total))


def _left(group: dict[str, Any]) -> Tensor | float:
    """What a scheduler has left of a group's largest learning rate so far, which the group keeps as `top_lr`.

    One above the initial rate (`OneCycleLR`: above `max_lr`) counts as that.
    """
    lr = group["lr"]
    group["top_lr"] = at_least(lr, group.get("top_lr", 0.0))
    top = at_most(group["top_lr"], group.get("max_lr", group["initial_lr"]))
    left: Tensor | float = lr / at_least(top, SMALLEST_RATE)
    return left
