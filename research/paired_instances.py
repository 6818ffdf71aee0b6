"""How sure is it that a specialised rule ends below the default on fresh instances of its task?

Verdict: of chars and finetune it is, of LeNet not by the last ten minibatches: docs/gallery.md.

    python research/paired_instances.py runs/gallery/chars/eval/cache/chars chars-total directional-total

Reads what `l2o eval` has kept of every run. A line for the last ten losses and one for the last tenth: the geometric
mean over instances of the ratio of the two optimizers' means, with a 95 % interval over instances.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap


def endings(folder: Path, last: int | None) -> dict[str, float]:
    """Logarithms of mean losses at the end, by instance."""
    found = {}
    for path in sorted(folder.glob("*x1.json")):
        losses = json.loads(path.read_text(encoding="utf-8"))["train"][0]
        count = last or len(losses) // 10
        found[path.stem.rpartition("-")[2]] = math.log(np.mean(losses[-count:]))
    return found


def main() -> None:
    """Print both ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="of a task")
    parser.add_argument("rule")
    parser.add_argument("beside")
    chosen = parser.parse_args()
    for name, last in (("last ten", 10), ("last tenth", None)):
        one, other = (endings(chosen.cache / who, last) for who in (chosen.rule, chosen.beside))
        ratios = np.array([one[key] - other[key] for key in sorted(one.keys() & other.keys())])
        interval = bootstrap((ratios,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
        low, centre, high = np.exp([interval.low, ratios.mean(), interval.high])
        print(f"{name}\t{len(ratios)} instances\t{centre:.2f} [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
