"""Games, and functions with many local minima: learned pairs and swarms beside classical solvers, on one page."""

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from l2o_runtime.config import nearest, require, to_dict
from l2o_runtime.files.artifact import read_learned
from l2o_runtime.learned import as_solver, make_learned
from l2o_runtime.solvers import Solver
from l2o_training.compare.baselines import BASELINES, best_lr
from l2o_training.compare.cache import read_result, rounded, write_result
from l2o_training.compare.code import code_version
from l2o_training.compare.contenders import of_baseline
from l2o_training.compare.flat import CPU, rollout
from l2o_training.compare.papers.lab import Lab
from l2o_training.compare.papers.numbers import markdown, number, with_spread
from l2o_training.compare.papers.page import DETAILS, write_index, write_parts
from l2o_training.compare.papers.plans import OTHER_TITLES, SYNTHETIC
from l2o_training.compare.papers.run import is_trained, train
from l2o_training.compare.sharing import Report
from l2o_training.config import TrainConfig, load_preset
from l2o_training.meta.folder import METRICS, RULE
from l2o_training.tasks import GameConfig, RastriginConfig, Task, make_task
from l2o_training.tasks.rastrigin import Swarms

CHOICES, VERDICTS, FIRST = 1000, 2000, 1
"""Seeds of instances that rates are tuned on, of those that are reported, and of meta-training; choices had seed 0."""


class Comparison(NamedTuple):
    """What is measured, on which tasks.

    Attributes:
        tasks: by their titles.
        steps: gradients of an optimization.
        runs: rows of instances; for choices a quarter.
        seeds: of meta-training.
        learned: title and preset.
        baselines: title and name; rates are tuned task by task.
    """

    tasks: Mapping[str, GameConfig | RastriginConfig]
    steps: int
    runs: int
    seeds: int
    learned: Mapping[str, str]
    baselines: Mapping[str, str]


GAMES = Comparison(
    {
        "rotated saddle": GameConfig(game="rotated-saddle"),
        "matrix game, 5 × 5": GameConfig(game="matrix", size=5),
        "seesaw": GameConfig(game="seesaw"),
    },
    2000,
    100,
    1,
    {"Twin": "twin"},
    {
        "gradient descent and ascent": "sgd",
        "the same by turns": "alternating",
        "optimistic": "optimistic",
        "extra-gradient": "extra-gradient",
    },
)

SEARCHES = Comparison(
    {f"{n} dimensions": RastriginConfig(size=n, particles=4, spread=0.1) for n in (10, 20)},
    100,
    800,
    3,
    {"Swarm": "swarm", "L2O-DM, best of 4": "rastrigin-dm"},
    {
        "gradient descent, best of 4": "sgd",
        "momentum, best of 4": "momentum",
        "Adam, best of 4": "adam",
        "AdamW with a cosine, best of 4": "adamw-cosine",
        "particle swarm (PSO)": "pso",
    },
)

PARTS = {"games": GAMES, "searches": SEARCHES}
"""Of the page."""

PUBLISHED = {
    "rotated saddle": ("Twin", 6.19e-92, 1e-10),
    "matrix game, 5 × 5": ("Twin", 2.16e-3, 1e-2),
    "seesaw": ("Twin", 5.64e-4, 1e-2),
}
"""Final distance, and our target. Source: Shen et al. 2021, as Open-L2O has it."""

PUBLISHED_SEARCHES = {
    "10 dimensions": {"Swarm": "12.3 ± 5.4", "L2O-DM, best of 4": "48.4"},
    "20 dimensions": {"Swarm": "43.0 ± 9.2", "L2O-DM, best of 4": "137.4"},
}
"""Source: Cao et al. 2019."""

LOOK = 500
"""Gradients after which a rate is judged."""

THICK = 8
"""Of grids with more rates than this every other one is tried."""

RESTARTS = 8
"""Of the search for the best known value: 64 found nothing lower in 80 functions of 10 or 20 dimensions."""

MEASURED_BY = tuple(f"l2o_training.{place}" for place in ("tasks.config:make_task", "compare.flat:rollout"))
LEARNED_BY = tuple(f"l2o_runtime.learned:{name}" for name in ("as_solver", "make_learned"))
"""What results depend on beside their settings."""

