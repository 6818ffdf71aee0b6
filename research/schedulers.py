"""Beside a scheduler of torch, how much longer should steps be in short runs, whose length it does not say?

Verdict: as in a run that would end if lr went on falling at its mean pace so far:
docs/decisions/0130-the-pace-of-a-scheduler-says-how-long-a-run-is.md.

    python research/schedulers.py --data-root data --steps 100 --shapes cosine linear warm-cosine warm-linear

A line per run: the task, who was run, the mean training loss of the last 50th of all steps, of ten at least, and the
validation loss at the end; then the means. `plain` has steps as long as lr says.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from everyday_loop import parser
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from l2o_runtime import LearnedOptimizer
from l2o_runtime.files.artifact import find_rule
from l2o_runtime.stepping import schedule
from l2o_training.compare import contenders
from l2o_training.compare.scripts import ScriptWorkload
from l2o_training.compare.workloads import Group
from l2o_training.tasks.data import Datasets
from l2o_training.tasks.scripts.everyday import RECIPES

SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "linear": lambda share: 1 - share,
}
"""How much of lr is left after a share of its fall; `warm-` rises before it."""


def left(shape: str, rise: float, total: int, done: int) -> float:
    """What a schedule leaves of lr after some steps."""
    fall = SHAPES[shape.removeprefix("warm-")]
    first = round(rise * total) if shape.startswith("warm-") else 0
    return (done + 1) / (first + 1) if done < first else fall(min((done - first) / (total - first), 1.0))


def scheduled(
    path: Path, left: Callable[[int, int], float], params: Iterable[Tensor], lr: float, steps: int
) -> tuple[LearnedOptimizer, LambdaLR]:
    """The rule under a scheduler."""
    optimizer = LearnedOptimizer(params, rule=path, lr=lr)
    return optimizer, LambdaLR(optimizer, partial(left, steps))


def main() -> None:
    """Run everybody on every task."""
    found = parser(__doc__)
    every = [*SHAPES, *(f"warm-{shape}" for shape in SHAPES)]
    found.add_argument("--shapes", nargs="+", choices=every, default=every)
    found.add_argument("--rise", type=float, default=0.05, help="share of a run in which lr rises, where it does")
    found.set_defaults(steps=100)
    options = found.parse_args()
    torch.set_num_threads(1)
    path = find_rule("default")
    told = contenders.of_rule("told", path, "total")
    who = [("told", told, schedule.paced)]
    for shape in options.shapes:
        contender = replace(told, name=shape, optimizer=partial(scheduled, path, partial(left, shape, options.rise)))
        who += [(shape, contender, schedule.paced), (f"{shape}, plain", contender, lambda step, left: 1.0)]
    ratios: dict[str, list[float]] = {name: [] for name, _, _ in who}
    for task in options.tasks:
        workload = ScriptWorkload(RECIPES[task], Datasets(options.data_root))
        workload.prepare()
        losses: dict[str, float] = {}
        for name, contender, paced in who:
            with patch.object(schedule, "paced", paced):
                curves = workload.measure(contender, 1.0, Group(0, 1), options.steps)
            losses[name] = float(curves.train[0][-max(10, options.steps // 50) :].mean())
            ratios[name].append(losses[name] / losses["told"])
            print(f"{task}\t{name}\t{losses[name]:.4g}\t{curves.validation[0, -1]:.4g}", flush=True)
    for name, own in ratios.items():
        logs = np.log(np.clip(own, 0.01, 100))
        print(f"{name}\tmean {np.exp(logs.mean()):.2f}\tmedian {np.exp(np.median(logs)):.2f}\tworst {max(own):.2f}")


if __name__ == "__main__":
    main()
