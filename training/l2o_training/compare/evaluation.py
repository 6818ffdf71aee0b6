"""An evaluation from its request to its files: what `l2o eval` does around the measuring."""

import math
import os
import shlex
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from l2o_runtime.config import require
from l2o_runtime.files.atomic import atomic_write
from l2o_training.compare import contenders
from l2o_training.compare.own import OwnWorkload
from l2o_training.compare.statistics import smoothed
from l2o_training.compare.study import Study
from l2o_training.compare.suites import OWN, OWN_BASELINES, Suite, find_suite, workloads
from l2o_training.compare.summary import Findings, summarise
from l2o_training.compare.workloads import Workload
from l2o_training.config import pick_device
from l2o_training.meta.provenance import versions
from l2o_training.plots import panels
from l2o_training.ranks.group import ALONE, START_TIMEOUT, Ranks
from l2o_training.results import plain, write_results
from l2o_training.tasks.data import Datasets
from l2o_training.tasks.places import distinct, is_place, name_of


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be compared on what; None leaves it to the suite.

    Attributes:
        rules: bundled names or files.
        suite, tasks: which tasks; none is all of the suite. With tasks of one's own, "file.py:function", the suite does
            not matter, and rules are told how long a run is.
        baselines: names, or "all"; the suite's usual ones are all, those beside tasks of one's own a few.
        steps, horizons, runs, seed: as a `Study` has them; horizons as text, "1,5,25".
        thin: try every n-th learning rate.
        cosine: let rules compete once more, under a cosine.
        told: let them compete once more, told how long the run is.
        weight_decay: of the rules.
        tune_on: the final loss that learning rates are tuned on, "training" or "validation".
    """

    rules: tuple[str, ...]
    suite: str = "digits"
    tasks: tuple[str, ...] = ()
    baselines: str | None = None
    steps: int | None = None
    horizons: str | None = None
    runs: int | None = None
    thin: int = 1
    cosine: bool = False
    told: bool = False
    weight_decay: float = 0.0
    tune_on: str = "training"
    seed: int = 0

    @property
    def own(self) -> bool:
        """Whether tasks are the user's own.

        Raises:
            ConfigError: some are, some are not.
        """
        places = [is_place(task) for task in self.tasks]
        mixed = any(places) and not all(places)
        require(not mixed, f"--task: tasks of your own or of a suite, not both, got {', '.join(self.tasks)}")
        if any(places):
            distinct(self.tasks)
        return any(places)

    @property
    def schedules(self) -> tuple[contenders.Schedule | None, ...]:
        """What rules are run under."""
        wanted: tuple[tuple[contenders.Schedule | None, bool], ...] = (
            (None, not self.own),
            ("total", self.told or self.own),
            ("cosine", self.cosine),
        )
        return tuple(schedule for schedule, asked in wanted if asked)

    def found_suite(self) -> tuple[str, Suite]:
        """Name and suite."""
        return (
            (", ".join(map(name_of, self.tasks)), OWN) if self.own else (self.suite, find_suite(self.suite, self.tasks))
        )


def start(
    request: Request,
    out: Path,
    data_root: Path,
    download: bool = False,
    device: str = "auto",
    report: Path | None = None,
    ranks: Ranks = ALONE,
) -> Study:
    """The study of a request; mistakes are told before anything is measured or written.

    Args:
        request: what is asked for.
        out: folder of results.
        data_root, download: where data sets are, and whether torchvision may fetch them.
        device: "auto", "cpu" or "cuda".
        report: file that a report will be written to.
        ranks: who shares the work.

    Raises:
        ConfigError, ArtifactError, OSError: what the command line tells in one line.
    """

    def choose() -> str:
        scripts = request.own or find_suite(request.suite).scripts
        require(not scripts or device != "cuda", f"--device {device}: these tasks run on the CPU")
        return "cpu" if scripts else pick_device(device)

    place = torch.device(ranks.place(ranks.agree(choose, START_TIMEOUT)))
    ranks.require_same({**asdict(request), "versions": versions()})
    ranks.connect(place)

    def prepare() -> Study:
        if report is not None and ranks.main:
            _require_writable(report)
        return _study(request, out, Datasets(data_root, download=download), place)

    return ranks.agree(prepare)


def _study(request: Request, out: Path, load: Datasets, device: torch.device) -> Study:
    name, suite = request.found_suite()
    own: list[Workload] = [OwnWorkload(task) for task in request.tasks] if request.own else []
    require(math.isfinite(request.weight_decay), f"--weight-decay: must be finite, got {request.weight_decay}")
    decays = request.own or suite.scripts or not request.weight_decay
    require(decays, f"--weight-decay: for training scripts, and {name} has none: leave it out, or choose another suite")
    baselines = request.baselines or (OWN_BASELINES if request.own else "all")
    return Study(
        suite=name,
        workloads=own or workloads(suite, load, device),
        contenders=[
            *contenders.rules(request.rules, request.schedules, request.weight_decay),
            *contenders.baselines(
                baselines, request.thin, flat=not (request.own or suite.scripts), structured=suite.structured
            ),
        ],
        steps=suite.steps if request.steps is None else request.steps,
        horizons=suite.horizons if request.horizons is None else parse_horizons(request.horizons),
        runs=suite.runs if request.runs is None else request.runs,
        seed=request.seed,
        cache=out / "cache",
        caveat=suite.caveat,
        tune_on=request.tune_on,
    )


def parse_horizons(text: str) -> tuple[int, ...]:
    """Multiples of the number of steps from "1,5,25", each once and ascending.

    Raises:
        ConfigError: something else.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    valid = bool(parts) and all(part.isascii() and part.isdecimal() and 1 <= int(part) <= 1000 for part in parts)
    require(valid, f"--horizons: expected whole numbers from 1 to 1000, such as 1,5,25, got {text!r}")
    return tuple(sorted({int(part) for part in parts}))


