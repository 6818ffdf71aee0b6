"""Who is compared: baselines over their grids of learning rates, and learned rules."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from l2o_runtime import HorizonWarning, LearnedOptimizer
from l2o_runtime.config import require
from l2o_runtime.contexts import passes
from l2o_runtime.files.artifact import find_rule, read_learned
from l2o_runtime.learned import Learned
from l2o_runtime.rules import Rule
from l2o_runtime.solvers import Descent, Point, Problems, Solver
from l2o_runtime.state import State
from l2o_runtime.stepping import schedule as stepping
from l2o_training.compare.baselines import BASELINES, Baseline, cosine, find_baselines
from l2o_training.compare.code import OWN, code_version
from l2o_training.fused.lstm import fuse

REFERENCE = "adam"
"""The tuned baseline that sets the target; without it there are no ratios."""

MakeOptimizer = Callable[[Iterable[Tensor], float, int], tuple[Optimizer, LRScheduler | None]]
MakeSolver = Callable[[float, int], Solver]

Schedule = Literal["cosine", "total"]
"""What a rule may be run under beside what it does by itself."""

SCHEDULES: dict[Schedule, str] = {"cosine": "cosine to 0", "total": "told how long the run is"}
"""In words."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An optimizer with the settings it may be run with.

    Attributes:
        name: how tables call it.
        label: what it is, in words.
        identity: what its numbers belong to: its settings, or the digest of a rule's file.
        optimizer: for training scripts: parameters, learning rate and number of steps → torch optimizer and schedule.
        solver: for flat tasks: learning rate and number of steps → solver.
        lrs: learning rates; the best is taken. A learned rule has one, 1.
        path: file of a rule; None for a baseline.
        horizon: steps that a rule was meta-trained for.
        seen: data sets that a rule was meta-trained or validated on.
        code: of a baseline, what its steps are made of beside torch's optimizers, "module:name".
    """

    name: str
    label: str
    identity: str
    optimizer: MakeOptimizer
    solver: MakeSolver
    lrs: tuple[float, ...]
    path: Path | None = None
    horizon: int = 0
    seen: frozenset[str] = frozenset()
    code: tuple[str, ...] = ()

    @property
    def learned(self) -> bool:
        """Whether it is a rule."""
        return self.path is not None

    @property
    def quiet(self) -> tuple[type[Warning], ...]:
        """Warnings of its steps that reports tell in their own words."""
        return (HorizonWarning,) if self.learned else ()

    @property
    def stepping(self) -> tuple[str, str]:
        """What its steps depend on beside its identity: the code in training scripts, and on flat tasks."""
        if not self.learned:
            version = code_version(f"{Baseline.__module__}:Baseline", *self.code)
            return version, version
        script, flat = (code_version(f"{__name__}:{make.__name__}") for make in (_rule_optimizer, _rule_solver))
        return f"{script} {_compiled()}", f"{flat} {_compiled()}"


def _compiled() -> str:
    """Whether kernels act, whose rounding long runs amplify."""
    return "plain" if passes.turned_off() or find_spec("llvmlite") is None else "compiled"


def of_baseline(baseline: Baseline) -> Contender:
    """A baseline as a contender; its identity are the optimizer's name and all that it is told."""
    kind: Any = getattr(baseline.make, "func", baseline.make)
    parts = [kind] if baseline.schedule is None else [kind, baseline.schedule]
    told = "".join(f", {key}={value}" for key, value in getattr(baseline.make, "keywords", {}).items())
    return Contender(
        name=baseline.name,
        label=baseline.label,
        identity=f"{kind.__name__}{told}{f', {baseline.schedule.__name__}' if baseline.schedule else ''}",
        optimizer=baseline.optimizer,
        solver=baseline.solver,
        lrs=baseline.grid,
        code=tuple(f"{part.__module__}:{part.__name__}" for part in parts if part.__module__.split(".")[0] in OWN),
    )


def baselines(text: str, thin: int = 1, *, flat: bool = False, structured: bool = False) -> list[Contender]:
    """Baselines by name, such as "adam,momentum", or "all". The reference has to be among them.

    Args:
        text: names.
        thin: take every n-th learning rate of their grids.
        flat: whether they are for flat tasks.
        structured: whether all of these have A and b.

    Raises:
        ConfigError: an unknown one, one that cannot run there, or no reference.
    """
    found = [of_baseline(baseline) for baseline in find_baselines(text, flat=flat, structured=structured)]
    names = [contender.name for contender in found]
    require(REFERENCE in names, f"--baselines: {REFERENCE} sets the target and has to be among them, got {text!r}")
    return [replace(contender, lrs=contender.lrs[::thin]) for contender in found]


