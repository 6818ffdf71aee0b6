"""The pace of Koopman acceleration: when to jump, how boldly, and how a jump is judged. Nothing here is a parameter."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from math import isfinite
from statistics import fmean, pstdev

import torch
from torch import Tensor

RIDGES = (1e-14, 1e-6, 1.0)
"""Lowest, first and highest ridge; above the highest, where jumps end in the window's middle, it begins anew."""

AGAIN = 1e-8
"""The ridge at which it begins anew."""

MARGIN = 2.0
"""Standard deviations by which a loss has to be below its trend, where it is of another minibatch."""

RECENT = 20
"""Losses that the trend is taken from."""

ROUND, LONGEST = 4, 4
"""So many failed tries go once through the ridges; every round doubles the wait, which grows up to so many times."""


@dataclass
class Pace:
    """Where the accelerator is.

    Attributes:
        kept: snapshots since the window was begun; the newest `window` + 1 of them are there.
        since: steps since the last snapshot.
        waited: steps since the last try.
        failures: failed tries in a row.
        ridge: of the next try.
        pending: a jump was made that has not been judged.
        tries, jumps: counters, of all tries and of those that lowered the loss.
    """

    kept: int = 0
    since: int = 0
    waited: int = 0
    failures: int = 0
    ridge: float = RIDGES[1]
    pending: bool = False
    tries: int = 0
    jumps: int = 0

    def judged(self, good: bool) -> None:
        """Take notice of how a try went."""
        lowest, _, highest = RIDGES
        self.pending, self.waited = False, 0
        self.tries, self.jumps, self.failures = self.tries + 1, self.jumps + good, 0 if good else self.failures + 1
        self.ridge = max(self.ridge / 10, lowest) if good else self.ridge * 100
        if self.ridge > highest:
            self.ridge = AGAIN

    def to_tensor(self) -> Tensor:
        """All of it, (8,) float64 on the CPU."""
        return torch.tensor([float(value) for value in astuple(self)], dtype=torch.float64)

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "Pace":
        """What `to_tensor` gave."""
        start = cls()
        return cls(*(type(old)(new) for old, new in zip(astuple(start), tensor.tolist(), strict=True)))


def below_trend(losses: Sequence[float], value: float) -> bool:
    """Whether a loss is clearly below those before it, had they gone on falling as they did.

    Args:
        losses: the latest, the newest last; NaN where there was none. Those that are not finite do not count.
        value: the one that is judged; below nothing, where it is not finite.

    >>> below_trend([3.0, 2.9, 2.8, 2.7], 2.5), below_trend([3.0, 2.5, 3.1, 2.6], 2.5)
    (True, False)
    """
    known = [loss for loss in losses if isfinite(loss)]
    falls = [after - before for before, after in pairwise(known)]
    if len(falls) < 2 or not isfinite(value):
        return False
    expected = fmean(known) + min(fmean(falls), 0.0) * (len(known) + 1) / 2
    return value < expected - MARGIN * pstdev(falls) / 2**0.5
