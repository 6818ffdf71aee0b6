"""Beside a scheduler of torch, how much longer should steps be in short runs, whose length it does not say?

Verdict: as in a run that would end if lr went on falling at its mean pace so far:
docs/decisions/0130-the-pace-of-a-scheduler-says-how-long-a-run-is.md.

    python research/schedulers.py --data-root data --steps 100 --shapes cosine linear warm-cosine warm-linear

A line per run, as in `everyday_loop`, then the means of training losses over those of the run that is told its length.
`plain` has steps as long as lr says.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from everyday_loop import measure, parser
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from l2o_runtime import LearnedOptimizer
from l2o_runtime.files.artifact import find_rule
from l2o_training.compare import contenders
from l2o_training.compare.baselines import cosine

SHAPES: dict[str, Callable[[int, int], float]] = {"cosine": cosine, "linear": lambda done, total: 1 - done / total}
"""What is left of lr after some of the steps of its fall; `warm-` rises before it."""


def left(shape: str, rise: float, total: int, done: int) -> float:
    """What a schedule leaves of lr after some steps."""
    fall = SHAPES[shape.removeprefix("warm-")]
    first = round(rise * total) if shape.startswith("warm-") else 0
    return (done + 1) / (first + 1) if done < first else fall(done - first, total - first)


def scheduled(
    path: Path, schedule: Any, left: Callable[[int, int], float], params: Iterable[Tensor], lr: float, steps: int
) -> tuple[LearnedOptimizer, LambdaLR]:
    """The rule under a scheduler, with a schedule of its own."""
    optimizer = LearnedOptimizer(params, rule=path, lr=lr, schedule=schedule)
    return optimizer, LambdaLR(optimizer, partial(left, steps))


def main() -> None:
    """Run everybody on every task."""
    found = parser(__doc__)
    every = [*SHAPES, *(f"warm-{shape}" for shape in SHAPES)]
    found.add_argument("--shapes", nargs="+", choices=every, default=every)
    found.add_argument("--rise", type=float, default=0.05, help="share of a run in which lr rises, where it does")
    found.set_defaults(steps=100)
    options = found.parse_args()
    path = find_rule("default")
    told = contenders.of_rule("told", path, "total")
    who = [("told", told, 1.0)]
    for shape in options.shapes:
        for name, schedule in ((shape, "auto"), (f"{shape}, plain", "constant")):
            optimizer = partial(scheduled, path, schedule, partial(left, shape, options.rise))
            who.append((name, replace(told, name=name, optimizer=optimizer), 1.0))
    losses = measure(options, who)
    for name, own in losses.items():
        ratios = np.clip(np.divide(own, losses["told"]), 0.01, 100)
        mean, median = np.exp(np.log(ratios).mean()), np.exp(np.median(np.log(ratios)))
        print(f"{name}\tmean {mean:.2f}\tmedian {median:.2f}\tworst {ratios.max():.2f}")


if __name__ == "__main__":
    main()
