"""What does a GPU say? All of it in less than eight minutes; NOT RUN YET on one: it was written where there was none.

    bash benchmarks/gpu.sh --out runs/gpu

needs a working tree and torch; what other packages are needed for and missing is said. Parts, each a process of its own
with a budget of its own, so that what fails in one does not stop the others:

- tests: those that need a GPU.
- default: steps of the default rule at 1.2 to 350 million parameters, beside Adam and a copy of what they have to move.
- lstm: likewise of rules with an LSTM for every coordinate, with and without a sketched DMD context.
- network: ResNet-50, forward and backward, beside the steps.
- meta: inner steps per second of meta-training, beside the CPU's.

`results.json` and `results.md` in `--out` are written anew with every line. `--cpu` does the same at small sizes.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUDGETS = {"tests": 90.0, "default": 110.0, "lstm": 75.0, "network": 60.0, "meta": 120.0}
"""Seconds of every part, its start included."""

CUDA_TESTS = [f"tests/runtime/test_{name}.py" for name in ("foreach", "triton", "dtypes")]
PATIENCE = 20
"""On a CPU budgets are so many times as long: nothing is lent there, and others may use it."""

MARGIN = 0.85
"""Of its budget a part plans with so much."""

GPU_SIZES = {"1.2 M": ("cnn",), "11 M": (6, 384, 1000), "86 M": (12, 768, 1000), "350 M": (24, 1024, 24_000)}
CPU_SIZES = {"0.01 M": (2, 16, 20)}
"""A model of `l2o_training.bench.models`; or layers, width and words of a transformer, which needs torch alone."""

LSTM_BYTES = 360
"""Per parameter of a 2 × 20 rule: state, parameters, gradients and their copy."""

Row = dict[str, Any]


def budget(part: str, cpu: bool) -> float:
    """Seconds of a part."""
    return BUDGETS[part] * (PATIENCE if cpu else 1)


class Clock:
    """What is left of a part's budget."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + MARGIN * seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def missing(*packages: str) -> list[Row]:
    """A line about those that are not there."""
    names = [name for name in packages if importlib.util.find_spec(name) is None]
    return [{"skipped": f"not installed: {', '.join(names)}"}] if names else []


def tests(cpu: bool, clock: Clock) -> Iterator[Row]:
    """The tests that need a GPU; on a CPU all of them are skipped."""
    if lacks := missing("pytest", "hypothesis", "safetensors"):
        yield from lacks
        return
    # What a bare machine lacks is asked for by fixtures that these tests do not use; what it warns of is no failure.
    options = ["-q", "-k", "cuda", "--maxfail=5", "--noconftest", "-W", "default", "-p", "no:cacheprovider"]
    for file in CUDA_TESTS[:1] if cpu else CUDA_TESTS:
        command = [sys.executable, "-m", "pytest", *options, file]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(clock.left, 1))
        except subprocess.TimeoutExpired as error:
            yield {"file": file, "failed": f"ran out of its time after {error.timeout:.0f} s"}
            continue
        lines = (done.stdout or done.stderr).strip().splitlines() or [""]
        yield {"file": file, "summary": lines[-1]} | (
            {"failed": "see tail", "tail": lines[-40:]} if done.returncode else {}
        )


def shapes_of(size: tuple[Any, ...]) -> list[tuple[int, ...]]:
    """Of a model's parameters."""
    import torch

    from l2o_training.bench import models

    if len(size) == 1:
        return models.shapes_of(size[0])
    layers, width, words = size
    with torch.device("meta"):
        model = models._transformer(layers, width, 2, words)
    return [tuple(param.shape) for param in model.parameters()]


