"""LearnedOptimizer: a frozen rule as a drop-in torch.optim.Optimizer."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from l2o_runtime.artifact import find_rule, load_rule
from l2o_runtime.exported import SUFFIXES, ExportedRule, load_exported
from l2o_runtime.gram import State
from l2o_runtime.rule import Rule, zeros

CHUNK = 16384
"""Coordinates advanced at a time: bounds the memory of the LSTM's gates (about 1 kB per coordinate)."""

CONTEXT = "context_"
"""Prefix of the context's state, which is kept beside that of the first parameter."""


@dataclass
class _Part:
    """One parameter in one step, or a chunk of it: flat float32 views and copies."""

    param: Tensor
    grad: Tensor
    coordinates: State
    offset: int

    def chunks(self) -> Iterator["_Part"]:
        for start in range(0, self.param.numel(), CHUNK):
            piece = slice(start, start + CHUNK)
            # A scalar (the step count) belongs to every chunk.
            state = {k: v[piece] if v.shape[0] == self.param.shape[0] else v for k, v in self.coordinates.items()}
            yield _Part(self.param[piece], self.grad[piece], state, self.offset + start)


def _check_group(group: dict[str, Any]) -> None:
    for key in ("lr", "weight_decay"):
        value = group.get(key, 0.0)
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{key}: expected a number or a tensor of one element, got shape {tuple(value.shape)}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{key}: expected a finite number, 0 or more, got {value}")


