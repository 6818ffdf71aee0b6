"""Objectives: the summands of the meta-loss."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from l2o_runtime.config import ConfigError, KAEConfig
from l2o_runtime.contexts import KAE
from l2o_runtime.solvers import Descent, Players, Point, Solver, SwarmConfig
from l2o_runtime.solvers.twin import DONE, MAX, MIN
from l2o_runtime.state import State
from l2o_training.config import TrainConfig
from l2o_training.tasks import Instances

TINY = 1e-10
"""Losses below this count as this where their logarithm is taken."""


def logarithm(losses: Tensor) -> Tensor:
    """log L, and never less than log `TINY`."""
    return losses.clamp_min(TINY).log()


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A summand of the meta-loss: it has a value at every point, or one for the whole truncation.

    With a span a, points are the means θ̄ of the latest parameters, about the latest a τ of τ steps:
    θ̄_τ = θ̄_{τ−1} + (θ_τ − θ̄_{τ−1}) / (1 + a τ), with τ from the optimization's beginning. Shorter steps lower the noise
    of L(θ) at once, and what they cost comes after the truncation, so that rules learn to shorten them too soon; at the
    mean there is little noise to be lowered.

    Attributes:
        weight: factor on it.
        name: of its mean among the metrics of a run; empty where they say it otherwise.
        span: a, or None for points at θ_τ itself.
        reads: what of the solver's states `of` looks at.
    """

    weight: float = 1.0
    name: ClassVar[str] = ""
    span: float | None = None
    reads: ClassVar[tuple[str, ...]] = ()

    def after(self, state: State) -> "Objective":
        """As it is at the point that a step has led to, which left the solver in this state."""
        return self

    @abstractmethod
    def at(self, instances: Instances, point: Point) -> tuple[Tensor, Tensor] | None:
        """Value and slope at a point; None where it has none there.

        ⟨slope, θ⟩ with the slope held constant has the gradient of the value with respect to all that θ depends on.

        Args:
            instances: the problems.
            point: constant.

        Returns:
            Value (B,) float64, and slope ∂value/∂θ (B, n).
        """

    def measure(self, instances: Instances, params: Tensor, loss: Tensor) -> Tensor:
        """What is recorded, and validated, of parameters (B, n) with these losses: (B,)."""
        return loss

    def of(self, solver: Solver, states: State) -> Tensor | None:
        """What depends on a solver's parameters otherwise than through θ, a scalar; None where there is nothing.

        Args:
            solver: which made the steps.
            states: those that `reads` names, after each step, (u, B, …) each.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Loss(Objective):
    """L, as in the papers."""

    def at(self, instances: Instances, point: Point) -> tuple[Tensor, Tensor]:
        """L and ∇L."""
        return point.loss.double(), point.grad


@dataclass(frozen=True, kw_only=True)
class LogLoss(Objective):
    """log L, so that late steps and hard tasks count alike."""

    def at(self, instances: Instances, point: Point) -> tuple[Tensor, Tensor]:
        """log L and ∇L / L."""
        return logarithm(point.loss.double()), point.grad / point.loss.clamp_min(TINY).unsqueeze(-1)


@dataclass(frozen=True, kw_only=True)
class Jacobian(Objective):
    """‖∇L‖², which asks for flat places.

    Source: HALO, Li et al. 2020, "HALO: Hardware-Aware Learning to Optimize", Jacobian regularisation.
    """

    def at(self, instances: Instances, point: Point) -> tuple[Tensor, Tensor]:
        """‖∇L‖² and 2 H ∇L; the instances have to have looked at the point just now."""
        square = instances.unscaled(point.grad).double().square().sum(-1)
        return square, instances.slope_of_square(point.params)


@dataclass(frozen=True, kw_only=True)
class SquaredError(Objective):
    """‖θ − θ*‖², where the solution θ* is known: that of sparse recovery, as in the papers."""

    def at(self, instances: Instances, point: Point) -> tuple[Tensor, Tensor]:
        """‖θ − θ*‖² and 2 (θ − θ*)."""
        return self.measure(instances, point.params, point.loss).double(), 2 * _error(instances, point.params)

    def measure(self, instances: Instances, params: Tensor, loss: Tensor) -> Tensor:
        """‖θ − θ*‖²."""
        return _error(instances, params).square().sum(-1)


def _error(instances: Instances, params: Tensor) -> Tensor:
    """θ − θ*."""
    solution = getattr(instances.structure, "solution", None)
    if solution is None:
        raise ConfigError("objective: squared_error needs tasks whose solutions are known, such as sparse")
    error: Tensor = params - solution
    return error


@dataclass(frozen=True, kw_only=True)
class Reward(Objective):
    """What the player who has just moved has gained by it: over an iteration of min over u, max over v of f(u, v),

    [f(u⁺, v) − f(u, v)] + [f(u⁺, v) − f(u⁺, v⁺)].

    What is subtracted from f after a move is constant to the mover, and so is the other's place: the slope is that of
    the mover's own loss, by its own coordinates. Up to constants of every move the value is f, or −f of the maximizer.

    Attributes:
        mover: who that is.

    Source: Shen et al. 2021, "Learning A Minimax Optimizer: A Pilot Study", equation 4.
    """

    mover: int = MIN

    def after(self, state: State) -> "Reward":
        """Of whose turn it was."""
        return replace(self, mover=(int(state[DONE]) - 1) % 2)

    def at(self, instances: Instances, point: Point) -> tuple[Tensor, Tensor]:
        """±f, and the mover's part of the field."""
        players = instances.structure
        assert isinstance(players, Players)  # as the solver has asked for
        moved = torch.zeros_like(point.grad[0])
        moved[players.places(self.mover, instances.shapes, moved.device)] = 1
        return (-1 if self.mover == MAX else 1) * point.loss.double(), moved * point.grad


