"""Do plain networks of many layers bear the steps of the default rule?

Verdict: of up to five, and shorter ones beyond: docs/decisions/0123-plain-depth-shortens-steps.md.

    python research/plain_depth.py --depths 6 9 12 15 18 --seeds 0 1

Digits of scikit-learn, ReLU layers of 48 with He's initialisation. A line per run: depth, who was run, the seed, the
mean training loss of the last fiftieth of the steps, the highest in their second half, the validation loss at the end.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from everyday_loop import ending

from l2o_runtime.files.artifact import find_rule
from l2o_training.compare import contenders
from l2o_training.compare.baselines import BASELINES
from l2o_training.compare.scripts import ScriptWorkload
from l2o_training.compare.workloads import Group
from l2o_training.tasks.data import Datasets, Load
from l2o_training.tasks.scripts.base import Recipe, Script
from l2o_training.tasks.scripts.everyday import networks
from l2o_training.tasks.scripts.everyday.tables import digits


def plain(depth: int, _: Load) -> Script:
    """So many layers without norms or shortcuts."""
    return digits(partial(networks.plain, (64, *[48] * (depth - 1), 10)))


def main() -> None:
    """Run everybody at every depth."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--depths", nargs="+", type=int, default=[6, 9, 12, 15])
    found.add_argument("--seeds", nargs="+", type=int, default=[0])
    found.add_argument("--steps", type=int, default=2500)
    options = found.parse_args()
    torch.set_num_threads(1)
    rule = find_rule("default")
    who = [
        ("told", contenders.of_rule("told", rule, "total"), 1.0),
        ("anytime", contenders.of_rule("anytime", rule), 1.0),
        ("AdamW, linear, 0.003", contenders.of_baseline(BASELINES["adamw-linear"]), 0.003),
    ]
    for depth in options.depths:
        workload = ScriptWorkload(Recipe(f"plain-{depth}", "", partial(plain, depth)), Datasets(Path()))
        workload.prepare()
        for run, contender, lr in who:
            for seed in options.seeds:
                curves = workload.measure(contender, lr, Group(seed, 1), options.steps)
                highest = float(curves.train[0, options.steps // 2 :].max())
                validation = float(curves.validation[0, -1])
                print(f"{depth}\t{run}\tseed {seed}\t{ending(curves):.3g}\t{highest:.3g}\t{validation:.3g}", flush=True)


if __name__ == "__main__":
    main()
