"""Where does the time of a learned step go?

Two views of one step on a model of the benchmark: torch's operators by their own time, from the profiler; and the three
phases of a rule by themselves, interleaved, on one chunk of coordinates, scaled to the model: `observe` (what a context
gathers per coordinate), `steer` (eigenvalues or autoencoder, once per step) and `update` (the network).

    python benchmarks/step_profile.py --size cnn --threads 1

How many operators a step dispatches, which is what a GPU pays for, says `--dispatch` alone.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from l2o_runtime import LearnedOptimizer
from l2o_runtime.rules import LSTMConfig, make_rule
from l2o_runtime.state import zeros
from l2o_runtime.stepping.parts import CHUNK
from l2o_training.bench.models import MODELS, count, random_tensors, shapes_of
from l2o_training.bench.operators import operators as operators_of
from l2o_training.bench.racers import CONTEXTS

CPU = torch.device("cpu")


def warm(size: str, rule: str) -> LearnedOptimizer:
    """An optimizer after two steps."""
    shapes = shapes_of(size)
    params = [param.requires_grad_() for param in random_tensors(shapes, 0.1, 0, CPU)]
    for param, grad in zip(params, random_tensors(shapes, 0.01, 1, CPU), strict=True):
        param.grad = grad
    optimizer = LearnedOptimizer(params, rule=rule)
    for _ in range(2):
        optimizer.step(loss=torch.ones(()))
    return optimizer


def dispatched(size: str, rule: str) -> Table:
    """Operators of one step, but for views, in the plain loop and in few operators."""
    shapes = shapes_of(size)
    title = f"operators of a step of rule {rule}, {count(shapes):,} parameters in {len(shapes)} tensors"
    table = Table("L2O_KERNELS", "operators", title=title)
    for kernels in ("plain", "foreach"):
        os.environ["L2O_KERNELS"] = kernels
        table.add_row(kernels, f"{operators_of(warm(size, rule).step):,}")
    return table


def operators(size: str, rule: str, top: int) -> Table:
    """Operators of one step, the slowest first."""
    shapes, optimizer = shapes_of(size), warm(size, rule)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(loss=torch.ones(()))
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    title = f"one step of rule {rule}, {count(shapes):,} parameters, {total / 1e3:.0f} ms under the profiler"
    table = Table("operator", "calls", "own ms", "share", title=title)
    for event in events[:top]:
        own = event.self_cpu_time_total
        table.add_row(event.key, str(event.count), f"{own / 1e3:.1f}", f"{own / total:.1%}")
    return table


def phases(size: str, rounds: int) -> Table:
    """The phases of every context, medians over interleaved rounds."""
    n = count(shapes_of(size))
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, context in CONTEXTS.items():
        torch.manual_seed(0)
        rule = make_rule(LSTMConfig(context=context)).eval().requires_grad_(False)
        theta, grad = 0.1 * torch.randn(CHUNK), 0.01 * torch.randn(CHUNK)
        state, whole = zeros(rule.spec.coordinate, (CHUNK,)), zeros(rule.spec.model, ())
        for _ in range(22):  # fill the window
            seen = rule.observe(theta, grad, state)
            features, whole = rule.steer(seen.unsqueeze(-2), None, torch.ones(()), whole)
            delta, state = rule.update(grad, theta, features, state)
            theta = theta + 0.01 * delta
        calls[name, "observe"] = lambda r=rule, t=theta, g=grad, s=state: r.observe(t, g, s)  # type: ignore[misc]
        calls[name, "steer"] = lambda r=rule, s=seen, w=whole: r.steer(s[None], None, torch.ones(()), w)  # type: ignore[misc]
        calls[name, "update"] = lambda r=rule, t=theta, g=grad, f=features, s=state: r.update(g, t, f, s)  # type: ignore[misc]
    spent: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            started = time.perf_counter()
            call()
            spent[key].append(time.perf_counter() - started)
    median = {key: statistics.median(values) for key, values in spent.items()}
    title = f"phases, ns per parameter at {n:,} parameters"
    table = Table("rule", "observe", "steer", "update", "(observe + steer) / update", title=title)
    for name in CONTEXTS:
        observe, update = (1e9 * median[name, phase] / CHUNK for phase in ("observe", "update"))
        once = 1e9 * median[name, "steer"] / n
        share = (observe + once) / update
        table.add_row(name, f"{observe:.1f}", f"{once:.2f}", f"{update:.0f}", f"{share:.1%}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(MODELS), default="cnn")
    parser.add_argument("--rule", default="default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--top", type=int, default=14)
    parser.add_argument("--dispatch", action="store_true", help="count operators, and nothing else")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console(width=100)
    if args.dispatch:
        console.print(dispatched(args.size, args.rule))
        return
    with torch.no_grad():
        console.print(phases(args.size, args.rounds))
        console.print(operators(args.size, args.rule, args.top))


if __name__ == "__main__":
    main()
