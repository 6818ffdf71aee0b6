"""Should steps grow with the parameters, how long should they be, and how does that depend on the length of a run?

Verdict: at most twofold. Then they may be three times as long, and shorter runs want longer ones, up to 2,500 steps:
docs/decisions/0096-steps-are-in-proportion-to-initial-parameters.md. `--growth 10 --share 1 --lr 0.333` is nearly the
step of before. They should lengthen where gradients go on agreeing:
docs/decisions/0098-steps-lengthen-where-gradients-agree.md; `--lengthening 0` is without that. Zeros and scalars need
sizes of their own: docs/decisions/0099-zeros-and-scalars-have-steps-too.md; `--drawn 0 --foreign 1e9` is without that.
Directions should turn to Adam's where gradients of a tensor go on agreeing:
docs/decisions/0122-directions-turn-where-gradients-agree.md; `--turning 1e9` is without that.

    python research/step_growth.py --data-root data --tasks lenet diabetes --growth 2 10 --share 0.25 1 --lr 0.333 1 2

Runs are told their length, but for `--anytime`; `--lr` multiplies the default's steps.
"""

import itertools
import os
import tempfile
from pathlib import Path
from unittest.mock import patch

from everyday_loop import measure, parser, untrained

from l2o_runtime.rules import DirectionalConfig, agreement, geometry, steering
from l2o_runtime.stepping import schedule
from l2o_training.compare import contenders


def main() -> None:
    """Run all combinations on every task."""
    found = parser(__doc__)
    found.add_argument("--growth", nargs="+", type=float, default=[2.0, 10.0], help="bound on that of steps")
    found.add_argument(
        "--share", nargs="+", type=float, default=[0.25, 1.0], help="of all parameters in a matrix's size"
    )
    found.add_argument("--lengthening", nargs="+", type=float, default=[agreement.LENGTHENING])
    found.add_argument("--drawn", nargs="+", type=float, default=[geometry.DRAWN], help="what weights are at least")
    found.add_argument(
        "--foreign", nargs="+", type=float, default=[geometry.FOREIGN], help="from where on units differ"
    )
    found.add_argument("--turning", nargs="+", type=float, default=[steering.TURNING], help="what τ has to exceed")
    found.add_argument("--anytime", action="store_true", help="runs are not told their length")
    found.add_argument("--lr", nargs="+", type=float, default=[1 / 3, 1.0])
    found.add_argument("--longest", type=float, default=1.0, help="how much longer steps may be in short runs")
    options = found.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = untrained(Path(folder) / "untrained.safetensors", DirectionalConfig())
        for growth, share, lengthening, drawn, foreign, turning in itertools.product(
            options.growth, options.share, options.lengthening, options.drawn, options.foreign, options.turning
        ):
            setting = (
                f"growth {growth:g}, share {share:g}, lengthening {lengthening:g}, drawn {drawn:g}, "
                f"foreign {foreign:g}, turning {turning:g}"
            )
            names = [(f"{setting}, lr {lr:g}", lr) for lr in options.lr]
            under = None if options.anytime else "total"
            with (
                patch.object(steering, "GROWTH", growth),
                patch.object(geometry, "SHARE", share),
                patch.object(agreement, "LENGTHENING", lengthening),
                patch.object(geometry, "DRAWN", drawn),
                patch.object(geometry, "FOREIGN", foreign),
                patch.object(steering, "TURNING", turning),
                patch.object(schedule, "LONGEST", options.longest),
                patch.dict(os.environ, L2O_KERNELS="plain"),  # constants are part of compiled code
            ):
                measure(options, [(name, contenders.of_rule(name, path, under), lr) for name, lr in names])


if __name__ == "__main__":
    main()
