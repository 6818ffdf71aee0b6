"""What wrappers have in common: groups and hooks of the optimizer inside, and one state dict for both."""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from l2o_runtime.config import require
from l2o_runtime.stepping.distributed import is_dtensor
from l2o_runtime.stepping.whole import listed

INSIDE = "inside_"
"""Prefix of the states of an optimizer inside in a state dict: a wrapper has some of the same name."""

HOOKS = ("state_dict_pre_hooks", "state_dict_post_hooks")

States = dict[Tensor, dict[str, Any]]
"""What a wrapper keeps, by parameter."""


class Wrapper(Optimizer):
    """An optimizer around another, which must not be stepped by itself any more.

    Groups and hooks of the state dict are those of the optimizer inside. What the wrapper keeps lies beside the states
    of that one: torch's optimizers stumble over others' states.

    Attributes:
        optimizer: the one inside.
        needs_loss: whether its steps need the loss.
    """

    optimizer: Optimizer
    needs_loss: ClassVar[bool] = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of the optimizer inside."""
        return self.optimizer.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the optimizer inside."""
        self.optimizer.add_param_group(param_group)

    def __repr__(self) -> str:
        """What is inside, with its groups."""
        return f"{type(self).__name__} around {self.optimizer!r}"

    def __getstate__(self) -> dict[str, Any]:
        """Groups are copied with the optimizer inside; all else is what the wrapper says."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make what torch's methods need, and share the hooks of the state dict with the optimizer inside."""
        optimizer = state["optimizer"]
        hooks = {key: value for key, value in vars(optimizer).items() if key.endswith(HOOKS)}
        super().__setstate__(state | hooks | {"defaults": dict(optimizer.defaults)})


def require_optimizer(optimizer: Any, name: str = "optimizer") -> None:
    """Is something an optimizer that takes steps without a closure?

    Raises:
        TypeError: it is none, or its `step` needs a closure.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{name}: expected a torch.optim.Optimizer, got a {type(optimizer).__name__}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{name}: {type(optimizer).__name__} calls the closure itself, which a wrapper has called already"
        )


def take_step(optimizer: Optimizer, loss: Any) -> None:
    """A step of an optimizer that has its gradients, with the loss if it takes one, as learned rules do."""
    if "loss" in inspect.signature(optimizer.step).parameters:
        optimizer.step(loss=loss)  # type: ignore[call-overload]
    else:
        optimizer.step()


def joint_state_dict(optimizer: Optimizer, own: Mapping[Tensor, dict[str, Any]]) -> dict[str, Any]:
    """The state dict of an optimizer, whose states are named `inside_…`, with those of a wrapper among them."""
    saved = optimizer.state_dict()
    for index, param in _numbered(optimizer, saved):
        inside = {INSIDE + key: value for key, value in saved["state"].get(index, {}).items()}
        if inside or param in own:
            saved["state"][index] = inside | own.get(param, {})
    return saved


def load_joint_state_dict(
    optimizer: Optimizer, own: States, state_dict: dict[str, Any], known: Collection[str], what: str
) -> None:
    """Load what `joint_state_dict` gave: the optimizer's states as it does, the wrapper's as they are.

    Args:
        optimizer: the one inside.
        own: the wrapper's states, written.
        state_dict: what is loaded; nothing is shared with it.
        known: names of the wrapper's states.
        what: the wrapper, in words.

    Raises:
        ValueError: it has others, or parameters are of other numbers.
    """
    theirs, inside = {}, {}
    for index, state in state_dict["state"].items():
        theirs[index] = {key: value for key, value in state.items() if not key.startswith(INSIDE)}
        kept = {key.removeprefix(INSIDE): value for key, value in state.items() if key.startswith(INSIDE)}
        if kept:
            inside[index] = copy.deepcopy(kept)  # torch may keep the very tensors that it is given
        if unknown := theirs[index].keys() - set(known):
            names = ", ".join(sorted(unknown))
            raise ValueError(f"unknown state {names}: it was saved with another optimizer, or without {what}")
    optimizer.load_state_dict(state_dict | {"state": inside})
    own.clear()
    for index, param in _numbered(optimizer, state_dict):
        for key, value in theirs.get(index, {}).items():
            own[param][key] = value.to(param.device if value.dim() else value.device, copy=True)


def _numbered(optimizer: Optimizer, saved: dict[str, Any]) -> Iterator[tuple[int, Tensor]]:
    """The parameters with their numbers in a state dict."""
    numbers = chain.from_iterable(group["params"] for group in saved["param_groups"])
    return zip(numbers, listed(optimizer.param_groups), strict=True)


def beside_all(params: Collection[Tensor], own: States, key: str, fresh: Callable[[], Tensor]) -> Tensor:
    """The one tensor of the whole optimization that lies beside every parameter under a name; `fresh` where it is new.

    It survives whichever parameter's state is left out of a checkpoint.
    """
    found = next((own[param][key] for param in params if key in own.get(param, {})), None)
    found = fresh() if found is None else found
    for param in params:
        own[param][key] = found
    return found


def no_states() -> States:
    """Where a wrapper's states go."""
    return defaultdict(dict)


def require_whole(low: int, high: int, **values: int) -> None:
    """Refuse arguments that are no whole numbers in low..high, by their names.

    Raises:
        ConfigError: one is not.
    """
    for name, value in values.items():
        fits = type(value) is int and low <= value <= high
        require(fits, f"{name}: expected a whole number in {low}..{high}, got {value!r}")


def require_plain(params: Collection[Tensor], what: str) -> None:
    """Refuse parameters that lie on several ranks, or are complex.

    Raises:
        ValueError: some are.
    """
    if any(is_dtensor(param) for param in params):
        raise ValueError(f"{what} takes plain parameters: these are DTensors (FSDP2, tensor parallelism)")
    require_real(params, what)


def require_real(params: Collection[Tensor], what: str) -> None:
    """Refuse parameters that are complex.

    Raises:
        ValueError: some are.
    """
    if any(torch.is_complex(param) for param in params):
        raise ValueError(f"{what} takes real parameters: optimize torch.view_as_real(param) instead")
