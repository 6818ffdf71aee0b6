"""l2o eval --suite unseen."""

import shlex
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from l2o_cli.console import err, out, print_json

if TYPE_CHECKING:
    from l2o_training.workloads.study import Study
    from l2o_training.workloads.summary import Findings

STEPS, RUNS = 100, 3


def evaluate_unseen(
    rules: list[str],
    *,
    tasks: Iterable[str],
    baselines: str,
    steps: int | None,
    horizons: str,
    runs: int | None,
    thin: int,
    cosine: bool,
    out_dir: Path,
    data_root: Path,
    download: bool,
    report: Path | None,
    as_json: bool,
) -> None:
    """Measure what is missing, print the overview, and write results and the report.

    Raises:
        ConfigError, ArtifactError, DataError, OSError: what the command line tells in one line.
    """
    import torch

    from l2o_runtime.config import require
    from l2o_training.results import plain, write_results
    from l2o_training.workloads.entrants import find_baselines, find_rules, thinned
    from l2o_training.workloads.study import Study
    from l2o_training.workloads.suite import find_workloads
    from l2o_training.workloads.summary import summarise

    tuned = (thinned(entrant, thin) for entrant in find_baselines(baselines))
    entrants = [*find_rules(rules, cosine=cosine), *tuned]
    study = Study(
        workloads=find_workloads(tasks),
        entrants=entrants,
        steps=STEPS if steps is None else steps,
        horizons=parse_horizons(horizons),
        seeds=RUNS if runs is None else runs,
        cells=out_dir / "cells",
        data_root=data_root,
        download=download,
    )
    if report is not None:
        require(not report.is_dir(), f"--report {report}: is a folder; give the name of a file, such as report.html")
        require_writable(report)
    _measure(study)
    findings = summarise(study)
    chosen = [entrant.name for entrant in entrants if not entrant.learned]
    settings = {
        "suite": "unseen",
        "rules": rules,
        "cosine": cosine,
        "baselines": chosen,
        "steps": study.steps,
        "horizons": list(study.horizons),
        "runs": study.seeds,
        "grids": {entrant.name: list(entrant.lrs) for entrant in entrants if len(entrant.lrs) > 1},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    overall, rows = ([asdict(row) for row in part] for part in (findings.overall, findings.rows))
    write_results(out_dir, {**settings, "overall": overall}, rows)
    if report is not None:
        from l2o_training.workloads.report import write_report

        write_report(findings, _command(study, rules, baselines, thin, cosine, list(tasks)), report)
    if as_json:
        print_json(plain({"overall": overall, "results": rows}))
        return
    from l2o_training.workloads.report import lags

    for horizon in study.horizons:
        out.print(_table(findings, horizon))
    for text in lags(findings):
        out.print(text, soft_wrap=True, markup=False)
    err.print(f"results.json and results.csv are in {out_dir}", soft_wrap=True)
    if report is not None:
        out.print(str(report), soft_wrap=True)


def parse_horizons(text: str) -> tuple[int, ...]:
    """Multiples of the number of steps from "1,5,25", each once and ascending.

    Raises:
        ConfigError: something else.
    """
    from l2o_runtime.config import require

    parts = [part.strip() for part in text.split(",") if part.strip()]
    valid = bool(parts) and all(part.isascii() and part.isdecimal() and 1 <= int(part) <= 1000 for part in parts)
    require(valid, f"--horizons: expected whole numbers from 1 to 1000, such as 1,5,25, got {text!r}")
    return tuple(sorted({int(part) for part in parts}))


def require_writable(path: Path) -> None:
    """Tell before hours of measuring that a file cannot be written.

    Raises:
        OSError: its folder does not exist, or nothing may be written there.
    """
    import os
    import tempfile

    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    Path(name).unlink()


def _measure(study: "Study") -> None:
    """Measure with a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from l2o_training.workloads.study import measure

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), MofNCompleteColumn())
    with Progress(*columns, TextColumn("{task.fields[detail]}", markup=False), TimeElapsedColumn(), console=err) as bar:
        job = bar.add_task("unseen", total=None, detail="")

        def tell(what: str, detail: str, done: int, total: int) -> None:
            bar.update(job, description=what, detail=detail, completed=done, total=total)

        measure(study, tell)


def _command(study: "Study", rules: list[str], baselines: str, thin: int, cosine: bool, tasks: list[str]) -> str:
    """The command that makes the report, folders aside."""
    import torch

    words = ["l2o", "eval", *rules, "--suite", "unseen", "--baselines", baselines]
    words += ["--steps", str(study.steps), "--horizons", ",".join(map(str, study.horizons))]
    words += ["--runs", str(study.seeds), "--thin", str(thin)]
    words += ["--cosine"] * cosine
    words += [word for task in tasks for word in ("--task", task)]
    words += ["--threads", str(torch.get_num_threads()), "--data-root", "data", "--report", "report.html"]
    return shlex.join(words)


def _table(findings: "Findings", horizon: int) -> Table:
    """Optimizers down, overall figures across."""
    steps = findings.study.steps * horizon
    table = Table("optimizer", title=f"{len(findings.study.workloads)} tasks, {steps} steps, ratios to tuned Adam")
    for title in ("train loss", "validation loss", "better on", "speed-up", "profile", "profile, s", "diverged"):
        table.add_column(title, justify="right")
    for row in (row for row in findings.overall if row.horizon == horizon):
        table.add_row(
            row.optimizer,
            _interval(row.train),
            _interval(row.validation),
            f"{row.better}/{row.workloads}",
            f"{row.speedup:.2f}",
            f"{row.score_steps:.2f}",
            f"{row.score_seconds:.2f}",
            f"{row.diverged:.0%}",
        )
    return table


def _interval(values: tuple[float, float, float]) -> str:
    centre, low, high = values
    return f"{centre:.2f}" if low != low else f"{centre:.2f} [{low:.2f}, {high:.2f}]"
