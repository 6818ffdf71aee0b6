"""Evolution strategies, truncated and persistent: meta-gradients from losses at perturbed parameters alone.

Perturbations are drawn from seeds that every rank knows, so ranks send losses, one number per pair, and each
rebuilds the same gradient. Sums over ranks then have one summand that is not zero: all is equal bit for bit for any
number of ranks.
"""

import dataclasses
import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from l2o_runtime.rules import Rule
from l2o_training.config import TrainConfig
from l2o_training.meta.curriculum import Lane
from l2o_training.meta.estimators.base import Estimator, Share, size
from l2o_training.meta.unroll import Inner, meta_losses, unroll
from l2o_training.tasks.base import generator


def draw_perturbation(config: TrainConfig, lane: Lane, done: int, pair: int, count: int) -> Tensor:
    """ε ~ N(0, σ² I), (P,) on the CPU: the same whoever draws it.

    Args:
        config: the run; gives σ and the seed.
        lane: gives the number of the episode.
        done: steps of the episode at the end of the truncation.
        pair: number of the antithetic pair.
        count: P.
    """
    seed = random.Random(f"{config.seed}/{lane.number}/{done}/{pair}").getrandbits(63)
    return config.sigma * torch.randn(count, generator=generator(seed, torch.device("cpu")))


def antithetic_gradient(perturbations: Tensor, differences: Tensor, sigma: float) -> Tensor:
    """1/(2 N σ²) Σ_i ξ_i (L(φ + ε_i) − L(φ − ε_i)), float64.

    Args:
        perturbations: (N, P) ξ; for es that of the truncation, for pes the sum over the episode so far.
        differences: (N,) of losses.
        sigma: σ of one truncation's perturbation.

    Source: Vicol, Metz & Sohl-Dickstein 2021, "Unbiased Gradient Estimation in Unrolled Computation Graphs with
    Persistent Evolution Strategies", equations 4 (es) and 10 (pes), for antithetic pairs.
    """
    return differences.double() @ perturbations.double() / (2 * len(perturbations) * sigma**2)


