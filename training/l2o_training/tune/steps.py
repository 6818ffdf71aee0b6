"""Steps of torch's optimizers as pure functions, and how hyper-parameters change where they lead: forward mode.

A formula takes vectors, θ, the gradient g and the slots of the optimizer's state, and gives θ and slots after the step.
Its Jacobian-vector product carries tangents dθ/dλ along (Franceschi et al. 2017, "Forward and Reverse Gradient-Based
Hyperparameter Optimization", eq. 14).
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.optim import SGD, Adam, AdamW, Optimizer

from l2o_runtime.config import nearest, require

Values = dict[str, Tensor]
Formula = Callable[[Tensor, Tensor, list[Tensor], Values, int, Mapping[str, Any]], tuple[Tensor, list[Tensor]]]


def sgd(
    params: Tensor, grad: Tensor, slots: list[Tensor], values: Values, number: int, group: Mapping[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """b ← m b + (1 − dampening)(g + w θ); θ ← θ − lr b. The first step has b = g + w θ, Nesterov's adds m b to it.

    Args:
        params, grad: (n,).
        slots: the momentum buffer b (n,).
        values: lr, momentum m, weight_decay w, each a number.
        number: 1 for the first step.
        group: other settings of the optimizer.
    """
    momentum = values["momentum"]
    grad = grad + values["weight_decay"] * params
    plain = number == 1 or group["momentum"] == 0
    buffer = grad if plain else momentum * slots[0] + (1 - group["dampening"]) * grad
    direction = grad + momentum * buffer if group["nesterov"] else buffer
    return params - values["lr"] * direction, [buffer]


def adam(
    params: Tensor, grad: Tensor, slots: list[Tensor], values: Values, number: int, group: Mapping[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """θ ← θ − lr m̂ / (√v̂ + ε), moments corrected for their start; decay on g, or on θ (AdamW).

    Args:
        params, grad: (n,).
        slots: the moments m and v, (n,) each.
        values: lr, beta1, weight_decay, each a number.
        number: 1 for the first step.
        group: other settings of the optimizer.
    """
    beta1, beta2, decay = values["beta1"], group["betas"][1], values["weight_decay"]
    if group["decoupled_weight_decay"]:
        params = params * (1 - values["lr"] * decay)
    else:
        grad = grad + decay * params
    mean = beta1 * slots[0] + (1 - beta1) * grad
    square = beta2 * slots[1] + (1 - beta2) * grad.square()
    seen = square > 0
    root = torch.where(seen, torch.where(seen, square / (1 - beta2**number), 1.0).sqrt(), 0.0)  # d√0 is 0, not NaN
    return params - values["lr"] * mean / (1 - beta1**number) / (root + group["eps"]), [mean, square]


@dataclass(frozen=True)
class Method:
    """What is known of an optimizer.

    Attributes:
        formula: its step.
        slots: names of its state, of the parameters' shape.
        hyperparameters: what can be tuned.
    """

    formula: Formula
    slots: tuple[str, ...]
    hyperparameters: tuple[str, ...]

    def number(self, state: Mapping[str, Any]) -> int:
        """Of the next step of a parameter; SGD does not count, and has only a first step and others."""
        if "momentum_buffer" in self.slots:
            return 1 if state.get("momentum_buffer") is None else 2
        return int(state["step"]) + 1 if "step" in state else 1


_SGD = Method(sgd, ("momentum_buffer",), ("lr", "momentum", "weight_decay"))
_ADAM = Method(adam, ("exp_avg", "exp_avg_sq"), ("lr", "beta1", "weight_decay"))
METHODS: dict[type[Optimizer], Method] = {SGD: _SGD, Adam: _ADAM, AdamW: _ADAM}


def method_of(optimizer: Any) -> Method:
    """What is known of an optimizer.

    Raises:
        ConfigError: nothing, or it has a setting that formulas leave out.
    """
    name, known = type(optimizer).__name__, ", ".join(kind.__name__ for kind in METHODS)
    require(type(optimizer) in METHODS, f"optimizer: its tangents are known for {known} of torch.optim; got a {name}")
    for setting in ("amsgrad", "maximize"):
        used = any(group.get(setting) for group in optimizer.param_groups)
        require(not used, f"optimizer: {name} with {setting} has no tangents here; leave {setting} out")
    return METHODS[type(optimizer)]


def push(
    formula: Formula,
    primals: tuple[Tensor, Tensor, list[Tensor], Values],
    tangents: tuple[Tensor, Tensor, list[Tensor], Values],
    number: int,
    group: Mapping[str, Any],
) -> list[Tensor]:
    """Tangents after a step, (p, n) each: of θ, then of the slots.

    Args:
        formula: of the step.
        primals: θ (n,), g (n,), slots, values, before the step.
        tangents: theirs, with p rows each.
        number, group: as the formula takes them.
    """
    _begin_forward_mode()
    (params, grad, slots, values), (d_params, d_grad, d_slots, d_values) = primals, tangents
    rows = []
    for row in range(len(d_params)):
        with forward_ad.dual_level():
            kept = [make_dual(slot, along[row]) for slot, along in zip(slots, d_slots, strict=True)]
            turned = {name: make_dual(value, d_values[name][row]) for name, value in values.items()}
            after, kept = formula(
                make_dual(params, d_params[row]), make_dual(grad, d_grad[row]), kept, turned, number, group
            )
            rows.append([unpack_dual(tensor).tangent for tensor in (after, *kept)])
    return [torch.stack(tensors) for tensors in zip(*rows, strict=True)]


@functools.cache
def _begin_forward_mode() -> None:
    """Where forward mode is first used torch scripts formulas, and warns that this is deprecated."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=FutureWarning)
        make_dual(torch.zeros(()), torch.zeros(()))


def read(group: Mapping[str, Any], name: str) -> float:
    """A hyper-parameter of a group; beta1 is the first of `betas`."""
    return float(group["betas"][0] if name == "beta1" else group[name])


def write(group: dict[str, Any], name: str, value: float) -> None:
    """Set a hyper-parameter of a group."""
    if name == "beta1":
        group["betas"] = (value, group["betas"][1])
    elif isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


def shares(name: str) -> bool:
    """Whether a hyper-parameter is a share, in 0 … 1, and moves as a logit; others are positive, and move as logs."""
    return name in ("momentum", "beta1")


def moved(name: str, value: float, step: float) -> float:
    """Where a hyper-parameter is after a step of its logarithm or logit.

    >>> round(moved("lr", 0.1, math.log(2)), 6), round(moved("momentum", 0.5, math.log(9)), 6)
    (0.2, 0.9)
    """
    return 1 / (1 + (1 - value) / value * math.exp(-step)) if shares(name) else value * math.exp(step)


def slope(name: str, value: float) -> float:
    """How a hyper-parameter changes with its logarithm or logit."""
    return value * (1 - value) if shares(name) else value


def require_tunable(method: Method, group: Mapping[str, Any], name: str) -> None:
    """Can a hyper-parameter be tuned from where it is?

    Raises:
        ConfigError: the optimizer has none of this name, or it is at a bound, which it would never leave.
    """
    known = list(method.hyperparameters)
    require(name in known, f"hyperparameters: this optimizer has no {name!r} to tune: {nearest(str(name), known)}")
    value, most = read(group, name), "1" if shares(name) else "infinity"
    require(0 < value < float(most), f"hyperparameters: {name} is tuned from between 0 and {most} on, it is {value:g}")