def _require_writable(path: Path) -> None:
    """Tell before hours of measuring that a file cannot be written."""
    require(not path.is_dir(), f"--report {path}: is a folder; give the name of a file, such as report.html")
    require(path.parent.is_dir(), f"--report {path}: there is no folder {path.parent}: make it, or name another")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    Path(name).unlink()


def finish(study: Study, request: Request, out: Path, report: Path | None = None) -> Findings:
    """Write `results.json`, `results.csv`, a picture for each length, and the report, of what was measured.

    Raises:
        Incomplete: a run is missing.
        OSError: a file cannot be written.
    """
    findings = summarise(study)
    settings = {
        "suite": study.suite,
        "rules": list(request.rules),
        "cosine": request.cosine,
        "told": request.told,
        "weight_decay": request.weight_decay,
        "baselines": [contender.name for contender in study.contenders if not contender.learned],
        "steps": study.steps,
        "horizons": list(study.horizons),
        "runs": study.runs,
        "seed": study.seed,
        "tune_on": study.tune_on,
        "grids": {c.name: list(c.lrs) for c in study.contenders if len(c.lrs) > 1},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    found = plain_results(findings)
    write_results(
        out,
        {**settings, "overall": found["overall"], "versus": found["versus"]},
        [asdict(row) for row in findings.rows],
    )
    for horizon in study.horizons:
        _draw(findings, horizon, out / f"losses-{study.steps * horizon}.png")
    if report is not None:
        from l2o_training.compare.report.page import write_report

        write_report(findings, command(study, request), report)
    return findings


def plain_results(findings: Findings) -> dict[str, Any]:
    """Overall figures, rules beside each other optimizer, and figures of every task and length, as plain data."""
    parts: dict[str, list[Any]] = {"overall": findings.overall, "versus": findings.versus, "results": findings.rows}
    return {name: plain([asdict(row) for row in rows]) for name, rows in parts.items()}


def _draw(findings: Findings, horizon: int, path: Path) -> None:
    """Smoothed losses of all contenders at their chosen learning rates, a panel for each task."""
    study = findings.study
    curves = {
        workload.name: {
            contender.name: smoothed(findings.tuned[horizon, workload.name, contender.name].curves.train)
            for contender in study.contenders
        }
        for workload in study.workloads
    }
    with atomic_write(path) as file:
        panels(curves, file)


def command(study: Study, request: Request) -> str:
    """The command that makes the report, folders aside."""
    words = ["l2o", "eval", *request.rules, *([] if request.own else ["--suite", study.suite])]
    words += [] if request.baselines is None else ["--baselines", request.baselines]
    words += ["--steps", str(study.steps), "--horizons", ",".join(map(str, study.horizons))]
    words += ["--runs", str(study.runs), "--seed", str(study.seed), "--thin", str(request.thin)]
    words += ["--cosine"] * request.cosine + ["--told"] * request.told
    words += ["--weight-decay", f"{request.weight_decay:g}"] * (request.weight_decay != 0)
    words += ["--tune-on", study.tune_on] * (study.tune_on != "training")
    words += [word for task in request.tasks for word in ("--task", task)]
    words += ["--threads", str(torch.get_num_threads()), "--data-root", "data", "--report", "report.html"]
    return shlex.join(words)
