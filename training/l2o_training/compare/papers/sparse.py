"""The page on sparse recovery: unrolled solvers meta-trained and measured, with Open-L2O's figures beside ours."""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from l2o_runtime.config import nearest, require
from l2o_runtime.files.atomic import atomic_write
from l2o_runtime.learned_solver import LearnedSolver
from l2o_runtime.solvers import AMP, FISTA, ISTA, Solver
from l2o_training.compare.papers import recovery
from l2o_training.compare.papers.numbers import NOT_RUN, markdown
from l2o_training.compare.papers.page import wrapped
from l2o_training.compare.papers.recovery import Errors
from l2o_training.config import load_preset
from l2o_training.meta.curriculum import make_curriculum
from l2o_training.meta.folder import METRICS, RULE
from l2o_training.meta.trainer import Trainer
from l2o_training.plots import STYLE
from l2o_training.tasks import SparseConfig

PUBLISHED = {
    "lista": (-16.8, -35.3),
    "lista-cp": (-22.1, -30.3),
    "lista-cpss": (-34.0, -63.1),
    "alista": (-28.0, -78.5),
    "lamp": (-31.9, -54.6),
    "glista": (-28.7, -55.6),
    "lfista": (-12.1, -28.9),
}
"""Preset → NMSE in dB at 8 and at 16 layers, without noise, read off Figure 5 of arXiv 2103.12828 (± 0.5 dB)."""

LASSO = {"lista-lasso": 2e-2, "alista-lasso": 8.5e-3}
"""Preset → E[f − f*]/E[f*] at 16 layers for A of 25 × 50, read off Figure 6 (± 10 %)."""

ITERATIONS = {"AMP": 25, "FISTA": 202, "ISTA": 3420}
"""Iterations to −35 dB that the authors of ALISTA report."""

CLEAN = SparseConfig(rows=256, columns=512)
ELSEWHERE = {
    "as in meta-training": CLEAN,
    "15 % not zero": replace(CLEAN, sparsity=0.15),
    "SNR 20": replace(CLEAN, snr=20.0),
    "A perturbed by 5 %": replace(CLEAN, perturbed=0.05),
    "b 10 times as large": CLEAN,
}
"""What solvers are tried on that were meta-trained without noise."""

NAMES = [*PUBLISHED, *LASSO]

TEXT = (
    "Unrolled solvers for b = A x*, A of 256 × 512, a tenth of x* not zero, no noise: Figure 5 of Open-L2O "
    "(arXiv 2103.12828), and Lasso problems as in its Figure 6. The published recipe trains each stage of each layer "
    "until 2,000 "
    "updates of batch 128 help no more. The presets do not: a stage has 40 to 120 updates of batch 32 to 64, layers "
    "begin with what the layer before has learned, and the first with ALISTA's analytic weight, where the published "
    "ones begin as ISTA. LAMP begins as AMP."
)


@dataclass(frozen=True)
class Runs:
    """Where the runs are.

    Attributes:
        folder: of all of them.
        changes: overrides of every meta-training.
    """

    folder: Path
    changes: tuple[str, ...] = ()

    def path(self, name: str) -> Path:
        """Folder of the run of a preset."""
        return self.folder / f"{name}-s0"

    def solver(self, name: str) -> LearnedSolver | None:
        """What was meta-trained; None where that is not done."""
        path = self.path(name) / RULE
        return LearnedSolver(path) if path.is_file() else None


def train(runs: Runs, only: Sequence[str] = (), report: Callable[[str], None] = lambda text: None) -> None:
    """Meta-train what is missing, or go on with it.

    Raises:
        ConfigError: there is no such preset on the page.
    """
    for name in only:
        require(name in NAMES, f"--only: unknown variant {name!r}: {nearest(name, NAMES)}")
    for name in only or NAMES:
        folder = runs.path(name)
        if not (folder / RULE).is_file():
            report(name)
            Trainer(load_preset(name, runs.changes), folder, restarted=True).run()


