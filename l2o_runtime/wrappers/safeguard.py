"""The safeguard: Adam is the incumbent, another optimizer has to prove itself.

`Safeguard` goes around any torch optimizer; `LearnedOptimizer(..., safeguard="adam")` is the same guard inside one. The
`referee` decides by the losses alone whose step is taken, the `guard` does what it says.
"""

import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from l2o_runtime.state import StateSpec
from l2o_runtime.stepping.distributed import check_process_group
from l2o_runtime.stepping.losses import Loss
from l2o_runtime.stepping.whole import listed, share, whole
from l2o_runtime.wrappers.base import (
    States,
    Wrapper,
    joint_state_dict,
    load_joint_state_dict,
    no_states,
    require_optimizer,
)
from l2o_runtime.wrappers.guard import STATE, Guard, Guarded


class Safeguard(Wrapper):
    """Take Adam's steps until the optimizer inside has shown that it does better, and again once it does not.

    Groups and hooks of the state dict are those of the optimizer inside. Each group gets an entry
    `safeguard_lr`, unless it has one: Adam's learning rate is lr · safeguard_lr, so that schedules act on whoever
    steps. A step of the optimizer inside is cut, in every coordinate, to `REACH` times that.

    What an optimizer inside knew is forgotten when it is tried again; a torch optimizer has its `step()` called,
    without a closure. Nobody takes a step whose loss, gradients or parameters are not all finite.

    Args:
        optimizer: the one inside; it must not be stepped by itself any more.
        lr: of Adam, at the present learning rates of the groups, from which schedules go on; for a
            `LearnedOptimizer`, whose lr is a factor, at lr = 1.
        process_group: the ranks that step together, as in `LearnedOptimizer`.

    Raises:
        TypeError: what is inside is no optimizer.
        ValueError: it is guarded already, or its steps need the loss; a learning rate is out of range; or this rank not
            in the group.

    >>> param = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = Safeguard(torch.optim.SGD([param], lr=0.1), lr=0.001)
    >>> param.grad = torch.ones(3)
    >>> optimizer.step(loss=param.sum())
    >>> optimizer.health()["adam_steps"]
    1
    """

    lr: float
    guard: Guard
    inside: Guarded

    def __init__(self, optimizer: Optimizer, lr: float = 1e-3, *, process_group: Any = None):
        require_optimizer(optimizer)
        if isinstance(optimizer, Safeguard) or getattr(optimizer, "guard", None) is not None:
            raise ValueError("optimizer: it has a safeguard already")
        if isinstance(optimizer, Wrapper) and optimizer.needs_loss:
            name = type(optimizer).__name__
            raise ValueError(f"optimizer: steps of {name} need the loss: write {name}(Safeguard(…))")
        if not 0 <= lr < float("inf"):
            raise ValueError(f"lr: expected a finite number, 0 or more, got {lr!r}")
        check_process_group(process_group)
        # What torch makes in `__init__` besides groups and states, which are not ours.
        inside = optimizer if isinstance(optimizer, Guarded) else Torch(optimizer)
        self.__setstate__({"optimizer": optimizer, "inside": inside, "lr": lr, "guard": Guard(process_group)})
        self._set_rates()

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The guard's states, by parameter; with those of a `LearnedOptimizer` inside, which has them in one."""
        return self.inside.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the optimizer inside."""
        super().add_param_group(param_group)
        self._set_rates()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, loss: Loss = None) -> Any:
        """Perform one step.

        Args:
            closure: reevaluates the model and returns the loss.
            loss: the loss of this step; one of both is needed.

        Returns:
            What the closure returned.

        Raises:
            TypeError: the closure cannot be called, or what it returned is no loss.
            ValueError: the loss is missing or more than one number, or it is not known with which ranks this one steps.
        """
        return self.guard.step(self.inside, closure, loss)

    def health(self) -> dict[str, int]:
        """How often a step was taken, by whom, and how often it was skipped for what reason.

        As `LearnedOptimizer.health` with a safeguard.
        """
        return self.guard.health(self.inside)

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer inside, with the guard's states; states of a torch optimizer are named `inside_…`."""
        params = listed(self.param_groups)
        if whole(params, self.state):
            share(params, self.state, self.inside.whole_spec)
        return self.inside.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that `state_dict` gave.

        Raises:
            ValueError: it belongs to another optimizer, or to other parameters.
        """
        self.inside.load_state_dict(state_dict)
        self.guard.left = {}
        self._set_rates()

    def __getstate__(self) -> dict[str, Any]:
        """Groups and states are copied with the optimizer inside."""
        return {"optimizer": self.optimizer, "inside": self.inside, "lr": self.lr, "guard": self.guard}

    def _set_rates(self) -> None:
        """Give groups their `safeguard_lr` where they have none."""
        for group in self.param_groups:
            unit = 1.0 if isinstance(self.optimizer, Guarded) else float(group.get("initial_lr", group["lr"]))
            if "safeguard_lr" not in group and unit == 0:
                raise ValueError("lr of the optimizer inside is 0: safeguard it before schedules change its lr")
            group.setdefault("safeguard_lr", self.lr / unit)


class Torch:
    """A torch optimizer as a guard wants it, whose states lie beside: torch's optimizers stumble over others' states.

    Attributes:
        optimizer: with its own states.
        state: the guard's, by parameter.
    """

    horizon = sys.maxsize
    whole_spec: ClassVar[StateSpec] = {}

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self.state: States = no_states()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer."""
        return self.optimizer.param_groups

    def prepare(self) -> None:
        """Nothing: torch's optimizers make states when they need them."""

    def take(self, loss: Tensor) -> Tensor:
        """A step; torch's optimizers take all."""
        self.optimizer.step()
        return torch.ones_like(loss, dtype=torch.bool)

    def restart(self) -> None:
        """Forget all states."""
        self.optimizer.state.clear()

    def fall(self, group: dict[str, Any]) -> float:
        """Nothing but lr."""
        return 1.0

    def decay(self, group: dict[str, Any]) -> float:
        """As AdamW at Adam's learning rate."""
        return float(group["lr"]) * float(group["safeguard_lr"]) * float(group.get("weight_decay", 0.0))

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with both states in one."""
        return joint_state_dict(self.optimizer, self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The optimizer's as torch does; the guard's as they are, for the referee would not survive torch's casts."""
        load_joint_state_dict(self.optimizer, self.state, state_dict, {"health", *STATE}, "a safeguard")
        share(listed(self.param_groups), self.state, {})
