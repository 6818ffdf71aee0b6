"""l2o reproduce."""

from pathlib import Path
from typing import Annotated

import typer

from l2o_cli.console import Threads, friendly_errors, out, progress, set_threads


def reproduce(
    plan: Annotated[
        str, typer.Argument(help="table1, controls, two-tiers, fig3, fig4, koopman, bundled, horizon or synthetic.")
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
        from l2o_runtime.config import require
        from l2o_training.compare.papers import synthetic
        from l2o_training.compare.papers.lab import Lab
        from l2o_training.compare.papers.page import index_of, write_page
        from l2o_training.compare.papers.plans import SYNTHETIC, find_plan
        from l2o_training.compare.papers.run import reproduce as run

        set_threads(threads)
        if plan == SYNTHETIC:
            others = {"--runs": runs, "--rule": rules, "--train-only": train_only}
            for option, value in others.items():
                require(not value, f"{option}: not with the plan {plan}, which has its own: leave it out")
            lab = Lab(runs_dir, data_root, download, tuple(overrides or ()))
            with progress(plan) as report:
                page = synthetic.reproduce(lab, out_dir, seeds or 3, only or (), report)
            out.print(str(page), soft_wrap=True)
            return
        chosen = find_plan(plan, seeds=seeds, runs=runs, rules=rules or ())
        index_of(out_dir)
        lab = Lab(runs_dir, data_root, download, tuple(overrides or ()))
        with progress(plan) as report:
            run(chosen, lab, only=only or (), train_only=train_only, report=report)
        if train_only:
            return
        given = {
            "--seeds": [seeds],
            "--runs": [runs],
            "--rule": rules,
            "--set": overrides,
            "--threads": [threads or None],
        }
        arguments = [text for flag, values in given.items() for v in values or () if v for text in (flag, str(v))]
        out.print(str(write_page(plan, chosen, lab, out_dir, arguments)), soft_wrap=True)
