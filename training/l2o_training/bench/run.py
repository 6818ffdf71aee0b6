"""Run the benchmark over sizes and write what came out."""

import gc
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import l2o_runtime
from l2o_runtime.config import require
from l2o_runtime.files.atomic import atomic_write
from l2o_training.bench.memory import available_bytes
from l2o_training.bench.models import Shapes, count, shapes_of
from l2o_training.bench.plan import Need, pilot, plan
from l2o_training.bench.plots import growth
from l2o_training.bench.racers import ADAM, FOREACH, FUSED, NO_CONTEXT, Racer
from l2o_training.bench.timing import Lane, Rates, overhead, race
from l2o_training.results import write_results

Report = Callable[[str], None]

OTHER_BYTES = 12
"""Bytes per parameter that a step moves beside its state: parameter read and written, gradient read."""


@dataclass(frozen=True)
class Result:
    """One optimizer at one size. Figures are None where it was skipped, or where there is nothing to compare with.

    Attributes:
        size, parameters, optimizer: what was timed.
        steps: timed steps.
        median_s, p10_s, p90_s: seconds per step.
        ns_per_parameter: of the median.
        ratio_adam, ratio_foreach, ratio_fused: median over Adam's in the same group, PyTorch's default first.
        context_overhead: relative to the same rule without context, median over rounds.
        state_bytes, state_bytes_per_parameter: tensors in `optimizer.state`.
        transient_bytes: peak of a step beyond what was there before, by torch's allocator.
        resident_bytes: growth of resident memory in a step, which also sees what is not torch's; CPU only.
        gemm_floor_ns: per parameter, had the matrix products run at the best rate measured in this group.
        copy_floor_ns: per parameter, had the state been read and written, and nothing else.
        group: racers of one size that were timed in turn; they are split only where memory demands it.
        skipped: why there are no figures.
    """

    size: str
    parameters: int
    optimizer: str
    steps: int = 0
    median_s: float | None = None
    p10_s: float | None = None
    p90_s: float | None = None
    ns_per_parameter: float | None = None
    ratio_adam: float | None = None
    ratio_foreach: float | None = None
    ratio_fused: float | None = None
    context_overhead: float | None = None
    state_bytes: int | None = None
    state_bytes_per_parameter: float | None = None
    transient_bytes: int | None = None
    resident_bytes: int | None = None
    gemm_floor_ns: float | None = None
    copy_floor_ns: float | None = None
    group: int = 0
    skipped: str | None = None


def summarise(size: str, n: int, lanes: list[Lane], rates: Rates, group: int) -> list[Result]:
    """Statistics of one group.

    Args:
        size, n: name and number of parameters of the model.
        lanes: after the race.
        rates: of the machine in the same race.
        group: its number.
    """
    by_name = {lane.racer.name: lane for lane in lanes}
    medians = {name: float(np.median(lane.seconds)) for name, lane in by_name.items()}

    def ratio(name: str, reference: str) -> float | None:
        return medians[name] / medians[reference] if reference in medians else None

    results = []
    for name, lane in by_name.items():
        compared = NO_CONTEXT in lane.racer.references and NO_CONTEXT in by_name
        flops = lane.racer.flops
        low, high = np.quantile(lane.seconds, [0.1, 0.9])
        results.append(
            Result(
                size=size,
                parameters=n,
                optimizer=name,
                steps=len(lane.seconds),
                median_s=medians[name],
                p10_s=float(low),
                p90_s=float(high),
                ns_per_parameter=1e9 * medians[name] / n,
                ratio_adam=ratio(name, ADAM),
                ratio_foreach=ratio(name, FOREACH),
                ratio_fused=ratio(name, FUSED),
                context_overhead=overhead(lane, by_name[NO_CONTEXT]) if compared else None,
                state_bytes=lane.state,
                state_bytes_per_parameter=lane.state / n,
                transient_bytes=lane.allocated,
                resident_bytes=lane.resident,
                gemm_floor_ns=None if flops is None else 1e9 * flops / rates.gemm,
                copy_floor_ns=1e9 * (2 * lane.state / n + OTHER_BYTES) / rates.copy,
                group=group,
            )
        )
    return results


def bench_size(
    size: str,
    shapes: Shapes,
    racers: list[Racer],
    needs: dict[str, Need],
    *,
    steps: int,
    seconds: float,
    device: torch.device,
    memory: int | None,
    report: Report,
) -> tuple[list[Result], dict[str, float]]:
    """All racers at one size, in the order given, and the machine's rates in the first group."""
    n = count(shapes)
    free = available_bytes(device)
    groups, skipped = plan(racers, needs, n, free if memory is None else min(free, memory))
    found: dict[str, Result] = {}
    machine: dict[str, float] = {}
    for number, group in enumerate(groups):
        lanes, rates = race(
            group, shapes, steps=steps, seconds=seconds, device=device, report=lambda text: report(f"{size}: {text}")
        )
        machine = machine or {"gemm_flops_per_s": rates.gemm, "copy_bytes_per_s": rates.copy}
        for result in summarise(size, n, lanes, rates, number):
            found.setdefault(result.optimizer, result)  # a reference counts where it was timed first
        del lanes  # before the next group is made: each may take most of the memory
        gc.collect()
    for name, reason in skipped.items():
        found[name] = Result(size, n, name, skipped=reason)
    return [found[racer.name] for racer in racers], machine


def bench(
    racers: list[Racer],
    sizes: list[str],
    *,
    steps: int = 20,
    seconds: float = 60.0,
    device: torch.device,
    memory: int | None = None,
    out: Path,
    settings: dict[str, Any],
    report: Report = lambda text: None,
) -> dict[str, Any]:
    """Benchmark, and write `results.json`, `results.csv` and `growth.png` into `out` after every size.

    Args:
        racers: references before those that name them.
        sizes: names of models.
        steps: timed steps of every optimizer at most.
        seconds: after which no further round of a group is begun.
        device: where.
        memory: bytes that may be used; what is free if that is less, or if None.
        out: folder; made if needed.
        settings: written into results.json.
        report: told what is going on.

    Returns:
        The content of results.json.

    Raises:
        ConfigError: an optimizer cannot be made or cannot step.
    """
    require(steps >= 1, f"--steps: must be 1 or more, got {steps}")
    require(seconds >= 0, f"--seconds: must be 0 or more, got {seconds:g}")
    needs = {}
    for racer in racers:
        report(f"{racer.name}: how much memory does it take?")
        needs[racer.name] = pilot(racer, device)
    out.mkdir(parents=True, exist_ok=True)
    content = {
        **settings,
        "steps": steps,
        "seconds": seconds,
        "sizes": sizes,
        "memory": memory,
        "machine": describe_machine(device),
    }
    content |= {"rates": {}, "results": []}
    for size in sizes:
        results, rates = bench_size(
            size,
            shapes_of(size),
            racers,
            needs,
            steps=steps,
            seconds=seconds,
            device=device,
            memory=memory,
            report=report,
        )
        content["rates"][size] = rates
        content["results"] += [asdict(result) for result in results]
        write(out, content)
    return content


def write(out: Path, content: dict[str, Any]) -> None:
    """The files of the sizes done so far: a stopped benchmark keeps them."""
    with atomic_write(out / "growth.png") as file:
        growth(content["results"], file)
    write_results(out, content, content["results"])


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a figure means little without: processor, threads, load, memory, versions."""
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": None if load is None else [round(value, 2) for value in load],
        "available_bytes": available_bytes(device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "l2o": l2o_runtime.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
