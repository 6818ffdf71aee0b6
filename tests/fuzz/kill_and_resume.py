"""Kill `l2o train` and examples/resume.py with SIGKILL, resume them, and compare with runs that were left alone.

python tests/fuzz/kill_and_resume.py --kills 50 --seed 0

Two ways of killing. At random: a process is killed at a moment uniform over the duration of an undisturbed run, imports
included, resumed, and killed again, up to three times or until it ends. At every point: a process kills itself before
each operation on its folder (open for writing, rename, remove, …) and in the middle of each write; its resumption dies
at a random one of these points.

After every kill all files must be whole, and a copy of the folder, resumed and left alone, must give the results of the
undisturbed run bit for bit: files by their bytes, metrics and checkpoints by all they hold but durations, TensorBoard
by its scalars. Needs Linux or another POSIX system.
"""

import argparse
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from l2o_runtime.files.artifact import read_rule
from l2o_training.meta import checkpoints

ROOT = Path(__file__).parents[2]
SMALL = [
    *("validate_every=4", "horizon=10", "unroll=5", "batch=2", "validation_runs=2"),
    *("rule.context.window=5", "rule.hidden=4", "rule.layers=1"),
]
CHAIN = 3
"""Kills of one run at random moments, at most: a run's end is soon reached, and then all moments are start-up."""

DURATIONS = {"seconds", "idle"}
"""Keys of metrics and checkpoints that differ between equal runs."""

PRELOAD = [
    *("__main__", "l2o_cli.main", "l2o_export.formats", "l2o_training.meta.trainer"),
    *("l2o_training.plots", "torch.utils.tensorboard", "torch._dynamo", "sklearn.datasets"),
]
FORKS = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Job:
    """What is killed.

    Attributes:
        name: for the report.
        start: arguments of python; the folder follows.
        resume: what a resumption adds.
    """

    name: str
    start: tuple[str, ...]
    resume: tuple[str, ...] = ()

    def arguments(self, folder: Path) -> list[str]:
        """Arguments of python that start or continue the run; where nothing was written there is nothing to resume."""
        begun = folder.is_dir() and any(folder.iterdir())
        return [*self.start, str(folder), *(self.resume if begun else ())]


def train(epochs: int) -> Job:
    """The command, on a small problem."""
    settings = (f"--set={setting}" for setting in (f"epochs={epochs}", *SMALL))
    start = ("-m", "l2o_cli", "train", "--preset=demo", "--threads=1", *settings, "--out")
    return Job("l2o train", start, ("--resume",))


def script(epochs: int) -> Job:
    """The example, with a checkpoint per epoch."""
    path = str(ROOT / "examples" / "resume.py")
    return Job("examples/resume.py", (path, f"--epochs={epochs}", "--every=14", "--out"))


JOBS = {"train": (train(60), train(12)), "script": (script(40), script(2))}
"""Name → a run as long as its start-up, for random moments, and a short one with few points."""


def is_temporary(path: Path) -> bool:
    """Whether a file is one that a killed writer left."""
    hidden = path.name.startswith(".") and path.name != ".lock"
    return hidden or ".tmp" in (path.suffix, path.parent.suffix)


def bits(value: Any) -> Any:
    """A value without durations in a form whose equality is equality of every bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items() if key not in DURATIONS}
    if isinstance(value, list | tuple):
        return type(value).__name__, [bits(item) for item in value]
    return value.hex() if isinstance(value, float) else value


def read_checkpoint(path: Path) -> Any:
    """All that a checkpoint holds: a script's file, or a folder of `l2o train`."""
    if path.is_file():
        return bits(torch.load(path, weights_only=True))
    return bits(checkpoints.read(path))


def read_metrics(path: Path) -> Any:
    """All rows of a metrics file, the last one ended by a newline."""
    text = path.read_text()
    if text and not text.endswith("\n"):
        raise ValueError("the last line is torn")
    return bits([json.loads(line) for line in text.splitlines()])


