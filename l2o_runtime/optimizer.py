"""LearnedOptimizer: a frozen rule as a drop-in torch.optim.Optimizer."""

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from l2o_runtime.files.artifact import SUFFIXES, find_rule, load_rule
from l2o_runtime.files.exported import ExportedRule, load_exported
from l2o_runtime.rules import Rule
from l2o_runtime.state import State, zeros
from l2o_runtime.stepping.distributed import ALONE, Groups, check_process_group, loss_groups, mean_loss, meeting_place
from l2o_runtime.stepping.engine import REASONS, Replicas, advance, advance_exported, diagnose, observe
from l2o_runtime.stepping.parts import CONTEXT, STATE_DTYPES, Part, awaited, check_state, kept_in, make_part
from l2o_runtime.wrappers import safeguard as guard

HEALTH = ("steps", *REASONS)
"""What is counted, in the order of the state `health`."""

FIRST_STEPS = 10
"""So many steps a learning rate may be low, as in a warm-up, before it is taken for one that was meant for Adam."""

LOW_LR = 0.05
"""Learning rates below this train next to nothing."""

RANKS = (
    "pass process_group=torch.distributed.group.WORLD if they step together (DDP), for the mean of their losses; "
    f"or process_group={ALONE!r} if this one trains by itself"
)
"""What to do where it is not known which ranks step together."""


class HorizonWarning(UserWarning):
    """A run has become longer than those that its rule was meta-trained for."""


LEFT_OVER = (
    "lr has been at most {:g} for ten steps, which trains next to nothing: it multiplies the learned step, and 1.0 is "
    "what rules are meta-trained with; is this value left over from another optimizer?"
)
NOT_SAVED = (
    "the state has parameters, but nothing of the whole optimization (context, counters, referee): these start again"
)


def _outside() -> int:
    """The `stacklevel` of a caller of this function's caller that is neither ours nor torch's."""
    ours = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    frame, level = sys._getframe(1), 0
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame, level = frame.f_back, level + 1
    return level + 1


def _check_group(group: dict[str, Any]) -> None:
    """Are numbers what they may be? Those of other kinds, such as NumPy's, become Python's."""
    for key in ("lr", "weight_decay", "safeguard_lr"):
        value = group.get(key, 0.0)
        if isinstance(value, Real) and not isinstance(value, int | float):
            group[key] = value = float(value)
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{key}: expected a number or a tensor of one element, got shape {tuple(value.shape)}")
        if not (isinstance(value, Tensor | int | float) and math.isfinite(value) and value >= 0):
            raise ValueError(f"{key}: expected a finite number, 0 or more, got {value!r}")


