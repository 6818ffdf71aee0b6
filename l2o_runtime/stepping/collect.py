"""The parts of every step; what does not change between steps is looked at once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from l2o_runtime.state import StateSpec
from l2o_runtime.stepping.checks import check_gradient
from l2o_runtime.stepping.interpolation import LAG, SPEC
from l2o_runtime.stepping.parts import Part, acts, make_part
from l2o_runtime.stepping.whole import States


@dataclass(eq=False)
class Known:
    """A part of an earlier step, and where its tensors lay then.

    Attributes:
        part: without a gradient, which would be kept from being freed.
        start: global index of its first coordinate.
        address: of the parameter, as a number, for a storage may move with all tensors in it.
        states: name, tensor, address and size of each of its states.
    """

    part: Part
    start: int
    address: int
    states: list[tuple[str, Tensor, int, int]]

    def holds(self, group: dict[str, Any], param: Tensor, state: dict[str, Any], start: int, trails: bool) -> bool:
        """Whether nothing is another than it was, but for numbers."""
        part, theta = self.part, self.part.param
        if (
            part.group is not group
            or self.start != start
            or param.data_ptr() != self.address
            or theta.shape != param.shape
            or theta.dtype != param.dtype
            or not param.is_contiguous()
            or (LAG in part.state) != trails
        ):
            return False
        for key, tensor, address, size in self.states:  # a single number that is resized lies elsewhere
            if state.get(key) is not tensor or tensor.data_ptr() != address:
                return False
            if size > 1 and (tensor.numel() != size or not tensor.is_contiguous()):
                return False
        return True


class Collector:
    """Makes the parts of a step.

    Args:
        spec, own: the rule's state per coordinate, and per tensor.
        unit: of weight decay, see `Part`.
    """

    def __init__(self, spec: StateSpec, own: StateSpec, unit: float):
        self.spec, self.own, self.unit = spec, own, unit
        self.known: dict[Tensor, Known] = {}

    def collect(
        self,
        groups: list[dict[str, Any]],
        states: States,
        factor: Callable[[dict[str, Any]], Tensor | float],
        trails: Callable[[dict[str, Any]], bool],
    ) -> Iterator[Part]:
        """Every parameter that has a gradient, here or elsewhere, with its state, which is made on first use.

        Args:
            groups: of an optimizer.
            states: by parameter; what the rule needs is added.
            factor: of the schedule, on a group's lr.
            trails: whether a group's parameters follow steps.

        Raises:
            RuntimeError: a gradient is sparse, or a gradient or a state does not fit its parameter.
        """
        start = 0
        if len(self.known) > sum(len(group["params"]) for group in groups):
            self.known = {}
        for group in groups:
            scale, follows = factor(group), trails(group)
            for param in group["params"]:
                if acts(param):
                    yield self._part(group, param, states[param], start, scale, follows)
                start += param.numel()

    def _part(
        self,
        group: dict[str, Any],
        param: Tensor,
        state: dict[str, Any],
        start: int,
        factor: Tensor | float,
        trails: bool,
    ) -> Part:
        spec = self.spec | SPEC if trails else self.spec
        if torch.compiler.is_compiling():
            part = make_part(group, param, state, spec, self.own, start, self.unit)
            return part.again(part.grad, factor)
        known = self.known.get(param)
        if known is not None and param.grad is not None and known.holds(group, param, state, start, trails):
            check_gradient(param)
            return known.part.again(param.grad.reshape(-1), factor)
        if not trails:
            state.pop(LAG, None)
        part = make_part(group, param, state, spec, self.own, start, self.unit)
        if part.plain and not part.groups and part.param.is_contiguous():
            kept = [(key, state[key]) for key in (*part.state, *part.own)]
            places = [(key, tensor, tensor.data_ptr(), tensor.numel()) for key, tensor in kept]
            known = Known(part.again(part.theta), start, part.param.data_ptr(), places)
            known.part = replace(known.part, origin=known)
            self.known[param] = known
        return part.again(part.grad, factor)

    def forget(self) -> None:
        """Look at everything anew, and keep nothing of what has been replaced."""
        self.known = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies look for themselves."""
        return self.__dict__ | {"known": {}}
