"""The report: one HTML file that needs neither network nor scripts."""

import itertools
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import l2o_runtime
from l2o_runtime.artifact import atomic_write
from l2o_training import metrics
from l2o_training.workloads import pictures
from l2o_training.workloads.base import Workload
from l2o_training.workloads.entrants import GRID_SIZE, REFERENCE, Entrant
from l2o_training.workloads.study import ROUNDS
from l2o_training.workloads.summary import Findings, Overall, Row
from l2o_training.workloads.train import LOOKS, looks

LIGHT_RULES, DARK_RULES = ("#c2410c", "#a16207", "#9d174d"), ("#fb923c", "#facc15", "#f472b6")
LIGHT_OTHERS = ("#737373", "#111827", "#0369a1", "#6d28d9", "#047857", "#be185d")
DARK_OTHERS = ("#a3a3a3", "#f3f4f6", "#38bdf8", "#a78bfa", "#34d399", "#f9a8d4")

LAG = 0.25
"""Share of a validation loss by which running statistics may raise it without a word."""

NAMED = 6
"""Learning rates at the edge that are named at the top of the page."""


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
        loader=PackageLoader("l2o_training.workloads", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"loss": loss, "digits": digits, "interval": interval, "share": share}
    study = findings.study
    return environment.get_template("report.html.jinja").render(
        study=study,
        findings=findings,
        command=command,
        colours=palette(study.entrants),
        horizons=[_horizon(findings, horizon) for horizon in study.horizons],
        sections=[_section(findings, workload) for workload in study.workloads],
        headlines={e.name: headline(findings, e) for e in study.entrants if e.learned},
        dashes=[" ".join(f"{2 * part:g}" for part in pictures.dashes(i)) for i in range(len(study.entrants))],
        warnings=cautions(findings),
        reference=REFERENCE,
        versions=versions(),
        last=metrics.LAST,
        cap=metrics.CAP,
        max_tau=metrics.MAX_TAU,
        resamples=metrics.RESAMPLES,
        looks=LOOKS,
        rounds=ROUNDS,
    )


def palette(entrants: list[Entrant]) -> list[tuple[str, str]]:
    """A colour of each optimizer on light and on dark ground; those of rules stand out."""
    found = []
    for learned in (True, False):
        light, dark = (LIGHT_RULES, DARK_RULES) if learned else (LIGHT_OTHERS, DARK_OTHERS)
        count = sum(entrant.learned == learned for entrant in entrants)
        found += [(light[i % len(light)], dark[i % len(dark)]) for i in range(count)]
    return found


def headline(findings: Findings, entrant: Entrant) -> list[str]:
    """What was found of a rule, in one sentence per horizon and one about time."""
    said = []
    rows = [row for row in findings.overall if row.optimizer == entrant.name]
    for row in rows:
        centre, low, high = row.train
        known = "" if math.isnan(low) else f"95 % interval {digits(low)} to {digits(high)}: "
        said.append(
            f"After {findings.study.steps * row.horizon:,} steps its training loss is {digits(centre)} times that of "
            f"tuned Adam ({known}{verdict(row)}), and lower on {row.better} of {row.workloads} tasks."
        )
    slower = digits(rows[0].optimizer_time)
    return [
        *said,
        f"Its step, without the network's forward and backward pass, takes {slower} times Adam's time.",
    ]


def verdict(row: Overall) -> str:
    """What the interval of a ratio to tuned Adam says."""
    _, low, high = row.train
    if math.isnan(low):
        return "one task, no interval"
    return "no difference shown" if low <= 1 <= high else "better" if high < 1 else "worse"


def cautions(findings: Findings) -> list[str]:
    """What a reader has to know before believing the figures."""
    study, found = findings.study, []
    for entrant in study.entrants:
        longest = study.steps * max(study.horizons)
        if entrant.learned and longest > entrant.horizon:
            found.append(
                f"{entrant.name} was meta-trained for {entrant.horizon:,} steps and runs for up to {longest:,}."
            )
        seen = sorted(entrant.seen & {workload.data for workload in study.workloads if workload.data})
        if seen:
            found.append(f"{entrant.name} was meta-trained on {' and '.join(seen)}: these data are not new to it.")
    found += lags(findings)
    edges = [row for row in findings.rows if row.edge]
    if edges:
        named = [f"{r.optimizer} on {r.workload} ({r.steps} steps, {r.lr:g})" for r in edges]
        named = named[:NAMED] + [f"and {len(named) - NAMED} more, marked in the tables"] * (len(named) > NAMED)
        found.append(f"The best learning rate is at the grid's edge, a better one may lie outside: {', '.join(named)}.")
    tried = next(len(entrant.lrs) for entrant in study.entrants if entrant.name == REFERENCE)
    if tried < GRID_SIZE:
        found.append(f"Baselines were tuned over {tried} of the {GRID_SIZE} learning rates of the full grid.")
    if study.seeds < 3:
        found.append(f"Runs per setting: {study.seeds}. Fewer than three say little.")
    return found


