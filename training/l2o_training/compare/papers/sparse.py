"""The page on sparse recovery: unrolled solvers meta-trained and measured, with Open-L2O's figures beside ours."""

import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib import color_sequences

from l2o_runtime.files.atomic import atomic_write
from l2o_runtime.learned_solver import LearnedSolver
from l2o_runtime.solvers import AMP, FISTA, ISTA, Solver
from l2o_training.compare.papers import recovery
from l2o_training.compare.papers.numbers import NOT_RUN, markdown
from l2o_training.compare.papers.page import DETAILS, train_command, write_index, write_parts
from l2o_training.compare.papers.panels import CLEAN, ITERATIONS, LASSO, PANELS, VARIANTS, Panel, find_variant
from l2o_training.compare.papers.plans import OTHER_TITLES, SPARSE
from l2o_training.compare.papers.recovery import Errors
from l2o_training.config import TrainConfig, load_preset
from l2o_training.meta.curriculum import make_curriculum
from l2o_training.meta.folder import RULE, read_metrics
from l2o_training.meta.trainer import Trainer
from l2o_training.plots import STYLE
from l2o_training.tasks import SparseConfig

ELSEWHERE = {
    "as in meta-training": CLEAN,
    "15 % not zero": replace(CLEAN, sparsity=0.15),
    "SNR 20": replace(CLEAN, snr=20.0),
    "A perturbed by 5 %": replace(CLEAN, perturbed=0.05),
    "b 10 times as large": CLEAN,
}
"""What solvers are tried on that were meta-trained without noise."""

SIGNALS = 1024
"""Of errors and gaps, as published."""

TEXT = (
    "Unrolled solvers for b = A x*, A of 256 × 512, a tenth of x* not zero: Figure 5 of Open-L2O (arXiv 2103.12828), "
    "and Lasso problems as in its Figure 6. The published recipe trains each stage of each layer until 2,000 updates "
    "of batch 128 help no more. The presets do not: a stage has at most 800 updates of batch 64, layers begin with "
    "what the layer before has learned, and the first with ALISTA's analytic weight, where the published ones begin "
    "as ISTA. LAMP begins as AMP. How the coherent A of Figure 5 was drawn is not known to us: one whose neighbouring "
    "columns have inner products of about 0.9 stands in its place, so that its figures can be compared in their order "
    "alone."
)
DEFINITION = (
    "NMSE is 10 log₁₀(Σ‖x − x*‖²/Σ‖x*‖²) over 1,024 signals. Open-L2O's code, which made the published figures, takes "
    "the mean of the signals' own decibels: it stands beside. A few hard signals decide the former. λ and α of "
    "classical solvers are tuned on other signals."
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
        """Folder of the run of a variant."""
        return self.folder / f"{name}-s0"

    def config(self, name: str) -> TrainConfig:
        """Of a variant's meta-training."""
        variant = find_variant(name)
        return load_preset(variant.preset, (*variant.overrides, *self.changes))

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
        find_variant(name)
    for name in only or VARIANTS:
        folder = runs.path(name)
        if not (folder / RULE).is_file():
            report(name)
            Trainer(runs.config(name), folder, restarted=True).run()


def write_page(runs: Runs, out: Path, arguments: Sequence[str] = ()) -> Path:
    """Measure what was meta-trained, and write `sparse.md` with its picture, and the index.

    Args:
        runs: where the solvers are.
        out: folder of the pages.
        arguments: of the command, folders aside.
    """
    out.mkdir(parents=True, exist_ok=True)
    learned = {end: _solvers(runs, end) for end in PANELS}
    curves = {end: _curves(PANELS[end], found) for end, found in learned.items() if found or not end}
    _draw(curves, out / "sparse.png")
    parts = [f"# {OTHER_TITLES[SPARSE]}", TEXT, DEFINITION, _table(runs, "", curves[""]), DETAILS]
    parts += ["![NMSE over layers](sparse.png)"]
    for end, panel in list(PANELS.items())[1:]:
        parts += [f"## {panel.title}", _table(runs, end, curves[end]) if end in curves else f"{NOT_RUN.capitalize()}."]
    parts += ["## Iterations of classical solvers", _iterations(), "## Time", _times(learned[""])]
    parts += ["## Elsewhere, and with the safeguard", _elsewhere(learned[""])]
    parts += ["## Lasso", _lasso(runs), "## Meta-training", _trainings(runs), "## Commands"]
    parts += [_commands(runs, arguments)]
    parts.append(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}.")
    path = out / f"{SPARSE}.md"
    write_parts(path, parts)
    write_index(out)
    return path


def _solvers(runs: Runs, end: str) -> dict[str, LearnedSolver]:
    """Preset → what was meta-trained for a panel."""
    return {name: found for name in PANELS[end].published if (found := runs.solver(f"{name}{end}")) is not None}


def _curves(panel: Panel, solvers: dict[str, LearnedSolver]) -> dict[str, list[Errors]]:
    """NMSE over layers of learned and classical solvers, λ and α of these tuned on other signals for the 16th."""
    instances, tuned = recovery.draw(panel.task, SIGNALS), recovery.draw(panel.task, 64, recovery.TEST_SEED + 1)
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


def _table(runs: Runs, end: str, curves: dict[str, list[Errors]]) -> str:
    rows = []
    for name, published in PANELS[end].published.items():
        ours = curves.get(name)
        cells = ["", "", ""] if ours is None else _cells(ours)
        rows.append([name, *cells, *("" if v is None else f"{v}" for v in published), _state(runs, f"{name}{end}")])
    rows += [[name, *_cells(curves[name]), "", "", ""] for name in ITERATIONS]
    header = ["dB", "ours, 8", "ours, 16", "ours, 16, mean of dB", "published, 8", "published, 16", "meta-training"]
    return markdown(header, rows)


def _cells(found: list[Errors]) -> list[str]:
    """NMSE after 8 and 16 layers; more than a hundredfold of the signal is no estimate of it."""
    numbers = (found[7].ratio, found[15].ratio, found[15].mean)
    return [f"{number:.1f}" if number < 20 else "diverges" for number in numbers]


def _state(runs: Runs, name: str) -> str:
    """Whether a run is done, or in which stage it was stopped, from the scores that it recorded."""
    rows = read_metrics(runs.path(name))
    if not rows:
        return NOT_RUN
    curriculum = make_curriculum(runs.config(name))
    for row in rows:
        curriculum.advance(row["validation"])
    return "done" if curriculum.over else f"stopped in {curriculum.stage.name}"


def _draw(panels: dict[str, dict[str, list[Errors]]], path: Path) -> None:
    with plt.rc_context(STYLE):
        size = (5.5 * len(panels), 4.5)
        figure, (row,) = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        colors = dict(zip([*PANELS[""].published, *ITERATIONS], color_sequences["tab10"], strict=True))
        for axes, (end, curves) in zip(row, panels.items(), strict=True):
            published = PANELS[end].published
            for name, found in curves.items():
                style = "-" if name in published else "--"
                steps = range(1, len(found) + 1)
                axes.plot(steps, [each.mean for each in found], style, color=colors[name], label=name)
            for name in published.keys() & curves.keys():
                points = [(at, value) for at, value in zip((8, 16), published[name], strict=True) if value is not None]
                axes.plot(*zip(*points, strict=True), "o", markerfacecolor="none", color=colors[name])
            axes.set(
                title=PANELS[end].title, xlabel="layers or iterations; hollow: published", ylabel="NMSE, mean of dB"
            )
            axes.set_ylim(top=5)
        row[0].legend(fontsize=8)
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=90)
        plt.close(figure)