class LearnedOptimizer(Optimizer):
    """Optimize with a frozen learned rule.

        θ ← θ · (1 − 0.001 · lr · weight_decay) + lr · Δ,  [Δ, h'] = M(features(g), context, h; φ)

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
        rule: a bundled name, or a file: `.safetensors`, or `.pt`, `.pt2`, `.onnx` that `l2o export` wrote.
        lr: factor on the learned step; 1 is what the rule was meta-trained with.
        weight_decay: decoupled weight decay. Values mean what they mean in AdamW at its default learning rate of
            0.001, for which lr = 1 stands: in a step parameters shrink by 0.001 · lr · weight_decay of themselves.
        maximize: go up the objective instead of down.
        safeguard: "adam" takes Adam's steps until the rule has shown that it does better, and again as soon as
            it does not; see `l2o_runtime.wrappers.safeguard`. It needs the loss at every step.
        safeguard_lr: learning rate of that Adam; it is multiplied by lr.
        state_dtype: `torch.bfloat16` keeps the network's memory in half the space; the step is still computed in
            float32. A state that is loaded is cast to it.
        process_group: the ranks that step together, which average their losses: `torch.distributed.group.WORLD` for
            DDP; or "self" for a rank that trains by itself. Needed by a safeguard where there are several ranks, and
            their parameters are plain. Copies of the optimizer forget a group.

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

    def __init__(
        self,
        params: ParamsT,
        rule: str | Path = "default",
        lr: float | Tensor = 1.0,
        *,
        weight_decay: float = 0.0,
        maximize: bool = False,
        safeguard: Literal["adam"] | None = None,
        safeguard_lr: float = 1e-3,
        state_dtype: torch.dtype = torch.float32,
        process_group: Any = None,
    ):
        if safeguard not in (None, "adam"):
            raise ValueError(f"safeguard: expected 'adam' or None, got {safeguard!r}")
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype: expected one of {STATE_DTYPES}, got {state_dtype!r}")
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "safeguard_lr": safeguard_lr}
        defaults["momentum"] = 0.0  # for schedulers; nothing here reads it
        _check_group(defaults)
        self._safeguard = safeguard
        if not isinstance(rule, str | Path):
            raise TypeError(f"rule: expected a name or a path, got {rule!r}; the learning rate goes by keyword, lr=")
        path = find_rule(rule)
        self._name = str(rule)
        self._rule: Rule | ExportedRule = load_exported(path) if path.suffix in SUFFIXES else load_rule(path)
        coordinate, self._tensor_spec, self._context_spec = self._rule.spec
        self._coordinate_spec = kept_in(state_dtype, coordinate)
        self._replicas = Replicas(self._rule) if isinstance(self._rule, Rule) else None
        check_process_group(process_group)
        self._process_group = process_group
        self._calls = 0
        self._told: set[str] = set()
        self._lrs: list[float] = []
        self._left: dict[Tensor, tuple[float, float]] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; they start with a fresh state."""
        _check_group(param_group)
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
        """
        returned = None
        if closure is not None:
            if not callable(closure):
                raise TypeError("step: expected a closure; pass the loss by keyword, step(loss=loss)")
            with torch.enable_grad():
                returned = closure()
            if not (returned is None or isinstance(returned, (Tensor, Real))):
                raise TypeError(f"closure: expected it to return the loss, got a {type(returned).__name__}")
            loss = returned if loss is None else loss
        groups = loss_groups(self._params(), self._process_group)
        parts = list(self._parts())
        if parts:
            self._warn(loss, groups)
        value = self._loss_value(loss, groups, parts)  # by every rank, for others may wait
        if parts:
            sums, pulse = observe(parts, self._replicas if self._safeguard is None else None)
            good, reasons = diagnose(pulse, value, sums)
            self._share_overall()
            if self._safeguard is None:
                self._learned_step(parts, sums, value, good)
            else:
                self._prepare_safeguard()
                if bool(pulse):
                    if loss is None:
                        raise ValueError("the safeguard compares losses: call step(loss=loss) or step(closure)")
                    good = good & self._guarded_step(parts, value, bool(good))
            self._count(good, reasons)
        return returned

    def health(self) -> dict[str, int]:
        """How often a step was taken, and how often it was skipped for what reason.

        Returns:
            `steps` taken; and steps skipped because of a `nonfinite_gradient`, `nonfinite_loss` or
            `nonfinite_parameter` (a step may have several reasons), or because of a `zero_gradient` (all of
            them zero). With a safeguard also `learned_steps`, `adam_steps`, the number of `trials` that the rule
            was given, and how many windows were `undone`. Counted since the start of training: the counters travel
            in the state dict.
        """
        overall = self._overall()
        counters = overall["health"].tolist() if "health" in overall else [0] * len(HEALTH)
        found = dict(zip(HEALTH, counters, strict=True))
        if self._safeguard is not None:
            referee = guard.Referee.from_tensor(overall["safeguard"]) if "safeguard" in overall else guard.Referee()
            found |= {key: getattr(referee, key) for key in guard.COUNTERS}
        return found

    def __repr__(self) -> str:
        """The groups, and what rule they are optimized with."""
        guarded = f", safeguard {self._safeguard}" if self._safeguard else ""
        kind = f"rule {self._name}, made for {self._rule.config.horizon:,} steps{guarded}"
        return super().__repr__().replace("(", f"({kind}", 1)

    def _overall(self) -> dict[str, Any]:
        """What belongs to the whole optimization, by the first parameter that has it; empty before the first step."""
        keys = ("health", "safeguard", *(CONTEXT + key for key in self._context_spec))
        for param in self._params():
            state = self.state.get(param, {})
            if "health" in state:
                return {key: state[key] for key in keys if key in state}
        return {}

    def _share_overall(self) -> dict[str, Any]:
        """Put what belongs to the whole optimization beside every state, made anew where it is missing."""
        overall = self._overall()
        device = next(self._params()).device
        if "health" not in overall:
            overall["health"] = torch.zeros(len(HEALTH), dtype=torch.int64, device=device)
        missing = {key: spec for key, spec in self._context_spec.items() if CONTEXT + key not in overall}
        overall |= {CONTEXT + key: value for key, value in zeros(missing, (), device).items()}
        if self._safeguard is not None and "safeguard" not in overall:
            overall["safeguard"] = guard.Referee().to_tensor()
        for param in self._params():
            state = self.state.get(param, {})
            if state:
                state.update(overall)
        return overall

    def _params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _trainable(self) -> Iterator[Tensor]:
        return (param for param in self._params() if param.requires_grad)

    def _parts(self) -> Iterator[Part]:
        """Every parameter that has a gradient, here or elsewhere, with its state, which is made on first use."""
        start = 0
        for group in self.param_groups:
            for param in group["params"]:
                if (param.grad is not None or awaited(param)) and param.numel() > 0:
                    yield make_part(group, param, self.state[param], self._coordinate_spec, self._tensor_spec, start)
                start += param.numel()

    def _context_state(self) -> State:
        """The context's state."""
        overall = self._overall()
        return {key: overall[CONTEXT + key] for key in self._context_spec}

    def _warn(self, loss: Tensor | float | None, groups: Groups | None) -> None:
        """Say once that the rule misses its loss or may not see it, that lr is low, that the horizon has passed."""
        if torch.compiler.is_compiling():
            return
        config = self._rule.config
        if groups is None and loss is not None and config.sees_loss and self._safeguard is None:
            needed = ", with which it was meta-trained" if config.needs_loss else ""
            self._tell("ranks", f"there are several ranks, so the rule does not see the loss{needed}: {RANKS}")
        if loss is None and config.needs_loss:
            self._tell("loss", "this rule was meta-trained with the loss at every step: call step(loss=loss)")
        self._calls += 1
        if self._calls <= FIRST_STEPS or not self._lrs:
            self._lrs.append(max(float(group["lr"]) for group in self.param_groups))
        rises = self._lrs[-1] > self._lrs[0]
        if self._calls == FIRST_STEPS == len(self._lrs) and max(self._lrs) < LOW_LR and not rises:
            self._tell("lr", LEFT_OVER.format(max(self._lrs)))
        if self._calls == config.horizon + 1 and self._safeguard is None:
            reached = f"step {self._calls}: the rule was meta-trained for runs of {config.horizon:,} steps"
            advice = "let lr fall, with torch.optim.lr_scheduler.CosineAnnealingLR for one, or take fewer steps"
            self._tell("horizon", f"{reached} and extrapolates from here; {advice}", HorizonWarning)

    def _tell(self, subject: str, message: str, kind: type[Warning] = UserWarning) -> None:
        """Warn, once for every subject, at the line of the script."""
        if subject not in self._told:
            self._told.add(subject)
            warnings.warn(message, kind, stacklevel=_outside())

    def _loss_value(self, loss: Tensor | float | None, groups: Groups | None, parts: list[Part]) -> Tensor:
        """The mean loss of the ranks that step together, () float32; 0 where there is none.

        There is none either where it is not known who steps together: with losses of their own ranks would drift apart.
        """
        if groups is None and self._safeguard is not None:
            raise ValueError(f"there are several ranks, and the safeguard has to know whose losses to compare: {RANKS}")
        device = parts[0].param.device if parts else meeting_place(self._params(), groups or ())
        if not (loss is None or isinstance(loss, (Tensor, Real))):
            raise TypeError(f"loss: expected a number or a tensor of one element, got a {type(loss).__name__}")
        value = torch.as_tensor(0.0 if loss is None else loss, dtype=torch.float32, device=device).detach()
        if value.numel() != 1:
            raise ValueError(f"loss: expected one number, got shape {tuple(value.shape)}")
        value = value.reshape(())
        sees_loss = self._rule.config.sees_loss or self._safeguard is not None
        if groups is None or (groups and not sees_loss):
            return torch.zeros_like(value)
        value = mean_loss(value, loss is not None, groups)
        return -value if self.param_groups[0]["maximize"] else value

    def _count(self, good: Tensor, reasons: list[Tensor]) -> None:
        counted = torch.stack([good, *reasons]).long()
        self._overall()["health"].add_(counted)

    def _learned_step(self, parts: list[Part], sums: Tensor, loss: Tensor, good: Tensor) -> None:
        reach = None if self._safeguard is None else guard.REACH
        if self._replicas is not None:
            advance(self._replicas, parts, sums, loss, self._context_state(), good, reach)
        else:
            assert isinstance(self._rule, ExportedRule)
            advance_exported(self._rule, parts, loss, self._context_state(), good, reach)

    def _prepare_safeguard(self) -> None:
        """Make all of the state in the first step: checkpoints are loaded into what a step without gradients makes."""
        for param in self._trainable():
            guard.prepare(param, self.state[param])
        self._share_overall()

    def _guarded_step(self, parts: list[Part], loss: Tensor, good: bool) -> bool:
        """The learned step or Adam's, as the referee says; whether one was taken."""
        overall = self._overall()
        referee = guard.Referee.from_tensor(overall["safeguard"])
        for param, left in self._left.items():
            if guard.fingerprint(param) != left:
                guard.accept(param, self.state[param])
        self._left = {}
        verdict = referee.judge(float(loss), self._rule.config.horizon) if good else referee.fail()
        overall["safeguard"].copy_(referee.to_tensor())
        states = {param: self.state[param] for param in self._params() if param in self.state}
        for param, state in states.items():
            guard.follow(verdict, param, state)
        if verdict.restore or not good:
            return False
        for group in self.param_groups:
            guard.adam_step(group, self.state, move=not verdict.learned)
        if verdict.restart:
            keys = {"step", *self._coordinate_spec, *self._tensor_spec}
            own = ((v for k, v in state.items() if k in keys) for state in states.values())
            for tensor in chain(self._context_state().values(), *own):
                tensor.zero_()
        if verdict.learned:
            sums, _ = observe(parts, self._replicas)
            self._learned_step(parts, sums, loss, torch.ones_like(loss, dtype=torch.bool))
            self._left = {param: guard.fingerprint(param) for param in self._trainable()}
        return True

    def state_dict(self) -> dict[str, Any]:
        """As torch's; what belongs to the whole optimization is beside every parameter's state."""
        if self.state:
            self._share_overall()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state: nothing is cast to the parameter's dtype, nothing is shared with the argument.

        Whatever dtype it was saved in, the network's memory is kept in this optimizer's `state_dtype`; from bfloat16 to
        float32 no number changes, the other way they are rounded. The rest is loaded as it is.

        Raises:
            ValueError: the state belongs to another rule or to parameters of another shape.
        """
        exact: dict[Tensor, dict[str, Any]] = {}

        def check(_: Optimizer, saved: dict[str, Any]) -> None:
            """The last pre-hook sees what the others made of the argument, before anything is changed."""
            indices = chain.from_iterable(group["params"] for group in saved["param_groups"])
            ours = any("step" in state for state in saved["state"].values())
            for index, param in zip(indices, self._params(), strict=False):  # torch reports a wrong number of them
                exact[param] = saved["state"].get(index, {}).copy()
                if isinstance(exact[param].get("step"), int | float):
                    exact[param]["step"] = torch.tensor(float(exact[param]["step"]), dtype=torch.float32)
                specs = self._coordinate_spec, self._tensor_spec, self._context_spec
                check_state(exact[param], param, *specs, others=("health", *guard.STATE), foreign=ours)

        def restore(_: Optimizer) -> None:
            """The first post-hook undoes torch's casts of all but `step` to the parameter's dtype."""
            for param, state in exact.items():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        kept = self._coordinate_spec[key][1] if key in self._coordinate_spec else value.dtype
                        value = value.to(param.device, kept, copy=True)
                    self.state[param][key] = value
            self._left = {}
            if any("step" in state for state in exact.values()):
                if not self._overall():
                    warnings.warn(NOT_SAVED, stacklevel=_outside())
                self._share_overall()
            self._calls = max((int(state["step"]) for state in exact.values() if "step" in state), default=0)

        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        """torch keeps only defaults, state and groups; a copy needs its rule as well."""
        specs = ("_coordinate_spec", "_tensor_spec", "_context_spec")
        own = ("_rule", "_name", "_replicas", *specs, "_safeguard", "_calls", "_told", "_lrs", "_left")
        copied = {key: getattr(self, key) for key in own}
        group = self._process_group if self._process_group == ALONE else None
        return super().__getstate__() | copied | {"_process_group": group}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Groups saved before a flag existed get its default."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)
            group.setdefault("safeguard_lr", 1e-3)
            group.setdefault("momentum", 0.0)
