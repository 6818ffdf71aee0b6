"""Who is timed: Adam, learned rules, the plain LSTM, and any optimizer by its import path."""

import functools
import importlib
import inspect
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from l2o_runtime import LearnedOptimizer, Rule, make_rule, save_rule
from l2o_runtime.config import ConfigError, ContextConfig, DMDConfig, KAEConfig, NoneConfig, require
from l2o_runtime.files.artifact import SUFFIXES, find_rule, load_rule
from l2o_runtime.files.exported import load_exported
from l2o_runtime.rules.lstm import LSTMConfig
from l2o_training.bench.reference import PlainLSTM

ADAM, FOREACH, FUSED, NO_CONTEXT = "Adam", "Adam foreach", "Adam fused", "2×20, no context"
"""The first as PyTorch has it without an argument: a loop over tensors on CPUs."""

CONTEXTS: dict[str, ContextConfig] = {
    NO_CONTEXT: NoneConfig(),
    "2×20, dmd exact": DMDConfig(window=20, rank=1),
    "2×20, dmd sketch": DMDConfig(window=20, rank=1, sketch=1024),
    "2×20, kae sketch": KAEConfig(window=20, sketch=1024),
}
"""Untrained rules that differ in their context alone; sketches have d = 1024."""


@dataclass(frozen=True)
class Racer:
    """An optimizer to be timed.

    Attributes:
        name: in tables.
        make: from parameters.
        references: names of those it is compared with, to be timed in turn with it.
        flops: floating-point operations per parameter and step, where known.
    """

    name: str
    make: Callable[[list[Tensor]], Optimizer]
    references: tuple[str, ...] = (FOREACH, FUSED, ADAM)
    flops: int | None = None


def racers(
    rule: str,
    extras: Iterable[str] = (),
    state_dtype: torch.dtype = torch.float32,
    exported: Path | None = None,
) -> list[Racer]:
    """Everyone, references first.

    Args:
        rule: a bundled name, or a file.
        extras: import paths "module:Class".
        state_dtype: what `LearnedOptimizer` keeps its state in.
        exported: a folder whose files `l2o export` wrote; they are timed too.

    Raises:
        ArtifactError: the rule, or what was exported, cannot be read.
        ConfigError: an import path leads nowhere, or the folder has no such files.
    """
    path = find_rule(rule)
    loaded = load_exported(path) if path.suffix in SUFFIXES else load_rule(path)
    foreach = Racer(FOREACH, partial(Adam, foreach=True), ())
    fused = Racer(FUSED, partial(Adam, fused=True), (FOREACH,))
    default = Racer(ADAM, Adam, (FOREACH,))
    make = partial(LearnedOptimizer, rule=path, state_dtype=state_dtype)
    named = Racer(f"rule {rule}", make, flops=loaded.config.flops)
    contexts = [_untrained(name, context, state_dtype) for name, context in CONTEXTS.items()]
    plain = Racer("plain nn.LSTMCell", partial(PlainLSTM, rule=_rule(NoneConfig())), flops=contexts[0].flops)
    others = [Racer(text, import_optimizer(text)) for text in dict.fromkeys(extras)]
    files = [] if exported is None else _exported(exported)
    return [foreach, fused, default, *contexts, named, plain, *files, *others]


def _exported(folder: Path) -> list[Racer]:
    """The files of a folder, which are read once to say what is wrong with them."""
    found = sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES)
    known = ", ".join(SUFFIXES)
    require(bool(found), f"--exported {folder}: no {known} file there; `l2o export RULE --out {folder}` writes them")
    for path in found:
        load_exported(path)
    return [Racer(path.name, partial(LearnedOptimizer, rule=path)) for path in found]


def _rule(context: ContextConfig) -> Rule:
    torch.manual_seed(0)
    return make_rule(LSTMConfig(context=context)).eval().requires_grad_(False)


def _untrained(name: str, context: ContextConfig, state_dtype: torch.dtype) -> Racer:
    rule = _rule(context)

    def make(params: list[Tensor]) -> Optimizer:
        with tempfile.TemporaryDirectory() as folder:
            save_rule(Path(folder) / "rule.safetensors", rule)
            return LearnedOptimizer(params, rule=Path(folder) / "rule.safetensors", state_dtype=state_dtype)

    references = (FOREACH, FUSED) if name == NO_CONTEXT else (FOREACH, FUSED, NO_CONTEXT)
    return Racer(name, make, references, rule.config.flops)


def import_optimizer(text: str) -> Callable[[list[Tensor]], Optimizer]:
    """The class that "module:Class" names; modules of the working directory are found too.

    Raises:
        ConfigError: there is none.
    """
    module, _, name = text.partition(":")
    require(bool(module and name), f"--extra {text}: expected module:Class, such as torch.optim:SGD")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # whatever a stranger's module raises while it is imported
        raise ConfigError(f"--extra {text}: cannot import {module}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise ConfigError(f"--extra {text}: {module} has no class {name}")
    maker: Callable[[list[Tensor]], Optimizer] = found
    return maker


@functools.cache
def takes_loss(kind: type[Optimizer]) -> bool:
    """Whether optimizers of a class are handed the loss, as learned rules are; looked up once, for steps ask for it."""
    return "loss" in inspect.signature(kind.step).parameters


def stepper(optimizer: Optimizer, loss: Tensor) -> Callable[[], object]:
    """`optimizer.step`, with the loss if it takes one."""
    if takes_loss(type(optimizer)):  # type: ignore[arg-type]  # a class, whose instances' __hash__ mypy looks at
        return partial(optimizer.step, loss=loss)  # type: ignore[call-arg]
    return optimizer.step
