"""A guarded step: Adam's or the one of the optimizer inside, as the referee says, or back to where we were.

What it keeps, `STATE`, lies in the states of the optimizer inside.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim.adam import adam

from l2o_runtime.state import State, StateSpec
from l2o_runtime.stepping.distributed import ALONE, Groups, local, loss_groups, shard_groups, sum_over
from l2o_runtime.stepping.engine import diagnose
from l2o_runtime.stepping.interpolation import LAG
from l2o_runtime.stepping.losses import RANKS, Loss, common_loss, evaluate
from l2o_runtime.stepping.parts import acts
from l2o_runtime.stepping.whole import States, counters, listed, share, whole
from l2o_runtime.wrappers.referee import COUNTERS, Referee, Verdict

REACH = 10.0
"""A learned step is cut, in every coordinate, to so many times Adam's learning rate."""

BETAS, EPSILON = (0.9, 0.999), 1e-8

ADAM = ("adam_step", "exp_avg", "exp_avg_sq")
"""Adam's state of a parameter; the averages have its dtype, as in torch.optim, but float32 for one of float16, in which
squares of gradients and ε are 0.
"""

STATE = ("safeguard", "saved_param", *ADAM, *(f"saved_{key}" for key in ADAM))
"""All that a safeguard keeps; `safeguard`, the referee, belongs to the whole optimization."""


@runtime_checkable
class Guarded(Protocol):
    """What a guard asks of the optimizer inside."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """With `lr`, and `safeguard_lr`: Adam's learning rate is their product."""

    @property
    def state(self) -> Any:
        """By parameter; the guard's states lie there."""

    @property
    def whole_spec(self) -> StateSpec:
        """What it keeps of the whole optimization, beside every state."""

    @property
    def horizon(self) -> int:
        """The longest run for which the optimizer was made."""

    def prepare(self) -> Any:
        """Called first in every step: make all states that steps need, complain about what cannot be stepped."""

    def take(self, loss: Tensor) -> Tensor:
        """Take one step; whether it was taken, () bool. The loss () is common to all ranks, gradients are finite."""

    def restart(self) -> None:
        """Begin afresh, from zero states."""

    def fall(self, group: dict[str, Any]) -> float:
        """What Adam's learning rate is multiplied by, beside lr: a schedule of the optimizer's own."""

    def decay(self, group: dict[str, Any]) -> float:
        """The part of itself that a parameter of a group loses in a step."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the guard's states."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but nothing is cast to the parameters' dtype."""


@dataclass
class Guard:
    """Decides in every step who takes it.

    Attributes:
        process_group: the ranks whose losses are averaged, as in `LearnedOptimizer`. Copies forget a group.
        left: `fingerprint` of every parameter after a learned step: somebody else may change it before the next.
    """

    process_group: Any = None
    left: dict[Tensor, tuple[float, float]] = field(default_factory=dict)

    def step(self, inner: Guarded, closure: Callable[[], Any] | None, loss: Loss) -> Any:
        """One step; what the closure returned.

        Raises:
            ValueError: the loss is missing, or it is not known with which ranks this one steps.
        """
        returned, loss = evaluate(closure, loss)
        params = listed(inner.param_groups)
        groups = loss_groups(params, self.process_group)
        if groups is None:
            raise ValueError(f"there are several ranks, and the safeguard has to know whose losses to compare: {RANKS}")
        inner.prepare()
        acting = [param for param in params if acts(param)]
        value = common_loss(loss, inner.param_groups, [*acting, *params], groups)  # by every rank, for others may wait
        if not acting:
            return returned
        pulse, thetas = look(acting)
        verdict = diagnose(pulse, value, thetas)
        # All of the state in the first step: checkpoints are loaded into what a step without gradients makes.
        for param in params:
            if param.requires_grad or acts(param):
                prepare(param, inner.state[param])
        found = share(params, inner.state, inner.whole_spec, {"safeguard": Referee().to_tensor()})
        if bool(pulse):
            if loss is None:
                raise ValueError("the safeguard compares losses: call step(loss=loss) or step(closure)")
            verdict[0] &= self._decide(inner, found["safeguard"], value, bool(verdict[0]))
        found["health"].add_(verdict)
        return returned

    def health(self, inner: Guarded) -> dict[str, int]:
        """Counters of the guard and of the referee."""
        found = whole(listed(inner.param_groups), inner.state)
        referee = Referee.from_tensor(found["safeguard"]) if "safeguard" in found else Referee()
        return counters(found) | {key: getattr(referee, key) for key in COUNTERS}

    def _decide(self, inner: Guarded, memory: Tensor, loss: Tensor, good: bool) -> Tensor | bool:
        """The step of the optimizer inside or Adam's, as the referee says; whether one was taken."""
        referee = Referee.from_tensor(memory)
        for param, left in self.left.items():
            if fingerprint(param) != left:
                accept(param, inner.state[param])
        self.left = {}
        verdict = referee.judge(float(loss), inner.horizon) if good else referee.fail()
        memory.copy_(referee.to_tensor())
        for param in listed(inner.param_groups):
            follow(verdict, param, inner.state.get(param, {}))
        if verdict.restore or not good:
            return False
        for group in inner.param_groups:
            fall, decay = inner.fall(group), inner.decay(group)
            adam_step(group, inner.state, decay=decay, fall=fall, move=not verdict.learned)
        if verdict.restart:
            inner.restart()
        return self._take(inner, loss) if verdict.learned else True

    def _take(self, inner: Guarded, loss: Tensor) -> Tensor:
        """The step of the optimizer inside, cut to ± REACH · safeguard_lr · lr."""
        before = {
            param: local(param).detach().clone() for param in listed(inner.param_groups) if param.grad is not None
        }
        taken = inner.take(loss)
        for group in inner.param_groups:
            bound = REACH * float(group["safeguard_lr"]) * float(group["lr"])
            for param in group["params"]:
                if param in before:
                    theta, lag = local(param).detach(), inner.state[param].get(LAG)
                    if lag is not None:  # what is cut is not followed
                        local(lag).masked_fill_((theta - before[param]).abs() > bound, 0.0)
                    theta.clamp_(before[param] - bound, before[param] + bound)
        self.left = {param: fingerprint(param) for param in listed(inner.param_groups) if param.requires_grad}
        return taken

    def __getstate__(self) -> dict[str, Any]:
        """Process groups cannot be copied."""
        return self.__dict__ | {"process_group": ALONE if self.process_group == ALONE else None}


