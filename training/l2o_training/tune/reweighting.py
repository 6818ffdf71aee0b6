"""Weights of training examples from the hypergradients of a clean set: those with wrong labels lose theirs."""

from typing import Any

import torch
from torch import Tensor

from l2o_runtime.config import require
from l2o_training.tune.estimates import Estimate, follow, gradients, require_settings

FARTHEST = 8.0
"""Logits stay within ± this: weights of 0.0003 … 0.9997."""


def alignment(losses: Tensor, params: list[Tensor], direction: list[Tensor | None]) -> Tensor:
    """⟨∇ℓ_i(θ), v⟩ of each example, (N,): two backward passes, no gradient by example.

    The gradient of Σ ε_i ℓ_i is linear in ε, and so is its product with v; that product's gradient by ε is asked for.

    Args:
        losses: (N,) with their graph.
        params: θ.
        direction: v, in the shapes of θ; None is zero.
    """
    shares = torch.ones_like(losses, requires_grad=True)
    grads = torch.autograd.grad(losses, params, shares, create_graph=True, allow_unused=True)
    product = sum((g * v).sum() for g, v in zip(grads, direction, strict=True) if g is not None and v is not None)
    return torch.autograd.grad(product, shares)[0] if isinstance(product, Tensor) else torch.zeros_like(losses)


class ExampleWeights:
    """A weight σ(a_i) for each training example, learned while a network trains.

    After a step of gradient descent on Σ w_i ℓ_i the validation loss V has the derivative −lr ⟨∇V, ∇ℓ_i⟩ by w_i:
    reverse mode, truncated to one step, as a forward mode would carry N tangents. τ of these are h_1 … h_τ; of
    them `foretell` takes what is steady, as in `GlocalTuner`, and a moves by −meta_lr · `relative`.

    Cost: a measurement is a gradient of V, and two backward passes through the losses of all examples.

    Args:
        count: N.
        tau: τ, measurements that an update is made of.
        meta_lr: the longest step of a logit.
        estimate: "glocal", "local" (the last measurement) or "mean".
        tolerance: how far from 1 the eigenvalue of a steady mode may be.

    Raises:
        ConfigError: a number out of range.

    Source: one step: Ren et al. 2018, "Learning to Reweight Examples for Robust Deep Learning", eq. 12, which takes
    weights of a minibatch from it at once; its trajectory: arXiv 2402.02741.

    >>> theta = torch.zeros(1, requires_grad=True)
    >>> weights = ExampleWeights(2, tau=3, meta_lr=2.0)
    >>> labels = torch.tensor([1.0, -5.0])  # the second is wrong
    >>> for _ in range(6):
    ...     weights.measure((theta - labels).square(), (theta - 1).square().sum(), [theta])
    >>> weights(torch.tensor([0, 1])).round(decimals=2)
    tensor([0.9800, 0.0200])
    """

    def __init__(
        self,
        count: int,
        tau: int = 6,
        *,
        meta_lr: float = 1.0,
        estimate: Estimate = "glocal",
        tolerance: float = 0.1,
    ):
        require(count >= 1, f"count: expected 1 example or more, got {count}")
        require_settings("measurements", tau, meta_lr, estimate, tolerance)
        self.tau, self.meta_lr, self.estimate, self.tolerance = tau, meta_lr, estimate, tolerance
        self.logits = torch.zeros(count)
        self.updates = self.fallbacks = 0
        self._trajectory: list[Tensor] = []

    def __call__(self, index: Tensor) -> Tensor:
        """Weights of examples, (*index), each in 0 … 1; take Σ w ℓ / Σ w for the loss of a minibatch."""
        return self.logits[index.cpu()].sigmoid().to(index.device)

    def measure(self, losses: Tensor, validation: Tensor, params: list[Tensor]) -> None:
        """Take a local hypergradient; the τ-th updates the weights.

        Args:
            losses: (N,) of all examples, in their order, with their graph.
            validation: V, with its graph.
            params: what is trained.

        Raises:
            ConfigError: losses are of another number, or V is no loss with a graph.
        """
        expected = f"losses: expected one for each of the {len(self.logits)} examples, with their graph"
        require(losses.shape == self.logits.shape and losses.requires_grad, f"{expected}; got {tuple(losses.shape)}")
        found = alignment(losses, params, gradients("validation", validation, params))
        self._trajectory.append(-found.double().cpu())
        if len(self._trajectory) == self.tau:
            self._update()

    def _update(self) -> None:
        step, found = follow(torch.stack(self._trajectory), self.estimate, self.tolerance)
        if found is not None:
            self.fallbacks += found.fell_back
        self.updates += 1
        self._trajectory = []
        step = torch.where(step.isfinite(), step, 0.0).to(self.logits.dtype)
        self.logits = (self.logits - self.meta_lr * step).clamp(-FARTHEST, FARTHEST)

    def state_dict(self) -> dict[str, Any]:
        """What weights of the same arguments go on from."""
        counters = {"updates": self.updates, "fallbacks": self.fallbacks}
        return counters | {"logits": self.logits.clone(), "trajectory": list(self._trajectory)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of `state_dict`.

        Raises:
            ConfigError: the state is of something else, or of another number of examples.
        """
        require(isinstance(state, dict) and state.keys() == self.state_dict().keys(), "state: not of ExampleWeights")
        require(
            all(row.shape == self.logits.shape for row in (state["logits"], *state["trajectory"])),
            f"state: of {len(state['logits'])} examples, these are {len(self.logits)}",
        )
        self.updates, self.fallbacks = state["updates"], state["fallbacks"]
        self.logits, self._trajectory = state["logits"].clone().cpu(), list(state["trajectory"])
