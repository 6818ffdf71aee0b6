"""An outer update of unrolled solvers, beside the matrix products that are in it.

The products of one update are recorded with their operands. Two floors are measured in turns with the updates, in the
same process: these very products once more, one after the other, and the sum of the best times of each size alone,
whose operands then lie in the cache. An update is of all layers, or of the last alone; times are medians.

    python benchmarks/unrolled_training.py lista-cpss lista alista --threads 1
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from l2o_training.config import load_preset
from l2o_training.meta.curriculum import Layerwise, Stage
from l2o_training.meta.trainer import Trainer


class Products(TorchDispatchMode):
    """Keeps the operands of matrix products, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.found.append((args[0].detach(), args[1].detach()))
        return func(*args, **(kwargs or {}))

    def run(self) -> None:
        """All of them once more."""
        for left, right in self.found:
            torch.mm(left, right)


def spent(work: Callable[[], object]) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)


def layout(pair: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    """Shapes and strides of both sides."""
    return tuple((tuple(one.shape), one.stride()) for one in pair)


def compare(stage: Stage, trainer: Trainer, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of an update, of its products in their order, and of each of them alone at its best."""
    trainer.curriculum.stage = stage
    trainer.learner.begin(stage)

    def update() -> None:
        gradient, _ = trainer.meta_gradient()
        trainer.learner.update(gradient)

    update()
    with Products() as products:
        update()
    sizes, pairs = Counter(map(layout, products.found)), {layout(pair): pair for pair in products.found}
    best, updates, replays = dict.fromkeys(pairs, float("inf")), [], []
    for _ in range(rounds):
        updates.append(spent(update))
        replays.append(spent(products.run))
        for key, (left, right) in pairs.items():
            best[key] = min(best[key], *(spent(partial(torch.mm, left, right)) for _ in range(3)))
    return median(updates), median(replays), sum(count * best[key] for key, count in sizes.items())


def main() -> None:
    """Two rows for every preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=["lista-cpss"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table("preset", "trained", "update, ms", "its products, ms", "ratio", "best of each alone, ms", "ratio")
    for name in args.presets:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(load_preset(name), Path(folder) / "run")
            assert isinstance(trainer.curriculum, Layerwise)
            *_, alone, every, _ = trainer.curriculum.stages
            for stage in (alone, every):
                whole, *floors = compare(stage, trainer, args.rounds)
                cells = (cell for floor in floors for cell in (f"{floor:.1f}", f"{whole / floor:.2f}"))
                table.add_row(name, stage.name, f"{whole:.1f}", *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