def write_page(runs: Runs, out: Path, arguments: Sequence[str] = (), count: int = 128) -> Path:
    """Measure what was meta-trained, and write `sparse.md` with its picture.

    Args:
        runs: where the solvers are.
        out: folder of the pages.
        arguments: of the command, folders aside.
        count: signals of errors and gaps.
    """
    solvers = {name: found for name in PUBLISHED if (found := runs.solver(name)) is not None}
    curves = _curves(solvers, count)
    out.mkdir(parents=True, exist_ok=True)
    _draw(curves, out / "sparse.png")
    parts = ["# Sparse recovery and the Lasso", TEXT, _table(runs, curves, count), "![NMSE over layers](sparse.png)"]
    parts += ["## Iterations of classical solvers", _iterations(), "## Time", _times(solvers)]
    parts += ["## Elsewhere, and with the safeguard", _elsewhere(solvers, count), "## Lasso", _lasso(runs, count)]
    parts += ["## Meta-training", _trainings(runs), "## Commands", _commands(runs, arguments)]
    parts.append(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}.")
    path = out / "sparse.md"
    with atomic_write(path) as file:
        file.write((wrapped("\n\n".join(parts)) + "\n").encode())
    return path


def _curves(solvers: dict[str, LearnedSolver], count: int) -> dict[str, list[Errors]]:
    """NMSE over layers of learned and classical solvers, λ and α of these tuned on other signals for the 16th."""
    instances, tuned = recovery.draw(CLEAN, count), recovery.draw(CLEAN, 64, recovery.TEST_SEED + 1)
    found = {name: recovery.over_layers(each.solver, instances, each.layers) for name, each in solvers.items()}
    makers: dict[str, tuple[Callable[[float], Solver], Sequence[float]]] = {
        "AMP": (AMP, (1.0, 1.1, 1.2, 1.3, 1.4, 1.5)),
        "FISTA": (FISTA, (0.01, 0.02, 0.05, 0.1, 0.2)),
        "ISTA": (ISTA, (0.01, 0.02, 0.05, 0.1, 0.2)),
    }
    for name, (make, grid) in makers.items():
        ends = {number: recovery.over_layers(make(number), tuned, 16)[-1].ratio for number in grid}
        found[name] = recovery.over_layers(make(min(ends, key=lambda number: ends[number])), instances, 16)
    return found


def _table(runs: Runs, curves: dict[str, list[Errors]], count: int) -> str:
    rows = []
    for name, (eight, sixteen) in PUBLISHED.items():
        ours = curves.get(name)
        if ours is None:
            rows.append([name, "", "", "", f"{eight}", f"{sixteen}", _state(runs, name)])
        else:
            cells = [f"{ours[7].ratio:.1f}", f"{ours[15].ratio:.1f}", f"{ours[15].mean:.1f}"]
            rows.append([name, *cells, f"{eight}", f"{sixteen}", _state(runs, name)])
    for name in ("AMP", "FISTA", "ISTA"):
        ours = curves[name]
        rows.append([name, f"{ours[7].ratio:.1f}", f"{ours[15].ratio:.1f}", f"{ours[15].mean:.1f}", "", ""])
    header = ["dB", "ours, 8", "ours, 16", "ours, 16, mean of dB", "published, 8", "published, 16"]
    text = (
        "NMSE is 10 log₁₀(Σ‖x − x*‖²/Σ‖x*‖²); the mean over signals of their own decibels, Open-L2O's, stands beside."
    )
    return f"{text}\n\n{markdown(header, rows)}"


def _state(runs: Runs, name: str) -> str:
    """Whether a run is done, or in which stage it was stopped, from the scores that it recorded."""
    rows = _history(runs, name)
    if not rows:
        return NOT_RUN
    curriculum = make_curriculum(load_preset(name, runs.changes))
    for row in rows:
        curriculum.advance(row["validation"])
    return "done" if curriculum.over else f"stopped in {curriculum.stage.name}"


def _history(runs: Runs, name: str) -> list[dict[str, Any]]:
    path = runs.path(name) / METRICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _draw(curves: dict[str, list[Errors]], path: Path) -> None:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(layout="constrained")
        for name, found in curves.items():
            style = "-" if name in PUBLISHED else "--"
            (line,) = axes.plot(range(1, len(found) + 1), [each.ratio for each in found], style, label=name)
            if name in PUBLISHED:
                axes.plot([8, 16], PUBLISHED[name], "o", markerfacecolor="none", color=line.get_color())
        axes.set(xlabel="layers, or iterations; hollow: published", ylabel="NMSE, dB")
        axes.legend(fontsize=8)
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=90)
        plt.close(figure)


