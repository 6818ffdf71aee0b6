"""Pages in Markdown: one per plan, and an index of their summaries."""

import itertools
import platform
import re
import shlex
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from l2o_runtime.files.artifact import read_rule
from l2o_runtime.files.atomic import atomic_write
from l2o_training.compare.papers.lab import Lab
from l2o_training.compare.papers.numbers import NOT_RUN, collect, markdown, number
from l2o_training.compare.papers.plans import OTHER_TITLES, PLANS, Plan
from l2o_training.compare.papers.sections import SECTIONS
from l2o_training.compare.papers.variants import Variant
from l2o_training.errors import RunError
from l2o_training.meta.folder import RULE, read_metrics

TITLE = "# Reproduction"
"""First line of the index."""

DETAILS = "<!-- details -->"
"""Where the part of a page ends that the index repeats."""

ENDS = 10
"""Epochs at the start and at the end of meta-training over which the Koopman loss is averaged."""


def write_page(name: str, plan: Plan, lab: Lab, out: Path, arguments: list[str]) -> Path:
    """Write `<out>/<name>.md` with its pictures from what was measured, and the index `<out>.md`.

    Args:
        name: of the plan.
        plan: with the seeds and runs that were asked for.
        lab: where the runs are.
        out: folder; made if needed.
        arguments: of `l2o reproduce` as it was called, folders aside.

    Returns:
        Path of the plan's page.
    """
    out.mkdir(parents=True, exist_ok=True)
    experiments = [collect(lab, experiment) for experiment in plan.experiments]
    section = SECTIONS[name](experiments, out)
    missing = [text for numbers in experiments for text in numbers.missing()]
    changed = f"Changed for this page: {', '.join(f'`{change}`' for change in lab.changes)}." if lab.changes else ""
    summary = [plan.text, *filter(None, [changed]), section.summary]
    if missing:
        summary.append(f"Not run, or not compared: {'; '.join(missing)}.")
    parts = [f"# {plan.title}", *summary, DETAILS, *filter(None, [section.details])]
    parts += ["## Commands", _code([shlex.join(["l2o", "reproduce", name, "--data-root", "data", *arguments])])]
    variants = dict.fromkeys(variant for each in plan.experiments for variant in each.variants)
    runs = [(max(each.seeds for each in plan.experiments if v in each.variants), v) for v in variants]
    if runs:
        threads = arguments[arguments.index("--threads") :][:2] if "--threads" in arguments else []
        parts += [_TRAINS, _code(_train_commands(runs, lab, threads)), "## Meta-training", _trainings(runs, lab)]
    parts.append(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}.")
    path = out / f"{name}.md"
    write_parts(path, parts)
    write_index(out)
    return path


def write_index(out: Path) -> None:
    """Write `<out>.md`, beside the folder: the summaries of all pages that are there."""
    parts = [TITLE, "What the papers report, run again: one section per `l2o reproduce PLAN`."]
    for name, title in ({name: plan.title for name, plan in PLANS.items()} | OTHER_TITLES).items():
        page = out / f"{name}.md"
        if page.is_file():
            body = page.read_text(encoding="utf-8").split("\n", 1)[1].split(DETAILS)[0].strip()
            linked = re.sub(r"\]\((?=[^):]+\))", f"]({out.name}/", body)  # links are relative to the page
            parts += [f"## [{title}]({out.name}/{name}.md)", linked]
        else:
            parts += [f"## {title}", f"{NOT_RUN.capitalize()}: `l2o reproduce {name}`."]
    write_parts(index_of(out), parts)


def index_of(out: Path) -> Path:
    """The index beside a folder of pages.

    Raises:
        RunError: another document has that name.
    """
    path = out.resolve().with_name(f"{out.resolve().name}.md")
    if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(TITLE):
        raise RunError(f"the index of the pages would take the place of {path}: choose another --out")
    return path


COLUMNS = 120
"""Of prose, at most."""

_TRAINS = (
    "It runs what is missing. These commands train the same rules, to the bit on the same machine (a DMD whose "
    "window is never full in meta-training is not trained, but equal to what training would give). Where another plan "
    "has trained a rule of that name for other epochs, `--runs-dir` takes another folder:"
)


def train_command(preset: str, changes: Iterable[str], *more: str) -> str:
    """A line of a shell that meta-trains a preset with overrides.

    >>> train_command("demo", ["epochs=5"], "--seed", "1")
    'l2o train --preset demo --set epochs=5 --seed 1'
    """
    settings = [word for change in changes for word in ("--set", change)]
    return shlex.join(["l2o", "train", "--preset", preset, *settings, *more])


def _train_commands(runs: list[tuple[int, Variant]], lab: Lab, threads: list[str]) -> list[str]:
    """A shell loop over seeds for variants one after the other that have as many."""
    lines = []
    for seeds, group in itertools.groupby(runs, key=lambda run: run[0]):
        lines.append(f"for seed in {' '.join(map(str, range(seeds)))}; do")
        lines += [f"  {_train_command(variant, lab, threads)}" for _, variant in group]
        lines.append("done")
    return lines


def _train_command(variant: Variant, lab: Lab, threads: list[str]) -> str:
    changes = (*variant.overrides, *lab.changes)
    fixed = train_command(variant.preset, changes, "--data-root", "data", *threads)
    return f"{fixed} --seed $seed --out runs/reproduction/{variant.name}-s$seed"


def _trainings(runs: list[tuple[int, Variant]], lab: Lab) -> str:
    """Validation loss, length and time of every run."""
    rows = []
    for seeds, variant in runs:
        for seed in range(seeds):
            folder = lab.folder(variant, seed)
            rows.append([f"{folder.name}", *_training(folder)])
    header = ["run", "best validation loss", "epochs", "minutes", "Koopman loss, start → end"]
    return markdown(header, rows)


def _training(folder: Path) -> list[str]:
    if not (folder / RULE).is_file():
        return [NOT_RUN, "", "", ""]
    best = number(read_rule(folder / RULE)[1]["validation"])
    rows = read_metrics(folder)
    if not rows:
        return [best, "put together from the run without context", "", ""]
    return [best, str(rows[-1]["epoch"]), f"{sum(row['seconds'] for row in rows) / 60:.1f}", _koopman(rows)]


def _koopman(rows: list[dict[str, Any]]) -> str:
    """Mean Koopman loss of the first and of the last ten epochs, of a KAE."""
    values = [row["koopman_loss"] for row in rows if "koopman_loss" in row]
    if not values:
        return ""
    first, last = values[:ENDS], values[-ENDS:]
    return f"{number(sum(first) / len(first))} → {number(sum(last) / len(last))}"


def _code(lines: list[str]) -> str:
    return "\n".join(["```", *lines, "```"])


def write_parts(path: Path, parts: list[str]) -> None:
    """Write paragraphs, tables and blocks of code as a page."""
    with atomic_write(path) as file:
        file.write((wrapped("\n\n".join(parts)) + "\n").encode())


def wrapped(text: str) -> str:
    """Prose in lines of at most `COLUMNS`; tables, headings and commands stay as they are.

    >>> wrapped("| " + "a " * 99 + "|") == "| " + "a " * 99 + "|"
    True
    >>> [len(line) for line in wrapped("- " + "word " * 30).splitlines()]
    [116, 36]
    """
    pieces = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)  # every other one is code
    pieces[::2] = ["\n".join(map(_wrapped, piece.split("\n"))) for piece in pieces[::2]]
    return "".join(pieces)


def _wrapped(line: str) -> str:
    if len(line) <= COLUMNS or line.startswith(("|", "#", "!")):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
