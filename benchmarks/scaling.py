"""How meta-training scales over ranks: efficiency, bytes per outer update, and what a sum costs.

python benchmarks/scaling.py --ranks 1 2 --repeats 3
python benchmarks/scaling.py --ranks 1 2 4 --equality

Starts itself under torchrun, one thread per rank, one count of ranks after the other, and again for every repeat. An
update's time is the median over the epochs of a repeat; tables show the best repeat, since other load only adds. CPU
seconds are summed over ranks: what they grow by is work that ranks add; what time grows by beyond that is waiting.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from l2o_training.config import TrainConfig, load_preset
from l2o_training.meta.trainer import Trainer
from l2o_training.ranks.group import Ranks
from l2o_training.ranks.rendezvous import join

LANES = 4
EPOCHS = 6
CALLS = 200
UPDATES = 20
SIZES = {"4 units, 1 layer": ("4", "1"), "20 units, 2 layers": ("20", "2"), "64 units, 2 layers": ("64", "2")}


def configuration(*overrides: str) -> TrainConfig:
    """Networks on digits, and more lanes than ranks."""
    return load_preset("demo", [f"lanes={LANES}", "validation_runs=1", "horizon=40", "unroll=20", *overrides])


def per_call(action: Any, count: int = CALLS) -> float:
    """Median seconds of a call, all ranks calling."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(ranks: Ranks) -> dict[str, Any]:
    """What one start of the ranks gives; the same on all of them but for CPU time, which is summed."""
    cpu, device = torch.device("cpu"), torch.device("cpu")
    trainer = Trainer(configuration(), Path("unused"), ranks=ranks)
    trainer.train_epoch()
    times, idle = [], ranks.idle
    used = time.process_time()
    for _ in range(EPOCHS):
        times.append(trainer.train_epoch().seconds / 2)
    used = sum(ranks.gather(time.process_time() - used, cpu))
    idles = [value / EPOCHS / 2 for value in ranks.gather(ranks.idle - idle, cpu)]
    found = {"update": statistics.median(times), "cpu": used / EPOCHS / 2, "idle": max(idles), "bytes": {}, "calls": {}}
    for name, (hidden, layers) in SIZES.items():
        for estimator in ("tbptt", "pes"):
            config = configuration(f"rule.hidden={hidden}", f"rule.layers={layers}", f"estimator={estimator}")
            small = Trainer(config, Path("unused"), ranks=ranks)
            size = 8 * (small.estimator.width(small.learner.solver) + 1 + len(small.names) + LANES)
            found["bytes"][f"{name}, {estimator}"] = [sum(p.numel() for p in small.rule.parameters()), size]
            if ranks.store is not None and estimator == "tbptt":
                vector = torch.zeros(size // 8, dtype=torch.float64, device=device)
                found["calls"][f"sum of {size} bytes"] = per_call(lambda vector=vector: ranks.sum(vector))
    if ranks.store is not None:
        found["calls"]["the sum's note in the store"] = per_call(lambda: ranks.store.set("note", "1"))
        found["calls"]["monitored_barrier, for comparison"] = per_call(lambda: dist.monitored_barrier(ranks.saving))
    return found


def train(ranks: Ranks) -> dict[str, Any]:
    """Meta-gradients of some updates, and the rule after them, by estimator; and whether all ranks have the same."""
    found = {}
    for estimator in ("tbptt", "es", "pes", "mixed"):
        trainer = Trainer(configuration(f"estimator={estimator}"), Path("unused"), ranks=ranks)
        gradients = []
        for _ in range(UPDATES):
            gradient, _ = trainer.meta_gradient()
            gradients.append(gradient.clone())
            trainer.learner.update(gradient)
        weights = torch.cat([p.detach().double().flatten() for p in trainer.rule.parameters()])
        result = torch.cat([*gradients, weights])
        same = ranks.exchange(hashlib.sha256(result.numpy().tobytes()).hexdigest())
        found[estimator] = {
            "gradients": torch.stack(gradients).tolist(),
            "rule": weights.tolist(),
            "ranks": len({*same}),
        }
    return found


def compare(found: dict[int, dict[str, Any]]) -> None:
    """Print how far meta-gradients and rules are from those of the first number of ranks."""
    first, *others = found
    print("| estimator | ranks | largest difference of a meta-gradient | of the rule | results among ranks |")
    print("|---|---|---|---|---|")
    for estimator, reference in found[first].items():
        for count in others:
            result = found[count][estimator]
            gradients, rule = (relative(result[key], reference[key]) for key in ("gradients", "rule"))
            print(f"| {estimator} | {count} against {first} | {gradients:.1e} | {rule:.1e} | {result['ranks']} |")


def relative(one: Any, other: Any) -> float:
    """Largest ‖a − b‖ ÷ ‖b‖ over rows."""
    a, b = (torch.tensor(value, dtype=torch.float64) for value in (one, other))
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


def start(count: int, threads: int, *options: str) -> dict[str, Any]:
    """Measure with so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command += [__file__, "--worker", str(result), *options]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": f"{threads}"}, check=True)
        return dict(json.loads(result.read_text()))


def milliseconds(seconds: float) -> str:
    """As tables show it."""
    return f"{1e3 * seconds:.2f} ms"


def report(found: dict[int, list[dict[str, Any]]]) -> None:
    """Print tables."""
    base = min(run["update"] for run in found[min(found)])
    print("| ranks | per update | all repeats | speed-up | efficiency | CPU, all ranks | longest idle |")
    print("|---|---|---|---|---|---|---|")
    for count, runs in found.items():
        best = min(runs, key=lambda run: run["update"])
        every = ", ".join(f"{1e3 * run['update']:.0f}" for run in runs)
        speed = base / best["update"]
        print(
            f"| {count} | {milliseconds(best['update'])} | {every} | {speed:.2f} | {speed * min(found) / count:.0%} "
            f"| {milliseconds(min(run['cpu'] for run in runs))} | {milliseconds(best['idle'])} |"
        )
    first = next(iter(found.values()))[0]
    print(f"\n| rule, estimator ({LANES} lanes) | parameters | bytes per update and rank |\n|---|---|---|")
    for name, (parameters, size) in first["bytes"].items():
        print(f"| {name} | {parameters:,} | {size:,} |")
    several = {count: runs for count, runs in found.items() if runs[0]["calls"]}
    if not several:
        return
    print("\n| call | " + " | ".join(f"{count} ranks" for count in several) + " |\n|---" + "|---" * len(several) + "|")
    for name in next(iter(several.values()))[0]["calls"]:
        cells = [milliseconds(min(run["calls"][name] for run in runs)) for runs in several.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")


LANE, SPREAD, HOP, BANDWIDTH, MESSAGE, CELLS = 0.060, 0.2, 10e-6, 10e9, 43_712, 16
"""Of the model: seconds of a lane's truncation on a GPU, its relative deviation between lanes, seconds per hop,
bytes per second, bytes per sum, tasks that can be validated side by side. All but the bytes are assumed."""


def model() -> None:
    """Print what an update takes with a lane per GPU: the slowest lane, and a sum along a tree, there and back."""
    rng = torch.Generator().manual_seed(0)
    print("| GPUs | slowest lane | sum | per update | efficiency | busy in validation | sockets to other ranks |")
    print("|---|---|---|---|---|---|---|")
    for count in (8, 64, 512):
        slowest = LANE * (1 + SPREAD * float(torch.randn(4000, count, generator=rng).amax(1).mean()))
        total = 2 * math.ceil(math.log2(count)) * HOP + 2 * MESSAGE / BANDWIDTH
        busy = min(1.0, CELLS / count)
        print(
            f"| {count} | {milliseconds(slowest)} | {milliseconds(total)} | {milliseconds(slowest + total)} "
            f"| {LANE / (slowest + total):.0%} | {busy:.0%} | {3 * (count - 1):,} |"
        )


def worker(result: Path, job: Callable[[Ranks], dict[str, Any]]) -> None:
    """What a rank does."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with join(300) as ranks:
        ranks.connect(torch.device("cpu"))
        found = job(ranks)
        if ranks.main:
            result.write_text(json.dumps(found))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--equality", action="store_true", help="compare what comes out, in place of measuring")
    parser.add_argument("--model", action="store_true", help="print a model of GPUs in place of measuring")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, train if args.equality else measure)
        return
    if args.model:
        model()
        return
    if args.equality:
        compare({count: start(count, args.threads, "--equality") for count in args.ranks})
        return
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in args.ranks}
    for _ in range(args.repeats):
        for count, runs in found.items():
            runs.append(start(count, args.threads))
    report(found)


if __name__ == "__main__":
    main()
