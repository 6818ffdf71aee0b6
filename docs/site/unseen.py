"""Draw docs/pictures/unseen.svg from the tables of docs/evaluation.md: python docs/site/unseen.py."""

import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1]
PANELS = {
    "100 steps": "## The two-tier rule `scale`, which is the default, 100 steps",
    "500 steps": "## The two-tier rule, 500 steps",
    "2,500 steps": "## The two-tier rule, 2,500 steps",
}
"""Title → heading of the section in whose table the ratios are."""

SERIES = {"`scale`": ("o", "tab:blue"), "Adam 0.001": ("x", "tab:gray")}


def ratios(heading: str) -> tuple[list[str], dict[str, list[float]]]:
    """Tasks, and for each series its ratios to tuned Adam's training loss."""
    section = (DOCS / "evaluation.md").read_text(encoding="utf-8").split(heading + "\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\|(.*)\|$", section, flags=re.MULTILINE)
    table = [[cell.strip() for cell in line.split("|")] for line in lines]
    start = next(index for index, row in enumerate(table) if row[0] == "task")
    rows = [
        row
        for row in table[start + 2 :]
        if "-" in row[0] or row[0] in ("convnet", "vit", "autoencoder", "vae", "tabular")
    ]
    columns = {name: table[start].index(name) for name in SERIES if name in table[start]}
    return [row[0] for row in rows], {name: [float(row[at]) for row in rows] for name, at in columns.items()}


def draw() -> None:
    """One panel per length, a line per task."""
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "l2o", "font.size": 9, "font.family": "sans-serif"}
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9.6, 3.7), sharey=True, layout="constrained")
    for axis, (title, heading) in zip(axes, PANELS.items(), strict=True):
        tasks, series = ratios(heading)
        axis.axvline(1, color="black", linewidth=0.8)
        for name, values in series.items():
            mark, color = SERIES[name]
            axis.plot(values, range(len(tasks)), mark, color=color, label=name.strip("`"), markersize=5)
        axis.set(title=title, xscale="log", xlim=(0.4, 50), yticks=range(len(tasks)), yticklabels=tasks)
        axis.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"], minor=False)
        axis.minorticks_off()
        axis.grid(axis="y", linewidth=0.3)
    axes[0].invert_yaxis()
    axes[0].legend(loc="lower right")
    axes[1].set_xlabel(
        "training loss ÷ that of Adam with the learning rate tuned per task (left of the line is better)"
    )
    figure.savefig(DOCS / "pictures" / "unseen.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw()
