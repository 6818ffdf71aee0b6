"""Do gradients agree with their average over the hundred steps before, in the course of a run?

Verdict: only where steps are too short, once the first hundred steps are over:
docs/decisions/0098-steps-lengthen-where-gradients-agree.md.

    python research/agreement.py --data-root data --tasks logistic siren --at 30 100 300 800 2300

A line per step of `--at`: the least and the greatest cosine of a matrix, and of all parameters, without lengthening;
then the loss at the end.
"""

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from everyday_loop import measure, parser, untrained
from torch import Tensor

from l2o_runtime.rules import DirectionalConfig, agreement, steering
from l2o_runtime.rules.geometry import Geometry
from l2o_runtime.rules.steering import Seen
from l2o_training.compare import contenders


@contextmanager
def watched(task: str, at: set[int]) -> Iterator[None]:
    """Print what the network sees of agreement over a hundred steps."""
    plain, steps = steering.inputs_of, itertools.count(1)

    def inputs_of(seen: Seen, everywhere: Tensor, signal: Tensor, shapes: Geometry) -> list[Any]:
        step = next(steps)
        if step in at:
            matrices, all_ = seen.slow[shapes.matrix], everywhere.flatten()[0]
            print(f"{task}\tstep {step}\t{matrices.min():.2f} … {matrices.max():.2f}\tall {all_:.2f}", flush=True)
        return plain(seen, everywhere, signal, shapes)

    with patch.object(steering, "inputs_of", inputs_of), patch.dict(os.environ, L2O_KERNELS="plain"):
        yield


def main() -> None:
    """Watch all tasks."""
    found = parser(__doc__)
    found.add_argument("--at", nargs="+", type=int, default=[30, 100, 300, 800, 1500, 2300])
    options = found.parse_args()
    with tempfile.TemporaryDirectory() as folder, patch.object(agreement, "LENGTHENING", 0.0):
        path = untrained(Path(folder) / "untrained.safetensors", DirectionalConfig())
        tasks = options.tasks
        for options.tasks in ([task] for task in tasks):
            with watched(options.tasks[0], set(options.at)):
                measure(options, [("told", contenders.of_rule("told", path, "total"), 1.0)])


if __name__ == "__main__":
    main()
