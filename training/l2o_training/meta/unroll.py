"""The inner loop, unrolled: Algorithm 1 of L2O-DMD (Šimánek et al., arXiv 2211.16268)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from l2o_runtime.layout import Layout
from l2o_runtime.rules import Rule
from l2o_runtime.state import State, zeros
from l2o_training.tasks import Instances
from l2o_training.tasks.base import Seen

TINY = 1e-10
"""Losses below this count as this where their logarithm is taken."""


@dataclass
class Inner:
    """Where the inner optimizations of a batch stand.

    Attributes:
        instances: the problems.
        params: (B, n).
        loss, grad: (B,) and (B, n), at `params` on the current minibatches.
        visible: (B,) 1 where the rule sees the loss, else 0.
        coordinates, optimization: the rule's states.
        layout: of the parameters, for a rule with a network per tensor.
        steps: (1,) done so far.
        mean: (B, n) of the latest parameters, with a tail.
        statistics, mean_statistics: (B, m) running statistics of the networks at `params`, and of those at `mean`.
    """

    instances: Instances
    params: Tensor
    loss: Tensor
    grad: Tensor
    visible: Tensor
    coordinates: State
    optimization: State
    layout: Layout | None
    steps: Tensor
    mean: Tensor
    statistics: Tensor
    mean_statistics: Tensor


@dataclass(frozen=True)
class Segment:
    """What one truncation gives.

    Attributes:
        objective: scalar whose gradient with respect to φ is that of the meta-loss.
        losses: (u, B) losses after each step.
        mean_losses: (u, B) losses at the mean of the latest parameters, None without a tail.
        scores: (1 or 2, u, B) losses in evaluation mode after each step, and with a tail those at the mean.
        features: (u, B, N) what a Koopman autoencoder saw, else None.
    """

    objective: Tensor
    losses: Tensor
    mean_losses: Tensor | None
    scores: Tensor
    features: Tensor | None


Chosen = tuple[Tensor, State]
"""Parameters (B, k) of the chosen coordinates, part of the graph, and their state."""


@dataclass(frozen=True)
class Sample:
    """Some coordinates, through which alone a truncation is differentiated.

    A meta-gradient is a sum over coordinates, which differ little from each other: an image's pixels see much the same.
    Drawn with probability q_i each, and weighted by 1/(k q_i), k of them give an estimate without bias for a fraction
    of the time.

    Attributes:
        index: (B, k) which.
        weight: (B, k) 1/(k q_i).
    """

    index: Tensor
    weight: Tensor

    @classmethod
    def draw(cls, grad: Tensor, fraction: float, rng: torch.Generator) -> "Sample":
        """Draw with replacement, q_i half uniform and half proportional to |g_i|.

        Args:
            grad: (B, n) gradients where the truncation begins.
            fraction: k/n.
            rng: random numbers.
        """
        size = grad.nan_to_num(0, 0, 0).abs() + 1e-30
        q = (size / size.sum(-1, keepdim=True) + 1 / grad.shape[-1]) / 2
        k = max(1, round(fraction * grad.shape[-1]))
        index = torch.multinomial(q, k, replacement=True, generator=rng)
        return cls(index, 1 / (k * q.gather(-1, index)))

    def take(self, values: Tensor) -> Tensor:
        """Rows (B, k, …) of (B, n, …)."""
        return values[torch.arange(len(values), device=values.device).unsqueeze(-1), self.index]

    def begin(self, params: Tensor, coordinates: State) -> Chosen:
        """The chosen coordinates at the beginning of a truncation."""
        return self.take(params), {key: self.take(value) for key, value in coordinates.items()}

    def step(
        self, rule: Rule, seen: tuple[Tensor, Tensor, Tensor, State, State], layout: Layout | None, chosen: Chosen
    ) -> tuple[Tensor, State, State, Chosen]:
        """A step of the rule: all coordinates without, the chosen ones with a graph.

        Args:
            rule: being trained.
            seen, layout: the arguments of `Rule.forward`.
            chosen: before the step.

        Returns:
            What `Rule.forward` gives, and the chosen coordinates after the step.
        """
        params, grad, loss, coordinates, optimization = seen
        sums = rule.rows(params, grad, coordinates, layout)
        steering, optimization = rule.steer(sums, None if layout is None else layout.shapes, loss, optimization)
        with torch.no_grad():
            delta, coordinates = rule.update(grad, params, rule.spread(steering, layout), coordinates)
        theta, state = chosen
        moved, state = rule.update(self.take(grad), theta.detach(), rule.spread(steering, layout, self.index), state)
        return delta, coordinates, optimization, (theta + moved, state)

    def product(self, slope: Tensor, theta: Tensor) -> Tensor:
        """An estimate of Σ_i slope_i θ_i over all coordinates and instances, from θ (B, k) of the chosen ones."""
        return (self.weight * self.take(slope) * theta).sum()


def begin(rule: Rule, instances: Instances, visible: Tensor | None = None) -> Inner:
    """Start optimizations at the instances' initial parameters."""
    return _at(rule, instances, instances.look(instances.params, instances.statistics), visible)


