"""The picture of a benchmark."""

from pathlib import Path
from typing import IO, Any

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from l2o_training.plots import STYLE


def growth(rows: list[dict[str, Any]], target: IO[bytes] | Path) -> None:
    """Nanoseconds per parameter, with p10 to p90 and both floors, as PNG: against the number of parameters, or of one
    size, against the optimizer.

    Args:
        rows: results as in results.json; skipped ones are left out.
        target: file or path.
    """
    timed = [row for row in rows if row["median_s"] is not None]
    with plt.rc_context(STYLE | {"figure.figsize": (8.5, 5.2)}):
        figure, axes = plt.subplots(layout="constrained")
        (_by_optimizer if len({row["size"] for row in timed}) == 1 else _by_parameters)(axes, timed)
        figure.savefig(target, format="png")
        plt.close(figure)


FLOORS = (
    ("gemm_floor_ns", "floor: matrix products", "--", "|"),
    ("copy_floor_ns", "floor: copying the state", ":", "x"),
)
"""Key, name, line and marker."""


def _span(row: dict[str, Any]) -> tuple[float, float]:
    """p10 and p90 in nanoseconds per parameter."""
    return 1e9 * row["p10_s"] / row["parameters"], 1e9 * row["p90_s"] / row["parameters"]


def _by_optimizer(axes: Axes, timed: list[dict[str, Any]]) -> None:
    """One size: a row for each optimizer, with its own floors."""
    places = range(len(timed))
    axes.hlines(places, *zip(*map(_span, timed), strict=True), color="C0", alpha=0.5, lw=4)
    axes.plot([row["ns_per_parameter"] for row in timed], places, "o", color="C0", label="median, p10 to p90")
    for key, text, _, marker in FLOORS:
        known = [(row[key], place) for place, row in zip(places, timed, strict=True) if row[key] is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker, color="black", ms=9, label=text)
    title = f"Cost of a step: {timed[0]['size']}, {timed[0]['parameters']:,} parameters"
    axes.set(title=title, xlabel="ns per parameter", xscale="log")
    axes.set_yticks(places, [row["optimizer"] for row in timed], parse_math=False)
    axes.invert_yaxis()
    axes.legend(fontsize=7)


def _by_parameters(axes: Axes, timed: list[dict[str, Any]]) -> None:
    """A line for each optimizer, and the lowest floors of all."""
    for number, name in enumerate(dict.fromkeys(row["optimizer"] for row in timed)):
        own = [row for row in timed if row["optimizer"] == name]
        n = [row["parameters"] for row in own]
        marker = "osD^v<>pPX"[number % 10]  # lines that lie on each other are told apart by their markers
        middle = [row["ns_per_parameter"] for row in own]
        (drawn,) = axes.plot(n, middle, marker=marker, ms=5, lw=1.2, label=name, mfc="none")
        axes.vlines(n, *zip(*map(_span, own), strict=True), color=drawn.get_color(), alpha=0.5, lw=2)
    learned = [row for row in timed if row["gemm_floor_ns"] is not None]
    for key, text, style, _ in FLOORS:
        lowest = {row["parameters"]: row[key] for row in reversed(learned)}
        if lowest:
            axes.plot(list(lowest), list(lowest.values()), style, color="black", lw=1, label=text)
    axes.set(title="Cost of a step", xlabel="parameters", ylabel="ns per parameter", xscale="log", yscale="log")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
