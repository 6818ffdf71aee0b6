"""What an optimizer's step works on: flat views of parameters, gradients and states, in chunks."""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from l2o_runtime.rules.restraint import ADAM_LR
from l2o_runtime.state import State, StateSpec
from l2o_runtime.stepping.checks import check_gradient, check_states
from l2o_runtime.stepping.distributed import Groups, first_index, local, shard_groups, zeros_beside
from l2o_runtime.stepping.interpolation import LAG, Weights, followed, resting, weights

CHUNK = 16384
"""Coordinates advanced at a time: bounds the memory of the LSTM's gates (about 1 kB per coordinate)."""

DEVICE_CHUNK = 2**20
"""The same on other devices, whose memory is larger, and for which a hundred operators on few numbers take longest."""

STATE_DTYPES = (torch.float32, torch.bfloat16)
"""What the network's memory may be kept in between steps; it is computed with in float32."""

NARROW = ("h", "c", "m")
"""States per coordinate, but for the number of the layer, that may be kept in less than float32."""


@dataclass(frozen=True)
class Chunk:
    """Some coordinates of a parameter.

    Attributes:
        theta: (n,) view of the parameter, to be written in place.
        grad: (n,) float32, the direction to go down.
        state: the rule's state, views (n, …); `step` (1,).
        offset: global index of the first coordinate, or (n,) global minus local index of each.
    """

    theta: Tensor
    grad: Tensor
    state: State
    offset: int | Tensor


@dataclass(frozen=True)
class Part:
    """This rank's part of one parameter in one step.

    Attributes:
        group: the parameter group.
        param: the parameter's part, in its own shape.
        theta: (n,) the same flat: a view, or a copy if `param` is not contiguous.
        grad: (n,) its gradient.
        state: the rule's state, views (n, …); `step` (1,). With `LAG` among it the parameter follows steps.
        own: the rule's state of the parameter as a whole.
        shape: of the whole parameter.
        offset: global index of the first coordinate, or an offset (n,) per coordinate.
        groups: the process groups over which the parameter is split.
        factor: of the schedule, on lr.
        unit: the part of itself that a parameter loses in a step of lr = 1 and weight decay 1.
        plain: whether kernels may have it, if its gradient is a plain tensor too: plain tensors on one device, states
            contiguous and in one of `STATE_DTYPES`.
        origin: parts of two steps with the same one are at the same place; None says nothing.
    """

    group: dict[str, Any]
    param: Tensor
    theta: Tensor
    grad: Tensor
    state: State
    own: State
    shape: torch.Size
    offset: int | Tensor
    groups: Groups
    factor: Tensor | float = 1.0
    unit: float = ADAM_LR
    plain: bool = False
    origin: object = None

    def again(self, grad: Tensor, factor: Tensor | float = 1.0) -> "Part":
        """The same in another step. `dataclasses.replace` takes as long as all that is checked in every step."""
        part = object.__new__(Part)
        part.__dict__.update(self.__dict__, grad=grad, factor=factor)
        return part

    @property
    def lr(self) -> Tensor | float:
        """What Δ is multiplied by: the group's lr times the schedule's factor."""
        lr: Tensor | float = self.group["lr"]
        lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
        if isinstance(self.factor, Tensor):
            return lr * self.factor.to(self.param.device)
        # In float64, as the same number would be.
        return lr.double() * self.factor if isinstance(lr, Tensor) and self.factor != 1 else lr * self.factor

    @property
    def trail(self) -> Weights:
        """Of the interpolation, in the next step."""
        return resting(weights(self.state["step"].to(self.param.device) + 1), self.lr)

    @property
    def decay(self) -> Tensor | float:
        """The part of itself that a parameter loses in a step of lr = 1."""
        decay: Tensor | float = self.unit * self.group["weight_decay"]
        return decay

    def chunks(self) -> Iterator[Chunk]:
        """Pieces of at most `CHUNK` coordinates; at least one, for a rank's part may be empty."""
        size = CHUNK if self.theta.device.type == "cpu" else DEVICE_CHUNK
        if len(self.theta) <= size:
            yield self._chunk(self.theta, self.grad, self.state, self.offset)
            return
        for start in range(0, len(self.theta), size):
            piece = slice(start, start + size)
            offset = start + (self.offset[piece] if isinstance(self.offset, Tensor) else self.offset)
            yield self._chunk(self.theta[piece], self.grad[piece], rows(self.state, piece), offset)

    def _chunk(self, theta: Tensor, grad: Tensor, state: State, offset: int | Tensor) -> Chunk:
        return Chunk(theta, self._downhill(grad), state, offset)

    @property
    def gradient(self) -> Tensor:
        """(n,) float32, the direction to go down."""
        return self._downhill(self.grad)

    def _downhill(self, grad: Tensor) -> Tensor:
        return -grad.float() if self.group["maximize"] else grad.float()

    def move(self, theta: Tensor, delta: Tensor, good: Tensor, state: State) -> None:
        """θ ← θ · (1 − unit · lr · weight_decay) + lr · Δ, in place, if the step is good; or behind this, if it trails.

        Args:
            theta: (n,) a chunk of this part.
            delta: (n,) float32.
            good: () bool.
            state: of the chunk.
        """
        lr, decay = self.lr, self.decay
        if LAG in state:
            wide = torch.promote_types(theta.dtype, torch.float32)
            step = delta.to(wide) * lr - (theta.to(wide) * (lr * decay) if decay else 0.0)
            new = followed(theta, step, state[LAG], self.trail)
            for old, value in zip((theta, state[LAG]), new, strict=True):
                old.copy_(torch.where(good, value, old))
            return
        if decay:
            theta.mul_(1 - good.double() * (lr * decay))
        delta = delta.to(torch.promote_types(theta.dtype, torch.float32))  # half precision is rounded once, at the end
        theta.add_(torch.where(good, delta * lr, 0.0))

    def finish(self, good: Tensor) -> None:
        """Count the step, and write back what was computed on a copy."""
        self.state["step"].add_(good)
        self.write_back()

    def write_back(self) -> None:
        """Put parameters where they belong, if the flat ones are a copy."""
        if not self.param.is_contiguous():
            self.param.copy_(self.theta.view(self.param.shape))


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off; where it is off already, to say so again would take longer than a small product."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def rows(state: State, piece: slice) -> State:
    """The state of some coordinates; a scalar (the step count) belongs to all of them."""
    return {key: value if key == "step" else value[piece] for key, value in state.items()}


