"""Should the newest gradient weigh more in the momentum of matrices, as short runs on noisy minibatches want it?

    python research/momentum.py --data-root data --steps 500 --tasks lenet char-lstm --weights 1 2 4

Weights are beside the default's, 0.19, where the average before it weighs 0.81. Runs are told their length.
"""

import math
import tempfile
from pathlib import Path

import torch
from everyday_loop import measure, parser

from l2o_runtime import make_rule, save_rule
from l2o_runtime.rules import DirectionalConfig
from l2o_training.compare import contenders


def weighing(path: Path, weight: float) -> Path:
    """A file with the default's step, in which the newest gradient weighs so many times as much."""
    torch.manual_seed(0)
    rule = make_rule(DirectionalConfig(momentum=True))
    with torch.no_grad():
        rule.momentum.fill_(math.log(weight) / 2)
    save_rule(path, rule)
    return path


def main() -> None:
    """Run all weights on every task."""
    found = parser(__doc__)
    found.add_argument("--weights", nargs="+", type=float, default=[1.0, 2.0, 4.0])
    options = found.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = [weighing(Path(folder) / f"{weight:g}.safetensors", weight) for weight in options.weights]
        measure(options, [(path.stem, contenders.of_rule(path.stem, path, "total"), 1.0) for path in paths])


if __name__ == "__main__":
    main()
