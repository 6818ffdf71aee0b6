"""What a step costs that a rule's exported files take, beside Adam and the rule itself, all in one process.

    l2o export default --to all --out runs/export
    python benchmarks/exported.py runs/export --sizes tiny mlp cnn

One row per size and file: CPU milliseconds of a step, and how many times as long as Adam's. Contenders take turns on
one thread; each figure is the median of its rounds. Times are the process's CPU time, so a machine with other work does
little to them. `plain` is the rule without compiled kernels. With --aoti FILE the .pt2 is also run as machine code:
AOTInductor, which needs a C++ compiler, writes FILE unless it is there.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from l2o_runtime import LearnedOptimizer
from l2o_training.bench.models import MODELS, count, random_tensors, shapes_of
from l2o_training.bench.racers import stepper

Maker = Callable[[list[Tensor]], Optimizer]


def compiled(folder: Path, package: Path) -> Maker:
    """The .pt2 as machine code, compiled if the package is not there."""
    if not package.is_file():
        program = torch.export.load(folder / "rule.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
    run = torch._inductor.aoti_load_package(str(package))

    def make(params: list[Tensor]) -> Optimizer:
        optimizer = LearnedOptimizer(params, rule=folder / "rule.pt2")
        optimizer._rule._run = lambda inputs: list(run(*inputs))  # the same inputs and outputs
        return optimizer

    return make


def plain(path: Path, params: list[Tensor]) -> Optimizer:
    """The rule's own file, without kernels, which are chosen at the first step."""
    with mock.patch.dict(os.environ, L2O_KERNELS="plain"):
        optimizer = LearnedOptimizer(params, rule=path)
        optimizer.step(loss=torch.ones(()))
    return optimizer


def contenders(folder: Path, package: Path | None) -> dict[str, Maker]:
    """By name; Adam is the first."""
    own = folder / "rule.safetensors"
    found: dict[str, Maker] = {
        "Adam": Adam,
        own.name: partial(LearnedOptimizer, rule=own),
        "plain": partial(plain, own),
    }
    found |= {f"rule{end}": partial(LearnedOptimizer, rule=folder / f"rule{end}") for end in (".pt", ".pt2", ".onnx")}
    return found if package is None else found | {"AOTInductor": compiled(folder, package)}


def race(makers: dict[str, Maker], size: str, seconds: float) -> dict[str, float]:
    """CPU seconds of a step: medians over at least two rounds, and more while there is time."""
    shapes, steps, times = shapes_of(size), {}, {name: [] for name in makers}
    for name, make in makers.items():
        params = [param.requires_grad_() for param in random_tensors(shapes, 0.1, 0, torch.device("cpu"))]
        for param, grad in zip(params, random_tensors(shapes, 1e-2, 1, torch.device("cpu")), strict=True):
            param.grad = grad
        steps[name] = stepper(make(params), torch.ones(()))
        steps[name]()
    started = time.process_time()
    while len(times["Adam"]) < 2 or (len(times["Adam"]) < 30 and time.process_time() - started < seconds):
        for name, step in steps.items():
            began = time.process_time()
            step()
            times[name].append(time.process_time() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `l2o export` wrote, all formats")
    parser.add_argument("--sizes", nargs="+", choices=list(MODELS), default=["tiny", "mlp"])
    parser.add_argument("--seconds", type=float, default=5, help="after which no further round is begun, per size")
    parser.add_argument("--aoti", type=Path, help="package of AOTInductor, with the suffix .pt2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    makers = contenders(options.folder, options.aoti)
    print("| parameters | file | ms | × Adam |\n|---:|---|---:|---:|")
    for size in options.sizes:
        found = race(makers, size, options.seconds)
        for name, seconds in found.items():
            row = f"{count(shapes_of(size)):,} | {name} | {1000 * seconds:.3g} | {seconds / found['Adam']:.3g}"
            print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
