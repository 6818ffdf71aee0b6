"""How a rule is run over the parts of a model: observe all, steer once, update each.

Everything is written in place, and only if the step is good; there is no branch on the device's numbers, so that no
device has to be waited for and a compiled step is one graph.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2o_runtime.kernels import Kernel, fits, select
from l2o_runtime.layout import describe
from l2o_runtime.rules import Rule
from l2o_runtime.state import State
from l2o_runtime.stepping.distributed import Groups, sum_over
from l2o_runtime.stepping.parts import Part, full_precision

REASONS = ("nonfinite_gradient", "nonfinite_loss", "nonfinite_parameter", "zero_gradient")
"""Why a step may not be taken."""

TOGETHER = 16_384
"""Coordinates of parts that are looked at as one."""


class Replicas:
    """Copies of a rule on the devices of a model, which may be spread over several."""

    def __init__(self, rule: Rule):
        self.rule = rule
        self.copies: dict[torch.device, Rule] = {}
        self.kernels: dict[torch.device, Kernel | None] = {}

    def on(self, device: torch.device) -> Rule:
        """The rule on a device."""
        if device not in self.copies:
            self.copies[device] = copy.deepcopy(self.rule).to(device)
        return self.copies[device]

    def fast(self, parts: list[Part]) -> dict[Kernel, list[int]]:
        """The kernels, each with the numbers of the parts that it is for; the plain loop does the others."""
        found: dict[Kernel, list[int]] = {}
        for index, part in enumerate(parts):
            kernel = self._kernel(part)
            if kernel is not None:
                found.setdefault(kernel, []).append(index)
        return found

    def whole(self, parts: list[Part], loss: Tensor) -> Kernel | None:
        """The kernel that takes the whole step of all parts by itself, if there is one."""
        kernels = {self._kernel(part) for part in parts}
        kernel = next(iter(kernels)) if len(kernels) == 1 else None
        if kernel is None or not kernel.whole or any(part.param.device != loss.device for part in parts):
            return None
        # A parameter that is there twice steps twice, the second time from where the first has led.
        return kernel if len({part.state["step"].data_ptr() for part in parts}) == len(parts) else None

    def _kernel(self, part: Part) -> Kernel | None:
        # A direction's size is known when all ranks have summed it up, in between of what kernels do in one go.
        if torch.compiler.is_compiling() or not fits(part) or (self.rule.normalizes and part.groups):
            return None
        device = part.param.device
        if device not in self.kernels:
            self.kernels[device] = select(self.on(device), device)
        return self.kernels[device]

    def forget(self) -> None:
        """Let kernels look at everything anew."""
        for kernel in filter(None, self.kernels.values()):
            kernel.forget()

    def __getstate__(self) -> dict[str, Any]:
        """Copies make their own kernels."""
        return self.__dict__ | {"kernels": {}}


def observe(parts: list[Part], rule: Replicas | None) -> tuple[Tensor, Tensor]:
    """The rule's sums and Σ|g| (), of all parts on all ranks, in float64.

    They are exchanged together: sharding costs one all-reduce for every set of process groups.

    Args:
        parts: of this rank.
        rule: whose sums; None gives Σθ in their place. Both are not finite where a parameter is not (a rule that looks
            at nothing gives no sums).

    Returns:
        Sums (parts, k), or (1, k) if the rule steers all parts alike; and Σ|g|.
    """
    device = parts[0].param.device
    # Rows of sums that are exchanged together: one for all parts that are split alike, or one for each of them.
    rows: dict[Groups, dict[int, Tensor]] = {}
    sums: dict[int, Tensor] = {}
    separate = rule is not None and rule.rule.per_tensor
    for kernel, members in ({} if rule is None else rule.fast(parts)).items():
        summed = kernel.observe([parts[index] for index in members])
        if summed is not None:
            sums |= zip(members, summed, strict=True)
    for index, part in enumerate(parts if sums else _together(parts, rule)):
        own = rows.setdefault(part.groups, {})
        row = index if separate else 0
        for seen in _look(part, rule, sums.get(index)):
            seen = seen.to(device)
            own[row] = own[row] + seen if row in own else seen
    tables = [sum_over(groups, torch.stack(list(own.values()))) for groups, own in rows.items()]
    if not separate:
        total = torch.cat(tables).sum(0, keepdim=True)
        return total[:, 1:], total[0, 0]
    found = [index for own in rows.values() for index in own]
    table = torch.cat(tables)[sorted(range(len(found)), key=found.__getitem__)]
    return table[:, 1:], table[:, 0].sum()


def _together(parts: list[Part], rule: Replicas | None) -> list[Part]:
    """Small parts as one, for a rule that does not mind: operators on few numbers cost more than their arithmetic."""
    keys = None if rule is None else rule.rule.observed
    if keys is None or sum(len(part.theta) for part in parts) > TOGETHER:
        return parts
    kinds = {(part.theta.device, part.theta.dtype, part.grad.dtype, part.groups) for part in parts}
    if len(kinds) > 1 or any(part.group["maximize"] for part in parts):
        return parts
    state = {key: torch.cat([part.state[key] for part in parts]) for key in keys}
    theta, grad = torch.cat([part.theta for part in parts]), torch.cat([part.grad for part in parts])
    return [replace(parts[0], theta=theta, grad=grad, state=state)]


def _look(part: Part, rule: Replicas | None, sums: Tensor | None) -> Iterator[Tensor]:
    """Σ|g| and sums of a part, to be added up; the context alone looks where a kernel has done the rest."""
    if sums is not None and rule is not None and not rule.rule.context.observes:
        yield sums
        return
    for piece in part.chunks():
        known = piece.grad.abs().sum(dtype=torch.float64).reshape(1) if sums is None else sums
        if rule is None:
            yield torch.cat([known, piece.theta.sum(dtype=torch.float64).reshape(1)])
            continue
        local = rule.on(piece.theta.device)
        with full_precision(piece.theta.device):
            see = local.observe if sums is None else local.context.observe
            seen = see(piece.theta.float(), piece.grad, piece.state, piece.offset).double()
        yield torch.cat([known, seen])
        sums = None if sums is None else torch.zeros_like(sums)


def diagnose(pulse: Tensor, loss: Tensor, sums: Tensor) -> Tensor:
    """Whether a step may be taken, and if not, why.

    Args:
        pulse: () Σ|g|.
        loss: ().
        sums: of the rule.

    Returns:
        (1 + len(REASONS),) bool, the verdict: whether it may, and which of `REASONS` are against it.
    """
    reasons = torch.stack([~pulse.isfinite(), ~loss.isfinite(), ~sums.isfinite().all(), pulse == 0])
    return torch.cat([~reasons.any().reshape(1), reasons])


def advance(
    rule: Replicas,
    parts: list[Part],
    sums: Tensor,
    loss: Tensor,
    context_state: State,
    good: Tensor,
) -> None:
    """One step of a rule.

    Args:
        rule: on all devices.
        parts: of this rank; their parameters and states are written.
        sums: of all parts on all ranks, from `observe`.
        loss: ().
        context_state: written.
        good: () bool; else nothing is written.
    """
    with full_precision(loss.device):
        steering = _steer(rule, parts, torch.where(good, sums, 0.0), torch.where(good, loss, 0.0), context_state, good)
    done = set()
    for kernel, members in rule.fast(parts).items():
        device = parts[members[0]].param.device
        here = [steering[index].to(device) for index in members]
        kernel.update([parts[index] for index in members], here, good.to(device))
        done.update(members)
    split: dict[Groups, list[Moving]] = {}
    for index, (part, row) in enumerate(zip(parts, steering, strict=True)):
        fine = good.to(part.param.device)
        if rule.rule.normalizes and index not in done:
            moving = _direct(rule, part, row.to(fine.device), fine)
            if part.groups:
                split.setdefault(part.groups, []).append(moving)
            else:
                _move(rule, moving, fine)
            continue
        if index not in done:
            _advance(rule, part, row.to(fine.device), fine)
        part.finish(fine)
    for groups, several in split.items():
        squares = sum_over(groups, torch.stack([moving.square.to(loss.device) for moving in several]))
        for moving, square in zip(several, squares, strict=True):
            _move(rule, moving._replace(square=square), good)


class Moving(NamedTuple):
    """A part whose direction is known, but not yet how large all of it is.

    Attributes:
        part: its states are written, its parameters are not.
        steering: (1, c).
        directions: of its chunks.
        square: () float64, the sum of their squares.
    """

    part: Part
    steering: Tensor
    directions: list[Tensor]
    square: Tensor


def _advance(rule: Replicas, part: Part, steering: Tensor, good: Tensor) -> None:
    """One step of one part by the plain loop; everything is on its device."""
    for piece in part.chunks():
        with full_precision(good.device):
            delta, new = rule.on(good.device).update(piece.grad, piece.theta.float(), steering, _wide(piece.state))
        write(piece.state, new, good)
        part.move(piece.theta, delta, good, piece.state)


def _direct(rule: Replicas, part: Part, steering: Tensor, good: Tensor) -> Moving:
    """All of a step but the move, of a part whose rule normalizes; everything is on its device."""
    local, directions = rule.on(good.device), []
    with full_precision(good.device):
        whole = {} if part.groups else local.prepare(part.gradient, _wide(part.state), part.shape)
        for piece in replace(part, state=part.state | whole).chunks():
            direction, new = local.update(piece.grad, piece.theta.float(), steering, _wide(piece.state))
            write(piece.state, new, good)
            directions.append(direction)
        return Moving(part, steering, directions, torch.stack([_energy(d) for d in directions]).sum())


def _move(rule: Replicas, moving: Moving, good: Tensor) -> None:
    """The move that was left, when the size of the whole direction is known."""
    part, device = moving.part, moving.directions[0].device
    good, mean_square = good.to(device), (moving.square.to(device) / max(part.shape.numel(), 1)).float().reshape(1)
    for piece, direction in zip(part.chunks(), moving.directions, strict=True):
        with full_precision(device):
            delta = rule.on(device).finish(direction, mean_square, moving.steering, _wide(piece.state))
        part.move(piece.theta, delta, good, piece.state)
    part.finish(good)


def _energy(direction: Tensor) -> Tensor:
    """Σd², () float64."""
    norm: Tensor = torch.linalg.vector_norm(direction, dtype=torch.float64)
    return norm.square()


def _wide(state: State) -> State:
    return {key: value.float() for key, value in state.items()}


def _steer(
    rule: Replicas, parts: list[Part], sums: Tensor, loss: Tensor, context_state: State, good: Tensor
) -> list[Tensor]:
    """What each part is steered by, (1, c); the states of the model and of tensors are written."""
    shapes = describe([part.shape for part in parts], loss.device) if rule.rule.per_tensor else None
    states = {key: torch.stack([part.own[key].to(loss.device) for part in parts]) for key in parts[0].own}
    steering, new = rule.on(loss.device).steer(sums, shapes, loss, context_state | states)
    # Of what has no gradient on any rank nothing changes; the first sum of rules with states of tensors is a count.
    shared = bool(states) and any(part.groups for part in parts)
    write_contexts(context_state, parts, new, good, sums[:, 0] > 0 if shared else None)
    return list(steering.expand(len(parts), -1).split(1))


def write_contexts(
    context_state: State, parts: list[Part], new: State, good: Tensor, present: Tensor | None = None
) -> None:
    """Overwrite the context's state and, where `present` (parts,), those of tensors, which are rows of `new`."""
    write(context_state, {key: new[key] for key in context_state}, good)
    for key in parts[0].own:
        states = [part.own[key] for part in parts]
        old = torch.stack([state.to(good.device) for state in states])
        there = good if present is None else (good & present).view(-1, *[1] * (old.dim() - 1))
        torch._foreach_copy_(states, list(torch.where(there, new[key].to(good.device), old)))


def write(state: State, new: State, good: Tensor) -> None:
    """Overwrite tensors if the step is good; the step count is advanced once per parameter, in `Part.finish`."""
    for key, value in new.items():
        if key != "step":
            state[key].copy_(torch.where(good, value.to(good.device), state[key]))
