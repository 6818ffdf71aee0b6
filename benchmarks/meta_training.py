"""How fast is meta-training, forward and backward, next to the same loop written plainly?

Plainly: two nn.LSTMCell, one task instance at a time, the meta-loss the sum of the losses along the trajectory (the
optimizee's gradient a constant, as here), its graph kept to the end of the truncation. Both train the 2 × 20 rule with
normalized features on the same network over scikit-learn's digits; the figure is inner steps × coordinates per second,
from the best of several truncations, contenders and numbers of threads taking turns. Ratios are to the plain loop with
the same number of threads, those of several processes of one thread, which sum their gradients as ranks of `l2o train`
do, to the plain loop with as many threads. Where others use the machine, the CPU time of the process tells more than
the clock; with two threads it counts both, with two processes only the first one's.

    python benchmarks/meta_training.py --threads 1 2 --processes 2

The two-tier rule is compared with itself in torch's operators instead:

    python benchmarks/meta_training.py --threads 1 --two-tiers --batches 2 --steps 100
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from l2o_runtime.rules import NormalizedConfig, Rule, TieredConfig, make_rule
from l2o_runtime.solvers import Descent
from l2o_training.fused import lstm as fused
from l2o_training.fused.lstm import fuse
from l2o_training.meta.unroll import begin, unroll
from l2o_training.tasks import MLPConfig, make_task
from l2o_training.tasks.base import Instances
from l2o_training.tasks.data import load_dataset

PLAIN = "plain, one instance"
OPERATORS = "torch operators, as many at once"
TWO_TIERS = TieredConfig(hidden=32)

DIGITS = load_dataset("digits", Path("data"))


class PlainRule(nn.Module):
    """The rule as one writes it down first."""

    def __init__(self, hidden: int = 20):
        super().__init__()
        self.first, self.second = nn.LSTMCell(2, hidden), nn.LSTMCell(hidden, hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, grad: Tensor, m: Tensor, v: Tensor, states: list, step: int):
        m, v = 0.95 * m + 0.05 * grad, 0.95 * v + 0.05 * grad**2
        root = (v / (1 - 0.95**step)).sqrt() + 1e-8
        features = torch.stack([m / (1 - 0.95**step) / root, grad / root], dim=-1)
        one = self.first(features, states[0])
        two = self.second(one[0], states[1])
        return 0.1 * self.head(two[0]).squeeze(-1), m, v, [one, two]


def plain(hidden: int, steps: int) -> tuple[Callable[[], None], int]:
    """One truncation of the plain loop; and the coordinates it advances."""
    rule, sizes = PlainRule(), [(hidden, 64), (hidden,), (10, hidden), (10,)]
    optimizer = torch.optim.Adam(rule.parameters(), lr=1e-3)
    n = sum(torch.Size(size).numel() for size in sizes)

    def loss_of(theta: Tensor) -> Tensor:
        images, labels = DIGITS.batch(torch.randint(len(DIGITS.labels), (64,)))
        parts = theta.split([torch.Size(size).numel() for size in sizes])
        w1, b1, w2, b2 = (part.view(size) for part, size in zip(parts, sizes, strict=True))
        return F.cross_entropy(F.linear(F.linear(images.flatten(1), w1, b1).sigmoid(), w2, b2), labels)

    def truncation() -> None:
        theta = (0.1 * torch.randn(n)).requires_grad_()
        m, v, states = torch.zeros(n), torch.zeros(n), [None, None]
        meta_loss, loss = 0.0, loss_of(theta)
        for step in range(1, steps + 1):
            grad = torch.autograd.grad(loss, theta, retain_graph=True)[0].detach()
            delta, m, v, states = rule(grad, m, v, states, step)
            theta = theta + delta
            loss = loss_of(theta)
            meta_loss = meta_loss + loss
        optimizer.zero_grad()
        meta_loss.backward()
        optimizer.step()

    return truncation, n


def ours(
    hidden: int, steps: int, batch: int, processes: int = 1, rule: Rule | None = None
) -> tuple[Callable[[], None], int]:
    """One truncation as `l2o train` does it, for `batch` instances at once in each of some processes."""
    rule = rule or fuse(make_rule(NormalizedConfig()))
    optimizer = torch.optim.Adam(rule.parameters(), lr=1e-3)
    task = make_task(MLPConfig(hidden=(hidden,), batch_size=64), lambda name: DIGITS, torch.device("cpu"))
    solver = Descent(rule)
    inner = begin(solver, task.instances(batch, seed=0))

    def truncation() -> None:
        objective = unroll(solver, inner, steps).objective
        optimizer.zero_grad()
        objective.backward()
        if processes > 1:
            grads = [p.grad for p in rule.parameters() if p.grad is not None]
            total = parameters_to_vector(grads)
            dist.all_reduce(total)
            vector_to_parameters(total, grads)
        optimizer.step()

    return truncation, processes * inner.params.numel()


def work(rank: int, store: str, processes: int, hidden: int, steps: int, batch: int) -> None:
    """What every process but the first does: a truncation whenever that one says so."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank + 1, world_size=processes)
    truncation, _ = ours(hidden, steps, batch, processes)
    go = torch.zeros(1)
    while True:
        dist.broadcast(go, 0)
        if not go:
            return
        truncation()


