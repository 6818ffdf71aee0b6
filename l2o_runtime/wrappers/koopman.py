"""Koopman acceleration: from time to time jump to where the last steps lead, if the loss is lower there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from l2o_runtime.stepping.distributed import Groups, local, shard_groups, sum_over, zeros_beside
from l2o_runtime.stepping.losses import Loss, evaluate
from l2o_runtime.stepping.whole import listed
from l2o_runtime.wrappers.base import (
    Wrapper,
    beside_all,
    joint_state_dict,
    load_joint_state_dict,
    no_states,
    require_optimizer,
    require_real,
    require_whole,
    take_step,
)
from l2o_runtime.wrappers.extrapolation import combine, resting_weights, step_gram
from l2o_runtime.wrappers.pace import LONGEST, RECENT, RIDGES, ROUND, Pace, below_trend

STATE = ("koopman", "koopman_losses", "snapshots", "returns_to")


class KoopmanAccelerated(Wrapper):
    """Follow the slow modes of an optimization to their end.

    The last snapshots of the parameters are taken for a linear recurrence, as those of an optimizer near a minimum
    are. Where that comes to rest is an affine combination of them (`extrapolation`). Every so many steps the
    parameters jump there. If the loss is lower there the optimizer inside goes on from there, with all it knows; else
    everything is as it was, to the bit, and the next jump is a shorter one.

    With a closure both losses are of the same minibatch, and a try costs one more evaluation. Without one pass the
    loss, `step(loss=loss)`: the jump is made after a step, and judged by the loss of the next minibatch, which has to
    be below the trend of the last ones by twice their deviation. If it is not, that minibatch is lost. So **between
    two steps the parameters may be on trial**: call `settle()` before they are evaluated or saved for good.

    Memory: `window` + 2 copies of the parameters, and during a try with a closure one of the gradients. Under DDP and
    FSDP2 all ranks have to pass the same loss, so all-reduce it first. Of DTensors each rank keeps its own shards, and
    ranks exchange the inner products of steps, m² numbers, in a try.

    Args:
        optimizer: the one inside, any but those that call the closure themselves (LBFGS).
        window: m, differences of snapshots that an extrapolation is made of.
        every: steps between tries; more after failures.
        stride: steps between snapshots.

    Raises:
        TypeError: what is inside is no such optimizer.
        ConfigError: a number is out of range.
        ValueError: parameters are complex.

    >>> x = torch.nn.Parameter(torch.ones(2))
    >>> curvature = torch.tensor([1.0, 0.01])
    >>> optimizer = KoopmanAccelerated(torch.optim.SGD([x], lr=0.5), window=4, every=5, stride=1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (curvature * x.square()).sum()
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(8):
    ...     loss = optimizer.step(closure)
    >>> optimizer.health()["jumps"], bool(loss < 1e-6)
    (1, True)
    """

    def __init__(self, optimizer: Optimizer, window: int = 10, every: int = 40, stride: int = 4):
        require_optimizer(optimizer)
        require_whole(2, 64, window=window)
        require_whole(1, 10**6, every=every)
        require_whole(1, 10**4, stride=stride)
        require_real(listed(optimizer.param_groups), type(self).__name__)
        own = {"window": window, "every": every, "stride": stride}
        self.__setstate__({"optimizer": optimizer, "state": no_states(), **own})

    needs_loss = True
    window: int
    every: int
    stride: int
    state: Any

    _lent = False
    """Parameters are lent to `averaged` at present; those of copies that were made meanwhile stay what they are."""

    _step_supports_amp_scaling = True
    """GradScaler calls `step` even where gradients have overflowed."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the optimizer inside; the window begins anew. A jump on trial is undone."""
        self.settle()
        super().add_param_group(param_group)
        require_real(self.param_groups[-1]["params"], type(self).__name__)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Loss = None) -> Any:
        """Perform one step.

        Args:
            closure: reevaluates the model and returns the loss.
            loss: the loss of this step; one of both is needed.

        Returns:
            What the closure returned; after a jump, where it jumped to.

        Raises:
            ValueError: there is no loss, or more than one number.
            RuntimeError: within `averaged`.
        """
        if self._lent:
            raise RuntimeError("step() within averaged(): parameters are lent there; leave the context first")
        if self._overflowed():
            self.settle()
            return None
        pace = self._pace()
        if closure is not None and pace.pending:  # the script has changed over
            self.settle()
            pace = self._pace()
        returned, loss = evaluate(closure, loss)
        if loss is None and not any(param.grad is not None and local(param.grad).any() for param in self._followed()):
            take_step(self.optimizer, None)  # as tools do that want states to be made
            return returned
        value = self._number(loss)
        if not pace.kept:
            self._keep(pace)
        if pace.pending:
            good = below_trend(self._losses().tolist(), value)
            pace.judged(good)
            self._begin(pace) if good else self._swap_back()
            self._set(pace)
            if not good:
                return returned  # its gradients are of where we no longer are
        elif closure is not None and self._due(pace):
            returned, loss = self._try(pace, closure, returned, loss)
        take_step(self.optimizer, loss)
        self._note(value)
        pace.since, pace.waited = pace.since + 1, pace.waited + 1
        if pace.since >= self.stride:
            self._keep(pace)
        if closure is None and self._due(pace):
            self._jump(pace)
            pace.pending = True
        self._set(pace)
        return returned

    @torch.no_grad()
    def settle(self) -> None:
        """Take back a jump that has not been judged, so that parameters are what steps made of them."""
        pace = self._pace()
        if pace.pending:
            self._swap_back()
            pace.pending, pace.waited = False, 0
            self._set(pace)

    @contextmanager
    def averaged(self, ridge: float = RIDGES[1]) -> Iterator[None]:
        """Within it parameters are where the window comes to rest, for evaluation; after it they are what they were.

        Where noise hides all trends that is close to the window's mean. Before the window is full nothing changes.

        Args:
            ridge: a larger one is closer to the mean.

        Raises:
            RuntimeError: this is within another such context.
        """
        if self._lent:
            raise RuntimeError("averaged() within averaged(): parameters are lent already")
        params = self._followed()
        before = [local(param).detach().clone() for param in params]
        self._lent = True
        try:
            with torch.no_grad():
                if self._full(self._pace()):
                    self._go(ridge)
            yield
        finally:
            self._lent = False
            with torch.no_grad():
                for param, kept in zip(params, before, strict=True):
                    local(param).copy_(kept)

    def health(self) -> dict[str, int]:
        """How many jumps were tried, and how many of them lowered the loss and stayed."""
        pace = self._pace()
        return {"tries": pace.tries, "jumps": pace.jumps}

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer inside, whose states are named `inside_…`, with the snapshots among them."""
        return joint_state_dict(self.optimizer, self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that `state_dict` gave.

        Raises:
            ValueError: it belongs to another optimizer, to other parameters, or to another window.
        """
        for state in state_dict["state"].values():
            size = len(state.get("snapshots", ())) or self.window + 1
            if size != self.window + 1:
                raise ValueError(f"window: the state has one of {size - 1}, this optimizer of {self.window}")
        load_joint_state_dict(self.optimizer, self.state, state_dict, STATE, "Koopman acceleration")

    def __getstate__(self) -> dict[str, Any]:
        """Groups are copied with the optimizer inside."""
        return {key: getattr(self, key) for key in ("optimizer", "state", "window", "every", "stride")}

    def _followed(self) -> list[Tensor]:
        """Parameters that may move."""
        return [param for param in listed(self.param_groups) if param.requires_grad and param.numel()]

    def _pace(self) -> Pace:
        """Where we are; the window begins anew where parameters have joined."""
        params = self._followed()
        pace = Pace.from_tensor(beside_all(params, self.state, "koopman", lambda: Pace().to_tensor()))
        if any("snapshots" not in self.state[param] for param in params):
            pace.kept = pace.since = 0
        return pace

    def _set(self, pace: Pace) -> None:
        beside_all(self._followed(), self.state, "koopman", lambda: Pace().to_tensor()).copy_(pace.to_tensor())

    def _full(self, pace: Pace) -> bool:
        return pace.kept > self.window

    def _due(self, pace: Pace) -> bool:
        wait = self.every * min(2 ** (pace.failures // ROUND), LONGEST)
        return self._full(pace) and pace.waited >= wait

    def _keep(self, pace: Pace) -> None:
        """Take a snapshot, in place of the oldest."""
        for param in self._followed():
            state = self.state[param]
            if "snapshots" not in state:
                state["snapshots"] = zeros_beside(param, (), param.dtype, leading=(self.window + 1,))
            local(state["snapshots"])[pace.kept % (self.window + 1)].copy_(local(param))
        pace.kept, pace.since = pace.kept + 1, 0

    def _begin(self, pace: Pace) -> None:
        """Begin the window anew, here: a recurrence does not hold across a jump."""
        pace.kept = 0
        self._keep(pace)

    def _go(self, ridge: float) -> None:
        """Go where the window, which is full, comes to rest."""
        oldest, params = self._pace().kept % (self.window + 1), self._followed()
        gram = self._gram(params, oldest)
        if not bool(gram.isfinite().all()):
            return
        weights = resting_weights(gram, ridge)
        for param in params:
            local(param).copy_(combine(local(self.state[param]["snapshots"]), weights, oldest))

    def _gram(self, params: list[Tensor], oldest: int) -> Tensor:
        """Of the steps of all parameters, on all ranks: (m, m) float64."""
        split: dict[Groups, list[Tensor]] = {}
        for param in params:
            split.setdefault(shard_groups(param), []).append(local(self.state[param]["snapshots"]))
        gram = torch.zeros((), dtype=torch.float64)
        for groups, kept in split.items():
            gram = gram + sum_over(groups, step_gram(kept, oldest).to(kept[0].device)).cpu()
        return gram

    def _jump(self, pace: Pace) -> None:
        """Remember the parameters, and go."""
        self._set(pace)
        for param in self._followed():
            kept = self.state[param].setdefault("returns_to", torch.empty_like(param))
            local(kept).copy_(local(param))
        self._go(pace.ridge)

    def _swap_back(self) -> None:
        for param in self._followed():
            if "returns_to" in self.state[param]:
                local(param).copy_(local(self.state[param]["returns_to"]))

    def _try(self, pace: Pace, closure: Callable[[], Any], returned: Any, loss: Loss) -> tuple[Any, Loss]:
        """Jump, and stay there if the closure's loss is lower; what it returned, and the loss, where we are then.

        Whatever the closure raises there is raised where we were.
        """
        params = listed(self.param_groups)
        grads = [None if param.grad is None else param.grad.clone() for param in params]
        self._jump(pace)
        good = False
        try:
            there, loss_there = evaluate(closure, None)
            good = self._number(loss_there) < self._number(loss)
        finally:
            if not good:
                self._swap_back()
                for param, grad in zip(params, grads, strict=True):
                    if param.grad is None or grad is None:
                        param.grad = grad
                    else:
                        param.grad.copy_(grad)  # in place: it may be a view of DDP's buckets
        pace.judged(good)
        if good:
            self._begin(pace)
            return there, loss_there
        return returned, loss

    def _number(self, loss: Loss) -> float:
        """A loss as a number to be minimized."""
        if loss is None:
            raise ValueError("KoopmanAccelerated compares losses: call step(loss=loss) or step(closure)")
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"loss: expected one number, got shape {tuple(loss.shape)}")
        return -float(loss) if self.param_groups[0].get("maximize") else float(loss)

    def _note(self, value: float) -> None:
        """Remember a loss."""
        losses = self._losses()
        losses.copy_(torch.cat([losses[1:], losses.new_tensor([value])]))

    def _losses(self) -> Tensor:
        fresh = lambda: torch.full((RECENT,), float("nan"), dtype=torch.float64)  # noqa: E731
        return beside_all(self._followed(), self.state, "koopman_losses", fresh)

    def _overflowed(self) -> bool:
        """For GradScaler, which else would skip this step, and leave us on trial: unscale, or tell of an overflow."""
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found is None:
            return False
        if bool(found):
            return True
        if scale is not None:
            for param in listed(self.param_groups):
                if param.grad is not None:
                    param.grad.div_(scale.to(param.grad.device))
        return False