def look(params: Collection[Tensor]) -> tuple[Tensor, Tensor]:
    """Σ|g| and Σθ, () float64 each, of all parameters on all ranks; not finite where a gradient or parameter is not."""
    device = next(iter(params)).device
    sums: dict[Groups, Tensor] = {}  # of what is split alike, to be exchanged together
    for param in params:
        groups = shard_groups(param)
        own = sums.setdefault(groups, torch.zeros(2, dtype=torch.float64, device=device))
        if param.grad is not None:
            grad = torch.linalg.vector_norm(local(param.grad, like=param).float(), 1, dtype=torch.float64)
            own += torch.stack([grad, local(param).sum(dtype=torch.float64)]).to(device)
    pulse, thetas = torch.stack([sum_over(groups, own) for groups, own in sums.items()]).sum(0)
    return pulse, thetas


def prepare(param: Tensor, state: State) -> None:
    """Make Adam's state of a parameter, and what it may return to, where they are missing."""
    if "adam_step" not in state:
        state["adam_step"] = torch.zeros((), dtype=torch.float32)
        kept = torch.float32 if param.dtype == torch.float16 else param.dtype
        state["exp_avg"] = torch.zeros_like(param, dtype=kept, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(param, dtype=kept, memory_format=torch.preserve_format)
        state["saved_param"] = param.detach().clone()
        state |= {f"saved_{key}": state[key].clone() for key in ADAM}


def follow(verdict: Verdict, param: Tensor, state: State) -> None:
    """Remember a parameter and its state of Adam, or return to what was remembered, if there was a step since then:
    what has no gradients may change for other reasons.
    """
    if "saved_param" not in state:  # frozen from the start
        return
    stepped = verdict.restore and bool(state["adam_step"] != state["saved_adam_step"])
    current = {"saved_param": param} | {f"saved_{key}": state[key] for key in ADAM}
    for key, tensor in current.items():
        if verdict.save:
            state[key].copy_(tensor)
        if stepped:
            tensor.copy_(state[key])


def accept(param: Tensor, state: State) -> None:
    """Take where a parameter is for where it would return to: the script itself has put it there."""
    if "saved_param" in state:
        state["saved_param"].copy_(param)


def fingerprint(param: Tensor) -> tuple[float, float]:
    """Σθ and Σθ² of this rank's part: they tell, but for luck, whether anybody has changed it."""
    theta = local(param).detach().double()
    return float(theta.sum()), float(theta.square().sum())


def adam_step(group: dict[str, Any], states: States, *, decay: float, fall: float, move: bool) -> None:
    """Adam (Kingma & Ba 2015), β = (0.9, 0.999), ε = 1e-8, by torch.optim, with decoupled weight decay.

    Args:
        group: parameter group; Adam's learning rate is lr · safeguard_lr · fall.
        states: optimizer state of every parameter.
        decay: the part of themselves that parameters lose.
        fall: factor of a schedule.
        move: else only Adam's averages go on.
    """
    params = [param for param in group["params"] if param.grad is not None]
    thetas = [local(param).detach() for param in params]
    moved = [_wide(theta) for theta in thetas]
    for theta in moved if move else ():
        theta.mul_(1 - decay)
    adam(
        moved,
        [_wide(local(param.grad, like=param)) for param in params],
        [local(states[param]["exp_avg"]) for param in params],
        [local(states[param]["exp_avg_sq"]) for param in params],
        [],
        [states[param]["adam_step"] for param in params],
        amsgrad=False,
        beta1=BETAS[0],
        beta2=BETAS[1],
        lr=float(group["lr"]) * group["safeguard_lr"] * fall if move else 0.0,
        weight_decay=0.0,
        eps=EPSILON,
        maximize=bool(group.get("maximize", False)),
    )
    for theta, wide in zip(thetas, moved, strict=True):
        if theta is not wide:
            theta.copy_(wide)


def _wide(tensor: Tensor) -> Tensor:
    """A copy in float32 of what is in float16, else itself."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor
