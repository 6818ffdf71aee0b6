"""Who is compared: baselines over their grids of learning rates, and learned rules as drop-in optimizers."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from l2o_runtime import LearnedOptimizer, kernels, layout, optimizer, state
from l2o_runtime.config import require
from l2o_runtime.contexts import base, dmd, gram, kae, passes, progress, sketch, spectra
from l2o_runtime.files.artifact import find_rule, read_rule
from l2o_runtime.rules import coordinate_lstm, features, lstm, tiered
from l2o_runtime.stepping import engine, parts
from l2o_training.compare import baselines
from l2o_training.compare.baselines import Make
from l2o_training.evaluation.evaluate import name_of
from l2o_training.workloads.base import code_version

FORMULAS = (state, lstm, tiered, coordinate_lstm, features, gram, sketch, spectra, base, dmd, kae, progress)
"""Modules with the formulas that a rule's steps depend on."""

STEPPING = (optimizer, engine, parts, layout, passes, kernels)
"""Modules with the rest of what a step does, compiled code aside."""


@dataclass(frozen=True)
class Entrant:
    """An optimizer with the settings it may be run with.

    Attributes:
        name: how tables call it.
        label: what it is, in words.
        identity: what its numbers belong to: its settings, or digests of a rule's file and of the code of rules.
        make: parameters and a learning rate → optimizer.
        lrs: learning rates; the best is taken. A learned rule has one, 1.
        cosine: whether the learning rate falls to zero along a cosine over the run.
        horizon: steps that a rule was meta-trained for; 0 for a baseline.
        seen: data sets that a rule was meta-trained or validated on.
    """

    name: str
    label: str
    identity: str
    make: Make
    lrs: tuple[float, ...]
    cosine: bool = False
    horizon: int = 0
    seen: frozenset[str] = frozenset()

    @property
    def learned(self) -> bool:
        """Whether it is a rule."""
        return self.horizon > 0

    def optimizer(self, params: Iterable[Parameter], lr: float, steps: int) -> tuple[Optimizer, LRScheduler | None]:
        """The optimizer, and its schedule if it has one."""
        optimizer = self.make(params, lr=lr)
        return optimizer, CosineAnnealingLR(optimizer, steps) if self.cosine else None


BASELINES = {
    baseline.name: Entrant(
        baseline.name, baseline.label, baseline.label, baseline.make, baseline.grid, cosine=baseline.anneals
    )
    for baseline in baselines.BASELINES.values()
}
"""Name → baseline."""

REFERENCE = "adam"
"""The tuned baseline that sets the target; without it there are no ratios."""


def find_baselines(text: str) -> list[Entrant]:
    """Baselines from "adam,momentum"; all of them for "all". The reference has to be among them.

    Raises:
        ConfigError: an unknown one, or no reference.
    """
    names = [baseline.name for baseline in baselines.find_baselines(text)]
    require(REFERENCE in names, f"--baselines: {REFERENCE} sets the target and has to be among them, got {text!r}")
    return [entrant for name, entrant in BASELINES.items() if name in names]


def thinned(entrant: Entrant, every: int) -> Entrant:
    """The same with every n-th learning rate of its grid only."""
    return replace(entrant, lrs=entrant.lrs[::every])


def annealed(entrant: Entrant) -> Entrant:
    """The same, whose learning rate falls to zero along a cosine over the run."""
    return replace(
        entrant,
        name=f"{entrant.name}-cosine",
        label=f"{entrant.label}, cosine to 0",
        identity=f"{entrant.identity} cosine",
        cosine=True,
    )


def find_rules(rules: Iterable[str], *, cosine: bool = False) -> list[Entrant]:
    """Learned rules by bundled name or file, as drop-in optimizers that are handed the loss.

    Args:
        rules: which.
        cosine: enter each a second time, `annealed`.

    Raises:
        ArtifactError: one cannot be read.
        ConfigError: two have the same name.
    """
    entrants: dict[str, Entrant] = {}
    for name in rules:
        path = find_rule(name)
        entrant = _rule(name_of(path), path)
        for found in [entrant, annealed(entrant)] if cosine else [entrant]:
            free = found.name not in entrants and found.name not in BASELINES
            advice = "rename the file, or its folder if it is rule.safetensors"
            require(free, f"{name}: the name {found.name!r} is taken: {advice}")
            entrants[found.name] = found
    return list(entrants.values())


def _rule(name: str, path: Path) -> Entrant:
    found, provenance = read_rule(path)
    return Entrant(
        name=name,
        label="learned rule, lr 1, not tuned",
        identity=f"{hashlib.sha256(path.read_bytes()).hexdigest()} {code_version(*FORMULAS, *STEPPING)} {_compiled()}",
        make=partial(LearnedOptimizer, rule=path),
        lrs=(1.0,),
        horizon=found.config.horizon,
        seen=frozenset(_data_sets(provenance)),
    )


def _compiled() -> str:
    """Whether kernels act, whose rounding long runs amplify."""
    return "plain" if passes.turned_off() or find_spec("llvmlite") is None else "compiled"


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
