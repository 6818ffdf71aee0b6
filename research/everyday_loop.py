"""Runs of everyday scripts, one seed each, for questions about a rule before its meta-training.

A line per run: the task, who was run, the mean training loss of the last 50th of all steps, of ten at least, and the
validation loss at the end.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch

from l2o_runtime import make_rule, save_rule
from l2o_runtime.rules import DirectionalConfig
from l2o_training.compare.contenders import Contender
from l2o_training.compare.scripts import ScriptWorkload
from l2o_training.compare.workloads import Curves, Group
from l2o_training.tasks.data import Datasets
from l2o_training.tasks.scripts.everyday import RECIPES


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options that all have."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data-root", type=Path, default=Path("data"))
    found.add_argument("--tasks", nargs="+", choices=RECIPES, default=list(RECIPES), help="of everyday")
    found.add_argument("--steps", type=int, default=2500)
    return found


def untrained(path: Path, config: DirectionalConfig) -> Path:
    """A file with a rule as it is before meta-training."""
    torch.manual_seed(0)
    save_rule(path, make_rule(config))
    return path


def ending(curves: Curves) -> float:
    """Mean training loss of the last 50th of all steps, of ten at least, of the first run."""
    losses = curves.train[0]
    return float(losses[-max(10, len(losses) // 50) :].mean())


def measure(options: argparse.Namespace, who: Iterable[tuple[str, Contender, float]]) -> dict[str, list[float]]:
    """Run everybody, at their rates, on every task; their training losses, task by task."""
    torch.set_num_threads(1)
    everybody = list(who)
    losses: dict[str, list[float]] = {run: [] for run, _, _ in everybody}
    for name in options.tasks:
        workload = ScriptWorkload(RECIPES[name], Datasets(options.data_root))
        workload.prepare()
        for run, contender, lr in everybody:
            curves = workload.measure(contender, lr, Group(0, 1), options.steps)
            losses[run].append(ending(curves))
            print(f"{name}\t{run}\t{losses[run][-1]:.5g}\t{curves.validation[0, -1]:.5g}", flush=True)
    return losses