def read_scalars(path: Path) -> Any:
    """What TensorBoard shows of the folder that an events file is in."""
    events = EventAccumulator(str(path.parent)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_picture(path: Path) -> bytes:
    """The bytes of a picture that can be decoded to its end."""
    with Image.open(path) as picture:
        picture.load()
    return path.read_bytes()


def read_verified(check: Callable[[Path], Any]) -> Callable[[Path], bytes]:
    """A reader that gives a file's bytes once `check` has accepted it."""

    def read(path: Path) -> bytes:
        check(path)
        return path.read_bytes()

    return read


READERS: dict[str, Callable[[Path], Any]] = {
    "checkpoint": read_checkpoint,
    "checkpoint.pt": read_checkpoint,
    "metrics.jsonl": read_metrics,
    "config.json": read_verified(lambda path: json.loads(path.read_text())),
    "rule.safetensors": read_verified(read_rule),
    "learning-curve.png": read_picture,
    "tensorboard": read_scalars,
    ".lock": Path.read_bytes,
}


def contents(folder: Path) -> dict[str, Any]:
    """What every file of a folder holds, temporary ones aside.

    Raises:
        Exception: a file cannot be read to its end, or nobody said how to read it.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and not is_temporary(path)]
    found = {}
    for path in files:
        kind, place = path.name, path
        if path.parent.name == "tensorboard":
            kind = "tensorboard"
        elif path.parent.parent.name == "checkpoints":
            kind, place = "checkpoint", path.parent
        found[place.name if kind == "checkpoint" else kind] = READERS[kind](place)
    return found


def differences(folder: Path, reference: dict[str, Any]) -> list[str]:
    """What of a finished run is not as in the reference."""
    found = contents(folder)
    wrong = [key for key in sorted(found.keys() | reference.keys()) if found.get(key) != reference.get(key)]
    return wrong + [f"{path.name} left over" for path in folder.rglob("*") if is_temporary(path)]


class Fuse:
    """Counts the points at which a process changes its folder, logs them, and kills the process at one.

    Args:
        folder: the process's own.
        at: number of the point to die at, from 1; 0 never.
        log: file that gets a line for every point reached.
    """

    def __init__(self, folder: Path, at: int, log: Path):
        self.folder, self.at, self.reached, self.last = str(folder), at, 0, ""
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def due(self, operation: str, path: str) -> bool:
        """Note a point; whether it is the one."""
        name = re.sub(r"^\.|\.\w{8}(\.tmp)?$|(?<=tfevents).*", "", os.path.basename(path))  # noqa: PTH119
        os.write(self.log, f"{operation} {name}\n".encode())
        self.reached += 1
        return self.reached == self.at

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Hook for `sys.addaudithook`: dies before the operation."""
        if event not in {"open", "os.mkdir", "os.rename", "os.remove", "os.chmod"}:
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        path = args[1 if event == "os.rename" else 0]
        if self.owns(path) and not isinstance(path, int):
            self.last = os.fsdecode(path)
            if self.due(event.removeprefix("os."), self.last):
                die()

    def owns(self, file: Any) -> bool:
        """Whether a path is in the folder; descriptors are, as nothing else is written through one here."""
        return isinstance(file, int) or os.fsdecode(file).startswith(self.folder)

    def open(self, file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        """In place of `io.open`: files of the folder that are written as bytes get torn writes."""
        if not (self.owns(file) and "b" in mode and set(mode) & set("wax")):
            return REAL_OPEN(file, mode, *args, **options)
        return io.BufferedWriter(TornFile(self, file, mode.replace("b", "")))


class TornFile(io.FileIO):
    """A file whose write can be the last thing that its process does, half done."""

    def __init__(self, fuse: Fuse, file: Any, mode: str):
        super().__init__(file, mode)
        self.fuse = fuse

    def write(self, data: Any) -> int:
        """Write, or write one half and die."""
        if self.fuse.due("write", self.fuse.last if isinstance(self.name, int) else os.fsdecode(self.name)):
            super().write(memoryview(data)[: len(data) // 2])
            die()
        return super().write(data)


REAL_OPEN = io.open


def die() -> None:
    """Kill this process so that it cannot tidy up."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_fused(arguments: list[str], folder: Path, at: int, log: Path) -> None:
    """What `python arguments` does, in this process, until the fuse blows."""
    output = os.open(log.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    fuse = Fuse(folder, at, log)
    sys.addaudithook(fuse.audit)
    io.open = fuse.open  # type: ignore[assignment]  # what Path.open, os.fdopen and TensorBoard call
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def run_to_point(job: Job, folder: Path, at: int = 0) -> list[str]:
    """Start or continue a run that dies at a point; gives the points it reached.

    The process is forked from one that has imported everything: starting takes no time.

    Raises:
        RuntimeError: it ended neither well nor by the signal.
    """
    # TensorBoard orders the files of a folder by the second they were begun in; real restarts take longer.
    while any(f".{int(time.time())}." in path.name for path in folder.glob("tensorboard/*")):
        time.sleep(0.02)
    log = folder.with_suffix(".log")
    process = FORKS.Process(target=run_fused, args=(job.arguments(folder), folder, at, log))
    process.start()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{job.name} ended with {process.exitcode}: {log.with_suffix('.out').read_text()}")
    points = log.read_text().splitlines()
    if (process.exitcode == 0) != (at == 0 or len(points) < at):
        raise RuntimeError(f"{job.name} ended with {process.exitcode} at point {len(points)}, was to die at {at}")
    return points


def run_for(job: Job, folder: Path, seconds: float | None = None) -> bool:
    """Start or continue a run in a process of its own and kill it after some time; whether it was killed.

    Raises:
        RuntimeError: it ended by itself with an error.
    """
    command = [sys.executable, *job.arguments(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, message = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        _, message = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{job.name} ended with {process.returncode}: {message.decode()}")
    return process.returncode != 0


@dataclass
class Series:
    """Kills of one job in one way, and what came of them.

    Attributes:
        job: what is killed.
        reference: contents of the folder of an undisturbed run.
        kills: number of them; `before_anything` of these left no file, `in_a_write` left a new temporary file.
        resumed: number of runs that were resumed, left alone, and came to their end.
        where: number of kills at each point, where it is known.
        failures: what went wrong.
    """

    job: Job
    reference: dict[str, Any]
    kills: int = 0
    before_anything: int = 0
    in_a_write: int = 0
    resumed: int = 0
    where: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def died(self, folder: Path, started: float) -> bool:
        """After a kill: whether all files are whole, and a copy that is resumed ends as the reference did."""
        self.kills += 1
        self.before_anything += not folder.is_dir() or not any(folder.iterdir())
        left = [path for path in folder.rglob("*") if is_temporary(path) and path.stat().st_mtime > started]
        self.in_a_write += bool(left)
        copy = folder.with_name(folder.name + "-resumed")
        try:
            contents(folder)
            if folder.is_dir():
                shutil.copytree(folder, copy)
            run_to_point(self.job, copy)
        except Exception as error:  # whatever a torn file or a refused resumption raises is a finding
            self.failures.append(f"{folder}: {error!r}")
            return False
        self.resumed += 1
        well = self.ended(copy)
        if well:
            shutil.rmtree(copy)
        return well

    def ended(self, folder: Path) -> bool:
        """After a run's own end: whether its folder is as the reference's."""
        wrong = differences(folder, self.reference)
        if wrong:
            self.failures.append(f"{folder}: {', '.join(wrong)}")
        return not wrong


def random_moments(series: Series, work: Path, kills: int, duration: float, draw: random.Random) -> None:
    """Short chains of kills at uniform moments, each chain in a folder of its own, until there were enough."""
    for chain in itertools.count():
        folder = work / f"random-{chain}"
        for _ in range(CHAIN):
            if series.kills == kills:
                return
            started = time.time()
            if not run_for(series.job, folder, draw.uniform(0, duration)):
                series.ended(folder)
                break
            if not series.died(folder, started):
                break


def every_point(series: Series, work: Path, limit: int | None, draw: random.Random) -> int:
    """A kill at every point of a run (or at evenly spaced ones), and one more while it is resumed.

    Returns:
        The number of points.
    """
    total = len(run_to_point(series.job, work / "points"))
    series.ended(work / "points")
    for at in spaced(total, limit):
        folder = work / f"point-{at}"
        for point in (at, draw.randint(1, total)):
            started = time.time()
            points = run_to_point(series.job, folder, point)
            if len(points) < point:  # a resumed run has fewer
                series.ended(folder)
                break
            series.where[points[-1]] += 1
            if not series.died(folder, started):
                break
    return total


def spaced(total: int, limit: int | None) -> Iterator[int]:
    """1 … total, or `limit` of them at equal distances."""
    count = min(total, limit or total)
    return (1 + i * (total - 1) // max(count - 1, 1) for i in range(count))


def report(way: str, series: Series) -> None:
    """Print what a series gave."""
    print(
        f"{series.job.name}, {way}: {series.kills} kills ({series.before_anything} before anything was written, "
        f"{series.in_a_write} with a file half done), {series.resumed} resumed to the end, "
        f"{len(series.failures)} failures",
        flush=True,
    )
    for place, count in sorted(series.where.items()):
        print(f"  {count:4d} × {place}")
    for failure in series.failures:
        print(f"  FAILED {failure}")


def undisturbed(job: Job, folder: Path) -> tuple[Series, float]:
    """Run a job to its end; gives an empty series with what is expected of others, and the seconds it took."""
    started = time.perf_counter()
    run_for(job, folder)
    duration = time.perf_counter() - started
    reference = contents(folder)
    print(f"{job.name}: undisturbed in {duration:.1f} s; compared: {', '.join(sorted(reference))}", flush=True)
    return Series(job, reference), duration


def measure(name: str, work: Path, kills: int, points: int | None, seed: int) -> bool:
    """Kill a job in both ways and report; whether all went well."""
    work.mkdir()
    draw = random.Random(f"{seed}/{name}")
    long, short = JOBS[name]
    failures = []
    if kills:
        series, duration = undisturbed(long, work / "long")
        random_moments(series, work, kills, duration, draw)
        report("random moments", series)
        failures += series.failures
    if points != 0:
        series, _ = undisturbed(short, work / "short")
        total = every_point(series, work, points, draw)
        report(f"{total} points", series)
        failures += series.failures
    return not failures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="at random moments, for each job")
    parser.add_argument("--points", type=int, help="at most so many points of the writes; default: every one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    FORKS.set_forkserver_preload(PRELOAD)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every epoch that was logged twice
    work = Path(tempfile.mkdtemp(prefix="l2o-kill-"))
    well = [measure(name, work / name, args.kills, args.points, args.seed) for name in args.jobs]
    if not all(well):
        sys.exit(f"what failed is kept in {work}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