@dataclass(frozen=True, kw_only=True)
class Distance(Objective):
    """log ‖x − x*‖ for the nearest solution x*: what a reward cannot say where gains have no bound, as uᵀ A v has."""

    def at(self, instances: Instances, point: Point) -> tuple[Tensor, Tensor]:
        """log d and (x − x*) / d², with d² at least `TINY`²."""
        apart = instances.structure.apart(point.params)
        squares = apart.square().sum(-1).clamp_min(TINY**2)
        return squares.log() / 2, (apart / squares.unsqueeze(-1)).to(point.grad.dtype)

    def measure(self, instances: Instances, params: Tensor, loss: Tensor) -> Tensor:
        """d: the loss of a game says nothing."""
        distance: Tensor = instances.structure.apart(params).square().sum(-1).sqrt()
        return distance


@dataclass(frozen=True, kw_only=True)
class Entropy(Objective):
    """How undecided a swarm is about where the minimum is: H(p) per particle, p = softmax(−ρ f) over its particles.

    It is lowest where one particle is far better than all others. The published one is the entropy of a posterior over
    all of space, exp(−ρ f̂) with the mean f̂ of a Gaussian process through all points so far, from a thousand samples;
    this is the same posterior at the particles alone, where f is known.

    Attributes:
        particles: k.
        sharpness: ρ.

    Source: Cao, Chen, Wang & Shen 2019, section 3.3.
    """

    particles: int
    sharpness: float = 1.0

    def at(self, instances: Instances, point: Point) -> tuple[Tensor, Tensor]:
        """H/k, and ∂(H/k)/∂f ∇f, where ∂H/∂f_i = ρ p_i (log p_i + H)."""
        logs = (-self.sharpness * point.loss.unflatten(0, (-1, self.particles))).log_softmax(-1)
        entropy = -(logs.exp() * logs).sum(-1, keepdim=True)
        slope = self.sharpness * logs.exp() * (logs + entropy)
        share = (entropy / self.particles).expand_as(logs).flatten()
        return share.double(), slope.flatten().unsqueeze(-1) / self.particles * point.grad


@dataclass(frozen=True, kw_only=True)
class KoopmanLoss(Objective):
    """How well the Koopman autoencoder of a rule describes what it saw: see `KAE.koopman_loss`."""

    name: ClassVar[str] = "koopman_loss"
    reads: ClassVar[tuple[str, ...]] = ("optimization/features",)

    def at(self, instances: Instances, point: Point) -> None:
        """It is of the truncation alone."""

    def of(self, solver: Solver, states: State) -> Tensor | None:
        """None without an autoencoder."""
        context = solver.rule.context if isinstance(solver, Descent) else None
        return context.koopman_loss(states[self.reads[0]]) if isinstance(context, KAE) else None


@dataclass(frozen=True, kw_only=True)
class ExpertObjective(Objective):
    """How far the learner's steps are from an expert's, summed over the steps: see `meta.imitation.distance`."""

    name: ClassVar[str] = "imitation"
    reads: ClassVar[tuple[str, ...]] = ("distance",)

    def at(self, instances: Instances, point: Point) -> None:
        """It is of the steps, not of where they lead."""

    def of(self, solver: Solver, states: State) -> Tensor:
        """Mean over instances."""
        return states[self.reads[0]].sum(0).mean()


MEASURES: dict[str, type[Objective]] = {
    "loss": Loss,
    "log_loss": LogLoss,
    "squared_error": SquaredError,
    "reward": Reward,
    "distance": Distance,
}
"""What a run's `objective` is."""


def loss_objectives(kind: str = "loss", tail: float | None = None) -> tuple[Objective, ...]:
    """That of a name; with a tail, half of the weight is for the mean of the latest parameters, over this span."""
    made = MEASURES[kind]
    return (made(),) if tail is None else (made(weight=0.5), made(weight=0.5, span=tail))


def make_objectives(config: TrainConfig, share: float = 1.0) -> tuple[Objective, ...]:
    """The objectives of a run, in which the learner carries this share of the steps, an expert the rest."""
    losses = loss_objectives(config.objective, config.tail)
    if config.jacobian:
        losses = (*losses, Jacobian(weight=config.jacobian))
    if config.expert:
        handed = tuple(replace(loss, weight=share * loss.weight) for loss in losses)
        return *handed, ExpertObjective(weight=1 - share)
    if isinstance(config.rule, SwarmConfig) and config.entropy:
        return *losses, Entropy(weight=config.entropy, particles=config.rule.particles)
    return (*losses, KoopmanLoss(weight=config.koopman)) if isinstance(config.rule.context, KAEConfig) else losses