def racers(kind: str) -> dict[str, tuple[str, Callable[..., Any]]]:
    """Who is timed: what L2O_KERNELS is set to, and how an optimizer is made; the first three are references."""
    import torch
    from torch.optim import Adam

    from l2o_runtime import LearnedOptimizer
    from l2o_training.bench.racers import CONTEXTS, _untrained

    found: dict[str, tuple[str, Callable[..., Any]]] = {
        f"Adam {name}": ("", partial(Adam, **{name: True})) for name in ("foreach", "fused")
    }
    if kind == "default":
        for kernels in ("plain", "foreach", "compiled", "foreach, graph", "compiled, graph"):
            found[f"default, {kernels}"] = (kernels, LearnedOptimizer)
        return found
    for context in ("2×20, no context", "2×20, dmd sketch"):
        make = _untrained(context, CONTEXTS[context], torch.float32).make
        sketch = "sketch" in context  # torch's eigenvalues wait for the device, which no graph can
        for kernels in ("plain", "triton", *(() if sketch else ("triton:tf32", "triton:ieee", "triton, graph"))):
            found[f"{context}, {kernels}"] = (kernels, make)
    return found


def steps(kind: str, cpu: bool, clock: Clock) -> Iterator[Row]:
    """Times of steps at every size, the smaller ones first."""
    if lacks := missing("safetensors"):
        yield from lacks
        return
    import torch

    from l2o_training.bench.memory import available_bytes
    from l2o_training.bench.models import count
    from l2o_training.bench.timing import Gradients

    device = torch.device("cpu" if cpu else "cuda")
    rates: dict[str, float] = {}
    reference: list[Any] = []
    # What has to be compiled comes last, for nobody knows how long that takes.
    for late, (name, size) in product((False, True), (CPU_SIZES if cpu else GPU_SIZES).items()):
        shapes = shapes_of(size)
        n, gradients = count(shapes), Gradients(shapes, device)
        common = {"size": name, "parameters": n, "tensors": len(shapes)}
        if not late:
            rates[name] = copy_rate(n, device)
            yield common | {"optimizer": "a copy", "gb_per_s": rates[name] / 1e9}
        for title, (kernels, make) in racers(kind).items():
            row = common | {"optimizer": title}
            if ("compiled" in kernels) != late:
                continue
            if clock.left < 3:
                yield row | {"skipped": "no time left"}
            elif "2×20" in title and LSTM_BYTES * n > available_bytes(device):
                yield row | {"skipped": f"needs {LSTM_BYTES * n / 1e9:.0f} GB"}
            elif cpu and ("graph" in kernels or "triton" in kernels):
                yield row | {"skipped": "needs a GPU"}
            elif cpu and kernels == "compiled":
                yield row | {"skipped": "to compile for a CPU takes longer than all else"}
            else:
                try:
                    found = timed(
                        kernels, make, shapes, gradients, device, clock, reference if len(rates) == 1 else None
                    )
                    yield row | found | {"floor_ms": 1e3 * (2e9 * found["state_gb"] + 12 * n) / rates[name]}
                except Exception as error:
                    yield row | {"failed": f"{type(error).__name__}: {error}"[:2000]}
            if device.type == "cuda":
                torch.cuda.empty_cache()


