"""Whose step is taken: Adam is the incumbent, the learned rule has to prove itself.

`Referee` watches the losses and decides, step by step; it knows nothing of parameters.

Source: the guard by the training loss is that of Prémont-Schwarz et al., "A Simple Guard for Learned Optimizers"
(arXiv 2201.12426), the fallback to a classical step that of Heaton et al., "Safeguarded Learned Convex Optimization"
(2020). Both compare with losses at extra points; here there are none: trials take place in time, one after the other,
so that `step(loss=loss)` is all that is needed.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean, variance

import torch
from torch import Tensor

WINDOW = 10
"""Losses in a window: what a decision is based on, its second half above all."""

HALF = WINDOW // 2

HISTORY = 50
"""Losses under Adam to which its trend is fitted, where it has taken so many steps since it took over."""

PATIENCE = 100
"""Windows of Adam's steps after a failed trial; doubled after every further one."""

CONFIDENCE = 3.0
"""Standard errors by which losses under the rule must lie below those that Adam's trend predicts."""

COUNTERS = ("learned_steps", "adam_steps", "trials", "undone")
"""What `Referee` counts."""


@dataclass(frozen=True)
class Verdict:
    """What to do in a step.

    Attributes:
        learned: take the learned step; else Adam's.
        save: first remember where we are.
        restart: the rule starts afresh, from zero states.
        restore: return to where we were; take no step.
    """

    learned: bool
    save: bool = False
    restart: bool = False
    restore: bool = False


@dataclass
class Referee:
    """Compares losses under the learned rule with Adam's trend.

    1. Adam steps. A line is fitted to its last losses, at most `HISTORY` of them.
    2. Trial: the rule starts afresh and takes `WINDOW` steps. It passes if the mean of the window's second half is
       below what the line predicts there, by `CONFIDENCE` standard errors of the difference. If it fails, the trial
       is undone and Adam goes on for PATIENCE · 2^(failures − 1) windows, so that trials cost ever less.
    3. While it passes it goes on, window after window, as long as each one gains more than Adam's line falls; then
       Adam takes over and 1 starts again. A window in which the loss rose is undone.

    Attributes:
        learned: the rule is acting.
        age: losses seen in this window, or since Adam took over.
        wait: how many losses Adam sees before the next trial.
        failures: trials that failed in a row.
        steps: learned steps since the rule was started.
        mean, slope, error: level of the window before (or, in a trial, Adam's prediction), slope of Adam's line per
            step, standard error of the prediction.
        worst: a loss above this ends the window at once.
        learned_steps, adam_steps, trials, undone: counters for `health`.
        losses: the latest `HISTORY`.
    """

    learned: bool = False
    age: int = 0
    wait: int = HISTORY
    failures: int = 0
    steps: int = 0
    mean: float = 0.0
    slope: float = 0.0
    error: float = 0.0
    worst: float = 0.0
    learned_steps: int = 0
    adam_steps: int = 0
    trials: int = 0
    undone: int = 0
    losses: list[float] = field(default_factory=lambda: [0.0] * HISTORY)

    def judge(self, loss: float, horizon: int) -> Verdict:
        """Take notice of the loss at the present parameters, and decide.

        Args:
            loss: finite.
            horizon: the longest run of the rule.
        """
        self.losses = [*self.losses[1:], loss]
        self.age += 1
        verdict = self._judge_learned(loss, horizon) if self.learned else self._judge_adam()
        if not verdict.restore:
            self.learned_steps += verdict.learned
            self.adam_steps += not verdict.learned
            self.steps += verdict.learned
        return verdict

    def fail(self) -> Verdict:
        """A loss or gradient is not finite: undo what the rule did; Adam just skips the step."""
        return self._undo() if self.learned else Verdict(learned=False)

    def _judge_adam(self) -> Verdict:
        if self.age < max(self.wait, WINDOW):
            return Verdict(learned=False)
        recent = self.losses[-min(self.age, HISTORY) :]
        self.mean, self.slope, self.error = predict(recent)
        self.worst = limit(recent)
        self.learned, self.age, self.steps = True, 0, 0
        self.trials += 1
        return Verdict(learned=True, save=True, restart=True)

    def _judge_learned(self, loss: float, horizon: int) -> Verdict:
        if loss > self.worst:
            return self._undo()
        if self.age < WINDOW:
            return Verdict(learned=True)
        recent = self.losses[-WINDOW:]
        reached, deviation = fmean(recent[HALF:]), variance(recent[HALF:])
        trial = self.steps == WINDOW
        margin = CONFIDENCE * math.sqrt(self.error**2 + deviation / HALF)
        expected = self.mean - margin if trial else self.mean + WINDOW * self.slope
        if reached < expected and self.steps < horizon:
            self.failures, self.age, self.mean = 0, 0, reached
            self.worst = limit(recent)
            return Verdict(learned=True, save=True)
        if trial or reached > self.mean:
            return self._undo()
        return self._hand_over(WINDOW)

    def _undo(self) -> Verdict:
        self.undone += 1
        if self.steps > WINDOW:
            self._hand_over(WINDOW)
        else:
            self._hand_over(PATIENCE * WINDOW * 2**self.failures)
            self.failures += 1
        return Verdict(learned=False, restore=True)

    def _hand_over(self, wait: int) -> Verdict:
        self.learned, self.age, self.wait = False, 0, wait
        return Verdict(learned=False)

    def to_tensor(self) -> Tensor:
        """All of it as numbers, for a state dict: (k,) float64 on the CPU."""
        values = asdict(self)
        return torch.tensor([*values.pop("losses"), *(float(v) for v in values.values())], dtype=torch.float64)

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "Referee":
        """What `to_tensor` gave."""
        referee = cls(losses=tensor[:HISTORY].tolist())
        names = [f.name for f in fields(cls) if f.name != "losses"]
        for name, value in zip(names, tensor[HISTORY:].tolist(), strict=True):
            setattr(referee, name, type(getattr(referee, name))(value))
        return referee


def limit(losses: list[float]) -> float:
    """A loss that is clearly not among `losses`: three times their range above the highest."""
    return max(losses) + 3 * (max(losses) - min(losses))


def predict(losses: list[float]) -> tuple[float, float, float]:
    """Where losses will be in the second half of the next window, if they follow their trend, but do not rise.

    Least squares line through equally spaced points; the prediction is for the mean of the second half of the
    `WINDOW` points that follow.

    Args:
        losses: n values, the latest last.

    Returns:
        Predicted mean, slope per step (at most 0), and standard error of the prediction.

    >>> predict([23.0, 22.0, 21.0, 20.0])  # 19, 18, … 10 are to come
    (12.0, -1.0, 0.0)
    """
    n = len(losses)
    x = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    y = torch.tensor(losses, dtype=torch.float64)
    spread = x.square().sum()
    slope = (x * y).sum() / spread
    residual = y - y.mean() - slope * x
    noise = residual.square().sum() / (n - 2)
    ahead = (n - 1) / 2 + WINDOW - (HALF - 1) / 2
    error = (noise * (1 / n + ahead**2 / spread)).sqrt()
    slope = slope.clamp_max(0)
    return float(y.mean() + slope * ahead), float(slope), float(error)
