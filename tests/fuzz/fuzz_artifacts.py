"""Feed hostile files to the readers of rules and exported files: each must be refused, fast and in little memory.

    python tests/fuzz/fuzz_artifacts.py --inputs 20000 --exported 1000

Every file must end in an ArtifactError with a short, printable message, in under a second and 200 MB, without a
warning, without running or unpickling anything. Some mutators may hit on a good rule; then it must be one. Each
mutator runs in a forked process of its own: a crash or a hang is counted, not suffered. Exit code 1 if anything else
happened. Needs Linux or macOS, and the `onnx` extra for exported files.
"""

import argparse
import dataclasses
import functools
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import rule_mutators
import signed_mutators
import torch

from l2o_runtime import ArtifactError
from l2o_runtime.config import DMDConfig, FlagConfig, KAEConfig
from l2o_runtime.files.artifact import parse_rule, read_rule, rule_bytes
from l2o_runtime.files.exported import load_exported
from l2o_runtime.rules import LSTMConfig, NormalizedConfig
from l2o_runtime.rules import make_rule as new_rule

LIMIT_BYTES = 200 * 10**6
LIMIT_SECONDS = 1.0  # of CPU time
HANG = 20  # seconds after which a file counts as hanging
CONFIGS = [LSTMConfig(hidden=2, layers=1), LSTMConfig(hidden=2, layers=1, context=FlagConfig(window=4))]
CONFIGS += [NormalizedConfig(hidden=3, layers=2, context=DMDConfig(window=4, rank=1))]
CONFIGS += [LSTMConfig(hidden=2, layers=1, context=DMDConfig(window=4, rank=2, sketch=16, every=2))]
CONFIGS += [LSTMConfig(hidden=2, layers=1, context=DMDConfig(window=4, rank=1, snapshots="loss", delay=3))]
CONFIGS += [LSTMConfig(hidden=2, layers=1, context=KAEConfig(window=4, latent=2, hidden=4))]
Read = Callable[[Path], str]


@dataclasses.dataclass
class Case:
    """A mutator: how it makes a file, how that is read, and which outcomes are right."""

    name: str
    make: Callable[[random.Random, Path], Path]
    read: Read
    allowed: tuple[str, ...] = ("refused",)


@dataclasses.dataclass
class Row:
    """What became of a mutator's inputs."""

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    slowest: float = 0.0
    growth: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)


def read_safetensors(path: Path) -> str:
    """Load a rule; one that loads must be exactly what the file says."""
    rule, provenance = read_rule(path)
    same = meaning(rule_bytes(rule, provenance)) == meaning(path.read_bytes())
    return "valid" if same else "not what the file says"


def meaning(content: bytes) -> tuple[Any, ...]:
    """Tensors, configuration and provenance of a file; the configuration may say 1 for 1.0."""
    header, data = rule_mutators.split(content)
    metadata = header.pop("__metadata__")
    return header, data, json.loads(metadata["config"]), json.loads(metadata["provenance"])


def read_exported(path: Path) -> str:
    """Load an exported rule."""
    load_exported(path)
    return "valid"


def outcome(read: Read, path: Path) -> str:
    """One word, or what went wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return read(path)
    except ArtifactError as error:
        message = str(error).replace(str(path), "")
        fine = len(message) < 1000 and message.isprintable()
        return "refused" if fine else f"message unfit to print: {message[:200]!a}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]!a}"


def work(case: Case, seed: int, indices: range, folder: Path, pipe: Connection) -> None:
    """In a process of its own: make and read the files, and report each."""
    os.chdir(folder)
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    before = peak()
    for index in indices:
        path = case.make(random.Random(f"{case.name} {seed} {index}"), folder)
        signal.alarm(HANG)
        start = time.process_time()  # not the clock: other programs want their share
        result = outcome(case.read, path)
        seconds = time.process_time() - start
        signal.alarm(0)
        if Path(rule_mutators.Payload.marker).exists():
            result = "it ran something"
        elif logged:
            result = f"logged {logged.pop()[:200]!a}"
        pipe.send((result, seconds, peak() - before))
    pipe.close()


def peak() -> int:
    """Largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(case: Case, seed: int, count: int) -> Row:
    """All inputs of a case; where its process dies, another goes on behind the file that killed it."""
    row, done = Row(), 0
    while done < count:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        with tempfile.TemporaryDirectory() as folder:
            process = multiprocessing.get_context("fork").Process(
                target=work, args=(case, seed, range(done, count), Path(folder), sender)
            )
            process.start()
            sender.close()
            for result, seconds, growth in received(receiver):
                record(row, case, done, result, seconds, growth)
                done += 1
            process.join()
        if done < count:
            what = "hung" if process.exitcode == -signal.SIGALRM else f"died with {process.exitcode}"
            record(row, case, done, what, 0.0, 0)
            done += 1
    return row


def received(pipe: Connection) -> Iterator[tuple[str, float, int]]:
    """What the process reports, until it ends."""
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


def record(row: Row, case: Case, index: int, result: str, seconds: float, growth: int) -> None:
    """Count one input."""
    if result not in case.allowed:
        row.wrong.append(f"{case.name} {index}: {result}")
    elif result == "refused" and seconds > LIMIT_SECONDS:
        row.wrong.append(f"{case.name} {index}: took {seconds:.2f} s")
    elif growth > LIMIT_BYTES:
        row.wrong.append(f"{case.name} {index}: memory grew by {growth / 1e6:.0f} MB")
    kind = result if result in ("refused", "valid") else "other"
    row.counts[kind] = row.counts.get(kind, 0) + 1
    row.slowest, row.growth = max(row.slowest, seconds), max(row.growth, growth)


