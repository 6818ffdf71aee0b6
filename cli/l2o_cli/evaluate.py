"""l2o eval."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from l2o_cli.console import (
    Json,
    Threads,
    Wide,
    err,
    fitting,
    friendly_errors,
    out,
    print_json,
    progress,
    set_threads,
    show,
    table_of,
)

if TYPE_CHECKING:
    from l2o_training.compare.summary import Findings


def evaluate(
    rules: Annotated[list[str], typer.Argument(help="Rules: .safetensors files or bundled names.")],
    suite: Annotated[str, typer.Option(help="Which tasks (see `l2o suites`).")] = "digits",
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", help="A task of the suite, or one of your own, file.py:function; may be repeated."),
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: adam, adam-0.001, adamw-cosine, adamw-linear, muon-linear, schedule-free, nadamw, "
            "sgd, momentum, rmsprop, talt-sgd, talt-adam; ista, fista, amp; all.",
            show_default="all; own tasks: four",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of a run at horizon 1.", show_default="300; scripts: 100; own: 1000"),
    ] = None,
    horizons: Annotated[
        str | None,
        typer.Option(help="Lengths of the runs, times --steps, such as 1,5,25.", show_default="1; scripts: 1,5,25"),
    ] = None,
    runs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs per task.", show_default="10; scripts: 3"),
    ] = None,
    thin: Annotated[int, typer.Option(min=1, max=14, help="Try every n-th of 14 rates.")] = 1,
    tune_on: Annotated[
        Literal["training", "validation"],
        typer.Option(metavar="LOSS", help="Final loss to tune on: training or validation."),
    ] = "training",
    cosine: Annotated[bool, typer.Option("--cosine", help="Enter rules with lr along a cosine too.")] = False,
    told: Annotated[bool, typer.Option("--told", help="Enter rules told their total_steps too.")] = False,
    weight_decay: Annotated[float, typer.Option(min=0.0, metavar="X", help="Weight decay of rules.")] = 0.0,
    report: Annotated[Path | None, typer.Option(help="Write a report, one HTML file, to this path.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the first run.")] = 0,
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Folder for results.")] = Path("runs/eval"),
    data_root: Annotated[Path, typer.Option(help="Folder with the data sets.")] = Path("data"),
    download: Annotated[bool, typer.Option("--download", help="Let torchvision fetch missing data.")] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Scripts run on the CPU.")] = "auto",
    threads: Threads = 0,
    wide: Wide = False,
    as_json: Json = False,
) -> None:
    """Compare rules with hand-made optimizers whose learning rate is tuned for every task and length.

    Losses are means over the last 10 steps. The folder gets results.json, results.csv and pictures; --report writes a
    page with all of it.

    What was measured is kept under --out: a stopped evaluation goes on.

    Example: l2o eval default --suite unseen --horizons 1 --report report.html

    Example: l2o eval runs/mine/rule.safetensors default --task my_tasks.py:make --report report.html
    """
    with friendly_errors():
        from l2o_training.compare import evaluation
        from l2o_training.compare.run import measure
        from l2o_training.ranks.rendezvous import join

        with join() as ranks:
            set_threads(threads or (1 if ranks.size > 1 else 0))
            request = evaluation.Request(
                rules=tuple(rules),
                suite=suite,
                tasks=tuple(tasks or ()),
                baselines=baselines,
                steps=steps,
                horizons=horizons,
                runs=runs,
                thin=thin,
                cosine=cosine,
                told=told,
                weight_decay=weight_decay,
                tune_on=tune_on,
                seed=seed,
            )
            study = evaluation.start(request, out_dir, data_root, download, device, report, ranks)
            with progress(study.suite) if ranks.main else nullcontext() as tell_progress:
                measure(study, *([tell_progress] if tell_progress else []), ranks=ranks)
            if not ranks.main:
                return
            findings = evaluation.finish(study, request, out_dir, report)
        if as_json:
            print_json(evaluation.plain_results(findings))
            return
        tell(findings, wide=wide)
        err.print(
            f"every figure is in results.json and results.csv in {out_dir}; --wide prints all columns", soft_wrap=True
        )
        if report is not None:
            out.print(str(report), soft_wrap=True)


def tell(findings: "Findings", *, wide: bool) -> None:
    """Print tables for every length of runs, then what they say in words, and what to know before believing it."""
    from l2o_training.compare.report.words import advice, cautions, headline

    for horizon in findings.study.horizons:
        for make, most in ((overview, len(titles(findings))), (by_task, len(findings.study.contenders))):
            count = fitting(partial(make, findings, horizon), most, wide=wide)
            show(make(findings, horizon, count), wide=wide)
        for rule in dict.fromkeys(row.optimizer for row in findings.versus):
            beside = partial(by_opponent, findings, horizon, rule)
            show(beside(fitting(beside, len(compared(findings)), wide=wide)), wide=wide)
    for contender in findings.study.contenders:
        if contender.learned:
            out.print(f"{contender.name}:", *headline(findings, contender))
            for line in advice(findings, contender):
                out.print(f"{contender.name}: {line}")
    for text in cautions(findings):
        out.print(text)


def titles(findings: "Findings") -> list[str]:
    """Of the overview's columns, the most telling ones first."""
    held = ["validation loss"] if findings.validated else []
    times = ["profile,\nseconds"] if findings.timed else []
    return ["train loss", *held, "better\non", "speed-up", "diverged", "profile", *times]


