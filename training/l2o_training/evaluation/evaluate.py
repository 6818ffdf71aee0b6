"""Run rules and baselines over a suite and write what came out."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from l2o_runtime.config import require
from l2o_runtime.files.artifact import find_rule, load_rule
from l2o_runtime.files.atomic import atomic_write
from l2o_runtime.rules import Rule
from l2o_runtime.solvers import Descent, Solver
from l2o_training.compare.baselines import BASELINES, GRID, best_lr
from l2o_training.evaluation.plots import loss_curves
from l2o_training.meta.unroll import rollout
from l2o_training.metrics import final
from l2o_training.ranks.group import ALONE, Ranks
from l2o_training.results import write_results
from l2o_training.tasks import Instances, Task

Report = Callable[[str, str], None]


@dataclass(frozen=True)
class Result:
    """One optimizer on one task.

    Attributes:
        task, optimizer: names.
        lr: of a baseline; None for a rule.
        mean, std: over runs, of the mean loss over the last 10 steps; not finite when a run diverged.
        diverged: number of runs that ended without a finite loss.
        ratio: mean over that of Adam at 0.01 in the same runs; None without it.
    """

    task: str
    optimizer: str
    lr: float | None
    mean: float
    std: float
    diverged: int
    ratio: float | None = None


def name_of(path: Path) -> str:
    """A short name for a rule's file: the file's own, or its folder's where that is `rule`."""
    return path.stem if path.stem != "rule" else path.absolute().parent.name


def name_rules(rules: Iterable[str]) -> dict[str, Rule]:
    """Load rules and give each a short name that is unique: its bundled name, or its folder's or file's.

    Raises:
        ArtifactError: one cannot be read.
        ConfigError: one is given twice.
    """
    named: dict[str, Rule] = {}
    paths: set[Path] = set()
    for text in rules:
        path = find_rule(text)
        require(path not in paths, f"{text}: this rule is given twice, as {path}")
        paths.add(path)
        name = name_of(path)
        named[name if name not in named else str(path)] = load_rule(path)
    return named


def evaluate_task(
    task: Task,
    rules: dict[str, Rule],
    baselines: list[str],
    steps: int,
    runs: int,
    seed: int,
    report: Report,
    ranks: Ranks = ALONE,
) -> tuple[list[Result], dict[str, np.ndarray]]:
    """All optimizers on the same `runs` instances of a task.

    A tuned baseline takes the learning rate of the grid that is best on these very runs, which favours it. Of several
    ranks, each runs some optimizers, and all get all losses; their number does not show in them.

    Returns:
        Results, and loss curves (runs, steps) by optimizer.
    """

    def fresh() -> Instances:
        return task.instances(runs, seed)

    cells: dict[tuple[str, float | None], Solver] = {(name, None): Descent(rule) for name, rule in rules.items()}
    for name in baselines:
        for lr in sorted({*GRID, BASELINES[name].lr}):
            cells[name, lr] = BASELINES[name].solver(lr, steps)
    device = fresh().params.device
    losses = torch.zeros(len(cells), steps, runs, dtype=torch.float64, device=device)
    for number, ((name, rate), solver) in enumerate(cells.items()):
        if number % ranks.size == ranks.rank:
            report(task.name, name if rate is None else f"{name} {rate:g}")
            losses[number] = rollout(solver, fresh(), steps)
    every = ranks.sum(losses).float().double().cpu().numpy()
    found = dict(zip(cells, every.swapaxes(1, 2), strict=True))
    curves = {name: found[name, None] for name in rules}
    lrs: dict[str, float | None] = dict.fromkeys(rules)
    for name in baselines:
        default = BASELINES[name].lr
        tried = {lr: curve for (key, lr), curve in found.items() if key == name and lr is not None}
        tuned = best_lr((lr, float(final(curve).mean())) for lr, curve in tried.items())
        for label, lr in ((f"{name} {default:g}", default), (f"{name} tuned", tuned)):
            curves[label], lrs[label] = tried[lr], lr
    finals = {name: final(losses) for name, losses in curves.items()}
    with np.errstate(all="ignore"):  # a diverged run makes its mean and deviation infinite or NaN, rightly
        results = _results(task.name, finals, lrs)
    return results, curves


def _results(task: str, finals: dict[str, np.ndarray], lrs: dict[str, float | None]) -> list[Result]:
    """Statistics over runs of every optimizer."""
    reference = float(finals["adam 0.01"].mean()) if "adam 0.01" in finals else None
    return [
        Result(
            task=task,
            optimizer=name,
            lr=lrs[name],
            mean=float(values.mean()),
            std=float(values.std(ddof=1)) if len(values) > 1 else 0.0,
            diverged=int((~np.isfinite(values)).sum()),
            ratio=float(values.mean()) / reference if reference else None,
        )
        for name, values in finals.items()
    ]


def evaluate(
    tasks: list[Task],
    rules: dict[str, Rule],
    baselines: list[str],
    *,
    steps: int = 300,
    runs: int = 10,
    seed: int = 0,
    out: Path,
    settings: dict[str, Any],
    report: Report = lambda task, optimizer: None,
    ranks: Ranks = ALONE,
) -> list[Result]:
    """Evaluate and write `results.json`, `results.csv` and one PNG of loss curves per task into `out`.

    Args:
        tasks, rules, baselines: what to compare.
        steps: inner steps per run.
        runs: instances per task.
        seed: of the instances; all optimizers get the same.
        out: folder; made if needed.
        settings: written into results.json.
        report: called before every optimizer with the names of task and optimizer.
        ranks: who shares the optimizers of a task; rank 0 writes.
    """
    require(steps >= 1, f"--steps: must be 1 or more, got {steps}")
    require(runs >= 1, f"--runs: must be 1 or more, got {runs}")
    ranks.agree(lambda: out.mkdir(parents=True, exist_ok=True) if ranks.main else None)
    results: list[Result] = []
    for task in tasks:
        found, curves = evaluate_task(task, rules, baselines, steps, runs, seed, report, ranks)
        results += found
        if not ranks.main:
            continue
        shown = {name: curve for name, curve in curves.items() if name in rules or name.endswith("tuned")}
        with atomic_write(out / f"{task.name}.png") as file:
            loss_curves(f"{task.name}, {runs} runs", shown, file)
        # A stopped evaluation keeps the tasks done so far.
        rows = [asdict(result) for result in results]
        write_results(out, {**settings, "steps": steps, "runs": runs, "seed": seed}, rows)
    return results