def _at(rule: Rule, instances: Instances, seen: Seen, visible: Tensor | None = None) -> Inner:
    """Optimizations at the instances' initial parameters, of which this was seen."""
    params = instances.params
    count, n = params.shape
    return Inner(
        instances=instances,
        params=params,
        loss=seen.loss,
        grad=seen.grad,
        visible=torch.ones_like(seen.loss) if visible is None else visible,
        coordinates=zeros(rule.spec.coordinate, (count, n), params.device),
        optimization=zeros(rule.spec.model, (count,), params.device)
        | zeros(rule.spec.tensor, (count, len(instances.shapes)), params.device),
        layout=Layout.of(instances.shapes, params.device) if rule.per_tensor else None,
        steps=torch.zeros(1, dtype=torch.int64),
        mean=params,
        statistics=seen.statistics,
        mean_statistics=seen.statistics,
    )


def unroll(
    rule: Rule,
    inner: Inner,
    steps: int,
    weights: Literal["uniform", "last"] = "uniform",
    *,
    objective: Literal["loss", "log_loss"] = "loss",
    tail: float | None = None,
    sample: Sample | None = None,
    recompute: bool = False,
) -> Segment:
    """Advance `inner` by `steps` steps and give the meta-loss Σ_τ w_τ L(θ_τ) in differentiable form.

    The optimizee's gradients are constants of the rule (first order, as in the paper), so that
    ∂/∂φ Σ_τ w_τ L(θ_τ) = Σ_τ w_τ ⟨∇L(θ_τ), ∂θ_τ/∂φ⟩, and ∇L(θ_τ) is what the next step needs anyway. The objective is
    therefore Σ_τ w_τ ⟨∇L(θ_τ), θ_τ⟩ with ∇L held constant: the same gradient, for one forward and backward pass of the
    optimizee per step and none of its graphs kept. For log L the products are divided by L(θ_τ).

    With a tail a, the mean of L(θ_τ) and L(θ̄_τ) takes the place of L(θ_τ), and of their logarithms that of log L. There
    θ̄_τ = θ̄_{τ−1} + (θ_τ − θ̄_{τ−1}) / (1 + a τ), with τ from the optimization's beginning: a mean over the latest a τ
    steps, about. Shorter steps lower the noise of L(θ) at once, and what they cost comes after the truncation, so that
    rules learn to shorten them too soon; at the mean there is little noise to be lowered.

    Args:
        rule: the rule being trained.
        inner: state, replaced by the (detached) state after the steps.
        steps: u.
        weights: w_τ = 1, or 1 for the last step only.
        objective: sum losses, or their logarithms.
        tail: a, or None for the losses at θ_τ alone.
        sample: differentiate through these coordinates alone, an estimate of the same gradient.
        recompute: keep only the states between steps, and compute everything else again for the gradient.
    """
    params, loss, grad = inner.params, inner.loss, inner.grad
    coordinates, optimization = inner.coordinates, inner.optimization
    statistics, mean_statistics = inner.statistics, inner.mean_statistics
    mean, begun = inner.mean, int(inner.steps)
    chosen = None if sample is None else sample.begin(params, coordinates)
    chosen_mean = None if sample is None else sample.take(mean)

    def product(loss: Tensor, grad: Tensor, theta: Tensor, of_chosen: Tensor | None) -> Tensor:
        slope = grad / loss.clamp_min(TINY).unsqueeze(-1) if objective == "log_loss" else grad
        moved = (slope * theta).sum() if sample is None or of_chosen is None else sample.product(slope, of_chosen)
        return moved / len(theta)

    total, losses, mean_losses, features = params.new_zeros(()), [], [], []
    scores, mean_scores = [], []
    for step in range(steps):
        seen = params.detach(), grad, torch.nan_to_num(loss * inner.visible), coordinates, optimization
        if sample is not None and chosen is not None:
            delta, coordinates, optimization, chosen = sample.step(rule, seen, inner.layout, chosen)
        elif recompute:
            delta, coordinates, optimization = checkpoint(rule, *seen, inner.layout, use_reentrant=False)
        else:
            delta, coordinates, optimization = rule(*seen, inner.layout)
        if "features" in optimization:
            features.append(optimization["features"])
        params = params + delta
        loss, grad, score, statistics = inner.instances.look(params.detach(), statistics)
        losses.append(loss)
        scores.append(score)
        points = [(loss, grad, params, None if chosen is None else chosen[0])]
        if tail is not None:
            share = 1 / (1 + tail * (begun + step + 1))
            mean = torch.lerp(mean, params, share)
            if chosen is not None and chosen_mean is not None:
                chosen_mean = torch.lerp(chosen_mean, chosen[0], share)
            mean_loss, mean_grad, mean_score, mean_statistics = inner.instances.look(mean.detach(), mean_statistics)
            mean_losses.append(mean_loss)
            mean_scores.append(mean_score)
            points.append((mean_loss, mean_grad, mean, chosen_mean))
        if weights == "uniform" or step == steps - 1:
            total = total + sum(product(*point) for point in points) / len(points)
    inner.params, inner.loss, inner.grad = params.detach(), loss, grad
    inner.statistics, inner.mean_statistics = statistics, mean_statistics
    inner.steps, inner.mean = inner.steps + steps, mean.detach()
    inner.coordinates = {key: value.detach() for key, value in coordinates.items()}
    inner.optimization = {key: value.detach() for key, value in optimization.items()}
    means, seen_features = (torch.stack(values) if values else None for values in (mean_losses, features))
    judged = torch.stack([torch.stack(values) for values in (scores, mean_scores) if values])
    return Segment(total, torch.stack(losses), means, judged, seen_features)


def points(segment: Segment) -> Tensor:
    """The losses that count: at the parameters, and with a tail at their mean; (1 or 2, u, B), float64."""
    losses = [segment.losses] if segment.mean_losses is None else [segment.losses, segment.mean_losses]
    return torch.stack(losses).double()


def valued(losses: Tensor, objective: Literal["loss", "log_loss"]) -> Tensor:
    """Losses, or their logarithms."""
    return losses.clamp_min(TINY).log() if objective == "log_loss" else losses


def meta_losses(segment: Segment, objective: Literal["loss", "log_loss"] = "loss") -> Tensor:
    """The summands of the meta-loss, whose gradient `unroll` gives, for every step and instance: (u, B), float64."""
    return valued(points(segment), objective).mean(0)


@torch.no_grad()
def rollout(rule: Rule, instances: Instances, steps: int) -> Tensor:
    """Losses (steps, B) before each of `steps` steps of a frozen rule; with BatchNorm those of evaluation mode."""
    seen = instances.look(instances.params, instances.statistics)
    first = seen.score.unsqueeze(0)
    return first if steps == 1 else torch.cat([first, unroll(rule, _at(rule, instances, seen), steps - 1).scores[0]])