def rules(
    names: Iterable[str], under: Sequence[Schedule | None] = (None,), weight_decay: float = 0.0
) -> list[Contender]:
    """Learned rules by bundled name or file.

    Args:
        names: which.
        under: what each competes under, one after the other; None is by itself.
        weight_decay: in training scripts.

    Raises:
        ArtifactError: one cannot be read.
        ConfigError: one is given twice, or two have the same name.
    """
    found: dict[str, Contender] = {}
    for text in names:
        path = find_rule(text)
        given = path in {contender.path for contender in found.values()}
        require(not given, f"{text}: this rule is given twice, as {path}")
        for contender in [of_rule(name_of(path), path, schedule, weight_decay) for schedule in under]:
            free = contender.name not in found and contender.name not in BASELINES
            advice = "rename the file, or its folder if it is rule.safetensors"
            require(free, f"{text}: the name {contender.name!r} is taken: {advice}")
            found[contender.name] = contender
    return list(found.values())


def of_rule(name: str, path: Path, schedule: Schedule | None = None, weight_decay: float = 0.0) -> Contender:
    """A rule's file as a contender, handed the loss; weight decay is that of training scripts.

    Raises:
        ArtifactError: it cannot be read.
    """
    found, provenance = read_learned(path)
    digest, kind = hashlib.sha256(path.read_bytes()).hexdigest(), "rule" if isinstance(found, Rule) else "solver"
    told = [SCHEDULES[schedule]] if schedule else []
    decays = [f"weight decay {weight_decay:g}"] if weight_decay else []
    return Contender(
        name=name if schedule is None else f"{name}-{schedule}",
        label=", ".join([f"learned {kind}, lr 1, not tuned", *told, *decays]),
        identity=", ".join([digest, *([schedule] if schedule else []), *decays]),
        optimizer=partial(_rule_optimizer, path, schedule, weight_decay),
        solver=partial(_rule_solver, path, digest, schedule),
        lrs=(1.0,),
        path=path,
        horizon=found.config.horizon,
        seen=frozenset(_data_sets(provenance)),
    )


def _rule_optimizer(
    path: Path, schedule: Schedule | None, weight_decay: float, params: Iterable[Tensor], lr: float, steps: int
) -> tuple[Optimizer, LRScheduler | None]:
    """A rule's optimizer for a script of so many steps, and its schedule."""
    length = steps if schedule == "total" else None
    optimizer = LearnedOptimizer(params, rule=path, lr=lr, weight_decay=weight_decay, total_steps=length)
    return optimizer, CosineAnnealingLR(optimizer, steps) if schedule == "cosine" else None


def _rule_solver(path: Path, digest: str, schedule: Schedule | None, lr: float, steps: int) -> Solver:
    """The same for flat tasks, without torch's optimizers; a learned solver is what it is."""
    rule = _loaded(path, digest)
    if isinstance(rule, Solver):
        return rule
    if schedule is None:
        return Descent(rule)
    own = stepping.Schedule(steps if schedule == "total" else None, fades=rule.config.scheduled)

    def factor(done: int) -> float:
        lr = cosine(done, steps) if schedule == "cosine" else 1.0
        return lr * float(own.factor({"lr": lr, "initial_lr": 1.0, "top_lr": 1.0}, lambda: torch.tensor(done)))

    return Scheduled(Descent(rule, scheduled=False), factor)


@functools.lru_cache(8)
def _loaded(path: Path, digest: str) -> Learned:
    """A frozen rule or solver; the digest is that of the file, so that another file is read anew."""
    found, _ = read_learned(path)
    return fuse(found) if isinstance(found, Rule) else found


class Scheduled(Solver):
    """Another solver's steps, times a factor.

    Args:
        solver: makes the steps.
        factor: after so many steps.
    """

    def __init__(self, solver: Solver, factor: Callable[[int], float]):
        super().__init__()
        self.solver, self.factor = solver, factor

    def init(self, problems: Problems) -> State:
        """The other's state, and the number of steps."""
        return self.solver.init(problems) | {"done": torch.zeros((), dtype=torch.int64)}

    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """θ + factor · (what the other would make of θ, less θ)."""
        done = state["done"]
        params, state = self.solver.step(point, {key: value for key, value in state.items() if key != "done"})
        moved = point.params + self.factor(int(done)) * (params - point.params)
        return moved, state | {"done": done + 1}


def name_of(path: Path) -> str:
    """A short name for a rule's file: the file's own, or its folder's where that is `rule`."""
    return path.stem if path.stem != "rule" else path.absolute().parent.name


def _data_sets(provenance: dict[str, Any]) -> Iterable[str]:
    """Names of the data sets in a rule's provenance and in that of the rule it started from, as far as they tell."""
    config = provenance.get("config")
    for key in ("tasks", "validation_tasks"):
        tasks = config.get(key) if isinstance(config, dict) else None
        for task in tasks if isinstance(tasks, list) else []:
            if isinstance(task, dict) and isinstance(task.get("data"), str):
                yield task["data"]
    if isinstance(provenance.get("start"), dict):
        yield from _data_sets(provenance["start"])