def overview(findings: "Findings", horizon: int, count: int) -> Table:
    """Optimizers down, the first `count` of the overall figures across."""
    from l2o_training.compare.report.words import digits, interval, plural, share, speedup

    study = findings.study
    title = f"{plural(len(study.workloads), 'task')}, {study.steps * horizon:,} steps, ratios to tuned Adam"
    found = table_of("optimizer", *titles(findings)[:count], title=title)
    for row in (row for row in findings.overall if row.horizon == horizon):
        figures = [interval(row.train), *([interval(row.validation)] if row.validation else [])]
        figures += [f"{row.better}/{row.workloads}", speedup(row.speedup), share(row.diverged), digits(row.score_steps)]
        figures += [digits(row.score_seconds)] if findings.timed else []
        found.add_row(row.optimizer, *figures[:count])
    return found


def by_task(findings: "Findings", horizon: int, count: int) -> Table:
    """Tasks down, the final training losses of the first `count` optimizers across: tuned Adam, rules, the others."""
    from l2o_training.compare.contenders import REFERENCE
    from l2o_training.compare.report.words import digits, loss

    study = findings.study
    order = sorted(study.contenders, key=lambda c: 0 if c.name == REFERENCE else 1 if c.learned else 2)[:count]
    title = f"training loss after {study.steps * horizon:,} steps (times tuned Adam's)"
    found = table_of("task", *(contender.name for contender in order), title=title)
    for workload in study.workloads:
        rows = [findings.row(horizon, workload.name, contender.name) for contender in order]
        found.add_row(workload.name, *(f"{loss(row.train)} ({digits(row.train_ratio)})" for row in rows))
    return found


def compared(findings: "Findings") -> list[str]:
    """Figures of a rule beside another optimizer, the most telling ones first."""
    held = ["validation loss"] if findings.validated else []
    return ["training loss", "worst task", "lower\non", "interquartile\nmean", *held]


def by_opponent(findings: "Findings", horizon: int, rule: str, count: int) -> Table:
    """Other optimizers down; ratios of the rule's final loss to theirs, the first `count` figures across."""
    from l2o_training.compare.report.words import digits, interval

    title = f"{findings.study.steps * horizon:,} steps, geometric means over tasks"
    found = table_of(f"{rule} beside", *compared(findings)[:count], title=title)
    for row in (row for row in findings.versus if (row.horizon, row.optimizer) == (horizon, rule)):
        train, held = row.train, [interval(row.validation.mean)] if row.validation else []
        worst = f"{train.worst} {digits(train.worst_ratio)}"
        figures = [interval(train.mean), worst, f"{train.lower}/{train.workloads}", interval(train.iqm), *held]
        found.add_row(row.against, *figures[:count])
    return found
