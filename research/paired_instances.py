"""How sure is it that a specialised rule ends below the default on fresh instances of its task?

Verdict: of regression, pinn, chars and finetune it is, of LeNet not by the last ten minibatches: docs/gallery.md.

    python research/paired_instances.py runs/gallery/chars/eval/cache/chars chars-total directional-total

Reads what `l2o eval` has kept of every run. A line for the last ten losses and one for the last tenth: the geometric
mean over instances of the ratio of the two optimizers' means, with a 95 % interval over instances.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from l2o_training.compare.statistics import centre, final, log_ratio
from l2o_training.meta.validation import ends


def losses(folder: Path) -> dict[str, list[float]]:
    """Training losses, by instance."""
    return {
        path.stem.rpartition("-")[2]: json.loads(path.read_text(encoding="utf-8"))["train"][0]
        for path in folder.glob("*x1.json")
    }


def main() -> None:
    """Print both ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="of a task")
    parser.add_argument("rule")
    parser.add_argument("beside")
    chosen = parser.parse_args()
    curves = [losses(chosen.cache / who) for who in (chosen.rule, chosen.beside)]
    common = sorted(curves[0].keys() & curves[1].keys())
    one, other = (np.array([own[key] for key in common]) for own in curves)
    for name, end in (("last ten", final), ("last tenth", lambda found: ends(torch.from_numpy(found)).numpy())):
        mean, low, high = np.exp(centre(log_ratio(end(one), end(other)), 0.0))
        print(f"{name}\t{len(common)} instances\t{mean:.2f} [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