Values = dict[str, dict[str, np.ndarray]]
"""Title of a line → of a task → (seeds, runs)."""

Measured = tuple[Values, dict[str, dict[str, float]]]
"""Values, and the rates that were tuned."""


def reproduce(lab: Lab, out: Path, seeds: int | None, only: Sequence[str], report: Report) -> Path:
    """Meta-train what is missing, measure everything, and write the page.

    Args:
        lab: where runs are, and what was measured.
        out: folder of pages.
        seeds: of meta-training; None for those of each part.
        only: parts of the page, games or searches; all where none are named.
        report: called as the work goes on.

    Returns:
        Path of the page.

    Raises:
        ConfigError: there is no such part.
    """
    for name in only:
        require(name in PARTS, f"--only {name}: {nearest(name, list(PARTS))}")
    found: dict[str, Measured] = {}
    for part, comparison in PARTS.items():
        if only and part not in only:
            continue
        for preset in comparison.learned.values():
            for seed in seeds_of(comparison, seeds):
                config, folder = config_of(preset, seed, lab), folder_of(preset, seed, lab)
                if not is_trained(folder, config):
                    train(lab, config, folder, report)
        found[part] = measured(lab, comparison, seeds, report)
    return write_page(lab, out, seeds, found)


def seeds_of(comparison: Comparison, seeds: int | None) -> range:
    """So many, or as many as the comparison has."""
    return range(FIRST, FIRST + (seeds or comparison.seeds))


def config_of(preset: str, seed: int, lab: Lab) -> TrainConfig:
    """The configuration of a run."""
    return load_preset(preset, [*lab.changes, f"seed={seed}"])


def folder_of(preset: str, seed: int, lab: Lab) -> Path:
    """The folder of a run."""
    return lab.runs / f"{preset}-s{seed}"


def measured(lab: Lab, comparison: Comparison, seeds: int | None, report: Report) -> Measured:
    """Final scores of all lines, and the rates that were tuned: line → task → rate."""
    values: Values = {}
    rates: dict[str, dict[str, float]] = {}
    lines = [*comparison.learned, *comparison.baselines]
    for count, title in enumerate(lines):
        for name, config in comparison.tasks.items():
            report("comparing", f"{title}: {name}", count, len(lines))
            bench = Bench(lab, comparison, config)
            if title in comparison.learned:
                preset = comparison.learned[title]
                files = [folder_of(preset, seed, lab) / RULE for seed in seeds_of(comparison, seeds)]
                values.setdefault(title, {})[name] = np.array([bench.learned(file) for file in files])
                values.setdefault(f"{title}, untrained", {})[name] = np.array([bench.untrained(preset)])
            else:
                rate, scores = bench.tuned(comparison.baselines[title])
                rates.setdefault(title, {})[name] = rate
                values.setdefault(title, {})[name] = np.array([scores])
    return values, rates


