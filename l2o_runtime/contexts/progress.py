"""How far an optimization has come: what the `moments` rule sees besides its context."""

from typing import ClassVar

import torch
from torch import Tensor

from l2o_runtime.features import LARGEST
from l2o_runtime.gram import State, StateSpec

SPANS = (10, 50)
"""Steps over which log-losses are averaged."""

CLOCKS = (10, 100, 1000)
"""Time scales t of step / (step + t)."""

ENERGY_SPAN = 100


class Progress:
    """Size of the gradients, time, and what became of the loss.

    Its vector is [level, step/(step + 10), step/(step + 100), step/(step + 1000), trend, decline, seen]. The level, log
    of the root mean square of all gradients over 100 steps, is not for the network but for its features. Trend is the
    difference of the average log-losses over 10 and over 50 steps; decline is that from the first loss; seen is
    whether there is a loss. Losses that are not positive count as not there.
    """

    STATISTICS: ClassVar[int] = 2
    WIDTH: ClassVar[int] = 2 + len(CLOCKS) + 1
    """Of what the network sees: without the level."""

    @property
    def context_spec(self) -> StateSpec:
        """Steps and losses so far, the gradients' mean square, averages of log-losses, the first of them."""
        keys = ("steps", "losses_seen", "energy", "first_loss", *(f"loss{span}" for span in SPANS))
        return dict.fromkeys(keys, ((), torch.float32))

    def observe(self, grad: Tensor) -> Tensor:
        """Σ g² and the number of coordinates, (..., 2), of gradients (..., n)."""
        square = grad.clamp(-LARGEST, LARGEST).double().square()
        return torch.stack([square.sum(-1), torch.ones_like(square).sum(-1)], dim=-1)

    def contextualise(self, statistics: Tensor, loss: Tensor, state: State) -> tuple[Tensor, State]:
        """The vector (..., 7) and the new state, from summed statistics (..., 2) and loss (...)."""
        steps = state["steps"] + 1
        mean = (statistics[..., 0] / statistics[..., 1].clamp_min(1)).float()
        energy = state["energy"] + (mean - state["energy"]) / ENERGY_SPAN
        level = (energy / (1 - (1 - 1 / ENERGY_SPAN) ** steps)).clamp_min(1e-36).log() / 2

        there = (loss > 0).float()
        seen = state["losses_seen"] + there
        logarithm = loss.float().clamp_min(1e-30).log()
        first = torch.where(seen * there == 1, logarithm, state["first_loss"])
        new = {"steps": steps, "energy": energy, "losses_seen": seen, "first_loss": first}
        averages = []
        for span in SPANS:
            key = f"loss{span}"
            new[key] = state[key] + there * (logarithm - state[key]) / span
            averages.append(new[key] / (1 - (1 - 1 / span) ** seen).clamp_min(1 / span))
        any_seen = (seen > 0).float()
        trend = any_seen * (5 * (averages[0] - averages[1])).clamp(-3, 3)
        decline = any_seen * (averages[0] - first).clamp(-5, 5)
        clocks = [steps / (steps + scale) for scale in CLOCKS]
        return torch.stack([level, *clocks, trend, decline, any_seen], dim=-1), new
