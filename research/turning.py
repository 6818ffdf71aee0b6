"""Should a direction turn to Adam's where a tensor's gradients go on agreeing? Six scripts that nothing was chosen by.

Verdict: yes. Losses are 2.4 to 17 times lower on three of them, and at most a tenth higher on the others:
docs/decisions/0122-directions-turn-where-gradients-agree.md.

    python research/turning.py --seeds 0 1

Their features are in units of their own, as tables have them that nobody standardised. A line per run: the task, who
was run, the seed, the mean training loss of the last fiftieth of the steps, and the validation loss at the end. AdamW
falls linearly to zero, at each of four rates.
"""

import argparse
import os
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
from everyday_loop import ending, untrained
from torch import Tensor, nn

from l2o_runtime.rules import DirectionalConfig, steering
from l2o_training.compare import contenders
from l2o_training.compare.baselines import BASELINES
from l2o_training.compare.scripts import ScriptWorkload
from l2o_training.compare.workloads import Group
from l2o_training.tasks.data import Datasets, Load
from l2o_training.tasks.scripts.base import Recipe, Script
from l2o_training.tasks.scripts.everyday import networks
from l2o_training.tasks.scripts.everyday.tables import arrays, shuffled, standardised
from l2o_training.tasks.scripts.images import cross_entropy
from l2o_training.tasks.scripts.tables import split, squared_error

RATES = (0.003, 0.01, 0.03, 0.1)

NEVER = 1e9
"""A direction that turns beyond this never turns."""


def normed(sizes: tuple[int, ...], activation: type[nn.Module]) -> nn.Sequential:
    """A multi-layer perceptron with LayerNorm."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def friedman2(_: Load) -> Script:
    """Friedman's second function: features of 1 to 1,760."""
    from sklearn.datasets import make_friedman2

    x, y = arrays(*make_friedman2(n_samples=4000, noise=50.0, random_state=0))
    return Script(partial(normed, (4, 48, 48, 1), nn.SiLU), squared_error, *split((x, standardised(y)), 400), 64)


def friedman3(_: Load) -> Script:
    """The third, of the same features."""
    from sklearn.datasets import make_friedman3

    x, y = arrays(*make_friedman3(n_samples=4000, noise=0.05, random_state=0))
    return Script(partial(normed, (4, 48, 48, 1), nn.GELU), squared_error, *split((x, standardised(y)), 400), 64)


def wine(_: Load) -> Script:
    """Features of 0.1 to 1,680."""
    from sklearn.datasets import load_wine

    x, y = shuffled(*arrays(*load_wine(return_X_y=True)))
    return Script(partial(normed, (13, 24, 3), nn.ReLU), cross_entropy, *split((x, y.long()), 38), 16)


def diabetes(_: Load) -> Script:
    """As measured, through BatchNorm."""
    from sklearn.datasets import load_diabetes

    x, y = shuffled(*arrays(*load_diabetes(return_X_y=True, scaled=False)))
    make = partial(networks.mlp, (10, 48, 48, 1), nn.ReLU, norm=True)
    return Script(make, squared_error, *split((x, standardised(y)), 90), 32)


def digits(_: Load) -> Script:
    """Every pixel in a unit of its own, of 0.1 to 10."""
    from sklearn.datasets import load_digits

    pixel_units = 10 ** (2 * torch.rand(64, generator=torch.Generator().manual_seed(11)) - 1)
    x, y = shuffled(*arrays(*load_digits(return_X_y=True)))
    data = x / 16 * pixel_units, y.long()
    return Script(partial(networks.mlp, (64, 64, 64, 10), nn.ReLU), cross_entropy, *split(data, 297), 64)


class Categories(nn.Module):
    """Numbers and two embedded categories to one number."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(20, 6), nn.Embedding(50, 6)])
        self.layers = normed((18, 40, 40, 1), nn.SiLU)

    def forward(self, numbers: Tensor, codes: Tensor) -> Tensor:
        """(B, 6) and (B, 2) → (B,)."""
        embedded = [embed(column) for embed, column in zip(self.embeddings, codes.unbind(-1), strict=True)]
        found: Tensor = self.layers(torch.cat([numbers, *embedded], -1)).squeeze(-1)
        return found


def categories(_: Load) -> Script:
    """Drawn numbers, whose units are 0.03 to 10, and categories."""
    rng = torch.Generator().manual_seed(12)
    x = torch.randn(6000, 6, generator=rng)
    codes = torch.stack([torch.randint(count, (6000,), generator=rng) for count in (20, 50)], -1)
    slopes, shifts = torch.randn(20, generator=rng), torch.randn(50, generator=rng)
    y = x[:, 0] * slopes[codes[:, 0]] + torch.sin(2 * x[:, 1]) + x[:, 2].abs() + shifts[codes[:, 1]]
    y = y + 0.5 * x[:, 3] * x[:, 4] + 0.3 * torch.randn(6000, generator=rng)
    numbers = x * torch.tensor([0.03, 0.3, 3.0, 0.1, 1.0, 10.0])
    return Script(Categories, squared_error, *split((numbers, codes, standardised(y)), 600), 64)


RECIPES = {build.__name__: build for build in (friedman2, friedman3, wine, diabetes, digits, categories)}


def main() -> None:
    """Run everybody on every task."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--tasks", nargs="+", choices=RECIPES, default=list(RECIPES))
    found.add_argument("--seeds", nargs="+", type=int, default=[0])
    found.add_argument("--steps", type=int, default=2500)
    options = found.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, L2O_KERNELS="plain"):
        path = untrained(Path(folder) / "untrained.safetensors", DirectionalConfig())
        told = contenders.of_rule("told", path, "total")
        adamw = contenders.of_baseline(BASELINES["adamw-linear"])
        who = [("turning", told, 1.0, steering.TURNING), ("without", told, 1.0, NEVER)]
        who += [(f"AdamW, linear, {rate:g}", adamw, rate, NEVER) for rate in RATES]
        for name in options.tasks:
            workload = ScriptWorkload(Recipe(name, "", RECIPES[name]), Datasets(Path()))
            workload.prepare()
            for seed in options.seeds:
                for run, contender, lr, turning in who:
                    with patch.object(steering, "TURNING", turning):
                        curves = workload.measure(contender, lr, Group(seed, 1), options.steps)
                    print(
                        f"{name}\t{run}\tseed {seed}\t{ending(curves):.5g}\t{curves.validation[0, -1]:.5g}", flush=True
                    )


if __name__ == "__main__":
    main()