class ES(Estimator):
    """Evolution strategies of a truncation, whose particles all start where the unperturbed rule stands.

    The gradient of the truncation's meta-loss, smoothed: biased as truncated back-propagation is, but it does not
    mind how rugged the loss is, and holds nothing constant. The lane goes on from the unperturbed rule's steps.
    """

    @property
    def pairs(self) -> int:
        """N, antithetic pairs per lane."""
        return self.config.particles // 2

    def width(self, rule: Rule) -> int:
        """lanes × pairs, whatever the size of the rule."""
        return self.config.lanes * self.pairs

    def share(self, rule: Rule, lane: Lane) -> Share:
        """The difference of losses of every pair."""
        message = self.message(rule, lane)
        (inner,) = lane.begun(rule)
        _, loss, koopman = self._steps(rule, inner, None)
        return Share(message, loss, koopman)

    def message(self, rule: Rule, lane: Lane) -> Tensor:
        """Differences of losses (lanes · pairs,), zero in other lanes' places; the lane stays where it is."""
        (inner,) = lane.begun(rule)
        rng, differences = inner.instances.rng, []
        start = rng.get_state()
        for pair in range(self.pairs):
            epsilon = self.perturbation(rule, lane, pair)
            ends = []
            for signed in (epsilon, -epsilon):
                ends.append(self._steps(rule, dataclasses.replace(inner), signed)[0])
                rng.set_state(start)  # the same minibatches for all
            differences.append(ends[0] - ends[1])
        return self._in_place(lane, differences)

    def gradient(self, rule: Rule, lanes: list[Lane], message: Tensor) -> Tensor:
        """Mean over lanes."""
        total = torch.zeros(size(rule), dtype=torch.float64, device=message.device)
        for gradient in self.gradients(rule, lanes, message):
            total += gradient / self.config.lanes
        return total

    def gradients(self, rule: Rule, lanes: list[Lane], message: Tensor) -> Iterator[Tensor]:
        """`antithetic_gradient` (P,) of every lane."""
        for lane, differences in zip(lanes, message.view(self.config.lanes, -1), strict=True):
            weights = torch.stack([self.weight(rule, lane, pair) for pair in range(self.pairs)])
            yield antithetic_gradient(weights, differences, self.config.sigma)

    def perturbation(self, rule: Rule, lane: Lane, pair: int) -> Tensor:
        """ε of the truncation, (P,)."""
        epsilon = draw_perturbation(self.config, lane, lane.done, pair, size(rule))
        return epsilon.to(next(rule.parameters()).device)

    def weight(self, rule: Rule, lane: Lane, pair: int) -> Tensor:
        """ξ, which a pair's difference is multiplied with: its perturbation."""
        return self.perturbation(rule, lane, pair)

    def _steps(self, rule: Rule, inner: Inner, epsilon: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Meta-loss, mean loss and Koopman loss of a truncation with perturbed parameters."""
        config = self.config
        with torch.no_grad(), perturbed(rule, epsilon):
            segment = unroll(rule, inner, config.unroll, config.weights, objective=config.objective, tail=config.tail)
            values = meta_losses(segment, config.objective).mean(1)
            value = values.sum() if config.weights == "uniform" else values[-1]
            koopman = self.koopman(rule, segment)
            if koopman is not None:
                value = value + config.koopman * koopman
        return value, segment.losses.double().mean(), koopman

    def _in_place(self, lane: Lane, differences: list[Tensor]) -> Tensor:
        message = torch.zeros(self.config.lanes, self.pairs, dtype=torch.float64, device=differences[0].device)
        message[lane.index] = torch.stack(differences)
        return message.flatten()


class PES(ES):
    """Persistent evolution strategies: particles go on where they stand, and remember their perturbations.

    The gradient of the whole episode's meta-loss, smoothed, without the bias of truncation: a truncation's loss is
    multiplied with the sum ξ of all perturbations since the episode's beginning. Its variance grows with that sum.

    Memory on every rank: lanes × pairs × P floats for ξ. They are not in checkpoints: seeds give them again. A lane
    carries the states of all its particles.
    """

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self._sums: dict[tuple[int, int], Tensor] = {}

    @property
    def copies(self) -> int:
        """One per particle."""
        return self.config.particles

    def count(self, rule: Rule, lanes: list[Lane]) -> None:
        """Add this truncation's perturbations to ξ, which begins with the episode."""
        for lane in lanes:
            for pair in range(self.pairs):
                epsilon = self.perturbation(rule, lane, pair)
                fresh = lane.done == self.config.unroll
                self._sums[lane.index, pair] = epsilon if fresh else self._sums[lane.index, pair] + epsilon

    def share(self, rule: Rule, lane: Lane) -> Share:
        """Advance all particles; the difference of losses of every pair."""
        inners = lane.begun(rule)
        found = []
        for index, inner in enumerate(inners):
            epsilon = self.perturbation(rule, lane, index // 2)
            found.append(self._steps(rule, inner, -epsilon if index % 2 else epsilon))
        differences = [plus[0] - minus[0] for plus, minus in zip(found[::2], found[1::2], strict=True)]
        koopman = [term for _, _, term in found if term is not None]
        loss = torch.stack([mean for _, mean, _ in found]).mean()
        return Share(self._in_place(lane, differences), loss, torch.stack(koopman).mean() if koopman else None)

    def weight(self, rule: Rule, lane: Lane, pair: int) -> Tensor:
        """ξ: the sum of the pair's perturbations since the episode's beginning."""
        return self._sums[lane.index, pair]

    def restore(self, rule: Rule, lanes: list[Lane]) -> None:
        """Draw the perturbations of the episodes under way once more, and sum them in the same order."""
        device, count = next(rule.parameters()).device, size(rule)
        for lane in lanes:
            if lane.under_way:
                for pair in range(self.pairs):
                    steps = range(self.config.unroll, lane.done + 1, self.config.unroll)
                    drawn = (draw_perturbation(self.config, lane, done, pair, count).to(device) for done in steps)
                    self._sums[lane.index, pair] = functools.reduce(torch.add, drawn)


@contextmanager
def perturbed(rule: Rule, epsilon: Tensor | None) -> Iterator[None]:
    """The rule's parameters moved by ε (P,) for a while; afterwards they are as before, bit for bit."""
    params = list(rule.parameters())
    if epsilon is None:
        yield
        return
    before = [p.detach().clone() for p in params]
    try:
        for p, part in zip(params, epsilon.split([p.numel() for p in params]), strict=True):
            p.add_(part.view_as(p))
        yield
    finally:
        for p, old in zip(params, before, strict=True):
            p.copy_(old)
