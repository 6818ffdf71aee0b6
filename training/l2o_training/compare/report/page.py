"""The report: one HTML file that needs neither network nor scripts."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import l2o_runtime
from l2o_runtime.files.atomic import atomic_write
from l2o_training.compare import statistics
from l2o_training.compare.contenders import REFERENCE, Contender
from l2o_training.compare.report import pictures
from l2o_training.compare.report.words import advice, cautions, digits, headline, interval, loss, share, speedup
from l2o_training.compare.scripts import ROUNDS
from l2o_training.compare.summary import Findings, Row
from l2o_training.compare.workloads import LOOKS, Workload, looks

LIGHT_RULES, DARK_RULES = ("#c2410c", "#a16207", "#9d174d"), ("#fb923c", "#facc15", "#f472b6")
LIGHT_OTHERS = ("#737373", "#111827", "#0369a1", "#6d28d9", "#047857", "#be185d")
DARK_OTHERS = ("#a3a3a3", "#f3f4f6", "#38bdf8", "#a78bfa", "#34d399", "#f9a8d4")


def write_report(findings: Findings, command: str, path: Path) -> None:
    """Write the report; the file appears whole or not at all.

    Args:
        findings: what was found.
        command: that measured it.
        path: of the file.
    """
    text = render(findings, command)
    with atomic_write(path) as file:
        file.write(text.encode())


def render(findings: Findings, command: str) -> str:
    """The report as text."""
    environment = Environment(
        loader=PackageLoader("l2o_training.compare.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {f.__name__: f for f in (loss, digits, interval, share, speedup)}
    study = findings.study
    return environment.get_template("page.html.jinja").render(
        study=study,
        findings=findings,
        command=command,
        colours=palette(study.contenders),
        horizons=[_horizon(findings, horizon) for horizon in study.horizons],
        sections=[_section(findings, workload) for workload in study.workloads],
        headlines={e.name: [*advice(findings, e), *headline(findings, e)] for e in study.contenders if e.learned},
        dashes=[" ".join(f"{2 * part:g}" for part in pictures.dashes(i)) for i in range(len(study.contenders))],
        warnings=cautions(findings),
        validated=findings.validated,
        timed=findings.timed,
        reference=REFERENCE,
        versions=versions(),
        last=statistics.LAST,
        cap=statistics.CAP,
        max_tau=statistics.MAX_TAU,
        resamples=statistics.RESAMPLES,
        fewest=statistics.FEWEST,
        looks=LOOKS,
        rounds=ROUNDS,
    )


def palette(contenders: list[Contender]) -> list[tuple[str, str]]:
    """A colour of each optimizer on light and on dark ground; those of rules stand out."""
    found = []
    for learned in (True, False):
        light, dark = (LIGHT_RULES, DARK_RULES) if learned else (LIGHT_OTHERS, DARK_OTHERS)
        count = sum(contender.learned == learned for contender in contenders)
        found += [(light[i % len(light)], dark[i % len(dark)]) for i in range(count)]
    return found


def versions() -> dict[str, str]:
    """What the figures were made with."""
    return {
        "l2o": l2o_runtime.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": version("scipy"),
        "Python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def _horizon(findings: Findings, horizon: int) -> dict[str, Any]:
    """Overview of one length of runs."""
    study = findings.study
    overall = [row for row in findings.overall if row.horizon == horizon]
    names = [row.optimizer for row in overall]

    def forest(kind: str, intervals: list[tuple[float, float, float]]) -> Markup:
        label = f"{kind} loss / tuned Adam's"
        return Markup(pictures.forest(f"{kind}-{horizon}", names, intervals, label))

    def profiles(field: str, label: str) -> Markup:
        ratios = statistics.slowdowns(findings.costs(horizon, field))
        return Markup(pictures.profiles(f"{field}-{horizon}", ratios, label))

    held = [row.validation for row in overall if row.validation is not None]
    return {
        "number": horizon,
        "steps": study.steps * horizon,
        "overall": overall,
        "ratios": [
            (workload, [findings.row(horizon, workload.name, name) for name in names]) for workload in study.workloads
        ],
        "versus": [row for row in findings.versus if row.horizon == horizon],
        "train": forest("training", [row.train for row in overall]),
        "validation": forest("validation", held) if findings.validated else None,
        "by_steps": profiles("steps_to_target", "τ: steps / fewest steps of all"),
        "by_seconds": profiles("seconds_to_target", "τ: time / shortest time of all") if findings.timed else None,
    }


def _section(findings: Findings, workload: Workload) -> dict[str, Any]:
    """A workload: figures and pictures per horizon."""
    parts = []
    for horizon in findings.study.horizons:
        rows = [findings.row(horizon, workload.name, contender.name) for contender in findings.study.contenders]
        runs = [findings.tuned[horizon, workload.name, row.optimizer].curves for row in rows]
        steps = rows[0].steps
        width = min(statistics.LAST, steps)
        smooth = [(np.arange(width, steps + 1), statistics.running_mean(r.train)) for r in runs]
        held = [(np.array(looks(steps)), r.validation) for r in runs if r.validation.size]
        name = f"{workload.name}-{horizon}"
        parts.append(
            {
                "number": horizon,
                "steps": steps,
                "rows": rows,
                "best": _best(rows),
                "train": Markup(pictures.curves(f"{name}-train", smooth, "training loss")),
                "validation": Markup(pictures.curves(f"{name}-held", held, "validation loss")) if held else None,
            }
        )
    return {"workload": workload, "parameters": rows[0].parameters, "parts": parts}


def _best(rows: list[Row]) -> dict[str, float | None]:
    """The lowest loss of a workload."""
    found: dict[str, float | None] = {}
    for field in ("train", "validation"):
        values = [value for row in rows if (value := getattr(row, field)) is not None]
        found[field] = min(values) if values else None
    return found
