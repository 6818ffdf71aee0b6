"""How far an optimization has come, and how large its gradients are: what rules see besides their context."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from l2o_runtime.arithmetic import quotients
from l2o_runtime.state import LARGEST, State, StateSpec

SPANS = (10, 50)
"""Steps over which log-losses are averaged."""

CLOCKS = (10, 100, 1000)
"""Time scales t of step / (step + t)."""

ENERGY_SPAN = 100


class Level:
    """Size of all gradients: the log of their root mean square over 100 steps, and nothing for the network."""

    SUMS: ClassVar[int] = 2
    WIDTH: ClassVar[int] = 0

    @property
    def context_spec(self) -> StateSpec:
        """Steps so far, and the gradients' mean square."""
        return dict.fromkeys(("steps", "energy"), ((), torch.float32))

    def observe(self, grad: Tensor, *averages: Tensor) -> Tensor:
        """Their number and Σg²: (..., 2) float64."""
        square = grad.nan_to_num().clamp(-LARGEST, LARGEST).double().square()
        return torch.stack([torch.ones_like(square).sum(-1), square.sum(-1)], dim=-1)

    def read(self, statistics: Tensor, loss: Tensor, state: State) -> tuple[Tensor, State]:
        """The level (..., 1) and the new state, from summed statistics (..., 2)."""
        count, square = statistics.unbind(-1)
        level, new = advance_level(count, square, state)
        return level.unsqueeze(-1), new


def advance_level(count: Tensor, square: Tensor, state: State) -> tuple[Tensor, State]:
    """Log of the root mean square of all gradients over 100 steps, float32, and the new `steps` and `energy`.

    Args:
        count, square: (...) number of coordinates and Σg².
        state: with both, (...) each.
    """
    steps = state["steps"] + 1
    mean = (square / count.clamp_min(1)).float()
    energy = state["energy"] + (mean - state["energy"]) / ENERGY_SPAN
    level = (energy / (1 - (1 - 1 / ENERGY_SPAN) ** steps)).clamp_min(1e-36).log() / 2
    return level, {"steps": steps, "energy": energy}


def normalized_products(grad: Any, momentum: Any, square: Any) -> list[Any]:
    """g m/v, g²/v and m²/v, 0 where v = 0; for tensors and for vectors of compiled code."""
    root = square.sqrt()
    g, m = (x.clamp(-100, 100).where(root > 0, 0.0) for x in quotients([grad, momentum], root))
    return [g * m, g * g, m * m]


class Progress:
    """Size of the gradients, time, whether gradients agree, and what became of the loss.

    Its vector is [level, step/(step + 10), step/(step + 100), step/(step + 1000), trend, decline, seen, agreement,
    steadiness]. The level, log of the root mean square of all gradients over 100 steps, is not for the network but for
    its features. Trend is the difference of the average log-losses over 10 and over 50 steps; decline is that from
    the first loss; seen is whether there is a loss. Losses that are not positive count as not there. With every
    coordinate divided by √v₁₀₀₀, agreement is the cosine of the gradient and its average m₁₀ before it, and steadiness
    the log of how large the latter is beside the former: steps that are too long turn gradients around.
    """

    SUMS: ClassVar[int] = 5
    WIDTH: ClassVar[int] = len(CLOCKS) + 5
    """Of what the network sees: without the level."""

    @property
    def context_spec(self) -> StateSpec:
        """Steps and losses so far, the gradients' mean square, averages of log-losses, the first of them."""
        keys = ("steps", "losses_seen", "energy", "first_loss", *(f"loss{span}" for span in SPANS))
        return dict.fromkeys(keys, ((), torch.float32))

    def terms(self, grad: Tensor, momentum: Tensor, square: Tensor) -> list[Tensor]:
        """Of every coordinate 1, g², and g m/v, g²/v, m²/v where v > 0: five of (..., n), float64.

        Args:
            grad: (..., n).
            momentum, square: averages of gradients (over 10 steps) and of their squares, before this step.
        """
        grad = grad.nan_to_num().clamp(-LARGEST, LARGEST)
        products = normalized_products(grad, momentum, square)
        return [x.double() for x in (torch.ones_like(grad), grad.double().square(), *products)]

    def observe(self, grad: Tensor, momentum: Tensor, square: Tensor) -> Tensor:
        """The sums of `terms`: (..., 5)."""
        return torch.stack([x.sum(-1) for x in self.terms(grad, momentum, square)], dim=-1)

    def read(self, statistics: Tensor, loss: Tensor, state: State, latest: int | None = None) -> tuple[Tensor, State]:
        """The vector (..., 9) and the new state, from summed statistics (..., 5) and loss (...).

        After step `latest`, if there is one, the clocks of the vector stand still.
        """
        count, square, product, gg, mm = statistics.unbind(-1)
        level, new = advance_level(count, square, state)
        there = (loss > 0).float()
        seen = state["losses_seen"] + there
        logarithm = loss.float().clamp_min(1e-30).log()
        first = torch.where(seen * there == 1, logarithm, state["first_loss"])
        new |= {"losses_seen": seen, "first_loss": first}
        averages = []
        for span in SPANS:
            key = f"loss{span}"
            new[key] = state[key] + there * (logarithm - state[key]) / span
            averages.append(new[key] / (1 - (1 - 1 / span) ** seen).clamp_min(1 / span))
        any_seen = (seen > 0).float()
        trend = any_seen * (5 * (averages[0] - averages[1])).clamp(-3, 3)
        decline = any_seen * (averages[0] - first).clamp(-5, 5)
        agreement = (product / (gg * mm).clamp_min(1e-30).sqrt()).float()
        steadiness = ((mm + 1e-6) / (gg + 1e-6)).log().float() / 4
        steps = new["steps"]
        shown = steps if latest is None else steps.clamp_max(latest)
        clocks = [shown / (shown + scale) for scale in CLOCKS]
        return torch.stack([level, *clocks, trend, decline, any_seen, agreement, steadiness], dim=-1), new
