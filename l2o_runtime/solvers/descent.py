"""Descent along a learned rule: the one place outside of rules that knows their phases in meta-training."""

from typing import NamedTuple

import torch
from torch import Tensor

from l2o_runtime.layout import Layout
from l2o_runtime.rules import Rule
from l2o_runtime.rules.base import mean_squares
from l2o_runtime.solvers.base import Point, Problems, Solver
from l2o_runtime.state import State, zeros
from l2o_runtime.stepping.interpolation import interpolated, weights
from l2o_runtime.stepping.schedule import anytime, told

COORDINATES, OPTIMIZATION, LAYOUT = "coordinates/", "optimization/", "layout/"
"""What names in the state begin with: the rule's state per coordinate, the rest of it, and the layout."""

DONE, TOTAL = "schedule/done", "schedule/total"
"""Numbers of steps, so far and in the whole; 0 for a whole that is not known."""

LAG = "schedule/lag"
"""Where the whole is not known, e of `l2o_runtime.stepping.interpolation` for every coordinate."""


class Chosen(NamedTuple):
    """Some coordinates of every optimization, advanced beside all of them.

    Attributes:
        places: (B, k) which.
        params: (B, k).
        state: their coordinate state.
    """

    places: Tensor
    params: Tensor
    state: State


class Descent(Solver):
    """θ ← θ + Δ with the steps Δ of a rule; a loss that is not finite is shown to it as zero.

    What a rule observes is constant: nothing is differentiated through θ, g and L, as in Algorithm 1 of
    arXiv 2211.16268 (first order).

    A rule that leaves the size of its steps to a schedule gets that of `l2o_runtime.stepping.schedule`, and, where the
    length is not known, its interpolation.

    Args:
        rule: gives the steps.
        scheduled: whether it gets one.
    """

    def __init__(self, rule: Rule, scheduled: bool = True):
        super().__init__()
        self.rule, self.scheduled = rule, scheduled and rule.config.scheduled

    def init(self, problems: Problems) -> State:
        """The rule's states, all of them zero, and the layout."""
        rule, (*lead, n), device = self.rule, problems.params.shape, problems.params.device
        layout = rule.layout(problems.shapes, device)
        coordinates = zeros(rule.spec.coordinate, (*lead, n), device)
        optimization = zeros(rule.spec.model, (*lead,), device)
        optimization |= zeros(rule.spec.tensor, (*lead, len(layout.shapes)), device)
        state = _join(coordinates, optimization, layout)
        if self.scheduled:
            state |= {
                DONE: torch.zeros((), device=device),
                TOTAL: torch.tensor(float(problems.steps or 0), device=device),
            }
        if self.scheduled and problems.steps is None:
            state[LAG] = torch.zeros_like(problems.params)
        return state

    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """A step of every coordinate; ∂(θ + Δ)/∂φ goes through the rule and on through `point.params`."""
        coordinates, optimization, layout = _split(state)
        delta, coordinates, optimization = self.rule(*_constants(point), coordinates, optimization, layout)
        move, clock = self._paced(delta, state)
        return point.params + move, _join(coordinates, optimization, layout) | clock

    def _paced(self, delta: Tensor, state: State) -> tuple[Tensor, State]:
        """What the schedule makes of a step, and its new state."""
        if not self.scheduled:
            return delta, {}
        done, total = state[DONE] + 1, state[TOTAL]
        clock = {DONE: done, TOTAL: total}
        if LAG not in state:
            return told(done, total.clamp_min(1)) * delta, clock
        move, lag = interpolated(anytime(done) * delta, state[LAG], *weights(done))
        return move, clock | {LAG: lag}

    def choose(self, params: Tensor, state: State, places: Tensor) -> Chosen:
        """Begin with some coordinates (B, k) where all of them (B, n) stand."""
        coordinates, _, _ = _split(state)
        chosen = {key: take(value, places) for key, value in coordinates.items()}
        chosen |= {LAG: take(state[LAG], places)} if LAG in state else {}
        return Chosen(places, take(params, places), chosen)

    def step_chosen(self, point: Point, state: State, chosen: Chosen) -> tuple[Tensor, State, Chosen]:
        """`step` without a graph, and the same step of the chosen coordinates with one.

        The first two phases of the rule are part of the graph.
        """
        rule, (coordinates, optimization, layout) = self.rule, _split(state)
        params, grad, loss = _constants(point)
        steering, optimization = rule.perceive(params, grad, loss, coordinates, optimization, layout)
        places, theta, own = chosen
        told = rule.spread(steering, layout, places)
        with torch.no_grad():
            whole, all_told = rule.prepare_all(grad, coordinates, layout), rule.spread(steering, layout)
            delta, coordinates = rule.update(grad, params, all_told, coordinates | whole)
        own = own | {key: take(value, places) for key, value in whole.items()}
        moved, own = rule.update(take(grad, places), theta.detach(), told, own)
        if rule.normalizes:
            squares = mean_squares(delta, layout)
            delta = rule.finish(delta, rule.spread(squares, layout).squeeze(-1), all_told.detach(), coordinates)
            moved = rule.finish(moved, rule.spread(squares, layout, places).squeeze(-1), told, own)
        move, clock = self._paced(delta, state)
        moved, kept = self._paced(moved, state | chosen.state)
        own = own | {LAG: kept[LAG]} if LAG in kept else own
        after = _join(coordinates, optimization, layout) | clock
        return params + move, after, Chosen(places, theta + moved, own)


def take(values: Tensor, places: Tensor) -> Tensor:
    """Rows (B, k, …) of (B, n, …) at places (B, k)."""
    return values[torch.arange(len(values), device=values.device).unsqueeze(-1), places]


def _constants(point: Point) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters, gradient and loss as a rule takes them."""
    return point.params.detach(), point.grad, torch.nan_to_num(point.loss, 0.0, 0.0, 0.0)


def _split(state: State) -> tuple[State, State, Layout]:
    coordinates, optimization, layout = (
        {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for prefix in (COORDINATES, OPTIMIZATION, LAYOUT)
    )
    return coordinates, optimization, Layout(**layout)


def _join(coordinates: State, optimization: State, layout: Layout) -> State:
    parts = {COORDINATES: coordinates, OPTIMIZATION: optimization, LAYOUT: layout.given}
    return {f"{prefix}{key}": value for prefix, part in parts.items() for key, value in part.items()}