def copy_rate(n: int, device: Any) -> float:
    """Bytes per second, read and written, of a copy of so many numbers, a gigabyte at most."""
    import torch

    from l2o_training.bench.timing import clock

    source = torch.ones(min(n, 2**28), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(clock(lambda: target.copy_(source), device) for _ in range(8))


def timed(
    kernels: str,
    make: Callable[..., Any],
    shapes: Any,
    gradients: Any,
    device: Any,
    clock: Clock,
    reference: list[Any] | None,
) -> Row:
    """Median milliseconds of a step, with the host's part.

    With a reference, at the first size, also operators, and the largest difference from the plain loop's parameters.
    """
    import torch

    from l2o_training.bench.memory import state_bytes
    from l2o_training.bench.operators import operators
    from l2o_training.bench.racers import Racer
    from l2o_training.bench.timing import clock as seconds_of
    from l2o_training.bench.timing import open_lane

    name, _, precision = kernels.split(",")[0].partition(":")
    os.environ["L2O_KERNELS"] = name
    found: Row = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    lane = open_lane(Racer("", make), shapes, gradients, device)
    params = lane.optimizer.param_groups[0]["params"]
    if precision:
        from l2o_runtime.kernels.triton import TritonKernel

        replicas = lane.optimizer._replicas
        replicas.kernels[params[0].device] = TritonKernel(replicas.on(params[0].device), precision)
    for _ in range(3):
        seconds_of(lane.step, device)
    found["first_s"] = time.perf_counter() - started
    if reference is not None and name == "plain":
        reference[:] = [param.detach().clone() for param in params]
    elif reference and name:
        found["differs"] = max(float((p - q).abs().max()) for p, q in zip(params, reference, strict=True))
    if reference is not None and name != "compiled":
        found["operators"] = operators(lane.step)
    step = lane.step
    if "graph" in kernels:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            lane.step()
        step = graph.replay
    times: list[float] = []
    until = time.perf_counter() + min(2.0 if device.type == "cuda" else 0.2, clock.left / 4)
    while len(times) < 3 or (len(times) < 50 and time.perf_counter() < until):
        times.append(seconds_of(step, device))
    found |= {"ms": 1e3 * sorted(times)[len(times) // 2], "steps": len(times)}
    found["state_gb"] = state_bytes(lane.optimizer) / 1e9
    if device.type == "cuda":
        found["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    return found


def network(cpu: bool, clock: Clock) -> Iterator[Row]:
    """ResNet-50 on a batch of 256 in bfloat16, forward and backward; and the steps of its parameters."""
    if lacks := missing("torchvision", "safetensors"):
        yield from lacks
        return
    import torch
    from torch.nn.functional import cross_entropy
    from torchvision.models import resnet50, squeezenet1_1

    from l2o_training.bench.timing import clock as seconds_of

    device = torch.device("cpu" if cpu else "cuda")
    batch, side = (2, 64) if cpu else (256, 224)
    torch.manual_seed(0)
    model = (squeezenet1_1 if cpu else resnet50)().to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device=device)

    def passes() -> None:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = cross_entropy(model(images), labels)
        loss.backward()

    def median(call: Callable[[], object], repeats: int) -> float:
        for _ in range(1 if cpu else 3):
            call()
        return 1e3 * sorted(seconds_of(call, device) for _ in range(repeats))[repeats // 2]

    whole = median(passes, 1 if cpu else 10)
    name = f"{type(model).__name__}, batch {batch}"
    yield {"optimizer": f"{name}: forward and backward", "ms": whole}
    for title, (kernels, make) in racers("default").items():
        if "graph" in kernels or (cpu and kernels != "foreach"):
            continue
        if clock.left < 5:
            yield {"optimizer": title, "skipped": "no time left"}
            continue
        os.environ["L2O_KERNELS"] = kernels
        try:
            time_ms = median(make(list(model.parameters())).step, 1 if cpu else 10)
            yield {"optimizer": title, "ms": time_ms, "share": time_ms / whole}
        except Exception as error:
            yield {"optimizer": title, "failed": f"{type(error).__name__}: {error}"[:2000]}


def meta(cpu: bool, clock: Clock) -> Iterator[Row]:
    """Inner steps per second of the default's preset, on its tasks without data; a third of the time is the CPU's."""
    if lacks := missing("safetensors", "filelock", "torchvision"):
        yield from lacks
        return
    from dataclasses import replace

    import torch

    from l2o_training.config import load_preset
    from l2o_training.meta.trainer import Trainer

    length = 4 if cpu else 200
    lanes = 2 if cpu else 8
    config = load_preset("directional", [f"horizon={length}", f"shortest={length}", f"lanes={lanes}", "epochs=100000"])
    chosen = tuple(task for task in config.tasks if task.kind == "regression")
    config = replace(config, tasks=chosen, validation_tasks=chosen[:1], validate_every=100_000)
    devices = ["cpu"] if cpu else ["cuda", "cpu"]
    for index, device in enumerate(devices):
        until = time.monotonic() + clock.left * (0.66 if index < len(devices) - 1 else 0.9)
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
            trainer = Trainer(config, Path(folder) / "run", device=device)
            trainer.train_epoch()
            started, taken = time.monotonic(), 0
            while taken == 0 or (time.monotonic() < until and not (cpu and taken)):
                taken += trainer.train_epoch().steps
            rate = taken / (time.monotonic() - started)
        kind = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
        title = f"preset directional, {len(chosen)} tasks without data, runs of {length} steps"
        yield {"optimizer": f"{title}: {kind}", "steps_per_s": rate, "steps": taken}


PARTS: dict[str, Callable[[bool, Clock], Iterator[Row]]] = {
    "tests": tests,
    "default": partial(steps, "default"),
    "lstm": partial(steps, "lstm"),
    "network": network,
    "meta": meta,
}


def child(part: str, cpu: bool, seconds: float) -> None:
    """Do a part, a line of JSON for every result."""
    for row in PARTS[part](cpu, Clock(seconds)):
        print("\n" + json.dumps(row), flush=True)


def parent(parts: list[str], cpu: bool, out: Path) -> int:
    """Do all parts, one after the other; write what they say as they say it."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(cpu), "parts": {}}
    for part in parts:
        seconds, lines = budget(part, cpu), []
        results["parts"][part] = lines
        command = [sys.executable, __file__, "--part", part, *(["--cpu"] if cpu else [])]
        started = time.monotonic()
        with (out / f"{part}.log").open("w") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
            timer = threading.Timer(seconds, process.kill)
            timer.start()
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    lines.append(json.loads(line))
                    write(out, results)
            process.wait()
            timer.cancel()
        spent = time.monotonic() - started
        if process.returncode:
            reason = "ran out of its time" if spent >= seconds else f"ended with {process.returncode}"
            tail = (out / f"{part}.log").read_text().strip().splitlines()[-12:]
            lines.append({"failed": f"{reason} after {spent:.0f} s; see {part}.log", "tail": tail})
        write(out, results)
        print(f"{part}: {len(lines)} lines in {spent:.0f} s", flush=True)
    failed = [
        line for lines in results["parts"].values() for line in lines if "failed" in line or line.get("passed") is False
    ]
    print(f"{out / 'results.md'}: {len(failed)} failures")
    return 1 if failed else 0


def machine(cpu: bool) -> Row:
    """What the figures mean little without."""
    found: Row = {"torch": version("torch"), "cores": os.cpu_count(), "device": "cpu"}
    if not cpu:
        import torch

        found["device"] = torch.cuda.get_device_name()
    there = {
        name: importlib.util.find_spec(name) is not None
        for name in ("triton", "safetensors", "torchvision", "llvmlite")
    }
    return found | there


def write(out: Path, results: dict[str, Any]) -> None:
    """Both files; each is whole at any time."""
    for name, text in (("results.json", json.dumps(results, indent=1)), ("results.md", markdown(results))):
        fresh = out / f"{name}.new"
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(out / name)


COLUMNS = (
    "file",
    "size",
    "parameters",
    "tensors",
    "optimizer",
    "ms",
    "× Adam fused",
    "share",
    "operators",
    "differs",
    "first_s",
)
COLUMNS += ("floor_ms", "state_gb", "peak_gb", "gb_per_s", "steps", "steps_per_s", "summary", "skipped", "failed")


def markdown(results: dict[str, Any]) -> str:
    """A table for every part."""
    facts = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    text = [f"# Measured on {results['machine']['device']}", "", facts, ""]
    for part, lines in results["parts"].items():
        fused = {
            line.get("size"): line["ms"] for line in lines if line.get("optimizer") == "Adam fused" and "ms" in line
        }
        rows = []
        for line in lines:
            ratio = line["ms"] / fused[line["size"]] if "ms" in line and line.get("size") in fused else None
            rows.append(line | ({} if ratio is None else {"× Adam fused": ratio}))
        columns = [name for name in COLUMNS if any(name in row for row in rows)]
        text += [f"## {part}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        text += ["| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in rows]
        text += [""]
    return "\n".join(text)


def cell(value: Any) -> str:
    """Of a table, on one line."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")[:300]


def main() -> int:
    """Run; 2 where there is no GPU, and none was excused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--cpu", action="store_true", help="the same at small sizes, to see whether it runs")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        child(options.part, options.cpu, budget(options.part, options.cpu))
        return 0
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts: expected some of {', '.join(PARTS)}; got {', '.join(unknown)}")
    if not options.cpu:
        import torch

        if not torch.cuda.is_available():
            print("gpu: no GPU here, nothing was measured; --cpu shows whether it runs", file=sys.stderr)
            return 2
    return parent(parts, options.cpu, options.out.resolve())


if __name__ == "__main__":
    sys.exit(main())