def _iterations() -> str:
    found = recovery.classical_iterations()
    rows = [
        [name, "not reached" if steps is None else str(steps), f"{number:g}", str(ITERATIONS[name])]
        for name, (number, steps) in found.items()
    ]
    text = "To −35 dB, A of 250 × 500, p = 0.1, SNR 40, 16 signals; λ, or α for AMP, with the fewest of a grid."
    return f"{text}\n\n{markdown(['', 'iterations', 'λ or α', 'published'], rows)}"


def _times(solvers: dict[str, LearnedSolver]) -> str:
    if "alista" not in solvers:
        return f"ALISTA: {NOT_RUN}."
    rows = []
    for batch in (1, 1024):
        for name, found in recovery.durations(solvers["alista"], batch, repeats=5 if batch == 1 else 1).items():
            steps = "" if found.steps is None else str(found.steps)
            number = "" if found.number is None else f"{found.number:g}"
            shown = "ALISTA" if name == "learned" else name
            rows.append([str(batch), shown, f"{found.milliseconds:.3f}", steps, number])
    text = "To −30 dB without noise, in turns in one process, one thread; the least of five times, of one at 1,024."
    return f"{text}\n\n{markdown(['batch', '', 'ms per signal', 'steps', 'λ'], rows)}"


def _elsewhere(solvers: dict[str, LearnedSolver], count: int) -> str:
    rows = []
    for title, config in ELSEWHERE.items():
        structure = recovery.draw(config, count).structure
        assert structure is not None
        assert structure.solution is not None
        size = 10.0 if title.startswith("b 10") else 1.0
        for name, solver in solvers.items():
            found = [
                recovery.errors(solver(size * structure.target, safeguard=safe), size * structure.solution).ratio
                for safe in (False, True)
            ]
            rows.append([title, name, *(f"{value:.1f}" for value in found)])
    text = (
        "NMSE in dB at 16 layers. With the safeguard no f(x) = ½‖A x − b‖² + 0.005 ‖x‖₁ is above that of 16 steps of "
        "ISTA; that is a bound on f, not on the error."
    )
    return f"{text}\n\n{markdown(['signals', '', 'safeguard off', 'on'], rows)}"


def _lasso(runs: Runs, count: int) -> str:
    config = SparseConfig(rows=25, columns=50)
    instances = recovery.draw(config, count)
    best = recovery.oracle(instances)
    rows = []
    for name, published in LASSO.items():
        solver = runs.solver(name)
        found = NOT_RUN if solver is None else f"{recovery.gaps(solver.solver, instances, best, (16,))[16]:.2g}"
        rows.append([name, found, "", f"{published:g}", ""])
    for title, classical, far in (("ISTA", ISTA(), 0.55), ("FISTA", FISTA(), 6e-5)):
        gap = recovery.gaps(classical, instances, best, (16, 1000))
        rows.append([title, f"{gap[16]:.2g}", f"{gap[1000]:.2g}", "", f"{far:g}"])
    text = "E[f − f*]/E[f*] for A of 25 × 50 and λ = 0.005; f* by coordinate descent."
    return f"{text}\n\n{markdown(['', 'at 16', 'at 1,000', 'published, 16', 'published, 1,000'], rows)}"


def _trainings(runs: Runs) -> str:
    rows = []
    for name in NAMES:
        lines = _history(runs, name)
        updates = len(lines) * getattr(load_preset(name, runs.changes).curriculum, "updates", 1)
        minutes = f"{sum(line['seconds'] for line in lines) / 60:.0f}"
        rows.append([name, _state(runs, name), f"{updates:,}" if lines else "", minutes if lines else ""])
    return markdown(["preset", "", "updates", "minutes of the clock"], rows)


def _commands(runs: Runs, arguments: Sequence[str]) -> str:
    settings = "".join(f" --set {change}" for change in runs.changes)
    trained = [f"l2o train --preset {name}{settings} --out runs/reproduction/{name}-s0" for name in NAMES]
    return "\n".join(["```", " ".join(["l2o reproduce sparse", *arguments]), *trained, "```"])
