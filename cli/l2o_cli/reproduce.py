"""l2o reproduce."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2o_cli.console import Threads, friendly_errors, out, progress, set_threads

if TYPE_CHECKING:
    from l2o_training.compare.papers.lab import Lab

OPEN_L2O = {
    "networks": ("networks", ""),
    **dict.fromkeys(("sparse", "lasso"), ("sparse", "")),
    **dict.fromkeys(("rastrigin", "swarm"), ("synthetic", "searches")),
    "minimax": ("synthetic", "games"),
}
"""What the benchmark has, and the plan and the part of it that it is in."""


def reproduce(
    plan: Annotated[
        str,
        typer.Argument(
            help="table1, controls, two-tiers, steps, fig3, fig4, koopman, networks, sparse, synthetic, bundled or "
            "horizon; or open-l2o, --only of whose parts are networks, sparse, lasso, rastrigin, swarm and minimax."
        ),
    ],
    data_root: Annotated[Path, typer.Option(help="Folder with the data sets.")] = Path("data"),
    download: Annotated[bool, typer.Option("--download", help="Let torchvision fetch missing data.")] = False,
    runs_dir: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/reproduction"),
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Folder of the pages.")] = Path("docs/reproduction"),
    seeds: Annotated[int | None, typer.Option(min=1, help="Meta-training seeds.", show_default="the plan's")] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="Runs per task.", show_default="the plan's")] = None,
    rules: Annotated[
        list[str] | None, typer.Option("--rule", help="Compare a further rule, by name or file; may be repeated.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of every meta-training, such as epochs=50.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Train and measure this variant only; may be repeated.")
    ] = None,
    train_only: Annotated[bool, typer.Option("--train-only", help="Measure nothing, write no page.")] = False,
    threads: Threads = 0,
) -> None:
    """Meta-train, compare and write a page: the papers' experiments with our numbers beside theirs.

    What is there already is kept: stopped runs are resumed, finished ones and their losses reused. Two processes
    with the same arguments share the work. The page shows what there is, and says what is missing.

    Example: l2o reproduce table1 --data-root data --threads 1
    """
    with friendly_errors():
        from l2o_runtime.config import nearest, require
        from l2o_training.compare.papers.lab import Lab
        from l2o_training.compare.papers.plans import OTHER_TITLES, PLANS, SPARSE, SYNTHETIC

        set_threads(threads)
        lab = Lab(runs_dir, data_root, download, tuple(overrides or ()))
        given = {"--seeds": [seeds], "--runs": [runs], "--rule": rules, "--set": overrides}
        known = [*PLANS, *OTHER_TITLES, "open-l2o"]
        require(plan in known, f"unknown plan {plan!r}: {nearest(plan, known)}")
        parts = [(plan, list(only or ()))]
        if plan == "open-l2o":
            for name in only or ():
                require(name in OPEN_L2O, f"--only {name}: {nearest(name, list(OPEN_L2O))}")
            found = dict.fromkeys(OPEN_L2O[name] for name in only or OPEN_L2O)
            parts = [(name, [part] if part else []) for name, part in found]
        page: Path | None
        for name, chosen in parts:
            if name == SYNTHETIC:
                _refuse(name, {flag: given[flag] for flag in ("--runs", "--rule")} | {"--train-only": [train_only]})
                page = _synthetic(lab, out_dir, seeds, chosen)
            elif name == SPARSE:
                _refuse(name, {flag: given[flag] for flag in ("--seeds", "--runs", "--rule")})
                page = _sparse(lab, out_dir, chosen, train_only)
            else:
                page = _rules(name, lab, out_dir, seeds, runs, rules or [], chosen, train_only, threads)
            if page is not None:
                out.print(str(page), soft_wrap=True)


def _refuse(plan: str, options: dict[str, Any]) -> None:
    """Refuse what a plan has its own of."""
    from l2o_runtime.config import require

    for option, values in options.items():
        require(not any(values or ()), f"{option}: not with the plan {plan}, which has its own: leave it out")


def _rules(
    plan: str,
    lab: "Lab",
    out_dir: Path,
    seeds: int | None,
    runs: int | None,
    rules: list[str],
    only: list[str],
    train_only: bool,
    threads: int,
) -> Path | None:
    """Rules that are meta-trained and compared as a plan says."""
    from l2o_training.compare.papers.page import index_of, write_page
    from l2o_training.compare.papers.plans import find_plan
    from l2o_training.compare.papers.run import reproduce as run

    chosen = find_plan(plan, seeds=seeds, runs=runs, rules=rules)
    index_of(out_dir)
    with progress(plan) as report:
        run(chosen, lab, only=only, train_only=train_only, report=report)
    if train_only:
        return None
    given: dict[str, Sequence[Any]] = {
        "--seeds": [seeds],
        "--runs": [runs],
        "--rule": rules,
        "--set": lab.changes,
        "--threads": [threads or None],
    }
    arguments = [text for flag, values in given.items() for v in values if v for text in (flag, str(v))]
    return write_page(plan, chosen, lab, out_dir, arguments)


def _synthetic(lab: "Lab", out_dir: Path, seeds: int | None, only: list[str]) -> Path:
    """Games and searches, whose solvers are no rules and are scored otherwise."""
    from l2o_training.compare.papers import synthetic

    with progress("synthetic") as report:
        return synthetic.reproduce(lab, out_dir, seeds, only, report)


def _sparse(lab: "Lab", out_dir: Path, only: list[str], train_only: bool) -> Path | None:
    """Sparse recovery, whose solvers are no rules and are measured otherwise."""
    from l2o_cli.console import err
    from l2o_training.compare.papers import sparse

    runs = sparse.Runs(lab.runs, lab.changes)
    sparse.train(runs, tuple(only), lambda name: err.print(f"meta-training {name}"))
    arguments = [word for change in lab.changes for word in ("--set", change)]
    return None if train_only else sparse.write_page(runs, out_dir, arguments)
