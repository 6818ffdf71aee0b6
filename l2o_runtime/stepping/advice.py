"""What a learned optimizer tells a script, once for every subject, at the line of the script."""

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2o_runtime.rules import RuleConfig
from l2o_runtime.stepping.distributed import Groups
from l2o_runtime.stepping.losses import RANKS, Loss

FIRST_STEPS = 10
"""So many steps a learning rate may be low, as in a warm-up, before it is taken for one that was meant for Adam."""

NOTHING = 100
"""Steps after which it is told that none of them was taken."""

LOW_LR = 0.05
"""Learning rates below this train next to nothing."""

LEFT_OVER = (
    "lr has been at most {:g} for ten steps, which trains next to nothing: it multiplies the learned step, and 1.0 is "
    "what rules are made for; is this value left over from another optimizer?"
)

LEFT_OUT = (
    "none of the first {} steps was taken, since gradients, losses or parameters were not finite, or no gradient was "
    "other than zero: optimizer.health() counts them; numbers above 1e19, whose squares overflow, are not finite"
)


class HorizonWarning(UserWarning):
    """A run has become longer than those that its rule was meta-trained for."""


@dataclass
class Advice:
    """Warnings, and what they depend on.

    Attributes:
        calls: steps so far.
        lrs: the largest learning rate of the first steps.
        told: what has been said.
    """

    calls: int = 0
    lrs: list[float] = field(default_factory=list)
    told: set[str] = field(default_factory=set)

    def on_step(self, param_groups: list[dict[str, Any]], total: int | None, done: Callable[[], Tensor]) -> None:
        """Count a step; say if lr is low, or the run over that `total` steps were announced for, of `done` so far.

        Raises:
            ValueError: an lr or a weight decay has become a number that is not finite.
        """
        if torch.compiler.is_compiling():
            return
        for group in param_groups:
            for key in ("lr", "weight_decay"):
                value = group[key]
                here = not isinstance(value, Tensor) or value.device.type == "cpu"  # devices are not waited for
                if here and not math.isfinite(value):
                    raise ValueError(f"{key}: expected a finite number, got {value}, as a script or scheduler set it")
        self.calls += 1
        if self.calls <= FIRST_STEPS or not self.lrs:
            self.lrs.append(max(float(group["lr"]) for group in param_groups))
        if total is not None and self.calls == 1 and any("initial_lr" in group for group in param_groups):
            self._tell("schedule", "total_steps has a schedule of its own, and the scheduler's lr multiplies it")
        if total is not None and self.calls > total and "total" not in self.told:
            taken = int(done())  # skipped steps do not count; asked for past the end alone, since a GPU is waited for
            if taken >= total:
                self._tell("total", f"step {taken + 1:,} of total_steps={total:,}: nothing moves any more")
        if self.calls == NOTHING + 1 and not int(done()):
            self._tell("nothing", LEFT_OUT.format(NOTHING))
        rises = self.lrs[-1] > self.lrs[0]
        if self.calls == FIRST_STEPS == len(self.lrs) and max(self.lrs) < LOW_LR and not rises:
            self._tell("lr", LEFT_OVER.format(max(self.lrs)))

    def on_loss(self, loss: Loss, groups: Groups | None, config: RuleConfig) -> None:
        """Say if the rule misses its loss or may not see it, and if its horizon has passed."""
        if torch.compiler.is_compiling():
            return
        if groups is None and loss is not None and config.sees_loss:
            needed = ", with which it was meta-trained" if config.needs_loss else ""
            self._tell("ranks", f"there are several ranks, so the rule does not see the loss{needed}: {RANKS}")
        if loss is None and config.needs_loss:
            self._tell("loss", "this rule was meta-trained with the loss at every step: call step(loss=loss)")
        if self.calls == config.horizon + 1 and not config.scheduled:
            reached = f"step {self.calls}: the rule was meta-trained for runs of {config.horizon:,} steps"
            advice = "let lr fall, with torch.optim.lr_scheduler.CosineAnnealingLR for one, or take fewer steps"
            self._tell("horizon", f"{reached} and extrapolates from here; {advice}", HorizonWarning)

    def _tell(self, subject: str, message: str, kind: type[Warning] = UserWarning) -> None:
        if subject not in self.told:
            self.told.add(subject)
            warnings.warn(message, kind, stacklevel=outside())


def outside() -> int:
    """The `stacklevel` of a caller of this function's caller that is neither ours nor torch's."""
    ours = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
    frame, level = sys._getframe(1), 0
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame, level = frame.f_back, level + 1
    return level + 1
