"""l2o eval."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from l2o_cli.console import Json, Threads, Wide, err, fitting, friendly_errors, print_json, set_threads, show, table_of

if TYPE_CHECKING:
    from l2o_runtime import Rule
    from l2o_training.evaluation.evaluate import Result


def evaluate(
    rules: Annotated[list[str], typer.Argument(help="Rules: .safetensors files or bundled names.")],
    suite: Annotated[str, typer.Option(help="Which tasks (see `l2o suites`).")] = "digits",
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="Only this task of the suite unseen; may be repeated.")
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: adam, sgd, momentum, rmsprop; "
            "unseen: adam, adam-0.001, adamw-cosine, nadamw, momentum, rmsprop.",
            show_default="adam,sgd,rmsprop; unseen: all",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of every run.", show_default="300; unseen: 100, at horizon 1")
    ] = None,
    horizons: Annotated[
        str | None,
        typer.Option(help="Suite unseen: lengths of the runs, times --steps.", show_default="1,5,25"),
    ] = None,
    runs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs per task: fresh initial weights and minibatches.", show_default="10; unseen: 3"),
    ] = None,
    thin: Annotated[
        int | None,
        typer.Option(min=1, max=14, help="Suite unseen: every n-th of 14 learning rates.", show_default="1"),
    ] = None,
    cosine: Annotated[
        bool,
        typer.Option("--cosine", help="Suite unseen: enter rules a second time, with lr falling along a cosine."),
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Suite unseen: write a report, one HTML file, to this path.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**31 - 1, help="Seed of the runs; all optimizers get the same.", show_default="0"),
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Folder for results.")] = Path("runs/eval"),
    data_root: Annotated[Path, typer.Option(help="Folder with the data sets.")] = Path("data"),
    download: Annotated[bool, typer.Option("--download", help="Let torchvision fetch missing data.")] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    threads: Threads = 0,
    wide: Wide = False,
    as_json: Json = False,
) -> None:
    """Compare rules with hand-made optimizers, untuned and with the learning rate tuned per task.

    The figure is the mean training loss of the last 10 steps, ± the standard deviation over runs. The folder gets
    results.json, results.csv and a picture of the loss curves per task.

    The suite `unseen` runs rules as drop-in optimizers of ordinary training scripts, against baselines whose learning
    rate is tuned for every task and length. What was measured is kept under --out: a stopped evaluation goes on where
    it was, and two processes with the same arguments share the work. See docs/evaluation.md.

    Example: l2o eval runs/demo/rule.safetensors --suite digits --steps 300 --runs 10

    Example: l2o eval default --suite unseen --horizons 1 --data-root data --report report.html
    """
    with friendly_errors():
        import torch

        from l2o_cli.unseen import evaluate_unseen
        from l2o_runtime.config import require
        from l2o_training.compare.baselines import find_baselines
        from l2o_training.config import pick_device
        from l2o_training.evaluation.evaluate import evaluate as run
        from l2o_training.evaluation.evaluate import name_rules
        from l2o_training.evaluation.suites import UNSEEN, find_suite
        from l2o_training.fused.lstm import fuse
        from l2o_training.meta.provenance import versions
        from l2o_training.ranks.group import START_TIMEOUT
        from l2o_training.ranks.rendezvous import join
        from l2o_training.tasks import Task, make_task
        from l2o_training.tasks.data import Datasets

        if suite == UNSEEN:
            set_threads(threads)
            require(device in ("auto", "cpu"), f"--device {device}: the suite unseen runs on the CPU")
            require(seed is None, "--seed: the suite unseen has seeds 0, 1, …; --runs says how many")
            evaluate_unseen(
                rules,
                tasks=tasks or (),
                baselines="all" if baselines is None else baselines,
                steps=steps,
                horizons="1,5,25" if horizons is None else horizons,
                runs=runs,
                thin=1 if thin is None else thin,
                cosine=cosine,
                out_dir=out_dir,
                data_root=data_root,
                download=download,
                report=report,
                wide=wide,
                as_json=as_json,
            )
            return
        theirs = {"--task": tasks, "--horizons": horizons, "--thin": thin, "--cosine": cosine, "--report": report}
        for flag, given in theirs.items():
            require(given in (None, [], False), f"{flag}: only the suite {UNSEEN} takes it, not {suite}")
        steps, runs, seed = (
            usual if given is None else given for given, usual in ((steps, 300), (runs, 10), (seed, 0))
        )
        baselines = "adam,sgd,rmsprop" if baselines is None else baselines

        load = Datasets(data_root, download=download)
        with join() as ranks:
            set_threads(threads or (1 if ranks.size > 1 else 0))
            place = ranks.place(ranks.agree(lambda: pick_device(device), START_TIMEOUT))
            chosen = ranks.agree(lambda: [found.name for found in find_baselines(baselines)], START_TIMEOUT)
            settings = {"suite": suite, "rules": rules, "baselines": chosen}
            sizes = {"steps": steps, "runs": runs, "seed": seed}
            ranks.require_same({**settings, **sizes, "versions": versions()})
            ranks.connect(torch.device(place))

            def prepare() -> "tuple[list[Task], dict[str, Rule]]":
                tasks = [make_task(config, load, torch.device(place)) for config in find_suite(suite)]
                return tasks, {name: fuse(rule.to(place)) for name, rule in name_rules(rules).items()}

            made, named = ranks.agree(prepare)
            with err.status("evaluating") if ranks.main else nullcontext() as status:
                results = run(
                    made,
                    named,
                    chosen,
                    **sizes,
                    out=out_dir,
                    settings=settings,
                    report=lambda task, name: status.update(Text(f"{task}: {name}")) if status else None,
                    ranks=ranks,
                )
        if not ranks.main:
            return
        if as_json:
            print_json([vars(result) for result in results])
            return
        tell(results, f"loss, mean of the last 10 of {steps} steps, ± std over {runs} runs", wide=wide)
        err.print(f"results.json, results.csv and loss curves are in {out_dir}", soft_wrap=True)


def tell(results: "list[Result]", title: str, *, wide: bool) -> None:
    """Print tables of as many tasks as fit side by side."""
    tasks = list(dict.fromkeys(result.task for result in results))
    while tasks:
        count = fitting(partial(table, results, title, tasks), len(tasks), wide=wide)
        show(table(results, title, tasks, count), wide=wide)
        tasks = tasks[count:]


def table(results: "list[Result]", title: str, tasks: list[str], count: int) -> Table:
    """Optimizers down, the first `count` tasks across, the lowest loss of each task in bold."""
    tasks = tasks[:count]
    cells = {(result.optimizer, result.task): result for result in results}
    lowest = {
        task: min((r.mean for r in results if r.task == task and r.mean == r.mean), default=0.0) for task in tasks
    }
    found = table_of("optimizer", *tasks, title=title)
    for name in dict.fromkeys(result.optimizer for result in results):
        row = []
        for task in tasks:
            result = cells[name, task]
            style = "bold" if result.mean == lowest[task] else ""
            cell = Text(f"{result.mean:.3f} ± {result.std:.3f}", style)
            if name.endswith("tuned") and result.lr is not None:  # a rule may be called so, and has no rate
                cell.append(f"\n(lr {result.lr:g})", "not bold")
            row.append(cell)
        found.add_row(name, *row)
    return found
