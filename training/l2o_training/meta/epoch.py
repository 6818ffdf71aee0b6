"""What an epoch of meta-training reports, and how it is recorded."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What an epoch reports.

    Attributes:
        epoch: number of epochs done.
        meta_loss: mean loss over steps and instances of this epoch.
        objectives: means over this epoch of what objectives say of whole truncations, by their names.
        validation: mean loss over fresh instances, None when this epoch had no validation.
        best: lowest validation so far.
        speedup: how many times fewer steps than Adam's the validation took to where Adam ends; None if it never got
            there, or there was no validation.
        steps: inner steps (of one instance) in this epoch.
        seconds: time this epoch took, validation aside.
        idle: seconds of it that each rank waited for the others, sums included; None for a process that is alone.
        dropped: outer updates that were left out, for their meta-gradient was not finite; None where none was.
        stage: name of the stage that the curriculum begins after it; None where the present one goes on.
    """

    epoch: int
    meta_loss: float
    objectives: dict[str, float]
    validation: float | None
    best: float
    speedup: float | None = None
    steps: int
    seconds: float
    idle: list[float] | None = None
    dropped: int | None = None
    stage: str | None = None

    def scalars(self) -> dict[str, float]:
        """What is plotted over epochs, by name."""
        plotted = {"meta_loss": self.meta_loss, **self.objectives}
        return plotted if self.validation is None else {**plotted, "validation": self.validation}

    def row(self) -> dict[str, Any]:
        """A line of `metrics.jsonl`: objectives have keys of their own, and what is None is left out."""
        measured = {"epoch": self.epoch, **self.scalars()}
        others = {key: getattr(self, key) for key in ("speedup", "steps", "seconds", "idle", "dropped", "stage")}
        return measured | {key: value for key, value in others.items() if value is not None}
