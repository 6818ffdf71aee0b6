"""What belongs to the whole optimization: context, counters, referee. The same tensors lie beside every state.

So they survive whichever parameter's state is left out of a checkpoint.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from l2o_runtime.state import CONTEXT, State, StateSpec, zeros
from l2o_runtime.stepping.engine import REASONS

HEALTH = ("steps", *REASONS)
"""What is counted, in the order of the state `health`."""

SPEC: StateSpec = {"health": ((len(HEALTH),), torch.int64)}

States = Mapping[Tensor, dict[str, Any]]
"""An optimizer's `state`."""


def listed(param_groups: list[dict[str, Any]]) -> list[Tensor]:
    """All parameters of an optimizer."""
    return [param for group in param_groups for param in group["params"]]


def whole(params: Collection[Tensor], states: States) -> State:
    """What belongs to the whole optimization, by the first parameter that has it; empty before the first step."""
    state = _first(params, states)
    return {k: value for k, value in state.items() if k in ("health", "safeguard") or k.startswith(CONTEXT)}


def taken(params: Collection[Tensor], states: States) -> Tensor:
    """() the number of steps that were taken."""
    state = _first(params, states)
    return state["health"][0] if state else torch.zeros((), dtype=torch.int64, device="cpu")


def _first(params: Collection[Tensor], states: States) -> dict[str, Any]:
    """The first state that has what belongs to the whole optimization."""
    for param in params:
        state = states.get(param)
        if state is not None and "health" in state:
            return state
    return {}


def share(params: Collection[Tensor], states: States, spec: StateSpec, fresh: State | None = None) -> State:
    """Put what belongs to the whole optimization beside every state.

    Args:
        params: all of an optimizer's, at least one.
        states: of the parameters; those that are empty stay empty.
        spec: what is made of zeros where it is missing, besides the counters.
        fresh: what else takes the place of what is missing.

    Returns:
        All of it.
    """
    found = whole(params, states)
    missing = {key: kind for key, kind in (SPEC | spec).items() if key not in found}
    found = (fresh or {}) | zeros(missing, (), next(iter(params)).device) | found
    for param in params:
        state = states.get(param, {})
        if state:
            state.update(found)
    return found


def counters(found: State) -> dict[str, int]:
    """The counters by their names, from what `whole` gives."""
    numbers = found["health"].tolist() if found else [0] * len(HEALTH)
    return dict(zip(HEALTH, numbers, strict=True))


def saved_states(params: Collection[Tensor], saved: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
    """The states of a state dict, by parameter; torch reports a wrong number of them."""
    indices = chain.from_iterable(group["params"] for group in saved["param_groups"])
    return {param: saved["state"].get(index, {}).copy() for index, param in zip(indices, params, strict=False)}


@contextmanager
def around_load(optimizer: Optimizer, before: Any, after: Any) -> Iterator[None]:
    """Within it `load_state_dict` calls `before` as the last of its pre-hooks, `after` as the first of its post-hooks.

    The one sees what other hooks made of the argument, before anything is changed; the other has torch's casts to undo.
    """
    hooks = (
        optimizer.register_load_state_dict_pre_hook(before),
        optimizer.register_load_state_dict_post_hook(after, prepend=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
