"""How much do meta-gradients differ from lane to lane, and what does it help to bound each of them?

Verdict: by orders of magnitude, and a bound helps. Norms go from 0.6 to 776; the mean over its standard error is 3.39
where each is at most 1, and 1.34 without (decisions 0074 and 0078).

Lanes of a preset are advanced side by side by a rule that does not change, and the gradient of every truncation is
kept. First come quantiles of their norms; then, for several bounds on the norm of each, how large the mean is beside
its standard error (both over all parameters): the larger the ratio, the more a mean over so many lanes says.

    python research/lane_gradients.py --preset scale --start scale --data-root data
"""

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from l2o_training.config import load_preset
from l2o_training.meta.trainer import Trainer

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def gradients(trainer: Trainer, truncations: int) -> Tensor:
    """Meta-gradients (truncations · lanes, P) of single lanes."""
    found = []
    for _ in range(truncations):
        for slot in trainer.slots:
            slot.tick()
        found += [trainer.estimator.share(trainer.learner.solver, slot).message for slot in trainer.slots]
    return torch.stack(found) * trainer.config.lanes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="scale")
    parser.add_argument("--start", default="", help="rule to begin with; random weights by default")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--lanes", type=int, default=6)
    parser.add_argument("--truncations", type=int, default=22)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = load_preset(args.preset, [f"lanes={args.lanes}", f"start={args.start}", "clip_lanes=false"])
    with tempfile.TemporaryDirectory() as folder:
        found = gradients(Trainer(config, Path(folder) / "run", data_root=args.data_root), args.truncations)
    norms = found.norm(dim=1)
    console, levels = Console(), torch.tensor(QUANTILES, dtype=norms.dtype)
    quantiles = Table(
        "quantile", *(f"{level:.0%}" for level in QUANTILES), title=f"norms of {len(found)} meta-gradients"
    )
    quantiles.add_row("norm", *(f"{value:.3g}" for value in norms.quantile(levels).tolist()))
    console.print(quantiles)
    table = Table("each at most", "norm of the mean", "its standard error", "ratio")
    for bound in (float("inf"), 100.0, 30.0, 10.0, 3.0, 1.0):
        kept = found * (bound / norms).clamp_max(1).unsqueeze(-1)
        mean, error = float(kept.mean(0).norm()), float((kept.var(0).sum() / len(kept)).sqrt())
        table.add_row(f"{bound:g}", f"{mean:.3g}", f"{error:.3g}", f"{mean / error:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
