"""The page of contests: learned pairs and swarms beside classical solvers."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from l2o_runtime.config import nearest, require
from l2o_runtime.files.artifact import read_learned
from l2o_training.compare.papers import contests
from l2o_training.compare.papers.lab import Lab
from l2o_training.compare.papers.numbers import markdown, number, with_spread
from l2o_training.compare.papers.page import DETAILS, train_command, write_index, write_parts
from l2o_training.compare.papers.plans import OTHER_TITLES, SYNTHETIC
from l2o_training.compare.papers.run import is_trained, train
from l2o_training.compare.sharing import Report
from l2o_training.meta.folder import RULE, read_metrics

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
        require(name in contests.PARTS, f"--only {name}: {nearest(name, list(contests.PARTS))}")
    found: dict[str, contests.Measured] = {}
    for part, comparison in contests.PARTS.items():
        if only and part not in only:
            continue
        for preset in comparison.learned.values():
            for seed in contests.seeds_of(comparison, seeds):
                config, folder = contests.config_of(preset, seed, lab), contests.folder_of(preset, seed, lab)
                if not is_trained(folder, config):
                    train(lab, config, folder, report)
        found[part] = contests.measured(lab, comparison, seeds, report)
    return write_page(lab, out, seeds, found)


def write_page(lab: Lab, out: Path, seeds: int | None, found: Mapping[str, contests.Measured]) -> Path:
    """Write `<out>/synthetic.md` and the index; a part that was not measured is said to be missing."""
    summary, details = [TEXT], []
    if "games" in found:
        summary += _game_verdicts(found["games"][0])
        details += ["## Games", GAMES_TEXT, _games(*found["games"])]
    if "searches" in found:
        lowest = contests.best_known(lab)
        summary += _search_verdicts(found["searches"][0], lowest)
        details += ["## Searches", SEARCHES_TEXT, _searches(*found["searches"], lowest)]
    missing = [part for part in contests.PARTS if part not in found]
    if missing:
        summary.append(f"Not run: {', '.join(f'`l2o reproduce {SYNTHETIC} --only {part}`' for part in missing)}.")
    runs = [
        (preset, seed)
        for part in found
        for preset in contests.PARTS[part].learned.values()
        for seed in contests.seeds_of(contests.PARTS[part], seeds)
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
    "published figures are of one start after the other on 100 games. The pair was meta-trained on the first two kinds "
    "of games; seesaws it had never seen."
)

SEARCHES_TEXT = (
    "The lowest value after 100 steps of four particles, mean over 200 functions near Rastrigin's ± deviation over "
    "functions ± over meta-training seeds. All that is learned was meta-trained in 10 dimensions; 20 were never seen. "
    "The best known value comes from a search that knows the function's parts: an upper bound on the minimum."
)


def _games(values: contests.Values, rates: dict[str, dict[str, float]]) -> str:
    rows = []
    for title, found in values.items():
        cells = [_distance(found[name], rates.get(title, {}).get(name)) for name in contests.GAMES.tasks]
        rows.append([title, *cells])
    rows.append(["published Twin", *(f"{PUBLISHED[name][1]:.2g}" for name in contests.GAMES.tasks)])
    return markdown(["solver", *contests.GAMES.tasks], rows)


def _distance(found: np.ndarray, rate: float | None) -> str:
    means = found.mean(1)
    spread = f" ± {means.std(ddof=1):.1e}" if len(means) > 1 else ""
    tuned_at = "" if rate is None else f" (lr {rate:g})"
    return f"{means.mean():.1e}{spread}<br>{np.median(found):.1e}{tuned_at}"


def _game_verdicts(values: contests.Values) -> list[str]:
    lines = []
    for name, (title, _, target) in PUBLISHED.items():
        mean = values[title][name].mean()
        best = min(((found[name].mean(), line) for line, found in values.items() if line != title), default=(0, ""))
        verdict = "met" if mean <= target else "missed"
        lines.append(f"- {name}: {mean:.1e}, target {target:g} {verdict}; the best beside it {best[0]:.1e}, {best[1]}.")
    return ["\n".join(lines)]


def _searches(values: contests.Values, rates: dict[str, dict[str, float]], lowest: dict[str, float]) -> str:
    rows = [
        [
            "best known",
            *(number(lowest[name]) for name in contests.SEARCHES.tasks),
            *["" for _ in contests.SEARCHES.tasks],
        ]
    ]
    for title, found in values.items():
        tuned_at = {name: f" (lr {rate:g})" for name, rate in rates.get(title, {}).items()}
        cells = [f"{with_spread(found[name])}{tuned_at.get(name, '')}" for name in contests.SEARCHES.tasks]
        rows.append([title, *cells, *(PUBLISHED_SEARCHES[name].get(title, "") for name in contests.SEARCHES.tasks)])
    return markdown(
        ["solver", *contests.SEARCHES.tasks, *(f"published, {name}" for name in contests.SEARCHES.tasks)], rows
    )


def _search_verdicts(values: contests.Values, lowest: dict[str, float]) -> list[str]:
    lines = []
    for name in contests.SEARCHES.tasks:
        mine, theirs = (values[title][name].mean() for title in contests.SEARCHES.learned)
        verdict = "met" if theirs >= 2 * mine else "missed"
        best = min((found[name].mean(), line) for line, found in values.items() if line in contests.SEARCHES.baselines)
        lines.append(
            f"- {name}: the swarm ends {mine - lowest[name]:.1f} above the best known value; L2O-DM's best of four is "
            f"{theirs / mine:.1f} times as high as the swarm, target 2 {verdict}; the best that is not learned "
            f"has {best[0]:.1f}: {best[1]}."
        )
    return ["\n".join(lines)]


def _commands(lab: Lab, seeds: int | None, found: Iterable[str], runs: Sequence[tuple[str, int]]) -> str:
    changes = "".join(f" --set {change}" for change in lab.changes)
    only = "".join(f" --only {part}" for part in found) if set(found) != {*contests.PARTS} else ""
    asked = f" --seeds {seeds}" if seeds else ""
    trains = [
        train_command(preset, lab.changes, "--seed", f"{seed}", "--out", f"runs/reproduction/{preset}-s{seed}")
        for preset, seed in runs
    ]
    return "\n".join(["```", f"l2o reproduce {SYNTHETIC}{asked}{only}{changes}", *trains, "```"])


def _trainings(lab: Lab, runs: Sequence[tuple[str, int]]) -> str:
    rows = []
    for preset, seed in runs:
        folder = contests.folder_of(preset, seed, lab)
        metrics = read_metrics(folder)
        best = read_learned(folder / RULE)[1]["validation"]
        minutes = sum(row["seconds"] for row in metrics) / 60
        rows.append([folder.name, number(best), str(metrics[-1]["epoch"]), f"{minutes:.1f}"])
    return markdown(["run", "best validation", "epochs", "minutes"], rows)