@dataclass(frozen=True)
class Bench:
    """One task of a comparison. What was measured is kept in a folder of the lab, and not measured again.

    Attributes:
        lab: where.
        comparison: how long, and how often.
        config: the task.
    """

    lab: Lab
    comparison: Comparison
    config: GameConfig | RastriginConfig

    def learned(self, file: Path) -> np.ndarray:
        """What a run has given."""
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return self._kept_learned(digest, lambda: self.finals(as_solver(read_learned(file)[0])))

    def untrained(self, preset: str) -> np.ndarray:
        """The placebo: the architecture of a preset, as seed 0 draws it."""
        config = config_of(preset, 0, self.lab)

        def measure() -> dict[str, Any]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                return self.finals(as_solver(make_learned(config.trained_rule)))

        return self._kept_learned(f"untrained {to_dict(config.trained_rule)}", measure)

    def _kept_learned(self, what: str, measure: Callable[[], dict[str, Any]]) -> np.ndarray:
        scores: np.ndarray = self.kept(what, code_version(*LEARNED_BY), measure)["scores"]
        return scores

    def tuned(self, name: str) -> tuple[float, np.ndarray]:
        """The rate with the lowest mean on instances for choices, and the scores with it on others.

        Choices are by the first 500 gradients where there are more.
        """
        baseline, steps = BASELINES[name], self.comparison.steps
        rates = baseline.grid[:: 1 + (len(baseline.grid) > THICK)]

        def measure() -> dict[str, Any]:
            instances = self.task.instances(self.comparison.runs // 4, CHOICES)
            tried = min(steps, LOOK)
            ends = {rate: rollout(baseline.solver(rate, tried), instances, tried + 1)[-1] for rate in rates}
            rate = best_lr((lr, float(end.nan_to_num(math.inf).mean())) for lr, end in ends.items())
            return {"rate": rate, **self.finals(baseline.solver(rate, steps))}

        found = self.kept(f"{name} {rates}", of_baseline(baseline).stepping[1], measure)
        return found["rate"], found["scores"]

    def finals(self, solver: Solver) -> dict[str, Any]:
        """Scores at the end: distances from a solution, or the lowest value that a swarm has found."""
        instances = self.task.instances(self.comparison.runs, VERDICTS)
        step = instances.structure.particles if isinstance(instances, Swarms) else 1
        ends: list[float] = rollout(solver, instances, self.comparison.steps + 1)[-1, ::step].double().tolist()
        return {"scores": rounded(ends)}

    @cached_property
    def task(self) -> Task:
        """The task itself."""
        return make_task(self.config, self.lab.load, CPU)

    def kept(self, what: str, code: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured before with the same code, or is now; a score that is no number counts as infinite."""
        said = f"{what} {to_dict(self.config)} {self.comparison.steps} {self.comparison.runs} {CHOICES} {VERDICTS}"
        path = self.lab.runs / "cache" / SYNTHETIC / f"{hashlib.sha256(said.encode()).hexdigest()[:24]}.json"
        key = {"what": said, "code": f"{code_version(*MEASURED_BY)} {code}"}
        found = read_result(path, key, "scores")
        if found is None:
            write_result(path, key, measure())
            found = read_result(path, key, "scores")
        assert found is not None
        return found | {"scores": np.nan_to_num(found["scores"], nan=np.inf)}


def best_known(lab: Lab) -> dict[str, float]:
    """Mean over the searches of the lowest value that is known."""
    found = {}
    for name, config in SEARCHES.tasks.items():
        instances = make_task(config, lab.load, CPU).instances(SEARCHES.runs, VERDICTS)
        found[name] = float(instances.structure.lowest(RESTARTS).mean())
    return found


def write_page(lab: Lab, out: Path, seeds: int | None, found: Mapping[str, Measured]) -> Path:
    """Write `<out>/synthetic.md` and the index; a part that was not measured is said to be missing."""
    summary, details = [TEXT], []
    if "games" in found:
        summary += _game_verdicts(found["games"][0])
        details += ["## Games", GAMES_TEXT, _games(*found["games"])]
    if "searches" in found:
        lowest = best_known(lab)
        summary += _search_verdicts(found["searches"][0], lowest)
        details += ["## Searches", SEARCHES_TEXT, _searches(*found["searches"], lowest)]
    missing = [part for part in PARTS if part not in found]
    if missing:
        summary.append(f"Not run: {', '.join(f'`l2o reproduce {SYNTHETIC} --only {part}`' for part in missing)}.")
    runs = [
        (preset, seed)
        for part in found
        for preset in PARTS[part].learned.values()
        for seed in seeds_of(PARTS[part], seeds)
    ]
    parts = [f"# {OTHER_TITLES[SYNTHETIC]}", *summary, DETAILS, *details]
    parts += ["## Commands", _commands(lab, seeds, found, runs), "## Meta-training", _trainings(lab, runs)]
    parts.append(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}.")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{SYNTHETIC}.md"
    write_parts(path, parts)
    write_index(out)
    return path


TEXT = (
    "Twin-L2O (Shen et al. 2021) and L2O-Swarm (Cao et al. 2019), on fresh instances of the functions of those papers. "
    "Rates of what is not learned are tuned task by task on other instances; seed 0 of meta-training was for choices, "
    "and the figures are of others. *Untrained* is the placebo: the same architecture before meta-training."
)

GAMES_TEXT = (
    "Distance from the nearest solution after 1,000 iterations, that is 2,000 gradients, the same for all; mean over "
    "100 games with a start of their own each, and below it the median. Means are ± deviation over meta-training seeds "
    "where there are several. Solutions of a singular matrix are a linear space, from which the distance is taken; the "
    "published figures are of one start after the other on 100 games."
)

SEARCHES_TEXT = (
    "The lowest value after 100 steps of four particles, mean over 200 functions near Rastrigin's ± deviation over "
    "functions ± over meta-training seeds. All that is learned was meta-trained in 10 dimensions; 20 were never seen. "
    "The best known value comes from a search that knows the function's parts: an upper bound on the minimum."
)


def _games(values: Values, rates: dict[str, dict[str, float]]) -> str:
    rows = []
    for title, found in values.items():
        cells = [_distance(found[name], rates.get(title, {}).get(name)) for name in GAMES.tasks]
        rows.append([title, *cells])
    rows.append(["published Twin", *(f"{PUBLISHED[name][1]:.2g}" for name in GAMES.tasks)])
    return markdown(["solver", *GAMES.tasks], rows)


def _distance(found: np.ndarray, rate: float | None) -> str:
    means = found.mean(1)
    spread = f" ± {means.std(ddof=1):.1e}" if len(means) > 1 else ""
    tuned_at = "" if rate is None else f" (lr {rate:g})"
    return f"{means.mean():.1e}{spread}<br>{np.median(found):.1e}{tuned_at}"


def _game_verdicts(values: Values) -> list[str]:
    lines = []
    for name, (title, _, target) in PUBLISHED.items():
        mean = values[title][name].mean()
        best = min(((found[name].mean(), line) for line, found in values.items() if line != title), default=(0, ""))
        verdict = "met" if mean <= target else "missed"
        lines.append(f"- {name}: {mean:.1e}, target {target:g} {verdict}; the best beside it {best[0]:.1e}, {best[1]}.")
    return ["\n".join(lines)]


def _searches(values: Values, rates: dict[str, dict[str, float]], lowest: dict[str, float]) -> str:
    rows = [["best known", *(number(lowest[name]) for name in SEARCHES.tasks), *["" for _ in SEARCHES.tasks]]]
    for title, found in values.items():
        tuned_at = {name: f" (lr {rate:g})" for name, rate in rates.get(title, {}).items()}
        cells = [f"{with_spread(found[name])}{tuned_at.get(name, '')}" for name in SEARCHES.tasks]
        rows.append([title, *cells, *(PUBLISHED_SEARCHES[name].get(title, "") for name in SEARCHES.tasks)])
    return markdown(["solver", *SEARCHES.tasks, *(f"published, {name}" for name in SEARCHES.tasks)], rows)


def _search_verdicts(values: Values, lowest: dict[str, float]) -> list[str]:
    lines = []
    for name in SEARCHES.tasks:
        mine, theirs = (values[title][name].mean() for title in SEARCHES.learned)
        verdict = "met" if theirs >= 2 * mine else "missed"
        best = min((found[name].mean(), line) for line, found in values.items() if line in SEARCHES.baselines)
        lines.append(
            f"- {name}: the swarm ends {mine - lowest[name]:.1f} above the best known value; L2O-DM's best of four is "
            f"{theirs / mine:.1f} times as high as the swarm, target 2 {verdict}; the best that is not learned "
            f"has {best[0]:.1f}: {best[1]}."
        )
    return ["\n".join(lines)]


def _commands(lab: Lab, seeds: int | None, found: Iterable[str], runs: Sequence[tuple[str, int]]) -> str:
    changes = "".join(f" --set {change}" for change in lab.changes)
    only = "".join(f" --only {part}" for part in found) if set(found) != {*PARTS} else ""
    asked = f" --seeds {seeds}" if seeds else ""
    trains = [
        f"l2o train --preset {preset}{changes} --seed {seed} --out runs/reproduction/{preset}-s{seed}"
        for preset, seed in runs
    ]
    return "\n".join(["```", f"l2o reproduce {SYNTHETIC}{asked}{only}{changes}", *trains, "```"])


def _trainings(lab: Lab, runs: Sequence[tuple[str, int]]) -> str:
    rows = []
    for preset, seed in runs:
        folder = folder_of(preset, seed, lab)
        metrics = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        best = read_learned(folder / RULE)[1]["validation"]
        minutes = sum(row["seconds"] for row in metrics) / 60
        rows.append([folder.name, number(best), str(metrics[-1]["epoch"]), f"{minutes:.1f}"])
    return markdown(["run", "best validation", "epochs", "minutes"], rows)