def kept_in(dtype: torch.dtype, spec: StateSpec) -> StateSpec:
    """A rule's state per coordinate as an optimizer keeps it: `NARROW` in `dtype`, the rest as in `spec`.

    >>> kept_in(torch.bfloat16, {"h0": ((20,), torch.float32), "v": ((), torch.float32)})
    {'h0': ((20,), torch.bfloat16), 'v': ((), torch.float32)}
    """
    return {key: (shape, dtype if key.rstrip("0123456789") in NARROW else own) for key, (shape, own) in spec.items()}


def awaited(param: Tensor) -> bool:
    """Whether other ranks, which hold the rest of a parameter, may wait for this one though it has no gradient."""
    return param.requires_grad and bool(shard_groups(param))


def acts(param: Tensor) -> bool:
    """Whether a parameter takes part in a step: it has coordinates, and a gradient, here or elsewhere."""
    return (param.grad is not None or awaited(param)) and param.numel() > 0


def make_part(
    group: dict[str, Any],
    param: Tensor,
    state: dict[str, Any],
    spec: StateSpec,
    own: StateSpec,
    start: int,
    unit: float = ADAM_LR,
) -> Part:
    """Look at a parameter that has a gradient, or is `awaited`: then it is a part without coordinates.

    Args:
        group: its parameter group.
        param: plain or DTensor.
        state: its optimizer state; what `spec` and `own` ask for is added where it is missing.
        spec, own: the rule's state per coordinate, and per tensor.
        start: global index of the parameter's first coordinate.
        unit: of weight decay, see `Part`.

    Raises:
        RuntimeError: the gradient is sparse, or gradient or states do not fit the parameter.
    """
    spec = {"step": ((), torch.float32)} | spec
    for key, (shape, dtype) in spec.items():
        if key not in state:
            here = torch.zeros((), dtype=dtype, device=param.device)
            state[key] = here if key == "step" else zeros_beside(param, shape, dtype)
    for key, (shape, dtype) in own.items():
        if key not in state:
            state[key] = torch.zeros(shape, dtype=dtype, device=param.device)
    part = local(param).detach()
    check_gradient(param)
    check_states(param, part, state, spec, own)
    views = {key: local(state[key]).view(-1, *shape) for key, (shape, _) in spec.items()}
    whole = Part(
        group=group,
        param=part,
        theta=part.reshape(-1),
        grad=(part if param.grad is None else local(param.grad, like=param)).reshape(-1),
        state=views,
        own={key: state[key] for key in own},
        shape=param.shape,
        offset=start + first_index(param),
        groups=shard_groups(param),
        unit=unit,
        plain=_plain(part, views, [state[key] for key in own]),
    )
    return _without_coordinates(whole) if param.grad is None else whole


def _plain(part: Tensor, views: State, own: Collection[Tensor]) -> bool:
    """Whether kernels may have a part, by what does not change; they read by address, so all has to lie there."""
    tensors = [part, *views.values(), *own]
    return (
        not torch.compiler.is_compiling()
        and all(type(kept) is Tensor and kept.device == part.device and not kept.is_neg() for kept in tensors)
        and all(kept.dtype in STATE_DTYPES and kept.is_contiguous() for kept in views.values())
        and (LAG not in views or views[LAG].dtype == torch.float32)
    )


def _without_coordinates(part: Part) -> Part:
    """Nothing of a part: it adds zeros to the sums, and its coordinates, with their step count, stay what they are."""
    none = slice(0)
    offset = part.offset[none] if isinstance(part.offset, Tensor) else part.offset
    state = rows(part.state, none) | {"step": part.state["step"].clone()}
    return replace(
        part, param=part.theta[none], theta=part.theta[none], grad=part.grad[none], state=state, offset=offset
    )