def together(processes: int, hidden: int, steps: int, batch: int) -> tuple[Callable[[bool], None], int]:
    """One truncation of several processes, or their end."""
    store = str(Path(tempfile.mkdtemp()) / "store")
    mp.spawn(work, (store, processes, hidden, steps, batch), nprocs=processes - 1, join=False)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=processes)
    truncation, n = ours(hidden, steps, batch, processes)

    def run(go: bool = True) -> None:
        dist.broadcast(torch.full((1,), float(go)), 0)
        if go:
            truncation()

    return run, n


def parts(hidden: int, steps: int, batch: int, rounds: int) -> dict[str, float]:
    """Nanoseconds of CPU time per coordinate and step in the parts of our truncation, of the fastest of some."""
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable) -> Callable:
        def run(*args):
            started = time.process_time()
            result = function(*args)
            spent[name] = spent.get(name, 0.0) + time.process_time() - started
            return result

        return run

    share, look = fused.share, Instances.look
    fused.share = lambda work, items: timed(next(calls), share)(work, items)
    Instances.look = timed("optimizee", look)
    calls, best = iter(()), {"all": float("inf")}
    try:
        truncation, n = ours(hidden, steps, batch)
        for _ in range(rounds):
            spent.clear()
            calls = iter(["network, forward"] * steps + ["network, backward"] * steps)
            timed("all", truncation)()
            best = min(best, dict(spent), key=lambda times: times["all"])
    finally:
        fused.share, Instances.look = share, look
    best["features, autograd, Python"] = 2 * best["all"] - sum(best.values())
    return {name: 1e9 * seconds / n / steps for name, seconds in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--hidden", type=int, default=20, help="of the optimizee: 75 · hidden + 10 coordinates")
    parser.add_argument("--steps", type=int, default=20, help="of a truncation")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="instances at once, of ours")
    parser.add_argument("--processes", type=int, default=1, help="add ours in so many processes of one thread")
    parser.add_argument("--two-tiers", action="store_true", help="compare the two-tier rule with and without fast code")
    parser.add_argument("--parts", action="store_true", help="show instead where our time goes, on one thread")
    args = parser.parse_args()
    if args.two_tiers and (len(args.batches) > 1 or args.processes > 1 or args.parts):
        parser.error("--two-tiers goes with one number of --batches, and without --processes and --parts")
    torch.manual_seed(0)
    if args.parts:
        torch.set_num_threads(1)
        for batch in args.batches:
            print(
                batch, "at once:", {k: round(v) for k, v in parts(args.hidden, args.steps, batch, args.rounds).items()}
            )
        return
    reference = OPERATORS if args.two_tiers else PLAIN
    if args.two_tiers:
        (batch,) = args.batches
        rules = {OPERATORS: make_rule(TWO_TIERS), f"ours, {batch} at once": fuse(make_rule(TWO_TIERS))}
        contenders = {name: ours(args.hidden, args.steps, batch, rule=rule) for name, rule in rules.items()}
    else:
        contenders = {PLAIN: plain(args.hidden, args.steps)}
        contenders |= {f"ours, {b} at once": ours(args.hidden, args.steps, b) for b in args.batches}
    never = float("inf"), float("inf")
    best = {(name, threads): never for threads in args.threads for name in contenders}
    several = f"ours, {args.batches[-1]} at once, {args.processes} processes"
    if args.processes > 1:
        contenders[several] = together(args.processes, args.hidden, args.steps, args.batches[-1])
        best |= {(name, args.processes): never for name in (PLAIN, several)}
    for _ in range(args.rounds):
        for name, threads in best:
            torch.set_num_threads(1 if name == several else threads)
            truncation, n = contenders[name]
            wall, busy = time.perf_counter(), time.process_time()
            truncation()
            times = time.perf_counter() - wall, time.process_time() - busy
            ns = [1e9 * seconds / n / args.steps for seconds in times]
            best[name, threads] = min(best[name, threads][0], ns[0]), min(best[name, threads][1], ns[1])
    if args.processes > 1:
        contenders[several][0](False)
    title = f"{75 * args.hidden + 10} coordinates, truncations of {args.steps}; ns per coordinate and step"
    table = Table("threads", "", "10⁶ coordinates · steps / s", "ns", "ratio", "CPU ns", "ratio", title=title)
    for (name, threads), (wall, busy) in best.items():
        ratios = [f"{known / own:.2f}" for known, own in zip(best[reference, threads], (wall, busy), strict=True)]
        table.add_row(str(threads), name, f"{1e3 / wall:.3f}", f"{wall:.0f}", ratios[0], f"{busy:.0f}", ratios[1])
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
