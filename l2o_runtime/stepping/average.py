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


def accumulate(params: Collection[Tensor], states: States, step: Tensor) -> None:
    """θ̄ ← θ̄ + (θ − θ̄) / (1 + a (t − 1)), in place, of all parameters that have been stepped.

    Args:
        params: of an optimizer.
        states: by parameter.
        step: () t, the number of steps so far; nothing changes where it is 0.

    Source: Shamir & Zhang 2013, polynomial-decay averaging.
    """
    for param in params:
        state = states.get(param, {})
        if "step" not in state:
            continue
        now = local(param).detach()
        mean = local(state.setdefault(KEY, param.detach().clone(memory_format=torch.preserve_format)))
        share = (step > 0) / (1 + SPAN * (step - 1).clamp_min(0))
        mean.copy_(torch.lerp(mean.float(), now.float(), share.to(now.device, torch.float32)))


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
