"""Inner steps of a preset's meta-training, in compiled code and in torch's operators.

For rules whose meta-training asks for steps alone, as evolution strategies do. Instances of every task are advanced
together, so many as the preset does; both ways take turns, a stretch of steps each, and times are medians.

    python benchmarks/preset_speed.py directional --threads 1
"""

import argparse
import copy
import time
from pathlib import Path
from statistics import geometric_mean, median

import torch
from rich.console import Console
from rich.table import Table

from l2o_runtime.rules import make_rule
from l2o_runtime.solvers import Descent
from l2o_training.config import load_preset
from l2o_training.fused.lstm import fuse
from l2o_training.meta.unroll import begin, unroll
from l2o_training.tasks import make_task
from l2o_training.tasks.data import Datasets


def main() -> None:
    """A row for every task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="directional")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="of a stretch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config, load = load_preset(args.preset), Datasets(args.data_root)
    plain = make_rule(config.rule)
    solvers = [Descent(plain), Descent(fuse(copy.deepcopy(plain)))]
    table = Table("task", "parameters", "loss and gradient, ms", "operators, ms", "compiled, ms", "ratio")
    ratios, totals = [], [0.0, 0.0]
    for number, kind in enumerate(config.tasks):
        instances = make_task(kind, load, torch.device("cpu")).instances(config.batch, seed=number)
        instances.steps = config.horizon
        times: list[list[float]] = [[], [], []]
        with torch.no_grad():
            inners = [begin(solver, instances) for solver in solvers]
            for _ in range(args.rounds + 1):
                for spent, solver, inner in zip(times, solvers, inners, strict=False):
                    started = time.perf_counter()
                    unroll(solver, inner, args.steps)
                    spent.append(time.perf_counter() - started)
                started = time.perf_counter()
                for _ in range(args.steps):
                    instances.look(inners[0].params, inners[0].statistics)
                times[2].append(time.perf_counter() - started)
        slow, fast, look = (1e3 * median(spent[1:]) / args.steps for spent in times)
        ratios.append(slow / fast)
        totals = [totals[0] + slow, totals[1] + fast]
        name = f"{kind.kind} {number + 1}"
        size = f"{instances.params.shape[1]:,}"
        table.add_row(name, size, f"{look:.2f}", f"{slow:.2f}", f"{fast:.2f}", f"{slow / fast:.2f}")
    Console(width=110).print(table)
    per_second = [1e3 * config.batch * len(config.tasks) / total for total in totals]
    print(
        f"{config.batch} instances at once, {args.threads} threads: {per_second[0]:.0f} and {per_second[1]:.0f} steps "
        f"of an instance per second, {per_second[1] / per_second[0]:.2f} times as many; geometric mean of the ratios "
        f"{geometric_mean(ratios):.2f}"
    )


if __name__ == "__main__":
    main()
