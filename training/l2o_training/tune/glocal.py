"""Glocal tuning: hyper-parameters follow the hypergradient that the last local ones foretell."""

import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from l2o_runtime.config import require
from l2o_runtime.stepping.whole import listed
from l2o_training.tune.estimates import Estimate, follow, gradients, require_settings
from l2o_training.tune.steps import method_of, moved, push, read, require_tunable, slope, write

ENOUGH = 5
"""Updates before a user is told that most have no steady mode."""


@dataclass
class Progress:
    """How far a tuner is.

    Attributes:
        steps: of the optimizer.
        updates, fallbacks, skipped, residuals, steady: see `GlocalTuner.health`; the latter two of every update.
        trajectory: hypergradients since the last update, (p,) each.
    """

    steps: int = 0
    updates: int = 0
    fallbacks: int = 0
    skipped: int = 0
    residuals: list[float] = field(default_factory=list)
    steady: list[int] = field(default_factory=list)
    trajectory: list[Tensor] = field(default_factory=list)


class GlocalTuner:
    """Tune the hyper-parameters of an ordinary optimizer while it trains.

    Beside the parameters θ go their tangents Z = dθ/dλ, and those of the optimizer's state. A step of λ is a step of
    log lr, log weight_decay, logit momentum or logit beta1, for each group of parameters. Every so many steps the
    local hypergradient h = Zᵀ ∇V(θ) of the validation loss V is taken. Of τ of them `foretell` takes what is steady,
    λ moves by −meta_lr · `relative`, and tangents begin anew, at zero.

    Cost, for p hyper-parameters (names times groups): each step a gradient that keeps its graph, and p
    Hessian-vector products, each about two backward passes; each measurement a gradient of V. Memory: p copies of
    parameters and state, and the graph of the gradient.

    The tuner takes gradients itself, so that gradients are neither clipped nor accumulated nor all-reduced: it is for
    one process. A scheduler must not set what is tuned. Every operation of the model needs a second derivative.

    Args:
        optimizer: SGD, Adam or AdamW of torch.optim.
        hyperparameters: of lr, momentum, weight_decay (SGD), or lr, beta1, weight_decay (Adam, AdamW).
        tau: τ, hypergradients that an update is made of.
        validation: gives V(θ) at the parameters as they are.
        every: steps between hypergradients.
        meta_lr: the longest step of a logarithm or logit.
        estimate: "glocal"; or what it is to be compared with: "local", the last hypergradient, and "mean".
        tolerance: how far from 1 the eigenvalue of a steady mode may be.
        delay: q of the embedding, as `foretell` takes it. For one hyper-parameter the default, τ // 2, has as many
            coefficients as equations, and a residual of 0 whatever happens; with τ // 3 it says something.

    Raises:
        ConfigError: an optimizer or hyper-parameter that cannot be tuned, or a number out of range.

    Source: arXiv 2402.02741.

    >>> x = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = torch.optim.SGD([x], lr=1e-3)
    >>> tuner = GlocalTuner(optimizer, tau=4, meta_lr=0.5, validation=lambda: x.square().sum())
    >>> for _ in range(20):
    ...     tuner.step(x.square().sum())
    >>> tuner.health()["updates"], optimizer.param_groups[0]["lr"] > 2e-3
    (5, True)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        hyperparameters: Sequence[str] = ("lr",),
        tau: int = 10,
        *,
        validation: Callable[[], Tensor],
        every: int = 1,
        meta_lr: float = 0.3,
        estimate: Estimate = "glocal",
        tolerance: float = 0.01,
        delay: int | None = None,
    ):
        self.method = method_of(optimizer)
        require(callable(validation), f"validation: expected a function that gives a loss, got {validation!r}")
        require_settings("hypergradients", tau, meta_lr, estimate, tolerance)
        require(every >= 1, f"every: expected 1 step or more, got {every}")
        require(
            delay is None or 1 <= delay <= tau - 2, f"delay: expected a number in 1..{tau - 2} (tau − 2), got {delay}"
        )
        names = [hyperparameters] if isinstance(hyperparameters, str) else list(hyperparameters)
        require(len(set(names)) == len(names) > 0, f"hyperparameters: expected different names, got {names}")
        for group in optimizer.param_groups:
            for name in names:
                require_tunable(self.method, group, name)
        self.optimizer, self.validation, self.tau, self.every = optimizer, validation, tau, every
        self.meta_lr, self.estimate, self.tolerance, self.delay = meta_lr, estimate, tolerance, delay
        self.tuned = [(index, name) for index in range(len(optimizer.param_groups)) for name in names]
        self._done = Progress()
        self._warned = False
        self._tangents: dict[Tensor, list[Tensor]] = {}

    def step(self, loss: Tensor) -> None:
        """Take gradients of the loss, step the optimizer, and from time to time the hyper-parameters.

        Args:
            loss: of a minibatch, with its graph; in place of `loss.backward()` and `optimizer.step()`.

        Raises:
            ConfigError: the loss has no graph, or is no single number.
        """
        params = self._params()
        grads = gradients("loss", loss, params, create_graph=True)
        self._carry(params, grads)
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else grad.detach()
        self.optimizer.step()
        self._done.steps += 1
        last = self._done.steps % (self.every * self.tau) == 0
        if last or (self._done.steps % self.every == 0 and self.estimate != "local"):
            self._done.trajectory.append(self.hypergradient())
        if last:
            self._update()

    def hypergradient(self) -> Tensor:
        """The local one, (p,) float64: dV/d log λ or dV/d logit λ through the steps since the last update."""
        params = self._params()
        found = torch.zeros(len(self.tuned), dtype=torch.float64)
        for param, grad in zip(params, gradients("validation", self.validation(), params), strict=True):
            if grad is not None and param in self._tangents:
                found += (self._tangents[param][0].flatten(1) @ grad.flatten()).double().cpu()
        return found

    def values(self) -> dict[str, list[float]]:
        """What is tuned, by name, one number for each group."""
        found: dict[str, list[float]] = defaultdict(list)
        for index, name in self.tuned:
            found[name].append(read(self.optimizer.param_groups[index], name))
        return dict(found)

    def health(self) -> dict[str, Any]:
        """How tuning goes: counters, and medians over updates.

        updates; fallbacks: of them had no steady mode, and took the mean; skipped: had numbers that are not finite;
        residual: of the linear model, relative; steady: modes; values: as they are.
        """
        done = self._done
        medians = {
            "residual": statistics.median(done.residuals) if done.residuals else None,
            "steady": statistics.median(done.steady) if done.steady else None,
        }
        counters = {"updates": done.updates, "fallbacks": done.fallbacks, "skipped": done.skipped}
        return counters | medians | {"values": self.values()}

    def state_dict(self) -> dict[str, Any]:
        """What a tuner of the same arguments goes on from, beside the state of its optimizer, which has the values."""
        return deepcopy(vars(self._done)) | {
            "tangents": [[tangent.clone() for tangent in self._tangents.get(param, [])] for param in self._params()]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of `state_dict`; load the optimizer's, too.

        Raises:
            ConfigError: the state is of a tuner of another kind, or of other parameters or hyper-parameters.
        """
        known = {*vars(self._done), "tangents"}
        require(isinstance(state, dict) and state.keys() == known, "state: not of a GlocalTuner")
        found = deepcopy(state)
        tangents, params, rows = found.pop("tangents"), self._params(), len(self.tuned)
        fits = len(tangents) == len(params) and all(
            len(kept) == 1 + len(self.method.slots) and tangent.shape == (rows, *param.shape)
            for param, kept in zip(params, tangents, strict=True)
            for tangent in kept
        )
        fits = fits and all(row.shape == (rows,) for row in found["trajectory"])
        require(fits, "state: of a tuner of other parameters or hyper-parameters")
        self._done = Progress(**found)
        self._tangents = {
            param: [tangent.to(param.device, param.dtype) for tangent in kept]
            for param, kept in zip(params, tangents, strict=True)
            if kept
        }

    def _params(self) -> list[Tensor]:
        return [param for param in listed(self.optimizer.param_groups) if param.requires_grad]

    @torch.no_grad()
    def _carry(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        """Tangents after the optimizer's next step. Parameters of one group and step number go as one vector."""
        curved = self._curvature(params, grads)
        index = {param: k for k, group in enumerate(self.optimizer.param_groups) for param in group["params"]}
        bundles: dict[tuple[int, int], list[Any]] = defaultdict(list)
        for param, grad, along in zip(params, grads, curved, strict=True):
            if grad is not None:  # the optimizer leaves out what has no gradient
                number = self.method.number(self.optimizer.state[param])
                bundles[index[param], number].append((param, grad.detach(), along))
        for (group, number), bundle in bundles.items():
            self._carry_bundle(group, number, *map(list, zip(*bundle, strict=True)))

    def _carry_bundle(self, index: int, number: int, params: list[Any], grads: list[Any], curved: list[Any]) -> None:
        group, slots = self.optimizer.param_groups[index], self.method.slots
        states = [self.optimizer.state[param] for param in params]
        theta = _joined(params, 0)
        kept = [_joined([_slot(s, name, p) for s, p in zip(states, params, strict=True)], 0) for name in slots]
        values = {name: theta.new_tensor(read(group, name)) for name in self.method.hyperparameters}
        directions = {
            name: theta.new_tensor([slope(name, read(group, name)) * (key == (index, name)) for key in self.tuned])
            for name in values
        }
        before = [self._tangent(param) for param in params]
        primals = (theta, _joined(grads, 0), kept, values)
        rows = [_joined([tangent[k] for tangent in before], 1) for k in range(1 + len(slots))]
        tangents = (rows[0], _joined(curved, 1), rows[1:], directions)
        sizes = [param.numel() for param in params]
        pieces = [row.split(sizes, 1) for row in push(self.method.formula, primals, tangents, number, group)]
        for k, param in enumerate(params):
            self._tangents[param] = [piece[k].view(-1, *param.shape) for piece in pieces]

    def _tangent(self, param: Tensor) -> list[Tensor]:
        """Of a parameter and of its slots; zeros after an update."""
        if param in self._tangents:
            return self._tangents[param]
        return [param.new_zeros((len(self.tuned), *param.shape))] * (1 + len(self.method.slots))

    def _curvature(self, params: list[Tensor], grads: list[Tensor | None]) -> list[Tensor]:
        """H Z, (p, …) for each parameter: reverse mode over reverse mode."""
        found = [param.new_zeros((len(self.tuned), *param.shape)) for param in params]
        curved = [(param, grad) for param, grad in zip(params, grads, strict=True) if grad is not None]
        curved = [(param, grad) for param, grad in curved if grad.requires_grad]
        if not self._tangents or not curved:
            return found
        for row in range(len(self.tuned)):
            along = [self._tangent(param)[0][row] for param, _ in curved]
            products = torch.autograd.grad(
                [grad for _, grad in curved], params, along, retain_graph=row < len(self.tuned) - 1, allow_unused=True
            )
            for target, product in zip(found, products, strict=True):
                if product is not None:
                    target[row] = product
        return found

    def _update(self) -> None:
        """Step the hyper-parameters, and begin anew."""
        done = self._done
        step, found = follow(torch.stack(done.trajectory), self.estimate, self.tolerance, self.delay)
        if found is not None:
            done.fallbacks += found.fell_back
            done.residuals.append(found.residual)
            done.steady.append(int(found.steady.sum()))
        done.updates += 1
        done.trajectory, self._tangents = [], {}
        if not bool(step.isfinite().all()):
            done.skipped += 1
            return
        for (index, name), change in zip(self.tuned, step.tolist(), strict=True):
            group = self.optimizer.param_groups[index]
            write(group, name, moved(name, read(group, name), -self.meta_lr * change))
        self._warn()

    def _warn(self) -> None:
        done = self._done
        if self._warned or done.updates < ENOUGH or 2 * done.fallbacks <= done.updates:
            return
        self._warned = True
        warnings.warn(
            f"{done.fallbacks} of {done.updates} updates had no steady mode, and took the mean of the local "
            "hypergradients: raise tau or tolerance, use a larger or fixed validation batch, or estimate='mean'",
            stacklevel=4,
        )


def _slot(state: Any, name: str, param: Tensor) -> Tensor:
    kept = state.get(name)
    return torch.zeros_like(param) if kept is None else kept


def _joined(tensors: list[Tensor], start: int) -> Tensor:
    """Tensors as one vector, or as one for each row where they have rows."""
    return torch.cat([tensor.detach().flatten(start) for tensor in tensors], start)
