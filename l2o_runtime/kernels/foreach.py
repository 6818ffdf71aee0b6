"""The directional rule's step in few operators, for GPUs: all tensors of a model at once.

A GPU takes as long for an operator on a bias as for one on a large matrix, and a model has a hundred tensors. So they
lie end to end, in rows of `WIDTH` numbers, each row of one tensor: what is coordinatewise is one operator for all of
them, what belongs to a tensor is a column beside its rows, and matrices of one shape are orthogonalised together.

The formulas are the rule's own. No number is read by the host, sums are added up in one order, and nothing is copied to
the device but tables, when the set of tensors changes: a CUDA graph may be captured after a few steps that are not.
L2O_KERNELS=foreach asks for it on any device, L2O_KERNELS=compiled has torch.compile fuse what is coordinatewise.
It has run on CPUs alone, where the tests hold it to the plain loop; on a GPU it has not run yet.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from l2o_runtime.config import NoneConfig
from l2o_runtime.kernels import Kernel
from l2o_runtime.kernels.foreach_plan import Bucket, Plan, add_up
from l2o_runtime.rules.directional import MOMENTUM, DirectionalRule, mixture, nesterov, relative, terms
from l2o_runtime.rules.orthogonal import orthogonalise_each
from l2o_runtime.rules.statistics import AVERAGES, averages_of
from l2o_runtime.rules.steering import STATES
from l2o_runtime.state import State
from l2o_runtime.stepping.engine import diagnose
from l2o_runtime.stepping.interpolation import LAG, followed, resting, weights
from l2o_runtime.stepping.parts import Part, full_precision

PLANS = 8
"""Sets of tensors whose tables are kept, for scripts in which they take turns."""

Function = Callable[..., Any]


def row_sums(theta: Tensor, grad: Tensor, state: State) -> Tensor:
    """Σ|g| and `terms` of every row, (rows, 1 + 6) float64."""
    seen = relative(averages_of(grad.nan_to_num(), state)[0])
    summands = [grad.abs(), *terms(theta.float(), *seen)]
    return torch.stack([summand.sum(-1, dtype=torch.float64) for summand in summands], dim=-1)


def directions(
    grad: Tensor, state: State, whole: Tensor | None, matrix: Tensor, weights: Tensor, good: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """d, Σd² of every row (rows, 1) float64, and new averages, all (rows, WIDTH) but for columns.

    Args:
        grad, state: of coordinates; `step` is a column.
        whole: orthogonalised momentum where there is a matrix.
        matrix: a column, where that is.
        weights: w, (rows, 1, 4).
        good: () bool; else averages stay what they are.
    """
    averages, new = averages_of(grad, state)
    x, u, s = relative(averages)
    direction = mixture(u if whole is None else whole.where(matrix, u), x, u, s, weights.unbind(-1))
    kept = [torch.where(good, new[key], state[key]) for key in AVERAGES]
    norm = torch.linalg.vector_norm(direction, dim=-1, keepdim=True, dtype=torch.float64)
    return direction, norm.square(), kept


def moved(theta: Tensor, delta: Tensor, rate: Tensor, left: Tensor, good: Tensor) -> Tensor:
    """left θ + rate Δ if good, rounded where the plain loop rounds: after the decay, and at the end."""
    wide = torch.promote_types(theta.dtype, torch.float32)
    decayed = (theta.to(wide) * left.to(wide)).to(theta.dtype)
    return torch.where(good, (decayed.to(wide) + delta.to(wide) * rate.to(wide)).to(theta.dtype), theta)


def trailed(
    theta: Tensor, delta: Tensor, rate: Tensor, taken: Tensor, good: Tensor, lag: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    """θ and e after a step of rate Δ − taken θ, if good: see `l2o_runtime.stepping.interpolation`."""
    wide = torch.promote_types(theta.dtype, torch.float32)
    rate, taken = rate.to(wide), taken.to(wide)
    trail = resting(weights(step + 1), rate)
    new = followed(theta, delta.to(wide) * rate - theta.to(wide) * taken, lag, trail)
    return torch.where(good, new[0], theta), torch.where(good, new[1], lag)


class ForeachKernel(Kernel):
    """Sums and steps of one rule; see `l2o_runtime.kernels.Kernel`. It is for whole tensors, not for shards.

    Args:
        rule: frozen, on the device of the parameters; its context keeps nothing per coordinate.
        compiler: of what is coordinatewise, and of what is a few numbers per tensor; `torch.compile`, or nothing.
    """

    def __init__(self, rule: DirectionalRule, compiler: Callable[[Function], Function] = lambda function: function):
        self.rule = rule
        self.whole = isinstance(rule.config.context, NoneConfig)
        functions: tuple[Function, ...] = (row_sums, directions, moved, trailed, rule.steer)
        self.row_sums, self.directions, self.moved, self.trailed, self.steer = map(compiler, functions)
        self.plans: dict[Any, Plan] = {}

    def forget(self) -> None:
        """As in `Kernel`."""
        self.plans = {}

    @torch.no_grad()
    def observe(self, parts: list[Part]) -> Tensor:
        """As in `Kernel`."""
        plan = self._plan(parts)
        with full_precision(parts[0].theta.device):
            return self._totals(plan, parts)

    @torch.no_grad()
    def update(self, parts: list[Part], steering: list[Tensor], good: Tensor) -> None:
        """As in `Kernel`; a parameter that is there twice steps twice."""
        if len({part.state["step"].data_ptr() for part in parts}) < len(parts):
            for part, row in zip(parts, steering, strict=True):
                self._advance(self._plan([part]), [part], row, good)
            return
        self._advance(self._plan(parts), parts, torch.cat(steering), good)

    @torch.no_grad()
    def step(self, parts: list[Part], loss: Tensor) -> Tensor:
        """As in `Kernel`."""
        plan = self._plan(parts)
        with full_precision(loss.device):
            totals = self._totals(plan, parts)
            sums = totals[:, 1:]
            verdict = diagnose(totals[:, 0].sum(), loss, sums)
            good = verdict[0]
            own = [part.own[key] for key in STATES for part in parts]
            old = torch.stack(own).view(len(STATES), -1)
            state = dict(zip(STATES, old.unbind(), strict=True))
            sums, loss = torch.where(good, sums, 0.0), torch.where(good, loss, 0.0)
            steering, new = self.steer(sums, plan.shapes, loss, state)
            kept = torch.where(good, torch.stack([new[key] for key in STATES]), old)
            self._advance(plan, parts, steering, good)
            torch._foreach_copy_(own, list(kept.view(-1).unbind()))
            # One tensor for all of them would be read by the host.
            torch._foreach_add_([part.state["step"] for part in parts], [good.float().reshape(1)] * len(parts))
        for part in parts:
            part.write_back()
        return verdict

    def _plan(self, parts: list[Part]) -> Plan:
        """Where everything is; it holds as long as the set of tensors, their shapes and groups are the same."""
        groups: dict[int, int] = {}
        key = tuple(
            (
                part.shape,
                part.theta.dtype,
                groups.setdefault(id(part.group), len(groups)),
                bool(part.group["maximize"]),
                LAG in part.state,
            )
            for part in parts
        )
        if key not in self.plans:
            if len(self.plans) >= PLANS:
                del self.plans[next(iter(self.plans))]
            self.plans[key] = Plan(parts, self.rule.config.rank)
        return self.plans[key]

    def _read(self, plan: Plan, bucket: Bucket, parts: list[Part]) -> tuple[Tensor, Tensor, State]:
        """θ, g and state, (rows, WIDTH) each, with a column of `step`."""
        theta, grad = bucket.flat([part.theta for part in parts]), bucket.flat([part.grad for part in parts]).float()
        if plan.maximizes:
            grad = grad * plan.signs[bucket.parts][bucket.owner]
        state = {key: bucket.flat([part.state[key] for part in parts]).float() for key in AVERAGES}
        step = torch.cat([part.state["step"] for part in parts])
        return theta, grad, state | {"step": step[bucket.owner].unsqueeze(-1)}

    def _totals(self, plan: Plan, parts: list[Part]) -> Tensor:
        """Σ|g| and the rule's sums, (S, 1 + 7) float64."""
        ordered = plan.ordered(parts)
        found = torch.cat(
            [
                add_up(self.row_sums(*self._read(plan, bucket, ordered[bucket.parts])), bucket.levels)
                for bucket in plan.buckets
            ]
        )
        return torch.cat([found[:, :1], plan.sizes, found[:, 1:]], dim=1)[plan.back]

    def _advance(self, plan: Plan, parts: list[Part], steering: Tensor, good: Tensor) -> None:
        """Move parts, whose steering is (S, 5), and write their averages."""
        parts, steering = plan.ordered(parts), steering[plan.there]
        one = torch.ones((), dtype=torch.float64, device=good.device)
        rates, decays = (
            torch.stack([one * getattr(parts[index], name) for index in plan.leaders])[plan.group].unsqueeze(-1)
            for name in ("lr", "decay")
        )
        numbers = torch.cat([rates, rates * decays], dim=1)
        for bucket in plan.buckets:
            own = parts[bucket.parts]
            theta, grad, state = self._read(plan, bucket, own)
            told = steering[bucket.parts][bucket.owner].unsqueeze(-2)
            whole = self._whole(bucket, grad, state[MOMENTUM])
            matrix = plan.matrix[bucket.parts][bucket.owner]
            direction, squares, kept = self.directions(grad, state, whole, matrix, told[..., 1:], good)
            mean = (add_up(squares, bucket.levels) / plan.sizes[bucket.parts]).float()[bucket.owner]
            rate, taken = numbers[bucket.parts][bucket.owner].split(1, dim=1)
            delta = self.rule.finish(direction, mean, told, state)
            targets = [part.theta for part in own] + [part.state[key] for key in AVERAGES for part in own]
            if LAG in own[0].state:
                lags = [part.state[LAG] for part in own]
                theta, lag = self.trailed(theta, delta, rate, taken, good, bucket.flat(lags), state["step"])
                targets, kept = targets + lags, [*kept, lag]
            else:
                theta = self.moved(theta, delta, rate, 1 - good.double() * taken, good)
            torch._foreach_copy_(targets, [piece for flat in (theta, *kept) for piece in bucket.pieces(flat)])

    def _whole(self, bucket: Bucket, grad: Tensor, momentum: Tensor) -> Tensor | None:
        """The orthogonalised momentum of matrices, (rows, WIDTH); what it is elsewhere means nothing."""
        if not bucket.stacks:
            return None
        found = nesterov(grad, momentum)
        views = [stack.of(found) for stack in bucket.stacks]
        made = orthogonalise_each(views, self.rule.config.rank, [stack.mix for stack in bucket.stacks])
        torch._foreach_copy_(views, made)
        return found


def make_kernel(
    rule: DirectionalRule, compiler: Callable[[Function], Function] = lambda function: function
) -> ForeachKernel | None:
    """The kernel of a rule; None if it is not in float32, or its context keeps something for every coordinate."""
    fits = all(p.dtype == torch.float32 for p in rule.parameters()) and not rule.context.coordinate_spec
    return ForeachKernel(rule, compiler) if fits else None
