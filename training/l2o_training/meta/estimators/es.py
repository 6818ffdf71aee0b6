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

from l2o_runtime.solvers import Solver
from l2o_training.config import TrainConfig
from l2o_training.meta.estimators.base import Estimator, Share, size, trained
from l2o_training.meta.slots import TaskSlot
from l2o_training.meta.unroll import Inner, Trace, unroll
from l2o_training.tasks.base import generator


def draw_perturbation(config: TrainConfig, slot: TaskSlot, done: int, pair: int, count: int) -> Tensor:
    """ε ~ N(0, σ² I), (P,) on the CPU: the same whoever draws it.

    Args:
        config: the run; gives σ and the seed.
        slot: gives the number of the episode.
        done: steps of the episode at the end of the truncation.
        pair: number of the antithetic pair.
        count: P.
    """
    seed = random.Random(f"{config.seed}/{slot.number}/{done}/{pair}").getrandbits(63)
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
    """Evolution strategies of a truncation, whose particles all start where the unperturbed one stands.

    The gradient of the truncation's meta-loss, smoothed: biased as truncated back-propagation is, but it does not
    mind how rugged the loss is, and holds nothing constant. The slot goes on from the unperturbed steps; where a
    truncation is the rest of an optimization, none are needed.
    """

    @property
    def pairs(self) -> int:
        """N, antithetic pairs per slot."""
        return self.config.particles // 2

    def width(self, outer: Solver) -> int:
        """slots × pairs, whatever the size of what is trained."""
        return self.config.lanes * self.pairs

    def share(self, outer: Solver, slot: TaskSlot) -> Share:
        """The difference of losses of every pair."""
        message, traces = self.particles(outer, slot)
        if slot.under_way:
            (inner,) = slot.begun(outer)
            traces = [self.advance(outer, slot, inner, None)]
        return Share(message, *recorded(traces))

    def particles(self, outer: Solver, slot: TaskSlot) -> tuple[Tensor, list[Trace]]:
        """Differences of losses (slots · pairs,), zero in other slots' places, and all steps; the slot stays where it
        is.
        """
        (inner,) = slot.begun(outer)
        rng, differences, traces = inner.instances.rng, [], []
        start = rng.get_state()
        for pair in range(self.pairs):
            epsilon = self.perturbation(outer, slot, pair)
            ends = []
            for signed in (epsilon, -epsilon):
                ends.append(self.advance(outer, slot, again(outer, slot, inner), signed))
                rng.set_state(start)  # the same minibatches for all
            differences.append(ends[0].value - ends[1].value)
            traces += ends
        return self._in_place(slot, differences), traces

    def gradient(self, outer: Solver, slots: list[TaskSlot], message: Tensor) -> Tensor:
        """Mean over slots."""
        total = torch.zeros(size(outer), dtype=torch.float64, device=message.device)
        for gradient in self.gradients(outer, slots, message):
            total += gradient / self.config.lanes
        return total

    def gradients(self, outer: Solver, slots: list[TaskSlot], message: Tensor) -> Iterator[Tensor]:
        """`antithetic_gradient` (P,) of every slot."""
        for slot, differences in zip(slots, message.view(self.config.lanes, -1), strict=True):
            weights = torch.stack([self.weight(outer, slot, pair) for pair in range(self.pairs)])
            yield antithetic_gradient(weights, differences, self.config.sigma)

    def perturbation(self, outer: Solver, slot: TaskSlot, pair: int) -> Tensor:
        """ε of the truncation, (P,)."""
        epsilon = draw_perturbation(self.config, slot, slot.done, pair, size(outer))
        return epsilon.to(next(outer.parameters()).device)

    def weight(self, outer: Solver, slot: TaskSlot, pair: int) -> Tensor:
        """ξ, which a pair's difference is multiplied with: its perturbation."""
        return self.perturbation(outer, slot, pair)

    def advance(self, outer: Solver, slot: TaskSlot, inner: Inner, epsilon: Tensor | None) -> Trace:
        """A truncation with perturbed parameters; `inner` is where it ends."""
        with torch.no_grad(), perturbed(outer, epsilon):
            return unroll(outer, inner, slot.span, self.objectives, self.config.weights)

    def _in_place(self, slot: TaskSlot, differences: list[Tensor]) -> Tensor:
        message = torch.zeros(self.config.lanes, self.pairs, dtype=torch.float64, device=differences[0].device)
        message[slot.index] = torch.stack(differences)
        return message.flatten()


class PES(ES):
    """Persistent evolution strategies: particles go on where they stand, and remember their perturbations.

    The gradient of the whole episode's meta-loss, smoothed, without the bias of truncation: a truncation's loss is
    multiplied with the sum ξ of all perturbations since the episode's beginning. Its variance grows with that sum.

    Memory on every rank: slots × pairs × P floats for ξ. They are not in checkpoints: seeds give them again. A slot
    carries the states of all its particles.
    """

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self._sums: dict[tuple[int, int], Tensor] = {}

    @property
    def copies(self) -> int:
        """One per particle."""
        return self.config.particles

    def count(self, outer: Solver, slots: list[TaskSlot]) -> None:
        """Add this truncation's perturbations to ξ, which begins with the episode."""
        for slot in slots:
            for pair in range(self.pairs):
                epsilon = self.perturbation(outer, slot, pair)
                fresh = slot.done == slot.span
                self._sums[slot.index, pair] = epsilon if fresh else self._sums[slot.index, pair] + epsilon

    def share(self, outer: Solver, slot: TaskSlot) -> Share:
        """Advance all particles; the difference of losses of every pair."""
        inners = slot.begun(outer)
        traces = []
        for index, inner in enumerate(inners):
            epsilon = self.perturbation(outer, slot, index // 2)
            traces.append(self.advance(outer, slot, inner, -epsilon if index % 2 else epsilon))
        differences = [plus.value - minus.value for plus, minus in zip(traces[::2], traces[1::2], strict=True)]
        return Share(self._in_place(slot, differences), *recorded(traces))

    def weight(self, outer: Solver, slot: TaskSlot, pair: int) -> Tensor:
        """ξ: the sum of the pair's perturbations since the episode's beginning."""
        return self._sums[slot.index, pair]

    def restore(self, outer: Solver, slots: list[TaskSlot]) -> None:
        """Draw the perturbations of the episodes under way once more, and sum them in the same order."""
        device, count = next(outer.parameters()).device, size(outer)
        for slot in slots:
            if slot.under_way:
                for pair in range(self.pairs):
                    steps = range(slot.span, slot.done + 1, slot.span)
                    drawn = (draw_perturbation(self.config, slot, done, pair, count).to(device) for done in steps)
                    self._sums[slot.index, pair] = functools.reduce(torch.add, drawn)


def again(outer: Solver, slot: TaskSlot, inner: Inner) -> Inner:
    """Where a truncation begins, for another particle.

    Whole optimizations are begun once more, as what tasks of one's own keep outside parameters and running statistics
    has moved; in a later truncation a particle finds that as the one before has left it.
    """
    return slot.anew(outer) if slot.done == slot.span else dataclasses.replace(inner)


def recorded(traces: list[Trace]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and terms, for the record."""
    loss = torch.stack([trace.losses.double().mean() for trace in traces]).mean()
    return loss, {name: torch.stack([trace.terms[name] for trace in traces]).mean() for name in traces[0].terms}


@contextmanager
def perturbed(outer: Solver, epsilon: Tensor | None) -> Iterator[None]:
    """The rule's parameters moved by ε (P,) for a while; afterwards they are as before, bit for bit."""
    params = trained(outer)
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
