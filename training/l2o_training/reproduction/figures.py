"""Pictures of the reproduction's pages."""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from l2o_runtime.files.atomic import atomic_write
from l2o_training.evaluation.plots import STYLE, draw_losses
from l2o_training.reproduction.statistics import Interval


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
    plt.close(figure)


def panels(curves: dict[str, dict[str, np.ndarray]], path: Path, marks: tuple[int, ...] = ()) -> None:
    """Loss curves, one panel per task, three in a row; a name has the same colour in all of them.

    Args:
        curves: title → name → (runs, steps).
        path: of the PNG.
        marks: steps to mark; with any, the steps' axis is logarithmic.
    """
    rows = math.ceil(len(curves) / 3)
    columns = math.ceil(len(curves) / rows)
    names = dict.fromkeys(name for named in curves.values() for name in named)
    colours = {name: f"C{index}" for index, name in enumerate(names)}
    lines: dict[str, Line2D] = {}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, squeeze=False, layout="constrained", figsize=(4.4 * columns, 3.4 * rows)
        )
        for place in axes.flat[len(curves) :]:
            place.set_visible(False)
        for place, (title, named) in zip(axes.flat, curves.items(), strict=False):
            draw_losses(place, named, colours)
            lines |= dict(zip(named, place.get_lines(), strict=True))
            place.set(title=title, xlabel="step", ylabel="training loss", yscale="log")
            if marks:
                place.set_xscale("log")
            for mark in marks if named else ():
                place.axvline(mark, color="black", lw=0.8, ls=":")
        if lines:
            axes.flat[0].legend([lines[name] for name in names], names, fontsize=8)
        _save(figure, path)


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