def special_file(rng: random.Random, folder: Path) -> Path:
    """Things under a rule's name that are no ordinary file."""
    path = folder / f"{rng.getrandbits(64):x}.safetensors"
    choice = rng.randrange(8)
    if choice == 0:
        path.mkdir()
    elif choice == 1:
        os.mkfifo(path)
    elif choice == 2:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    elif choice == 3:
        path.symlink_to(rng.choice(["/dev/zero", "/dev/random", "/dev/null", "nowhere", path.name, "/proc/self/mem"]))
    elif choice == 4:
        with path.open("wb") as file:
            file.truncate(rng.choice([2**20, 10**9, 2**40]))
    elif choice == 5:
        return Path(rng.choice(["a\0b", "x" * 5000, "/".join("x" * 300), "/etc/passwd/x", ".", "/", ""]))
    elif choice == 6:
        path.touch()
    return path


def good_rules() -> list[bytes]:
    """The files that are spoilt."""
    torch.manual_seed(0)
    return [rule_bytes(new_rule(config).requires_grad_(False), {"seed": 0}) for config in CONFIGS]


def rule_cases() -> list[Case]:
    """All mutators of `.safetensors` files."""
    good = good_rules()
    for content in good:  # what torch imports for the first rule of a kind is not the doing of a file
        parse_rule(content)

    def make(mutate: rule_mutators.Mutator, rng: random.Random, folder: Path) -> Path:
        path = folder / "rule.safetensors"
        path.write_bytes(mutate(rng, rng.choice(good)))
        return path

    def case(name: str, mutate: rule_mutators.Mutator, *allowed: str) -> Case:
        return Case(name, functools.partial(make, mutate), read_safetensors, ("refused", *allowed))

    cases = [case(mutate.__name__.replace("_", " "), mutate) for mutate in rule_mutators.RAW]
    cases += [Case("special file", special_file, read_safetensors)]
    cases += [case(f"signed: {name}", mutate) for name, mutate in signed_mutators.SIGNED.items()]
    return cases + [case(f"signed: {name}", mutate, "valid") for name, mutate in signed_mutators.MAY_LOAD.items()]


def exported_cases(folder: Path, native: bool) -> list[Case]:
    """All mutators of exported files."""
    import exported_mutators as exported

    from l2o_export.formats import WRITERS, Source

    torch.manual_seed(0)
    source = Source(new_rule(CONFIGS[1]).eval().requires_grad_(False), {"seed": 0})
    cases = []
    for suffix, writer in list(WRITERS.values())[1:]:
        writer(source, folder / f"good{suffix}")
        good = (folder / f"good{suffix}").read_bytes()

        def make(mutate: exported.Mutator, suffix: str, good: bytes, rng: random.Random, folder: Path) -> Path:
            path = folder / f"rule{suffix}"
            path.write_bytes(mutate(rng, good, suffix))
            return path

        groups = [(exported.REFUSED[suffix], ("refused",)), (exported.IGNORED[suffix], ("valid",))]
        if native:
            groups = [({"resealed": exported.resealed}, ("refused", "valid"))]
        for mutators, allowed in groups:
            for name, mutate in mutators.items():
                bound = functools.partial(make, mutate, suffix, good)
                cases.append(Case(f"{suffix}: {name}", bound, read_exported, allowed))
    return cases


def table(cases: list[Case], count: int, seed: int) -> list[str]:
    """Run the cases and print their table; what went wrong."""
    print(f"{'mutator':32} {'inputs':>7} {'refused':>8} {'valid':>6} {'other':>6} {'slowest ms':>11} {'growth MB':>10}")
    total, wrong = Row(), []
    for index, case in enumerate(cases):
        row = run(case, seed, count // len(cases) + (index < count % len(cases)))
        wrong += row.wrong
        show(case.name, row)
        total.slowest, total.growth = max(total.slowest, row.slowest), max(total.growth, row.growth)
        total.counts = {key: total.counts.get(key, 0) + row.counts.get(key, 0) for key in ("refused", "valid", "other")}
    show("all", total)
    return wrong


def show(name: str, row: Row) -> None:
    """One line of the table."""
    counts = [row.counts.get(key, 0) for key in ("refused", "valid", "other")]
    numbers = (
        f"{sum(counts):7} {counts[0]:8} {counts[1]:6} {counts[2]:6} {1000 * row.slowest:11.1f} {row.growth / 1e6:10.1f}"
    )
    print(f"{name:32} {numbers}", flush=True)


def main() -> int:
    """Parse the command line, run, and say what went wrong."""
    parser = argparse.ArgumentParser(description="Feed hostile files to the readers of rules.")
    parser.add_argument("--inputs", type=int, default=20_000, help="number of .safetensors files")
    parser.add_argument("--exported", type=int, default=0, help="number of .pt, .pt2 and .onnx files")
    parser.add_argument("--native", type=int, default=0, help="exported files damaged under a digest that fits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only mutators whose name has this in it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for count, cases in (
            (arguments.inputs, rule_cases),
            (arguments.exported, lambda: exported_cases(Path(folder), native=False)),
            (arguments.native, lambda: exported_cases(Path(folder), native=True)),
        ):
            if count:
                wrong += table([case for case in cases() if arguments.only in case.name], count, arguments.seed)
    print(*(f"WRONG {line}" for line in wrong[:50]), f"{len(wrong)} wrong", sep="\n")
    return min(len(wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
