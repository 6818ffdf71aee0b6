"""What the update of a rule costs on this CPU, beside its matrix products alone, all in one process.

python benchmarks/cpu_kernel.py --threads 2 --sizes 100000 1200000 11000000
python benchmarks/cpu_kernel.py --rule moments --also plain

Rules: `paper` has 2 x 20 units over `log_sign`, `moments` 1 x 20 over `moments`, `rnnprop` as published.

One table row per size: nanoseconds per parameter of

- floor: the matrix products of a coordinate at the best rate of torch's matrix product at that moment;
- cell: nn.LSTMCell twice as in the paper, on all coordinates at once;
- plain: the loop over chunks, without kernels;
- kernel: the kernel's update, compared with the plain loop before it is timed;
- step: the whole of LearnedOptimizer.step with the bundled rule.

The contenders take turns; each figure is the median of its rounds, with the least one in brackets.
"""

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from l2o_runtime import LearnedOptimizer, Rule
from l2o_runtime.kernels import lstm as cpu
from l2o_runtime.rules import LSTMConfig, MomentsConfig, RNNPropConfig
from l2o_runtime.rules import make_rule as new_rule
from l2o_runtime.state import zeros
from l2o_runtime.stepping.engine import Replicas, advance
from l2o_runtime.stepping.parts import Part, make_part

RULES = {
    "paper": LSTMConfig(),
    "moments": MomentsConfig(output_scale=0.01, layers=1),
    "rnnprop": RNNPropConfig(),
}

clock = time.perf_counter


class Cells(nn.Module):
    """The plain way to write it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.LSTMCell(2, 20), nn.LSTMCell(20, 20), nn.Linear(20, 1)

    def forward(self, features: Tensor, state: list[Tensor]) -> Tensor:
        state[0], state[1] = self.first(features, (state[0], state[1]))
        state[2], state[3] = self.second(state[0], (state[2], state[3]))
        return self.head(state[2])


def seconds(action: Callable[[], object]) -> float:
    start = clock()
    action()
    return clock() - start


def gemm_rates() -> Callable[[], float]:
    """A function that gives the rate in FLOP/s of a product of squares: the best of three."""
    a, b, out = (torch.randn(1024, 1024) for _ in range(3))
    return lambda: 2 * 1024**3 / min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(3))


def part_of(rule: Rule, n: int) -> Part:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(n))
    param.grad = torch.randn(n)
    group = {"lr": 1.0, "weight_decay": 0.0, "maximize": False}
    return make_part(group, param, {}, rule.spec.coordinate, {}, 0)


def updater(rule: Rule, part: Part, kernel: cpu.CPUKernel | None) -> Callable[[], None]:
    replicas = Replicas(rule)
    replicas.kernels[part.param.device] = kernel
    good, loss = torch.tensor(True), torch.tensor(1.0)
    context, statistics = zeros(rule.spec.model, ()), rule.observe(part.theta, part.grad, part.state).unsqueeze(0)
    return lambda: advance(replicas, [part], statistics, loss, context, good)


def compare(rule: Rule, n: int) -> float:
    """Largest difference of any number of the state or θ between kernel and plain loop after five steps."""
    parts = [part_of(rule, n) for _ in range(2)]
    for part, kernel in zip(parts, (None, cpu.make_kernel(rule)), strict=True):
        update = updater(rule, part, kernel)
        for _ in range(5):
            update()
    pairs = [(parts[0].theta, parts[1].theta), *((parts[0].state[k], parts[1].state[k]) for k in parts[0].state)]
    return max(float((a - b).abs().max()) for a, b in pairs)


def contenders(rule: Rule, n: int, names: list[str]) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}
    if "cell" in names:
        cells, state, features = Cells(), [torch.zeros(n, 20) for _ in range(4)], torch.randn(n, 2)
        found["cell"] = lambda: cells(features, state)
    part = part_of(rule, n)
    if "plain" in names:
        found["plain"] = updater(rule, part, None)
    found["kernel"] = updater(rule, part, cpu.make_kernel(rule))
    if "step" in names:
        param = nn.Parameter(torch.randn(n))
        param.grad = torch.randn(n)
        optimizer = LearnedOptimizer([param])
        found["step"] = lambda: optimizer.step(loss=1.0)
    return found


def measure(rule: Rule, n: int, rounds: int, names: list[str]) -> str:
    rate = gemm_rates()
    actions = contenders(rule, n, names)
    times: dict[str, list[float]] = {name: [] for name in ("floor", *actions)}
    for action in actions.values():
        action()
    for _ in range(rounds):
        times["floor"].append(rule.config.flops * n / rate())
        for name, action in actions.items():
            times[name].append(seconds(action))
    figures = {name: (statistics.median(t) / n * 1e9, min(t) / n * 1e9) for name, t in times.items()}
    row = " ".join(f"{name} {middle:.0f} ({least:.0f})" for name, (middle, least) in figures.items())
    ratios = [f"{figures['kernel'][i] / figures['floor'][i]:.2f}" for i in (0, 1)]
    return f"{n:>9,}: {row}; kernel/floor {ratios[0]} ({ratios[1]})"


def transient(rule: Rule, n: int) -> float:
    """Bytes per parameter by which a kernel's first update, with all its scratch memory, raises the peak."""
    part = part_of(rule, n)
    for state in part.state.values():
        state.add_(0)  # touch the pages
    update = updater(rule, part, cpu.make_kernel(rule))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    update()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / n


def main() -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", choices=RULES, default="paper")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_200_000, 11_000_000])
    parser.add_argument("--also", nargs="*", default=["cell", "plain", "step"], help="besides the kernel")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of all threads: for a machine that is shared")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rule = new_rule(RULES[arguments.rule]).eval().requires_grad_(False)
    torch.nn.init.normal_(rule.cell.head.weight, std=0.1)  # some rules start with zeros
    with torch.no_grad():
        print(f"{arguments.threads} threads, load {os.getloadavg()[0]:.1f}; nanoseconds per parameter, median (least)")
        first = seconds(updater(rule, part_of(rule, 1), cpu.make_kernel(rule)))
        # Before anything else has raised the peak.
        print(f"transient memory {transient(rule, 1_200_000):.1f} bytes/param")
        print(f"made in {first:.2f} s; largest difference to the plain loop {compare(rule, 50_001):.1e}")
        for n in arguments.sizes:
            # Gates of all coordinates at once, ten arrays of 80 numbers and more, are too much for large n.
            names = [name for name in arguments.also if name != "cell" or n <= 2_000_000]
            print(measure(rule, n, arguments.rounds, names), flush=True)


if __name__ == "__main__":
    main()