class LearnedOptimizer(Optimizer):
    """Optimize with a frozen learned rule.

        θ ← θ · (1 − lr · weight_decay),  θ ← θ + lr · Δ,  [Δ, h'] = M(features(g), context, h; φ)

    The context is computed from all parameters that have a gradient; each keeps its own recurrent state.
    Coordinates are computed in float32 whatever the parameter's dtype.

    Args:
        params: as for any torch optimizer: tensors, named tensors, or groups with their own `lr` and
            `weight_decay`.
        rule: a bundled name, or a file: `.safetensors`, or `.pt`, `.pt2`, `.onnx` that `l2o export` wrote.
        lr: factor on the learned step; 1 is what the rule was meta-trained with.
        weight_decay: decoupled weight decay, as in AdamW. It is multiplied by lr, so values that suit
            AdamW at lr = 1e-3 are a thousand times larger than those for lr = 1.

    Raises:
        ArtifactError: the rule cannot be read.
        ValueError: an hyper-parameter is out of range, or a parameter is complex.

    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = LearnedOptimizer(model.parameters())
    >>> loss = model(torch.ones(8, 3)).square().mean()
    >>> loss.backward()
    >>> optimizer.step(loss=loss)
    """

    def __init__(
        self,
        params: ParamsT,
        rule: str | Path = "default",
        lr: float | Tensor = 1.0,
        *,
        weight_decay: float = 0.0,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay}
        _check_group(defaults)
        path = find_rule(rule)
        self._rule: Rule | ExportedRule = load_exported(path) if path.suffix in SUFFIXES else load_rule(path)
        self._warned = False
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; they start with a fresh state."""
        _check_group(param_group)
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.is_complex():
                raise ValueError("complex parameters are not supported: optimize torch.view_as_real(param) instead")

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
        """
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
            loss = returned if loss is None else loss
        work = list(self._parts())
        if work:
            parts = [part for _, _, part in work]
            context_state = self._context_state()
            value = self._loss_value(loss, parts[0].param.device)
            if isinstance(self._rule, Rule):
                deltas = self._advance(self._rule, parts, value, context_state)
            else:
                deltas = self._advance_exported(self._rule, parts, value, context_state)
            for (group, param, _), delta in zip(work, deltas, strict=True):
                self._apply(param, delta, group)
        return returned

    def _parts(self) -> Iterator[tuple[dict[str, Any], Tensor, _Part]]:
        """Every parameter with a gradient: its group, itself, and its state as flat views."""
        offset = 0
        grouped = [(g, p) for g in self.param_groups for p in g["params"]]
        for group, param in grouped:
            start, offset = offset, offset + param.numel()
            if param.grad is None or param.numel() == 0:
                continue
            if param.grad.is_sparse:
                raise RuntimeError("LearnedOptimizer does not support sparse gradients: use sparse=False")
            coordinates = self._coordinate_state(param)
            yield (
                group,
                param,
                _Part(
                    param.detach().reshape(-1).float(),
                    param.grad.detach().reshape(-1).float(),
                    coordinates,
                    start,
                ),
            )

    def _coordinate_state(self, param: Tensor) -> State:
        """The rule's state of a parameter as views (n, …) of what `self.state` holds; made on first use."""
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for key, (shape, dtype) in self._rule.coordinate_spec.items():
                if key != "step":
                    state[key] = torch.zeros((*param.shape, *shape), dtype=dtype, device=param.device)
        views = {}
        for key, (shape, _) in self._rule.coordinate_spec.items():
            stored = state[key].to(param.device) if key == "step" else state[key]
            views[key] = stored.reshape(1) if key == "step" else stored.view(-1, *shape)
        return views

    def _context_state(self) -> State:
        """The context's state, kept beside that of the first parameter: state belongs to parameters."""
        first = self.param_groups[0]["params"][0]
        state = self.state[first]
        for key, value in zeros(self._rule.context_spec, (), first.device).items():
            state.setdefault(CONTEXT + key, value)
        return {key: state[CONTEXT + key] for key in self._rule.context_spec}

    def _loss_value(self, loss: Tensor | float | None, device: torch.device) -> Tensor:
        if loss is None:
            if self._rule.config.needs_loss and not self._warned:
                self._warned = True
                warnings.warn(
                    "this rule was meta-trained with the loss at every step: call step(loss=loss)",
                    stacklevel=4,
                )
            return torch.zeros((), device=device)
        value = torch.as_tensor(loss, dtype=torch.float32, device=device).detach()
        if value.numel() != 1:
            raise ValueError(f"loss: expected one number, got shape {tuple(value.shape)}")
        return value.reshape(()).nan_to_num(0.0, 0.0, 0.0)

    def _advance(self, rule: Rule, parts: list[_Part], loss: Tensor, context_state: State) -> list[Tensor]:
        """Observe all, contextualise once, update each, chunk by chunk; states are written in place."""
        device = loss.device
        statistics = torch.zeros((), device=device)
        for part in parts:
            local = self._rule_on(part.param.device)
            for piece in part.chunks():
                seen = local.observe(piece.param, piece.grad, piece.coordinates, piece.offset)
                statistics = statistics + seen.to(device)
        context, new = self._rule_on(device).contextualise(statistics, loss, context_state)
        _write(context_state, new)
        deltas = []
        for part in parts:
            local, here = self._rule_on(part.param.device), context.to(part.param.device)
            pieces = []
            for piece in part.chunks():
                delta, state = local.update(piece.grad, piece.param, here, piece.coordinates)
                _write(piece.coordinates, state)
                pieces.append(delta)
            deltas.append(torch.cat(pieces))
        return deltas

    def _advance_exported(
        self, rule: ExportedRule, parts: list[_Part], loss: Tensor, context_state: State
    ) -> list[Tensor]:
        """The same through an exported file, which takes all coordinates at once."""
        sizes = [part.param.numel() for part in parts]

        def join(tensors: list[Tensor]) -> Tensor:
            # The step count is one number per parameter here, and one per coordinate in the file.
            return torch.cat([(t.expand(n) if len(t) != n else t).cpu() for t, n in zip(tensors, sizes, strict=True)])

        coordinates = {k: join([part.coordinates[k] for part in parts]) for k in rule.coordinate_spec}
        params, grads = join([part.param for part in parts]), join([part.grad for part in parts])
        delta, coordinates, new = rule(params, grads, loss, coordinates, context_state)
        _write(context_state, new)
        for key, value in coordinates.items():
            for part, piece in zip(parts, value.split(sizes), strict=True):
                _write(part.coordinates, {key: piece})
        return list(delta.split(sizes))

    def _rule_on(self, device: torch.device) -> Rule:
        assert isinstance(self._rule, Rule)
        return self._rule.to(device)

    def _apply(self, param: Tensor, delta: Tensor, group: dict[str, Any]) -> None:
        self.state[param]["step"] += 1
        lr, decay = group["lr"], group["weight_decay"]
        if decay:
            param.mul_(1 - lr * decay)
        param.add_(delta.to(param).view(param.shape) * lr)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state exactly: nothing is cast to the parameter's dtype, nothing is shared with the argument.

        Raises:
            ValueError: the state belongs to another rule or to parameters of another shape.
        """
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(saved, params, strict=True):
            if index not in state_dict["state"]:
                continue
            state = state_dict["state"][index]
            for key, (shape, _) in self._rule.coordinate_spec.items():
                want = () if key == "step" else (*param.shape, *shape)
                found = tuple(state[key].shape) if key in state else None
                if "step" in state and found != want:
                    raise ValueError(f"state {key} is {found}, this rule needs {want}: it was saved with another rule")
            # torch casts all but `step` to the parameter's dtype, which would destroy float32 and int64 state.
            self.state[param] = {
                k: v.to("cpu" if k == "step" else param.device, copy=True) if isinstance(v, Tensor) else v
                for k, v in state.items()
            }

    def __getstate__(self) -> dict[str, Any]:
        """torch keeps only defaults, state and groups; a copy needs its rule as well."""
        return super().__getstate__() | {"_rule": self._rule, "_warned": self._warned}


def _write(state: State, new: State) -> None:
    """Overwrite tensors in place; the step count is advanced once per parameter, elsewhere."""
    for key, value in new.items():
        if key != "step":
            state[key].copy_(value)
