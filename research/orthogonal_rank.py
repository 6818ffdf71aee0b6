"""How much of Muon's orthogonalisation does a low rank keep, before any meta-training?

Verdict: most of it, at rank 8: docs/decisions/0092-matrices-are-orthogonalised-at-a-low-rank.md.

    python research/orthogonal_rank.py --data-root data --tasks lenet friedman-mlp
"""

import tempfile
from pathlib import Path

from everyday_loop import measure, parser, untrained

from l2o_runtime.rules import DirectionalConfig
from l2o_training.compare import contenders
from l2o_training.compare.baselines import BASELINES

RATES = (0.001, 0.003, 0.01, 0.03)


def main() -> None:
    """Run everybody on every task."""
    found = parser(__doc__)
    found.add_argument("--ranks", nargs="+", type=int, default=[0, 8, 64])
    options = found.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        who = [(f"AdamW, linear, {lr:g}", contenders.of_baseline(BASELINES["adamw-linear"]), lr) for lr in RATES]
        for rank in options.ranks:
            path = untrained(Path(folder) / f"rank{rank}.safetensors", DirectionalConfig(rank=rank))
            for schedule in ("total", None):
                name = f"rank {rank}, {'total_steps' if schedule else 'anytime'}"
                who.append((name, contenders.of_rule(name, path, schedule), 1.0))
        measure(options, who)


if __name__ == "__main__":
    main()
