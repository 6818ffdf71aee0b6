"""Pictures for pages: matplotlib's SVG, made to follow the page's colours, fonts and switches."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("agg")

import matplotlib.pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from l2o_training.compare import statistics

INK, FAINT = "#5e0201", "#5e0202"
"""Colours that stand for the page's text and for lines behind the curves; no other colour is drawn."""

POINTS = 120
"""Points of a curve, at most."""

DASHES = ((1, 1.2), (6, 1.5), (4, 1.5, 1, 1.5), (2.5, 1.2), (7, 1.5, 1, 1.5, 1, 1.5), (9, 3), (3, 1, 3, 3))
"""Lines of all series but the first, which is drawn through: lengths drawn and left out, in widths of the line."""

STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def colour(index: int) -> str:
    """What stands for the colour of a series."""
    return f"#5e01{index:02x}"


def dashes(index: int) -> tuple[float, ...]:
    """What of the line of a series is drawn and left out by turns; nothing is drawn through."""
    return DASHES[(index - 1) % len(DASHES)] if index else ()


def _line(index: int) -> dict[str, Any]:
    """How the line of a series looks."""
    return {"color": colour(index), "ls": (0, dashes(index)) if index else "-", "lw": 1.5 if index else 2.2}


def curves(name: str, series: Sequence[tuple[np.ndarray, np.ndarray]], ylabel: str) -> str:
    """Loss against the step: mean over runs, and a band from the lowest to the highest.

    Args:
        name: of the picture, another for each on a page.
        series: steps (n,) and losses (runs, n) of each optimizer.
        ylabel: what the losses are.

    Returns:
        An `<svg>` element, to be put into a page.
    """
    with plt.rc_context(STYLE | {"svg.hashsalt": name}):
        figure, axes = plt.subplots(figsize=(4.6, 3.0), layout="constrained")
        for index, (steps, losses) in enumerate(series):
            _draw(axes, index, *_thin(steps, np.where(np.isfinite(losses) & (losses > 0), losses, np.nan)))
        axes.set(xlabel="step", ylabel=ylabel, yscale="log", xlim=(0, None))
        _limit(axes, series)
        _ticks(axes)
        return _finish(figure)


def profiles(name: str, ratios: np.ndarray, xlabel: str) -> str:
    """Performance profiles: ρ(τ) for τ from 1 to 4.

    Args:
        name: of the picture.
        ratios: (optimizers, workloads), from `statistics.slowdowns`.
        xlabel: what τ is.
    """
    taus = np.linspace(1, statistics.MAX_TAU, 601)
    with plt.rc_context(STYLE | {"svg.hashsalt": name}):
        figure, axes = plt.subplots(figsize=(4.6, 3.0), layout="constrained")
        for index, row in enumerate(ratios):
            # A little beside each other, so that lines on top of each other are seen to be more than one.
            height = statistics.profile(row, taus) + 0.004 * (index - len(ratios) / 2)
            keep = np.flatnonzero(np.diff(height, prepend=-1, append=-1)[:-1] != 0)
            places = np.unique([*keep, len(taus) - 1])
            (line,) = axes.step(taus[places], height[places], where="post", **_line(index))
            line.set_gid(_gid(index))
        axes.set(xlabel=xlabel, ylabel="share of tasks", xlim=(1, statistics.MAX_TAU), ylim=(-0.03, 1.03))
        return _finish(figure)


def forest(name: str, labels: Sequence[str], intervals: Sequence[tuple[float, float, float]], xlabel: str) -> str:
    """Ratios with their intervals, one row each, on a logarithmic axis.

    Args:
        name: of the picture.
        labels: of the rows.
        intervals: centre and bounds; NaN bounds are not drawn.
        xlabel: what the ratios are.
    """
    with plt.rc_context(STYLE | {"svg.hashsalt": name}):
        figure, axes = plt.subplots(figsize=(4.6, 0.9 + 0.3 * len(labels)), layout="constrained")
        for index, (centre, low, high) in enumerate(intervals):
            (bar,) = axes.plot([low, high], [index, index], color=colour(index), lw=2.5, solid_capstyle="butt")
            (mark,) = axes.plot([centre], [index], "o", ms=6, color=colour(index))
            bar.set_gid(_gid(index))
            mark.set_gid(_gid(index))
        axes.axvline(1, color=INK, lw=0.8)
        axes.set(xlabel=xlabel, xscale="log", ylim=(len(labels) - 0.5, -0.5))
        axes.set_yticks(range(len(labels)), labels, parse_math=False)
        bounds = np.array([x for interval in intervals for x in interval if np.isfinite(x)])
        axes.set_xlim(min(0.8, bounds.min() / 1.1), max(1.25, bounds.max() * 1.1))
        _plain_log(axes.xaxis, *axes.get_xlim(), 6)
        axes.grid(visible=False, axis="y")
        return _finish(figure)


def _gid(index: int) -> str:
    return f"series-{index}"


def _thin(steps: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same curves with at most 120 points."""
    keep = np.unique(np.linspace(0, len(steps) - 1, min(POINTS, len(steps))).round().astype(int))
    return steps[keep], losses[:, keep]


def _draw(axes: Axes, index: int, steps: np.ndarray, losses: np.ndarray) -> None:
    marker = "o" if len(steps) < 10 else ""
    mean = losses.mean(0)  # NaN where a run has ended, so the curve ends there
    (line,) = axes.plot(steps, mean, **_line(index), marker=marker, ms=3)
    line.set_gid(_gid(index))
    if len(losses) > 1:
        band = axes.fill_between(steps, losses.min(0), losses.max(0), color=colour(index), alpha=0.13, lw=0)
        band.set_gid(_gid(index))


def _limit(axes: Axes, series: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Keep a curve that shoots up from squeezing the others together."""
    tops = [np.nanmax(losses) for _, losses in series if np.isfinite(losses).any()]
    starts = [float(losses[0, 0]) for _, losses in series if np.isfinite(losses[0, 0])]
    if tops and starts and max(tops) > 3 * max(starts):
        axes.set_ylim(top=3 * max(starts))


def _ticks(axes: Axes) -> None:
    _plain_log(axes.yaxis, *axes.get_ylim(), 7)


def _plain_log(axis: mpl.axis.Axis, low: float, high: float, count: int) -> None:
    """Few ticks with plain numbers, also where the axis spans less than a decade."""
    wide = high / low > 30
    places = (ticker.LogLocator(numticks=count) if wide else ticker.MaxNLocator(count)).tick_values(low, high)
    axis.set_major_locator(ticker.FixedLocator([place for place in places if low <= place <= high and place > 0]))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def _finish(figure: Figure) -> str:
    """The figure as an element of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    return as_element(buffer.getvalue())


def as_element(svg: str) -> str:
    """An SVG file of matplotlib's as an element that takes colours and fonts from its page.

    Ids that nothing refers to are dropped, for they are the same in all pictures; those of series become classes.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<svg", '<svg aria-hidden="true" focusable="false"', svg, count=1)
    svg = re.sub(r'id="series-(\d+)"', r'class="s\1"', svg)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"#5e01([0-9a-f]{2})", lambda found: f"var(--s{int(found[1], 16)})", svg)
    svg = svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", svg)
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d+\.\d)\d+", r"\1", tag[0]), svg)  # not in texts
    return re.sub(r">\s+<", "><", svg)
