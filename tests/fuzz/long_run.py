"""Does anything grow or drift in a long run?

A small network is trained for many steps. Every thousand steps the window's Gram matrix is compared with one computed
from scratch, in float64, from the snapshots themselves (which the script keeps), and the memory of the process is read.

    python tests/fuzz/long_run.py --steps 50000
"""

import argparse
import collections
import itertools
import resource
import tempfile
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from l2o_runtime import HorizonWarning, LearnedOptimizer, save_rule
from l2o_runtime.config import ContextConfig, DMDConfig, KAEConfig
from l2o_runtime.contexts.sketch import count_sketch
from l2o_runtime.rules import NormalizedConfig, make_rule

DRIFT = 1e-10
GROWTH = 8.0
"""MB between the first tenth of the run and its end."""

CONTEXTS: dict[str, ContextConfig] = {
    "DMD, exact window": DMDConfig(window=10, rank=2),
    "DMD, sketch": DMDConfig(window=10, rank=2, sketch=256),
    "KAE, sketch": KAEConfig(window=10, latent=4, sketch=256),
}


def snapshot(params: list[Tensor], sketch: int | None) -> Tensor:
    """θ, or its sketch, in float64."""
    if sketch is None:
        return torch.cat([p.detach().flatten() for p in params]).double()
    starts = itertools.accumulate((p.numel() for p in params), initial=0)
    parts = [count_sketch(p.detach().flatten(), sketch, start) for p, start in zip(params, starts, strict=False)]
    return torch.stack(parts).double().sum(0).float().double()


def from_scratch(snapshots: collections.deque[Tensor]) -> Tensor:
    """Gram matrix of the last snapshots."""
    window = torch.stack(list(snapshots))
    return window @ window.T


def megabytes() -> float:
    """Resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def run(context: ContextConfig, steps: int, every: int) -> tuple[float, float, float, bool]:
    """Largest relative drift, growth of memory in MB, milliseconds per step, and whether all stayed finite."""
    torch.manual_seed(0)
    rule = make_rule(NormalizedConfig(context=context, output="tanh", output_scale=0.01)).eval()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    with tempfile.TemporaryDirectory() as folder:
        save_rule(Path(folder) / "rule.safetensors", rule)
        optimizer = LearnedOptimizer(model.parameters(), rule=Path(folder) / "rule.safetensors", lr=0.1)
    first = next(model.parameters())
    snapshots: collections.deque[Tensor] = collections.deque(maxlen=context.window + 1)
    rng = torch.Generator().manual_seed(0)
    drift, memory, started = 0.0, [], time.perf_counter()
    for step in range(1, steps + 1):
        x = torch.randn(16, 6, generator=rng)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :1].sin()).square().mean()
        loss.backward()
        snapshots.append(snapshot(list(model.parameters()), context.sketch))
        optimizer.step(loss=loss)
        if step % every == 0:
            expected = from_scratch(snapshots)
            gram = optimizer.state[first]["context_gram"]
            drift = max(drift, float((gram - expected).abs().max() / expected.abs().max()))
            memory.append(megabytes())
    spent = (time.perf_counter() - started) * 1000 / steps
    finite = all(v.isfinite().all() for state in optimizer.state.values() for v in state.values())
    assert optimizer.health()["steps"] == steps
    return drift, memory[-1] - memory[len(memory) // 10], spent, finite


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--every", type=int, default=1000, help="steps between two comparisons")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", HorizonWarning)
    table = Table("context", "largest drift", "growth, MB", "ms per step", "finite", title=f"{args.steps} steps")
    good = True
    for name, context in CONTEXTS.items():
        drift, growth, spent, finite = run(context, args.steps, args.every)
        good &= drift <= DRIFT and growth <= GROWTH and finite
        table.add_row(name, f"{drift:.1e}", f"{growth:.2f}", f"{spent:.2f}", "yes" if finite else "no")
    Console(width=100).print(table)
    print(f"allowed: drift {DRIFT:g}, growth {GROWTH:g} MB")
    return int(not good)


if __name__ == "__main__":
    raise SystemExit(main())
