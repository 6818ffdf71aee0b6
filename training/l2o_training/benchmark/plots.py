"""The picture of a benchmark."""

from pathlib import Path
from typing import IO, Any

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt

from l2o_training.evaluation.plots import STYLE


def growth(rows: list[dict[str, Any]], target: IO[bytes] | Path) -> None:
    """Nanoseconds per parameter against the number of parameters, with p10 to p90 and both floors, as PNG.

    Args:
        rows: results as in results.json; skipped ones are left out.
        target: file or path.
    """
    timed = [row for row in rows if row["median_s"] is not None]
    with plt.rc_context(STYLE | {"figure.figsize": (8.5, 5.2)}):
        figure, axes = plt.subplots(layout="constrained")
        for number, name in enumerate(dict.fromkeys(row["optimizer"] for row in timed)):
            own = [row for row in timed if row["optimizer"] == name]
            n = [row["parameters"] for row in own]
            middle = [row["ns_per_parameter"] for row in own]
            marker = "osD^v<>pPX"[number % 10]  # lines that lie on each other are told apart by their markers
            (drawn,) = axes.plot(n, middle, marker=marker, ms=5, lw=1.2, label=name, mfc="none")
            low = [1e9 * row["p10_s"] / row["parameters"] for row in own]
            high = [1e9 * row["p90_s"] / row["parameters"] for row in own]
            axes.vlines(n, low, high, color=drawn.get_color(), alpha=0.5, lw=2)
        learned = [row for row in timed if row["gemm_floor_ns"] is not None]
        for key, text, style in (
            ("gemm_floor_ns", "floor: matrix products", "--"),
            ("copy_floor_ns", "floor: copying the state", ":"),
        ):
            lowest = {row["parameters"]: row[key] for row in reversed(learned)}
            if lowest:
                axes.plot(list(lowest), list(lowest.values()), style, color="black", lw=1, label=text)
        axes.set(title="Cost of a step", xlabel="parameters", ylabel="ns per parameter", xscale="log", yscale="log")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
        figure.savefig(target, format="png")
        plt.close(figure)