def _iterations() -> str:
    rows = [
        [
            name,
            _count(each.fewest),
            f"{each.number:g}",
            _count(each.usual) if name != "AMP" else "",
            f"{ITERATIONS[name]}",
        ]
        for name, each in recovery.classical_iterations().items()
    ]
    text = "To −35 dB, A of 250 × 500, p = 0.1, SNR 40, 16 signals; λ, or α for AMP, with the fewest of a grid."
    header = ["", "fewest", "λ or α", f"at λ = {recovery.USUAL:g}", "published"]
    return f"{text}\n\n{markdown(header, rows)}"


def _count(steps: int | None) -> str:
    return "not reached" if steps is None else f"{steps:,}"


def _times(solvers: dict[str, LearnedSolver]) -> str:
    if "alista" not in solvers:
        return f"ALISTA: {NOT_RUN}."
    rows = []
    for batch in (1, 1024):
        for name, found in recovery.durations(solvers["alista"], batch).items():
            steps = "" if found.steps is None else str(found.steps)
            number = "" if found.number is None else f"{found.number:g}"
            shown = "ALISTA" if name == "learned" else name
            rows.append([str(batch), shown, f"{found.milliseconds:.3f}", steps, number])
    text = (
        "To −30 dB without noise, in turns in one process, one thread; the least of five times. λ of FISTA and of "
        f"coordinate descent is tuned for the fewest steps; {recovery.USUAL:g} is that of the published iterations."
    )
    return f"{text}\n\n{markdown(['batch', '', 'ms per signal', 'steps', 'λ'], rows)}"


def _elsewhere(solvers: dict[str, LearnedSolver]) -> str:
    rows = []
    for title, config in ELSEWHERE.items():
        structure = recovery.draw(config, SIGNALS).structure
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


def _lasso(runs: Runs) -> str:
    config = SparseConfig(rows=25, columns=50)
    instances = recovery.draw(config, SIGNALS)
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
    for name in VARIANTS:
        lines = read_metrics(runs.path(name))
        updates = len(lines) * getattr(runs.config(name).curriculum, "updates", 1)
        minutes = f"{sum(line['seconds'] for line in lines) / 60:.0f}"
        rows.append([name, _state(runs, name), f"{updates:,}" if lines else "", minutes if lines else ""])
    return markdown(["", "", "updates", "minutes of the clock"], rows)


def _commands(runs: Runs, arguments: Sequence[str]) -> str:
    lines = [shlex.join(["l2o", "reproduce", "sparse", *arguments])]
    for name, variant in VARIANTS.items():
        changes = (*variant.overrides, *runs.changes)
        lines.append(train_command(variant.preset, changes, "--out", f"runs/reproduction/{name}-s0"))
    return "\n".join(["```", *lines, "```"])
