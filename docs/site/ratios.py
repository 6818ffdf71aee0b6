"""Draw pictures of ratios from the tables of docs/evaluation.md: python docs/site/ratios.py."""

import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from l2o_training.tasks.scripts import RECIPES, everyday

DOCS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Picture:
    """What is drawn.

    Attributes:
        panels: title → heading of the section in whose first table of tasks the ratios are.
        series: column → mark, colour and label.
        axis: what the ratios are to.
        limits: of the axis.
        ticks: on it.
    """

    panels: dict[str, str]
    series: dict[str, tuple[str, str, str]]
    axis: str
    limits: tuple[float, float]
    ticks: tuple[float, ...]


PICTURES = {
    "unseen.svg": Picture(
        {
            "100 steps": "## The two-tier rule `scale`, 100 steps",
            "500 steps": "## The two-tier rule, 500 steps",
            "2,500 steps": "## The two-tier rule, 2,500 steps",
        },
        {"`scale`": ("o", "tab:blue", "scale"), "Adam 0.001": ("x", "tab:gray", "Adam 0.001")},
        "training loss ÷ that of Adam with the learning rate tuned per task (left of the line is better)",
        (0.4, 50),
        (0.5, 1, 2, 5, 10, 20),
    ),
    "everyday.svg": Picture(
        {"2,500 steps, the end of training": "## Everyday scripts"},
        {
            "told": ("o", "tab:blue", "default rule, told total_steps"),
            "anytime": ("s", "tab:cyan", "default rule, nothing said"),
        },
        "training loss ÷ that of Adam at 0.001 (left of the line is better)",
        (1e-4, 5000),
        (0.0001, 0.001, 0.01, 0.1, 1, 10, 100, 1000),
    ),
}
TASKS = {*RECIPES, *everyday.RECIPES}


def ratios(heading: str, names: list[str]) -> tuple[list[str], dict[str, list[float]]]:
    """Tasks, and for each of the named columns its ratios."""
    section = (DOCS / "evaluation.md").read_text(encoding="utf-8").split(heading + "\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\|(.*)\|$", section, flags=re.MULTILINE)
    table = [[cell.strip() for cell in line.split("|")] for line in lines]
    start = next(index for index, row in enumerate(table) if row[0] == "task")
    header = table[start]
    rows = list(takewhile(lambda row: row[0] in TASKS, table[start + 2 :]))
    columns = {name: header.index(name) for name in names if name in header}
    return [row[0] for row in rows], {name: [float(row[at]) for row in rows] for name, at in columns.items()}


def draw(picture: Picture, path: Path) -> None:
    """One panel per section, a line per task."""
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "l2o", "font.size": 9, "font.family": "sans-serif"}
    count = len(picture.panels)
    figure, grid = plt.subplots(
        1, count, figsize=(9.6 if count > 1 else 7, 3.7), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (title, heading) in zip(grid[0], picture.panels.items(), strict=True):
        tasks, series = ratios(heading, list(picture.series))
        axis.axvline(1, color="black", linewidth=0.8)
        for name, values in series.items():
            mark, color, label = picture.series[name]
            axis.plot(values, range(len(tasks)), mark, color=color, label=label, markersize=5)
        axis.set(title=title, xscale="log", xlim=picture.limits, yticks=range(len(tasks)), yticklabels=tasks)
        axis.set_xticks(picture.ticks, [f"{tick:g}" for tick in picture.ticks], minor=False)
        axis.minorticks_off()
        axis.grid(axis="y", linewidth=0.3)
    grid[0][0].invert_yaxis()
    grid[0][0].legend(loc="lower right")
    grid[0][count // 2].set_xlabel(picture.axis)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    for name, picture in PICTURES.items():
        draw(picture, DOCS / "pictures" / name)