def lags(findings: Findings) -> list[str]:
    """Where BatchNorm's running statistics lag far behind the weights: a line for each task and length."""
    found = []
    for horizon, workload in itertools.product(findings.study.horizons, findings.study.workloads):
        rows = [row for row in findings.rows if (row.horizon, row.workload) == (horizon, workload.name)]
        named = [f"{r.optimizer} {loss(r.validation)} ({loss(r.batch_validation)})" for r in rows if _lags(r)]
        if named:
            found.append(
                f"{workload.name}, {rows[0].steps:,} steps: validation loss far from that with the statistics of "
                f"minibatches, in brackets: {', '.join(named)}."
            )
    return found


def _lags(row: Row) -> bool:
    """Whether the validation loss is far above, or not finite where that with the statistics of minibatches is."""
    return row.batch_validation is not None and (row.gap is None or row.gap > LAG * abs(row.batch_validation))


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
    slow = {
        field: metrics.slowdowns(findings.costs(horizon, field)) for field in ("steps_to_target", "seconds_to_target")
    }
    return {
        "number": horizon,
        "steps": study.steps * horizon,
        "overall": overall,
        "ratios": [
            (workload, [findings.row(horizon, workload.name, name) for name in names]) for workload in study.workloads
        ],
        "train": Markup(
            pictures.forest(f"train-{horizon}", names, [row.train for row in overall], "training loss / tuned Adam's")
        ),
        "validation": Markup(
            pictures.forest(
                f"validation-{horizon}", names, [row.validation for row in overall], "validation loss / tuned Adam's"
            )
        ),
        "by_steps": Markup(
            pictures.profiles(f"steps-{horizon}", slow["steps_to_target"], "τ: steps / fewest steps of all")
        ),
        "by_seconds": Markup(
            pictures.profiles(f"seconds-{horizon}", slow["seconds_to_target"], "τ: time / shortest time of all")
        ),
    }


def _section(findings: Findings, workload: Workload) -> dict[str, Any]:
    """A workload: figures and pictures per horizon."""
    parts = []
    for horizon in findings.study.horizons:
        rows = [findings.row(horizon, workload.name, entrant.name) for entrant in findings.study.entrants]
        runs = [findings.tuned[horizon, workload.name, row.optimizer] for row in rows]
        steps = rows[0].steps
        width = min(metrics.LAST, steps)
        smooth = [(np.arange(width, steps + 1), metrics.running_mean(r.train)) for r in runs]
        held = [(np.array(looks(steps)), r.validation) for r in runs]
        parts.append(
            {
                "number": horizon,
                "steps": steps,
                "rows": rows,
                "best": _best(rows),
                "train": Markup(pictures.curves(f"{workload.name}-{horizon}-train", smooth, "training loss")),
                "validation": Markup(pictures.curves(f"{workload.name}-{horizon}-held", held, "validation loss")),
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


def loss(value: float | None) -> str:
    """A loss in three digits.

    >>> loss(0.41649), loss(0.000012345), loss(None)
    ('0.416', '1.23e-05', 'diverged')
    """
    return "diverged" if value is None else f"{value:#.3g}"


def digits(value: float | None) -> str:
    """Two decimals, or three digits; a dash where there is no value.

    >>> digits(1.006), digits(0.0123), digits(123.4), digits(None)
    ('1.01', '0.0123', '123', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    return (
        f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"
    )


def interval(values: tuple[float, float, float]) -> str:
    """A centre with its bounds.

    >>> interval((1.0, 0.5, 2.0))
    '1.00 [0.50, 2.00]'
    """
    centre, low, high = map(digits, values)
    return centre if math.isnan(values[1]) else f"{centre} [{low}, {high}]"


def share(value: float) -> str:
    """A share in per cent.

    >>> share(0.125)
    '12 %'
    """
    return f"{100 * value:.0f} %"
