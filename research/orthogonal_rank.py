"""How much of Muon's orthogonalisation does a low rank keep, before any meta-training?

Verdict: most of it, at rank 8: docs/decisions/0092-matrices-are-orthogonalised-at-a-low-rank.md. Each line is a task,
who was run, the mean training loss of the last 50 of 2,500 steps, and the validation loss at the end.

    python research/orthogonal_rank.py --data-root data --tasks lenet friedman-mlp
"""

import argparse
import tempfile
from pathlib import Path

import torch

from l2o_runtime import make_rule, save_rule
from l2o_runtime.rules import DirectionalConfig
from l2o_training.compare import contenders
from l2o_training.compare.baselines import BASELINES
from l2o_training.compare.scripts import ScriptWorkload
from l2o_training.compare.workloads import Group
from l2o_training.tasks.data import Datasets
from l2o_training.tasks.scripts.everyday import RECIPES

RATES = (0.001, 0.003, 0.01, 0.03)


def main() -> None:
    """Run everybody on every task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--tasks", nargs="+", choices=RECIPES, default=list(RECIPES), help="of everyday")
    parser.add_argument("--ranks", nargs="+", type=int, default=[0, 8, 64])
    parser.add_argument("--steps", type=int, default=2500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        who = [(f"AdamW, linear, {lr:g}", contenders.of_baseline(BASELINES["adamw-linear"]), lr) for lr in RATES]
        for rank in options.ranks:
            path = Path(folder) / f"rank{rank}.safetensors"
            torch.manual_seed(0)
            save_rule(path, make_rule(DirectionalConfig(rank=rank)))
            for schedule in ("total", None):
                name = f"rank {rank}, {'total_steps' if schedule else 'anytime'}"
                who.append((name, contenders.of_rule(name, path, schedule), 1.0))
        for name in options.tasks:
            workload = ScriptWorkload(RECIPES[name], Datasets(options.data_root))
            workload.prepare()
            for run, contender, lr in who:
                curves = workload.measure(contender, lr, Group(0, 1), options.steps)
                last = float(curves.train[0, -50:].mean())
                print(f"{name}\t{run}\t{last:.5g}\t{curves.validation[0, -1]:.5g}", flush=True)


if __name__ == "__main__":
    main()
