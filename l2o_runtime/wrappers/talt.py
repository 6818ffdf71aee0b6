"""TALT: gradients are stretched along valleys and shrunk between their walls, before another optimizer sees them."""

import zlib
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from l2o_runtime.config import require
from l2o_runtime.contexts.hashing import PRIME
from l2o_runtime.contexts.sketch import count_sketch
from l2o_runtime.stepping.losses import Loss, evaluate
from l2o_runtime.stepping.whole import listed
from l2o_runtime.wrappers.base import (
    Wrapper,
    beside_all,
    joint_state_dict,
    load_joint_state_dict,
    no_states,
    require_optimizer,
    require_plain,
    require_whole,
    take_step,
)
from l2o_runtime.wrappers.valleys import Covariance, leading_directions, orthonormal_weights, slopes

WALLS = 3
"""Directions of the largest variance that are tracked; the mean gradient is one more."""

BANK = 6
"""Gradients that directions are made of."""

SEED_STEP = 104_729
"""What a seed moves places in the hash by."""

STATE = ("talt", "talt_paths", "talt_scales", "talt_axes", "gradients")


class TALT(Wrapper):
    """Topology-aware learning trajectories: look where gradients go, and change what the optimizer inside sees of them.

        g' = g + Σ_j (s_j − 1) u_j u_jᵀ g

    with orthonormal u_j: the complement of what is tracked is kept as it is. Every `update_interval` steps:

    1. Each gradient has left a sketch S g of `projection_dim` numbers (a hash of the coordinate says which of them, and
       with what sign). Their weighted covariance and mean are kept; the covariance's leading eigenvectors v_j, by block
       power iteration, are walls, and the mean is where the valley may go.
    2. A test of signs on the interval's sketches says of each direction whether gradients go along it (a valley,
       s = 1 + `valley_strength`), to and fro (s = 1 − `valley_strength`), or neither (s = 1, not touched).
    3. Directions of parameters are combinations u_j = Σ_i c_ij g_i of a few of the interval's gradients, those whose
       sketch is nearest to v_j. To lift v_j by the hash's transpose would not do: Sᵀ v is nearly all noise, for S has
       more columns than rows.

    Parameters that have names (`named_parameters`) are hashed by them, and their order does not matter; others by their
    place. Memory: `BANK` gradients and `WALLS` + 1 directions, 10 copies of the parameters. One process; under DDP,
    whose gradients agree, replicas stay equal. DTensors are refused.

    Args:
        base_optimizer_factory: parameters, and a learning rate under the name `lr`, → the optimizer inside.
        params: as for any torch optimizer.
        lr: its learning rate.
        projection_dim: of sketches.
        update_interval: steps between updates of directions, at least `BANK`.
        valley_strength: in 0..1, how much is changed; at 0 this is the optimizer inside.
        smoothing_factor: in (0, 1], the share of mean and covariance that an interval replaces.
        seed: of the hash.

    Raises:
        TypeError: what the factory makes is no optimizer, or one that calls the closure itself.
        ConfigError: a number is out of range.
        ValueError: parameters are complex, or DTensors.

    >>> x = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = TALT(torch.optim.SGD, [x], lr=0.1)
    >>> x.grad = torch.ones(3)
    >>> optimizer.step()
    >>> optimizer.health()
    {'updates': 0, 'valleys': 0, 'walls': 0}
    """

    projection_dim: int
    update_interval: int
    valley_strength: float
    smoothing_factor: float
    seed: int
    state: Any

    def __init__(
        self,
        base_optimizer_factory: Callable[..., Optimizer],
        params: ParamsT,
        lr: float,
        projection_dim: int = 32,
        update_interval: int = 20,
        valley_strength: float = 0.2,
        smoothing_factor: float = 0.3,
        *,
        seed: int = 0,
    ):
        require_whole(2 * (WALLS + 1), 4096, projection_dim=projection_dim)
        require_whole(BANK, 10**6, update_interval=update_interval)
        require_whole(0, 2**31, seed=seed)
        require(0 <= valley_strength <= 1, f"valley_strength: expected a number in 0..1, got {valley_strength!r}")
        require(0 < smoothing_factor <= 1, f"smoothing_factor: expected a number in (0, 1], got {smoothing_factor!r}")
        optimizer = base_optimizer_factory(params, lr=lr)
        require_optimizer(optimizer, "base_optimizer_factory")
        require_plain(listed(optimizer.param_groups), type(self).__name__)
        numbers = {"projection_dim": projection_dim, "update_interval": update_interval, "seed": seed}
        shares = {"valley_strength": float(valley_strength), "smoothing_factor": float(smoothing_factor)}
        self.__setstate__({"optimizer": optimizer, "state": no_states(), **numbers, **shares})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the optimizer inside; directions take them in from the next update on."""
        super().add_param_group(param_group)
        require_plain(self.param_groups[-1]["params"], type(self).__name__)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Loss = None) -> Any:
        """Perform one step; gradients are afterwards what they were.

        Args:
            closure: reevaluates the model and returns the loss.
            loss: of this step, handed on to an optimizer inside that looks at it.

        Returns:
            What the closure returned.
        """
        returned, loss = evaluate(closure, loss)
        acting = [param for param in listed(self.param_groups) if param.grad is not None and param.numel()]
        if any(param.grad.layout != torch.strided for param in acting if param.grad is not None):
            raise RuntimeError("TALT does not support sparse gradients: use sparse=False")
        if not acting:
            take_step(self.optimizer, loss)
            return returned
        before = [param.grad for param in acting]
        try:
            for param, scaled in zip(acting, self._scaled(acting), strict=True):
                param.grad = scaled
            take_step(self.optimizer, loss)
        finally:
            for param, grad in zip(acting, before, strict=True):
                param.grad = grad
        self._look(acting)
        return returned

    def health(self) -> dict[str, int]:
        """How many updates there were, and how many of their directions were valleys, or between walls."""
        counts = self._numbers()[-3:].tolist() if self.state else (0, 0, 0)
        return {key: int(value) for key, value in zip(("updates", "valleys", "walls"), counts, strict=True)}

    def spectrum(self) -> tuple[list[float], list[float]]:
        """Leading eigenvalues of the sketched gradients' covariance, and s of every direction, the mean's last."""
        covariance = self._covariance(self._numbers())
        values, _ = leading_directions(covariance.value(), self._axes()[:, :WALLS])
        return values.tolist(), self._scales().tolist()

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer inside, whose states are named `inside_…`, with what was looked at among them."""
        return joint_state_dict(self.optimizer, self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that `state_dict` gave.

        Raises:
            ValueError: it belongs to another optimizer, to other parameters, or to sketches of another size.
        """
        for state in state_dict["state"].values():
            paths = state.get("talt_paths")
            expected = (self.update_interval, self.projection_dim)
            if paths is not None and tuple(paths.shape) != expected:
                raise ValueError(f"update_interval, projection_dim: the state has {tuple(paths.shape)}, not {expected}")
        load_joint_state_dict(self.optimizer, self.state, state_dict, STATE, "TALT")

    def __getstate__(self) -> dict[str, Any]:
        """Groups are copied with the optimizer inside."""
        own = ("projection_dim", "update_interval", "valley_strength", "smoothing_factor", "seed")
        return {key: getattr(self, key) for key in ("optimizer", "state", *own)}

    def _scaled(self, acting: list[Tensor]) -> list[Tensor]:
        """g' of every parameter."""
        grads = [param.grad for param in acting if param.grad is not None]
        factors = self._scales() - 1
        if not bool(factors.any()):
            return grads
        # Bank, and then directions: what a parameter that joined late has not is zero there.
        axes = [self.state[param]["gradients"][BANK:] if "gradients" in self.state[param] else None for param in acting]
        parts = torch.zeros(WALLS + 1, dtype=torch.float64)
        for axis, grad in zip(axes, grads, strict=True):
            if axis is not None:
                parts += (axis.flatten(1) @ grad.flatten().to(axis.dtype)).double().cpu()
        if not bool(parts.isfinite().all()):
            return grads
        added = factors * parts
        return [
            grad if axis is None else grad + torch.tensordot(added.to(axis), axis, 1).to(grad.dtype)
            for axis, grad in zip(axes, grads, strict=True)
        ]

    def _look(self, acting: list[Tensor]) -> None:
        """Take notice of the gradients of a step, and at an interval's end find directions anew."""
        numbers, paths = self._numbers(), self._paths()
        sketch = self._sketch(acting)
        if not bool(sketch.isfinite().all()):
            return
        place = int(numbers[2])
        paths[place].copy_(sketch)
        covariance = self._covariance(numbers)
        covariance.update(sketch, (1 - self.smoothing_factor) ** (1 / self.update_interval))
        banked = place - (self.update_interval - BANK)
        if banked >= 0:
            for param in acting:
                state, grad = self.state[param], param.grad
                assert grad is not None
                if "gradients" not in state:
                    shape = (BANK + WALLS + 1, *param.shape)
                    state["gradients"] = torch.zeros(shape, dtype=_real(param.dtype), device=param.device)
                state["gradients"][banked].copy_(grad)
        numbers[2] = (place + 1) % self.update_interval
        self._remember(covariance, numbers)
        if place + 1 == self.update_interval:
            self._find(covariance, numbers, paths)

    def _find(self, covariance: Covariance, numbers: Tensor, paths: Tensor) -> None:
        """Directions, by the sketches, what gradients do along them, and their place among the parameters."""
        axes = self._axes()
        _, walls = leading_directions(covariance.value(), axes[:, :WALLS])
        mean = covariance.mean - walls @ (walls.mT @ covariance.mean)
        size = mean.norm()
        mean = mean / size if size > 0 else mean
        axes.copy_(torch.cat([walls, mean[:, None]], 1))
        found = torch.tensor(slopes(paths @ axes), dtype=torch.float64)
        found[-1] = found[-1].clamp_min(0)  # a mean between walls is no direction to go in
        owners = [param for param in listed(self.param_groups) if "gradients" in self.state.get(param, {})]
        gram = torch.zeros(BANK, BANK, dtype=torch.float64)
        for param in owners:
            bank = self.state[param]["gradients"][:BANK].flatten(1).double()
            gram += (bank @ bank.mT).cpu()
        weights = orthonormal_weights(paths[-BANK:].mT, axes, gram)
        for param in owners:
            kept = self.state[param]["gradients"]
            kept[BANK:] = torch.tensordot(weights.to(kept), kept[:BANK], ([0], [0]))
            kept[:BANK].zero_()
        self._scales().copy_(1 + self.valley_strength * found * (weights.square().sum(0) > 0))
        numbers[-3:] += torch.stack([torch.ones(()), (found > 0).sum(), (found < 0).sum()])

    def _sketch(self, acting: list[Tensor]) -> Tensor:
        """S g, (k,) float64 on the CPU."""
        total = torch.zeros(self.projection_dim, dtype=torch.float64)
        for param, offset in self._offsets():
            if any(param is other for other in acting) and param.grad is not None:
                flat = param.grad.flatten().to(_real(param.dtype))
                total += count_sketch(flat, self.projection_dim, offset).double().cpu()
        return total

    def _offsets(self) -> list[tuple[Tensor, int]]:
        """Every parameter with the place of its first coordinate in the hash."""
        names = list(chain.from_iterable(group.get("param_names", ()) for group in self.param_groups))
        params, start, found = listed(self.param_groups), self.seed * SEED_STEP, []
        for number, param in enumerate(params):
            if len(names) == len(params):
                start = zlib.crc32(f"{self.seed} {names[number]}".encode()) % (PRIME // 2)
            found.append((param, start))
            start += param.numel()
        return found

    def _numbers(self) -> Tensor:
        """W₁, W₂, place in the interval, mean, scatter, and counters: (6 + k + k²,)."""
        size = 6 + self.projection_dim * (1 + self.projection_dim)
        return self._whole("talt", lambda: torch.zeros(size, dtype=torch.float64))

    def _paths(self) -> Tensor:
        shape = (self.update_interval, self.projection_dim)
        return self._whole("talt_paths", lambda: torch.zeros(shape, dtype=torch.float64))

    def _scales(self) -> Tensor:
        return self._whole("talt_scales", lambda: torch.ones(WALLS + 1, dtype=torch.float64))

    def _axes(self) -> Tensor:
        """(k, `WALLS` + 1): where iterations start, at first anywhere."""
        rng = torch.Generator().manual_seed(self.seed)
        shape = (self.projection_dim, WALLS + 1)
        return self._whole("talt_axes", lambda: torch.randn(shape, generator=rng, dtype=torch.float64))

    def _whole(self, key: str, fresh: Callable[[], Tensor]) -> Tensor:
        return beside_all(listed(self.param_groups), self.state, key, fresh)

    def _covariance(self, numbers: Tensor) -> Covariance:
        size = self.projection_dim
        mean, scatter = numbers[3 : 3 + size], numbers[3 + size : -3].view(size, size)
        return Covariance(mean.clone(), scatter.clone(), float(numbers[0]), float(numbers[1]))

    def _remember(self, covariance: Covariance, numbers: Tensor) -> None:
        numbers[0], numbers[1] = covariance.first, covariance.second
        numbers[3:-3] = torch.cat([covariance.mean, covariance.scatter.flatten()])


def _real(dtype: torch.dtype) -> torch.dtype:
    """What gradients of a dtype are kept in: at least float32."""
    return torch.promote_types(dtype, torch.float32)
