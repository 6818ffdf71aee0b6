"""Do the first matrix, the last, those in between, and all other tensors want steps of another length?

Verdict: in one architecture they do, not by the same factors elsewhere; so it is learned where a rule is specialised:
docs/decisions/0128-specialised-steps-go-by-place.md.

    python research/places.py --data-root data --tasks friedman-mlp siren --factors 1,1,1,1 1,1,2,1 0.5,1,2,1

Factors are of the first matrix, those in between, the last one, and all else. Runs are told their length.
"""

import math
import tempfile
from pathlib import Path

import torch
from everyday_loop import measure, parser

from l2o_runtime import make_rule, save_rule
from l2o_runtime.rules import DirectionalConfig
from l2o_training.compare import contenders


def saying(factor: float, config: DirectionalConfig) -> float:
    """What a place has to say for steps so many times as long: the inverse of `steering.correction`."""
    bound = math.log(config.grow if factor > 1 else config.shrink)
    return bound * math.atanh(math.log(factor) / bound)


def placed(path: Path, factors: list[float]) -> Path:
    """A file with the default's step, so many times as long by place."""
    torch.manual_seed(0)
    config = DirectionalConfig(places=True)
    rule = make_rule(config)
    with torch.no_grad():
        rule.places.copy_(torch.tensor([saying(factor, config) for factor in factors]))
    save_rule(path, rule)
    return path


def main() -> None:
    """Run all factors on every task."""
    found = parser(__doc__)
    found.add_argument("--factors", nargs="+", default=["1,1,1,1", "1,1,2,1", "0.5,1,1,1", "0.5,1,2,1"])
    options = found.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            text: placed(Path(folder) / f"{text}.safetensors", list(map(float, text.split(","))))
            for text in options.factors
        }
        measure(options, [(text, contenders.of_rule(text, path, "total"), 1.0) for text, path in paths.items()])


if __name__ == "__main__":
    main()
