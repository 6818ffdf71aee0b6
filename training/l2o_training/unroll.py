"""The inner loop, unrolled: Algorithm 1 of L2O-DMD (Šimánek et al., arXiv 2211.16268)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from l2o_runtime.gram import State
from l2o_runtime.rule import Rule, zeros
from l2o_training.tasks import Instances


@dataclass
class Inner:
    """Where the inner optimizations of a batch stand.

    Attributes:
        instances: the problems.
        params: (B, n).
        loss, grad: (B,) and (B, n), at `params` on the current minibatches.
        visible: (B,) 1 where the rule sees the loss, else 0.
        coordinates, optimization: the rule's states.
    """

    instances: Instances
    params: Tensor
    loss: Tensor
    grad: Tensor
    visible: Tensor
    coordinates: State
    optimization: State


@dataclass(frozen=True)
class Segment:
    """What one truncation gives.

    Attributes:
        objective: scalar whose gradient with respect to φ is that of the meta-loss.
        losses: (u, B) losses after each step.
        features: (u, B, N) what a Koopman autoencoder saw, else None.
    """

    objective: Tensor
    losses: Tensor
    features: Tensor | None


def begin(rule: Rule, instances: Instances, visible: Tensor | None = None) -> Inner:
    """Start optimizations at the instances' initial parameters."""
    params = instances.params
    count, n = params.shape
    loss, grad = instances.value_and_grad(params)
    return Inner(
        instances=instances,
        params=params,
        loss=loss,
        grad=grad,
        visible=torch.ones_like(loss) if visible is None else visible,
        coordinates=zeros(rule.coordinate_spec, (count, n), params.device),
        optimization=zeros(rule.context_spec, (count,), params.device),
    )


def unroll(
    rule: Rule,
    inner: Inner,
    steps: int,
    weights: Literal["uniform", "last"] = "uniform",
    *,
    recompute: bool = False,
) -> Segment:
    """Advance `inner` by `steps` steps and give the meta-loss Σ_τ w_τ L(θ_τ) in differentiable form.

    The optimizee's gradients are constants of the rule (first order, as in the paper), so that
    ∂/∂φ Σ_τ w_τ L(θ_τ) = Σ_τ w_τ ⟨∇L(θ_τ), ∂θ_τ/∂φ⟩, and ∇L(θ_τ) is what the next step needs anyway. The objective is
    therefore Σ_τ w_τ ⟨∇L(θ_τ), θ_τ⟩ with ∇L held constant: the same gradient, for one forward and backward pass of the
    optimizee per step and none of its graphs kept.

    Args:
        rule: the rule being trained.
        inner: state, replaced by the (detached) state after the steps.
        steps: u.
        weights: w_τ = 1, or 1 for the last step only.
        recompute: keep only the states between steps, and compute everything else again for the gradient.
    """
    params, loss, grad = inner.params, inner.loss, inner.grad
    coordinates, optimization = inner.coordinates, inner.optimization
    objective, losses, features = params.new_zeros(()), [], []
    for step in range(steps):
        seen = params.detach(), grad, torch.nan_to_num(loss * inner.visible), coordinates, optimization
        delta, coordinates, optimization = checkpoint(rule, *seen, use_reentrant=False) if recompute else rule(*seen)
        if "features" in optimization:
            features.append(optimization["features"])
        params = params + delta
        loss, grad = inner.instances.value_and_grad(params.detach())
        if weights == "uniform" or step == steps - 1:
            objective = objective + (grad * params).sum() / len(params)
        losses.append(loss)
    inner.params, inner.loss, inner.grad = params.detach(), loss, grad
    inner.coordinates = {key: value.detach() for key, value in coordinates.items()}
    inner.optimization = {key: value.detach() for key, value in optimization.items()}
    return Segment(objective, torch.stack(losses), torch.stack(features) if features else None)


@torch.no_grad()
def rollout(rule: Rule, instances: Instances, steps: int) -> Tensor:
    """Losses (steps, B) before each of `steps` steps of a frozen rule."""
    inner = begin(rule, instances)
    first = inner.loss
    if steps == 1:
        return first.unsqueeze(0)
    return torch.cat([first.unsqueeze(0), unroll(rule, inner, steps - 1).losses])
