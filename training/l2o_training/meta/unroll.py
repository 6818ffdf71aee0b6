"""The inner loop, unrolled: Algorithm 1 of L2O-DMD (Šimánek et al., arXiv 2211.16268), for any solver."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from l2o_runtime.solvers import Point, Solver
from l2o_runtime.state import State
from l2o_training.meta.objectives import Loss, Objective
from l2o_training.meta.steppers import Stepper
from l2o_training.tasks import Instances
from l2o_training.tasks.base import Seen

Weights: TypeAlias = Literal["uniform", "last", "end"]
"""Which of the losses of a truncation count: all, the last, or the mean of its last tenth."""


def weight(weights: Weights, step: int, steps: int) -> float:
    """w_τ of step τ = 0, 1, …, steps − 1.

    >>> [weight("end", step, 20) for step in (0, 17, 18, 19)], weight("end", 4, 5), weight("last", 3, 5)
    ([0.0, 0.0, 0.5, 0.5], 1.0, 0.0)
    """
    counted = {"uniform": steps, "last": 1, "end": max(1, steps // 10)}[weights]
    return float(step >= steps - counted) / (counted if weights == "end" else 1)


@dataclass
class Inner:
    """Where the inner optimizations of a batch stand.

    Attributes:
        instances: the problems.
        params: (B, n).
        loss, grad: (B,) and (B, n), at `params` on the current minibatches.
        visible: (B,) 1 where the solver sees the loss, else 0.
        state: the solver's.
        steps: (1,) done so far.
        mean: (B, n) of the latest parameters, where an objective asks for it.
        statistics, mean_statistics: (B, m) running statistics of the networks at `params`, and of those at `mean`.
    """

    instances: Instances
    params: Tensor
    loss: Tensor
    grad: Tensor
    visible: Tensor
    state: State
    steps: Tensor
    mean: Tensor
    statistics: Tensor
    mean_statistics: Tensor


@dataclass(frozen=True)
class Trace:
    """What one truncation gives.

    Attributes:
        losses: (u, B) losses after each step, or what the first objective measures in their place. A blind solver's
            are those of the steps that count alone.
        mean_losses: (u, B) losses at the mean of the latest parameters; None where no objective asks for it.
        scores: (1 or 2, u, B) losses in evaluation mode after each step, and those at the mean, likewise.
        states: what objectives read of the solver's states, (u, B, …) each.
        objective: scalar whose gradient with respect to φ is that of the meta-loss.
        value: scalar, float64, the meta-loss itself.
        terms: what objectives say of the whole truncation, by their names, constant.
    """

    losses: Tensor
    mean_losses: Tensor | None
    scores: Tensor
    states: State
    objective: Tensor
    value: Tensor
    terms: dict[str, Tensor]


class _Place:
    """Where points are looked at, and what was seen there: at θ_τ, or at the mean of the latest."""

    def __init__(self, instances: Instances, statistics: Tensor, objective: Objective):
        self.instances, self.statistics, self.objective = instances, statistics, objective
        self.losses: list[Tensor] = []
        self.scores: list[Tensor] = []

    def look(self, params: Tensor) -> Point:
        """The point at constant parameters (B, n), on the next minibatch."""
        loss, grad, score, self.statistics = self.instances.look(params, self.statistics)
        self.losses.append(self.objective.measure(self.instances, params, loss))
        self.scores.append(self.objective.measure(self.instances, params, score))
        return Point(params, loss, grad)


def begin(solver: Solver, instances: Instances, visible: Tensor | None = None) -> Inner:
    """Start optimizations at the instances' initial parameters, which a blind solver does not look at."""
    seen = _unseen(instances) if solver.blind else instances.look(instances.params, instances.statistics)
    return Inner(
        instances=instances,
        params=instances.params,
        loss=seen.loss,
        grad=seen.grad,
        visible=torch.ones_like(seen.loss) if visible is None else visible,
        state=solver.init(instances),
        steps=torch.zeros(1, dtype=torch.int64),
        mean=instances.params,
        statistics=seen.statistics,
        mean_statistics=seen.statistics,
    )


def _unseen(instances: Instances) -> Seen:
    zeros = torch.zeros_like(instances.params[:, 0])
    return Seen(zeros, torch.zeros_like(instances.params), zeros, instances.statistics)


