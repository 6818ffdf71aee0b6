"""LearnedOptimizer: a frozen rule as a drop-in torch.optim.Optimizer."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from l2o_runtime.files.artifact import SUFFIXES, find_rule, load_rule
from l2o_runtime.files.exported import ExportedRule, load_exported
from l2o_runtime.rules import Rule
from l2o_runtime.state import CONTEXT, State, StateSpec
from l2o_runtime.stepping import average, interpolation
from l2o_runtime.stepping.advice import Advice, outside
from l2o_runtime.stepping.checks import check_group, check_saved_groups, check_state, whole_number
from l2o_runtime.stepping.collect import Collector
from l2o_runtime.stepping.distributed import ALONE, check_process_group, loss_groups
from l2o_runtime.stepping.engine import Replicas, advance, diagnose, observe
from l2o_runtime.stepping.exported import advance_exported
from l2o_runtime.stepping.losses import common_loss, evaluate
from l2o_runtime.stepping.parts import STATE_DTYPES, Part, kept_in
from l2o_runtime.stepping.schedule import Schedule
from l2o_runtime.stepping.whole import around_load, counters, listed, saved_states, share, taken, whole
from l2o_runtime.wrappers.guard import STATE, Guard

NOT_SAVED = (
    "the state has parameters, but nothing of the whole optimization (context, counters, referee, the place in a "
    "schedule): these start again"
)


def _read(rule: str | Path | Rule) -> Rule | ExportedRule:
    """A rule from a bundled name or a file, or as it is."""
    if isinstance(rule, Rule):
        return rule
    path = find_rule(rule)
    return load_exported(path) if path.suffix in SUFFIXES else load_rule(path)


class LearnedOptimizer(Optimizer):
    """Optimize with a frozen learned rule.

        θ ← θ · (1 − unit · lr · weight_decay) + lr · Δ,  [Δ, h'] = M(features(g), context, h; φ)

    The unit is 0.001; of rules that leave their size to a schedule 0.005, and their lr is multiplied by its factor.
    The context is computed from all parameters that have a gradient; each keeps its own recurrent state.
    Coordinates are computed in float32 whatever the parameter's dtype.

    A step whose loss or gradients are not all finite, or whose gradients are all zero, changes nothing but the
    counters of `health`; nor does one whose parameters are not all finite, if the rule or its context looks at them.

    A learned rule has no momentum to cycle. Its groups have an entry `momentum` all the same, since OneCycleLR and
    CyclicLR ask for one; what a scheduler writes there is ignored.

    What belongs to the whole optimization (the context, `health`, the referee) lies beside every parameter's state,
    the same tensors each time: it survives whichever parameter's state is left out of a checkpoint.

    Ranks of `torch.distributed` communicate in `step`, and only there, where they are known to step together:
    - parameters are plain tensors (one process, DDP): never. Where there are several ranks the rule does not see the
      loss, and warns once if it is given one: ranks that saw losses of their own would drift apart.
    - parameters are DTensors (FSDP2, tensor parallelism): sums over a sharded tensor are exchanged in the groups among
      which it is split, and the loss is averaged over the parameters' meshes, each by all of its ranks.
    - `process_group` is a group: all of its ranks, also those without gradients or parameters, average their loss at
      every step, in one all-reduce. Like DDP's own it takes its place in the order of that group's collectives.
    - `process_group="self"`: the rule sees this rank's loss, whatever others do.
    Losses are averaged only if the rule looks at them (it does over `moments`, and with a window) or a safeguard does.
    Under ZeroRedundancyOptimizer a rule sees the parameters of its rank only.

    Args:
        params: as for any torch optimizer: tensors, named tensors, or groups with their own `lr`,
            `weight_decay` and `maximize`.
        rule: a bundled name, or a file: `.safetensors`, or `.pt`, `.pt2`, `.onnx` that `l2o export` wrote;
            `hf://owner/name@revision`, a rule on the Hugging Face Hub, at a commit's hash (extra `hub`); or a rule that
            was loaded already.
        lr: factor on the learned step; 1 is what the rule was meta-trained with.
        weight_decay: decoupled weight decay. Values mean what they mean in AdamW at a learning rate of unit · lr, for
            by unit · lr · weight_decay of themselves parameters shrink in a step.
        maximize: go up the objective instead of down.
        safeguard: "adam" takes Adam's steps until the rule has shown that it does better, and again as soon as
            it does not, as `l2o_runtime.wrappers.safeguard.Safeguard` does. It needs the loss at every step.
        safeguard_lr: learning rate of that Adam; it is multiplied by lr.
        state_dtype: `torch.bfloat16` keeps the network's memory in half the space; the step is still computed in
            float32. A state that is loaded is cast to it.
        process_group: the ranks that step together, which average their losses: `torch.distributed.group.WORLD` for
            DDP; or "self" for a rank that trains by itself. Needed by a safeguard where there are several ranks, and
            their parameters are plain. Copies of the optimizer forget a group.
        total_steps: length of the run: steps, those of a safeguard's Adam too, grow over its first 2 % and then fall
            along a line, to nothing at its end.
            Without it a scheduler of torch may drive lr, from whose pace the length is guessed; without either the
            steps of rules that leave their size to a schedule (`directional` does) become shorter by themselves, and
            parameters follow them, see `l2o_runtime.stepping.interpolation`; 4 bytes per parameter.
        schedule: "constant" lets steps be as long as lr says, for scripts that change lr by hand.
        averaging: keep the mean of the latest parameters, for `averaged`; 4 bytes per parameter, 8 of float64.

    Raises:
        ArtifactError: the rule cannot be read.
        ValueError: an hyper-parameter is out of range, a parameter is complex, or this rank not in the group.

    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = LearnedOptimizer(model.parameters())
    >>> loss = model(torch.ones(8, 3)).square().mean()
    >>> loss.backward()
    >>> optimizer.step(loss=loss)
    >>> optimizer.health()["steps"]
    1
    """

    _lent = False
    """Parameters are their means at present; those of copies that were made meanwhile stay what they are."""

    def __init__(
        self,
        params: ParamsT,
        rule: str | Path | Rule = "default",
        lr: float | Tensor = 1.0,
        *,
        weight_decay: float = 0.0,
        maximize: bool = False,
        safeguard: Literal["adam"] | None = None,
        safeguard_lr: float = 1e-3,
        state_dtype: torch.dtype = torch.float32,
        process_group: Any = None,
        total_steps: int | None = None,
        schedule: Literal["auto", "constant"] = "auto",
        averaging: bool = False,
    ):
        if safeguard not in (None, "adam"):
            raise ValueError(f"safeguard: expected 'adam' or None, got {safeguard!r}")
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype: expected one of {STATE_DTYPES}, got {state_dtype!r}")
        if total_steps is not None and not (whole_number(total_steps) and total_steps >= 1):
            raise ValueError(f"total_steps: expected a whole number, 1 or more, or None; got {total_steps!r}")
        if schedule not in ("auto", "constant"):
            raise ValueError(f"schedule: expected 'auto' or 'constant', got {schedule!r}")
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "safeguard_lr": safeguard_lr}
        defaults["momentum"] = 0.0  # for schedulers; nothing here reads it
        check_group(defaults)
        if safeguard is None:
            del defaults["safeguard_lr"]
        if not isinstance(rule, str | Path | Rule):
            raise TypeError(f"rule: expected a name or a path, got {rule!r}; the learning rate goes by keyword, lr=")
        self._name = rule.config.kind if isinstance(rule, Rule) else str(rule)
        self._rule = _read(rule)
        coordinate, self._tensor_spec, self._context_spec = self._rule.spec
        self._coordinate_spec = kept_in(state_dtype, coordinate)
        self._collector = Collector(self._coordinate_spec, self._tensor_spec, self._rule.config.decay_unit)
        self._replicas = Replicas(self._rule) if isinstance(self._rule, Rule) else None
        check_process_group(process_group)
        self._process_group = process_group
        self.guard = None if safeguard is None else Guard(process_group)
        total = None if total_steps is None else int(total_steps)
        self._schedule = Schedule(total, fades=schedule == "auto" and self._rule.config.scheduled)
        self._averaging = averaging
        self._advice = Advice()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; they start with a fresh state."""
        check_group(param_group)
        super().add_param_group(param_group)
        added = self.param_groups[-1]["params"]
        for wrong, kind, instead in (
            (any(param.is_complex() for param in added), "complex", "torch.view_as_real(param)"),
            (any(param.layout != torch.strided for param in added), "sparse", "param.to_dense()"),
        ):
            if wrong:
                self.param_groups.pop()
                raise ValueError(f"{kind} parameters are not supported: optimize {instead} instead")
        if self._replicas is not None:
            for param in added:
                self._replicas.on(param.device)  # now rather than in `step`, which may be compiled

    @overload
    def step(self, closure: None = None, *, loss: Tensor | float | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, loss: Tensor | float | None = None) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, loss: Tensor | float | None = None) -> float | None:
        """Perform one step.

        Args:
            closure: reevaluates the model and returns the loss.
            loss: the loss of this step, where the script has it at hand. Rules with a context look at it; they
                do without it too.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: a gradient is sparse; a gradient or a state does not fit its parameter; or parameters are
                those of FullyShardedDataParallel (FSDP1).
            TypeError: the closure cannot be called, or what it returned is no loss.
            ValueError: the loss is more than one number, or missing where a safeguard needs it; or a safeguard does not
                know with which ranks this one steps.
            RuntimeError: within `averaged`.
        """
        if self._lent:
            raise RuntimeError("step() within averaged(): parameters are their means there; leave the context first")
        before = self._steps().clone() if self._averaging else None
        returned: float | None = (
            self._stepped(closure, loss) if self.guard is None else self.guard.step(self, closure, loss)
        )
        if before is not None:
            average.accumulate(listed(self.param_groups), self.state, before, self._steps())
        return returned

    def _stepped(self, closure: Callable[[], float] | None, loss: Tensor | float | None) -> float | None:
        """A step of the rule; what the closure returned."""
        returned: float | None
        returned, loss = evaluate(closure, loss)
        groups = loss_groups(listed(self.param_groups), self._process_group)
        parts = self.prepare()
        if parts:
            self._advice.on_loss(loss, groups, self._rule.config)
        near = [*(part.param for part in parts), *listed(self.param_groups)]
        sees_loss = self._rule.config.sees_loss
        value = common_loss(loss, self.param_groups, near, groups, sees_loss)  # by every rank, for others may wait
        if parts:
            found = self._share()
            found["health"].add_(self._advance(parts, value, found))
        return returned

    @property
    def whole_spec(self) -> StateSpec:
        """For wrappers: the states that belong to the whole optimization."""
        return {CONTEXT + key: spec for key, spec in self._context_spec.items()}

    @property
    def horizon(self) -> int:
        """The number of steps for which the rule was meta-trained."""
        return self._rule.config.horizon

    def prepare(self) -> list[Part]:
        """For wrappers, first in every step: make all states that the step needs, tell of a low lr.

        Returns:
            What will be stepped.

        Raises:
            RuntimeError: a gradient is sparse; or a gradient or a state does not fit its parameter.
        """
        parts = list(self._parts())
        if parts:
            self._advice.on_step(self.param_groups, self._schedule.total, self._steps)
        return parts

    def take(self, loss: Tensor) -> Tensor:
        """For wrappers: a step of the rule, which counts nothing, and exchanges no loss.

        Args:
            loss: () of all ranks that step together.

        Returns:
            () bool, whether it was taken: all numbers were finite, and some gradient not zero.
        """
        return self._advance(list(self._parts()), loss, whole(listed(self.param_groups), self.state))[0]

    def restart(self) -> None:
        """For wrappers: begin afresh, from zero states, as rules are meta-trained to; counters go on."""
        keys = {"step", interpolation.LAG, *self._coordinate_spec, *self._tensor_spec, *self.whole_spec}
        for param in listed(self.param_groups):
            for key in keys & self.state.get(param, {}).keys():
                self.state[param][key].zero_()

    def fall(self, group: dict[str, Any]) -> float:
        """For wrappers: what others who step multiply their learning rate by, so that a run of known length ends."""
        return self._schedule.fall(self._steps)

    def decay(self, group: dict[str, Any]) -> float:
        """For wrappers: the part of itself that a parameter of a group loses in a step."""
        factor = float(self._schedule.factor(group, self._steps))
        return float(group["lr"]) * factor * self._rule.config.decay_unit * float(group["weight_decay"])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it parameters are the mean of the latest ones, for evaluation; after it they are what they were.

        The mean is over about the last tenth of all steps, and part of the state. A network's own statistics, such as
        BatchNorm's, are not averaged: see `torch.optim.swa_utils.update_bn`.

        Raises:
            RuntimeError: the optimizer was made without `averaging=True`, or this is within another such context.
        """
        if not self._averaging:
            raise RuntimeError("averaged(): nothing was averaged; make the optimizer with averaging=True")
        if self._lent:
            raise RuntimeError("averaged() within averaged(): parameters are their means already")
        self._lent = True
        try:
            with average.swapped(listed(self.param_groups), self.state):
                yield
        finally:
            self._lent = False

    def health(self) -> dict[str, int]:
        """How often a step was taken, and how often it was skipped for what reason.

        Returns:
            `steps` taken; and steps skipped because of a `nonfinite_gradient`, `nonfinite_loss` or
            `nonfinite_parameter` (a step may have several reasons), or because of a `zero_gradient` (all of
            them zero). With a safeguard also `learned_steps`, `adam_steps`, the number of `trials` that the rule
            was given, and how many windows were `undone`. Counted since the start of training: the counters travel
            in the state dict.
        """
        return counters(whole(listed(self.param_groups), self.state)) if self.guard is None else self.guard.health(self)

    def __repr__(self) -> str:
        """The groups, and what rule they are optimized with."""
        guarded = "" if self.guard is None else ", safeguard adam"
        made = "size from a schedule" if self._rule.config.scheduled else f"made for {self.horizon:,} steps"
        kind = f"rule {self._name}, {made}{guarded}"
        return super().__repr__().replace("(", f"({kind}", 1)

    def _share(self) -> State:
        """Put what belongs to the whole optimization beside every state; all of it."""
        return share(listed(self.param_groups), self.state, self.whole_spec)

    def _steps(self) -> Tensor:
        """() the number of steps that were taken."""
        return taken(listed(self.param_groups), self.state)

    def _parts(self) -> Iterator[Part]:
        """Every parameter that has a gradient, here or elsewhere, with its state, which is made on first use."""
        return self._collector.collect(
            self.param_groups,
            self.state,
            lambda group: self._schedule.factor(group, self._steps),
            self._schedule.anytime,
        )

    def _advance(self, parts: list[Part], loss: Tensor, found: State) -> Tensor:
        """A step of the rule, where `found` belongs to the whole; the verdict: see `diagnose`."""
        context_state = {key: found[CONTEXT + key] for key in self._context_spec}
        if self._replicas is not None and (kernel := self._replicas.whole(parts, loss)) is not None:
            return kernel.step(parts, loss)
        sums, pulse = observe(parts, self._replicas)
        verdict = diagnose(pulse, loss, sums)
        if self._replicas is not None:
            advance(self._replicas, parts, sums, loss, context_state, verdict[0])
        else:
            assert isinstance(self._rule, ExportedRule)
            advance_exported(self._rule, parts, loss, context_state, verdict[0])
        return verdict

    def state_dict(self) -> dict[str, Any]:
        """As torch's; what belongs to the whole optimization is beside every parameter's state."""
        if self.state:
            self._share()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state: nothing is cast to the parameter's dtype, nothing is shared with the argument.

        Whatever dtype it was saved in, the network's memory is kept in this optimizer's `state_dtype`; from bfloat16 to
        float32 no number changes, the other way they are rounded. The rest is loaded as it is. A scheduler that was
        made before still drives lr. A mean that this optimizer does not go on with (`averaging`) is left out.

        Raises:
            ValueError: the state belongs to another rule, another optimizer, or to parameters of another shape.
        """
        exact: dict[Tensor, dict[str, Any]] = {}
        driven = [group.get("initial_lr") for group in self.param_groups]
        coordinates = self._coordinate_spec | interpolation.SPEC

        def check(_: Optimizer, saved: dict[str, Any]) -> None:
            exact.update(saved_states(listed(self.param_groups), saved))
            ours = any("step" in state for state in saved["state"].values())
            for param, state in exact.items():
                if isinstance(state.get("step"), int | float):
                    state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)
                own = self._coordinate_spec if interpolation.LAG not in state else coordinates
                specs = own, self._tensor_spec, self._context_spec
                check_state(state, param, *specs, others=("health", average.KEY, *STATE), foreign=ours)
            check_saved_groups(self.param_groups, saved["param_groups"])

        def restore(_: Optimizer) -> None:
            for group, initial in zip(self.param_groups, driven, strict=True):
                if initial is not None:
                    group.setdefault("initial_lr", initial)
            for param, state in exact.items():
                if not self._averaging:
                    for found in (state, self.state.get(param, {})):
                        found.pop(average.KEY, None)
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        kept = coordinates[key][1] if key in coordinates else value.dtype
                        value = value.to(param.device, kept, copy=True)
                    self.state[param][key] = value
            if any("step" in state for state in exact.values()):
                if not whole(listed(self.param_groups), self.state):
                    warnings.warn(NOT_SAVED, stacklevel=outside())
                self._share()
            self._collector.forget()
            if self._replicas is not None:
                self._replicas.forget()
            self._advice.calls = max((int(state["step"]) for state in exact.values() if "step" in state), default=0)
            if self.guard is not None:
                self.guard.left = {}

        with around_load(self, check, restore):
            super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """torch keeps only defaults, state and groups; a copy needs its rule as well."""
        specs = ("_coordinate_spec", "_tensor_spec", "_context_spec")
        own = ("_rule", "_name", "_collector", "_replicas", *specs, "guard", "_advice", "_schedule", "_averaging")
        copied = {key: getattr(self, key) for key in own}
        group = self._process_group if self._process_group == ALONE else None
        return super().__getstate__() | copied | {"_process_group": group}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Groups saved before a flag existed get its default."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)
            if "safeguard_lr" in self.defaults:
                group.setdefault("safeguard_lr", self.defaults["safeguard_lr"])
            group.setdefault("momentum", 0.0)
