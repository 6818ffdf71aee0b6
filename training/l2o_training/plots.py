"""Pictures: learning curves of meta-training, loss curves of evaluations."""

import math
from pathlib import Path
from typing import IO, Any

import matplotlib as mpl
import numpy as np

mpl.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

STYLE: Any = {"figure.figsize": (7, 4.2), "axes.grid": True, "grid.alpha": 0.3, "figure.dpi": 130}


def learning_curve(history: list[dict[str, Any]], target: IO[bytes] | Path, adam: dict[str, Any] | None = None) -> None:
    """Meta-loss per epoch and validation loss of a run, as PNG.

    Args:
        history: rows of `metrics.jsonl`.
        target: file or path.
        adam: learning rate and loss of Adam, or name and loss of another, on the validation's instances.

    The title says how many times fewer steps than Adam the best rule takes to where Adam ends, if that is known.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(layout="constrained")
        epochs = [row["epoch"] for row in history]
        axes.plot(epochs, [row["meta_loss"] for row in history], lw=0.8, alpha=0.5, label="meta-loss")
        validated = [(row["epoch"], row["validation"]) for row in history if "validation" in row]
        axes.plot(*zip(*validated, strict=True), "o-", ms=3, label="validation (fresh instances)")
        if adam is not None and adam["loss"] is not None:
            name = adam.get("name", f"Adam at {adam['lr']}")
            axes.axhline(adam["loss"], color="0.4", ls="--", lw=1, label=f"{name}, on the same instances")
        best = min((row for row in history if "validation" in row), key=lambda row: row["validation"], default={})
        if "speedup" in best:
            axes.set_title(f"{best['speedup']:.2g} × fewer steps than Adam at its best rate", fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        lowest = min([*(row["meta_loss"] for row in history), *(loss for _, loss in validated)], default=1.0)
        scale = "log" if lowest > 0 else "linear"
        axes.set(xlabel="epoch", ylabel="mean loss over an optimization", yscale=scale)
        axes.legend()
        figure.savefig(target, format="png")
        plt.close(figure)


def loss_curves(title: str, curves: dict[str, np.ndarray], target: IO[bytes] | Path) -> None:
    """Mean loss against the step with a band of ± 1 standard deviation over runs, as PNG.

    Args:
        title: of the picture.
        curves: name → (runs, steps).
        target: file or path.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(layout="constrained")
        draw_losses(axes, curves)
        axes.set(title=title, xlabel="step", ylabel="training loss", yscale="log")
        axes.legend(fontsize=8)
        figure.savefig(target, format="png")
        plt.close(figure)


def draw_losses(axes: Axes, curves: dict[str, np.ndarray], colours: dict[str, str] | None = None) -> None:
    """Mean loss against the step with a band of ± 1 standard deviation over runs.

    Args:
        axes: where to.
        curves: name → (runs, steps).
        colours: of the names; matplotlib's, one after the other, where they are not given.
    """
    for name, losses in curves.items():
        # A diverged run ends its curve; float64, so that squares of what came before do not overflow.
        finite = np.where(np.abs(losses) < 1e30, losses, np.nan).astype(np.float64)
        mean, spread = finite.mean(0), finite.std(0)
        steps = np.arange(1, len(mean) + 1)
        (line,) = axes.plot(steps, mean, lw=1.4, label=name, color=colours and colours[name])
        low = np.maximum(mean - spread, finite.min(0))  # a log axis cannot show what falls below zero
        axes.fill_between(steps, low, mean + spread, color=line.get_color(), alpha=0.15, lw=0)


def panels(curves: dict[str, dict[str, np.ndarray]], target: IO[bytes] | Path, marks: tuple[int, ...] = ()) -> None:
    """Loss curves, one panel per task, three in a row; a name has the same colour in all of them.

    Args:
        curves: title → name → (runs, steps).
        target: file or path, of a PNG.
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
            place.set(title=title, xlabel="step", ylabel="training loss")
            if any(bool(np.any(np.isfinite(losses) & (losses > 0))) for losses in named.values()):
                place.set_yscale("log")  # which takes no axis without numbers
                place.set_xscale("log" if marks else "linear")
            for mark in marks if named else ():
                place.axvline(mark, color="black", lw=0.8, ls=":")
        if lines:
            axes.flat[0].legend([lines[name] for name in names], names, fontsize=8)
        figure.savefig(target, format="png")
        plt.close(figure)
