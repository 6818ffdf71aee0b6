"""How many floating-point operations does a step of `directional` take, beside the forward and backward pass?

Verdict: see the table of decision 92. Where every weight is used once per example, as in MLPs, a step costs about half
of a pass over 64 examples; where weights are used at many places, a few hundredths. Run it by

    python research/step_flops.py --data-root data
"""

import argparse
from itertools import islice
from pathlib import Path

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from l2o_runtime.rules import DirectionalConfig
from l2o_runtime.rules.orthogonal import sides
from l2o_training.tasks.data import Datasets
from l2o_training.tasks.scripts import RECIPES, larger
from l2o_training.tasks.scripts.base import Script

EVERYWHERE = 75
"""Operations per coordinate of any tensor: averages and ratios, once to look and once to step (40), sums (14), the
mixture (16), its length and the move (5)."""

MATRICES = 13
"""Besides, per coordinate of a matrix: Nesterov's momentum, norms, sums of rows and what is composed; all but products
with k columns."""

BATCH = 64


def passes(script: Script) -> float:
    """Of a forward and backward pass over 64 examples: matrix products and convolutions only."""
    model = script.make_model()
    (batch,) = islice(script.batches(0), 1)
    with FlopCounterMode(display=False) as counter:
        script.loss(model, batch).backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops()) * BATCH / script.batch_size


def step(model: nn.Module, rank: int) -> float:
    """Of a step."""
    total = 0.0
    for param in model.parameters():
        matrix = sides(param.shape) is not None and rank > 0
        total += param.numel() * (EVERYWHERE + matrix * (MATRICES + 6 * rank))
    return total


def share(step: float, whole: float) -> str:
    """In percent; embeddings alone need no matrix product."""
    return f"{100 * step / whole:.1f} %" if whole else "no products"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--rank", type=int, nargs="*", default=[0, 8, DirectionalConfig().rank])
    options = parser.parse_args()
    load = Datasets(options.data_root)
    print("| script | parameters | passes, 10⁶ |" + "".join(f" rank {rank} |" for rank in options.rank))
    print("|---|---:|---:|" + "---:|" * len(options.rank))
    for suite in (RECIPES, larger.RECIPES):
        for name, recipe in suite.items():
            script = recipe.build(load)
            model, whole = script.make_model(), passes(script)
            shares = "".join(f" {share(step(model, rank), whole)} |" for rank in options.rank)
            count = sum(param.numel() for param in model.parameters())
            print(f"| {name} | {count:,} | {whole / 1e6:.1f} |{shares}", flush=True)


if __name__ == "__main__":
    main()
