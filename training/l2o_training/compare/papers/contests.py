"""Contests: games, and functions with many local minima, on which learned pairs and swarms meet classical solvers."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from l2o_runtime.config import to_dict
from l2o_runtime.files.artifact import read_learned
from l2o_runtime.learned import as_solver, make_learned
from l2o_runtime.solvers import Solver
from l2o_training.compare.baselines import BASELINES, best_lr
from l2o_training.compare.cache import read_result, rounded, write_result
from l2o_training.compare.code import code_version
from l2o_training.compare.contenders import of_baseline
from l2o_training.compare.flat import CPU, rollout
from l2o_training.compare.papers.lab import Lab
from l2o_training.compare.papers.plans import SYNTHETIC
from l2o_training.compare.sharing import Report
from l2o_training.config import TrainConfig, load_preset
from l2o_training.meta.folder import RULE
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