def unroll(
    solver: Solver,
    inner: Inner,
    steps: int,
    objectives: Sequence[Objective] = (Loss(),),
    weights: Weights = "uniform",
    stepper: Stepper | None = None,
) -> Trace:
    """Advance `inner` by `steps` steps and give the meta-loss Σ_τ w_τ L(θ_τ) in differentiable form.

    The optimizee's gradients are constants of the rule (first order, as in the paper), so that
    ∂/∂φ Σ_τ w_τ L(θ_τ) = Σ_τ w_τ ⟨∇L(θ_τ), ∂θ_τ/∂φ⟩, and ∇L(θ_τ) is what the next step needs anyway. The objective is
    therefore Σ_τ w_τ ⟨∇L(θ_τ), θ_τ⟩ with ∇L held constant: the same gradient, for one forward and backward pass of the
    optimizee per step and none of its graphs kept. Other objectives than L come with slopes of their own.

    Args:
        solver: being trained.
        inner: state, replaced by the (detached) state after the steps.
        steps: u.
        objectives: what is summed; means over instances.
        weights: see `weight`.
        stepper: makes the solver's steps; differentiated through everything if left out.
    """
    stepper = Stepper(solver) if stepper is None else stepper
    span, reads = _span(objectives), {key for objective in objectives for key in objective.reads}
    measured = objectives[0] if objectives else Loss()
    latest, average = (
        _Place(inner.instances, statistics, measured) for statistics in (inner.statistics, inner.mean_statistics)
    )
    params, point, state = inner.params, Point(inner.params, inner.loss, inner.grad), inner.state
    mean, mean_theta, begun = inner.mean, stepper.take(inner.mean), int(inner.steps)
    total, values, read = params.new_zeros(()), [], []
    for step in range(steps):
        shown = Point(params, point.loss * inner.visible, point.grad)
        params, state, theta = stepper.step(shown, state)
        read.append({key: state[key] for key in reads if key in state})
        share = weight(weights, step, steps)
        if solver.blind and not share:
            continue
        counted = [[each for each in objectives if share and each.span == place] for place in (None, span)]
        point = latest.look(params.detach())
        product, value = _summands(counted[0], inner.instances, point, theta, stepper, state)
        if span is not None:
            newest = 1 / (1 + span * (begun + step + 1))
            mean, mean_theta = torch.lerp(mean, params.detach(), newest), torch.lerp(mean_theta, theta, newest)
            # Objectives may ask for more of the minibatch that was looked at last: each place is done with first.
            more = _summands(counted[1], inner.instances, average.look(mean), mean_theta, stepper, state)
            product, value = product + more[0], value + more[1]
        if share:
            total = total + share * product
            values.append(share * value)
    inner.params, inner.loss, inner.grad = params.detach(), point.loss, point.grad
    inner.statistics, inner.mean_statistics = latest.statistics, average.statistics
    inner.steps, inner.mean = inner.steps + steps, mean
    inner.state = {key: value.detach() for key, value in state.items()}
    states = {key: torch.stack([kept[key] for kept in read]) for key in read[0]}
    value, terms = torch.stack(values).mean(1).sum(), {}
    for objective in objectives:
        term = objective.of(solver, states)
        if term is not None:
            total, value = total + objective.weight * term, value + objective.weight * term.detach()
            terms[objective.name] = term.detach()
    return Trace(
        losses=torch.stack(latest.losses),
        mean_losses=torch.stack(average.losses) if average.losses else None,
        scores=torch.stack([torch.stack(place.scores) for place in (latest, average) if place.losses]),
        states=states,
        objective=total,
        value=value,
        terms=terms,
    )


def _span(objectives: Sequence[Objective]) -> float | None:
    """Over what the mean of the latest parameters is taken; there is one for all objectives."""
    spans = {objective.span for objective in objectives if objective.span is not None}
    if len(spans) > 1:
        raise ValueError(f"objectives: expected one span of means, got {sorted(spans)}: give all tails the same")
    return spans.pop() if spans else None


def _summands(
    objectives: Sequence[Objective], instances: Instances, point: Point, theta: Tensor, stepper: Stepper, state: State
) -> tuple[Tensor, Tensor]:
    """Σ of the objectives at a point: a scalar with their gradient, and their values (B,) float64.

    Args:
        objectives: of this point.
        instances: the problems, which looked at it last.
        point: constant.
        theta: what is differentiated through there, (B, k).
        stepper: which of the coordinates these are.
        state: the solver's, after the step that led there.
    """
    product, value = point.loss.new_zeros(()), torch.zeros_like(point.loss, dtype=torch.float64)
    for objective in objectives:
        found = objective.after(state).at(instances, point)
        if found is not None:
            product = product + objective.weight * ((stepper.weigh(found[1]) * theta).sum() / len(theta))
            value = value + objective.weight * found[0]
    return product, value
