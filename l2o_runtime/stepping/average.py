"""The mean of the latest parameters, which there is less noise in than in the last ones."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from l2o_runtime.stepping.distributed import local
from l2o_runtime.stepping.whole import States

KEY = "averaged"
"""Its name among the states of a parameter."""

SPAN = 0.1
"""a: the mean is over about the last 1 / (1 + 1/a) of all steps."""


def accumulate(params: Collection[Tensor], states: States, before: Tensor, step: Tensor) -> None:
    """θ̄ ← θ̄ + (θ − θ̄) / (1 + a (t − 1)), in place, of all parameters that have been stepped.

    Means are at least float32: in half precision a late step, which changes them by little, would change nothing.

    Args:
        params: of an optimizer.
        states: by parameter.
        before: () the number of steps before this one; nothing changes where it was not taken.
        step: () t, the number of steps so far.

    Source: Shamir & Zhang 2013, polynomial-decay averaging.
    """
    for param in params:
        state = states.get(param, {})
        if "step" not in state:
            continue
        if KEY not in state:
            first = param.detach().to(torch.promote_types(param.dtype, torch.float32), copy=True)
            state[KEY] = first.nan_to_num_(0.0, 0.0, 0.0)  # weights of zero do not undo what is not finite
        mean = local(state[KEY])
        taken = step > before.to(step.device)
        share = taken / (1 + SPAN * (step - 1).clamp_min(0))
        theta = torch.where(taken.to(mean.device), local(param).detach().to(mean.dtype), mean)
        mean.lerp_(theta, share.to(mean.device, mean.dtype))


@contextmanager
def swapped(params: Collection[Tensor], states: States) -> Iterator[None]:
    """Within it parameters are their means; after it they are what they were."""
    pairs = [(param, states[param][KEY]) for param in params if KEY in states.get(param, {})]
    kept = [local(param).detach().clone() for param, _ in pairs]
    with torch.no_grad():
        for param, mean in pairs:
            local(param).copy_(local(mean))
    try:
        yield
    finally:
        with torch.no_grad():
            for (param, _), before in zip(pairs, kept, strict=True):
                local(param).copy_(before)
