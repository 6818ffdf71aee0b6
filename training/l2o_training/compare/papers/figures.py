"""Pictures of the reproduction's pages."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from l2o_runtime.files.atomic import atomic_write
from l2o_training import plots
from l2o_training.compare.statistics import Interval
from l2o_training.plots import STYLE


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
    plt.close(figure)


def panels(curves: dict[str, dict[str, np.ndarray]], path: Path, marks: tuple[int, ...] = ()) -> None:
    """`plots.panels` as a file."""
    with atomic_write(path) as file:
        plots.panels(curves, file, marks)


def dots(values: dict[str, dict[str, float]], label: str, path: Path) -> None:
    """One row per task, one mark per name; hollow marks are the paper's.

    Args:
        values: name → task → value; names that start with "paper" are drawn hollow.
        label: of the axis.
        path: of the PNG.
    """
    tasks = list(dict.fromkeys(task for named in values.values() for task in named))
    colours: dict[str, str] = {}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(layout="constrained", figsize=(8, 0.7 + 0.55 * len(tasks)))
        for index, (name, named) in enumerate(values.items()):
            places = [tasks.index(task) + 0.1 * (index - len(values) / 2) for task in named]
            plain = name.removeprefix("paper: ")
            colour = colours.setdefault(plain, f"C{len(colours)}")
            face = "none" if name != plain else colour
            axes.plot(list(named.values()), places, "o", color=colour, markerfacecolor=face, label=name)
        axes.axvline(1, color="black", lw=0.8)
        axes.set(xlabel=label, xscale="log", yticks=range(len(tasks)))
        axes.set_yticklabels(tasks)
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        if values:
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        _save(figure, path)


def forest(intervals: dict[str, Interval], label: str, path: Path) -> None:
    """Ratios with their confidence intervals, one row each.

    Args:
        intervals: name → interval of the log-ratio.
        label: of the axis.
        path: of the PNG.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(layout="constrained", figsize=(7, 0.9 + 0.35 * len(intervals)))
        for place, interval in enumerate(intervals.values()):
            axes.plot(np.exp([interval.low, interval.high]), [place, place], color="C0", lw=1.6)
            axes.plot(np.exp(interval.mean), place, "o", color="C0")
        axes.axvline(1, color="black", lw=0.8)
        axes.set(xlabel=label, yticks=range(len(intervals)))
        axes.set_yticklabels(intervals)
        axes.invert_yaxis()
        _save(figure, path)


def heat_map(values: np.ndarray, rows: list[str], columns: list[str], title: str, path: Path) -> None:
    """A matrix (rows, columns) in colour, its numbers written in; NaN stays blank."""
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(layout="constrained", figsize=(5, 3.6))
        image = axes.imshow(values, cmap="viridis_r", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", bbox={"color": "white", "alpha": 0.7})
        axes.set(title=title, xticks=range(len(columns)), yticks=range(len(rows)))
        axes.set_xticklabels(columns)
        axes.set_yticklabels(rows)
        figure.colorbar(image)
        _save(figure, path)
