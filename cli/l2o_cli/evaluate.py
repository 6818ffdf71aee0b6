"""l2o eval."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from l2o_cli.console import Json, Threads, err, friendly_errors, out, print_json, set_threads


def evaluate(
    rules: Annotated[list[str], typer.Argument(help="Rules: .safetensors files or bundled names.")],
    suite: Annotated[str, typer.Option(help="Which tasks (see `l2o suites`).")] = "digits",
    baselines: Annotated[str, typer.Option(help="Comma-separated: adam, sgd, momentum, rmsprop.")] = "adam,sgd,rmsprop",
    steps: Annotated[int, typer.Option(min=1, help="Steps of every run.")] = 300,
    runs: Annotated[int, typer.Option(min=1, help="Runs per task: fresh initial weights and minibatches.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the runs; all optimizers get the same.")] = 0,
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Folder for results.")] = Path("runs/eval"),
    data_root: Annotated[Path, typer.Option(help="Folder with the data sets.")] = Path("data"),
    download: Annotated[bool, typer.Option("--download", help="Let torchvision fetch missing data.")] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Compare rules with hand-made optimizers, untuned and with the learning rate tuned per task.

    The figure is the mean training loss of the last 10 steps, ± the standard deviation over runs. The folder gets
    results.json, results.csv and a picture of the loss curves per task.

    Example: l2o eval runs/demo/rule.safetensors --suite digits --steps 300 --runs 10
    """
    with friendly_errors():
        import torch

        from l2o_training.data import Dataset, load_dataset
        from l2o_training.evaluation.baselines import parse_baselines
        from l2o_training.evaluation.evaluate import evaluate as run
        from l2o_training.evaluation.evaluate import name_rules
        from l2o_training.evaluation.suites import find_suite
        from l2o_training.tasks import make_task
        from l2o_training.trainer import pick_device

        set_threads(threads)
        place = torch.device(pick_device(device))
        named = {name: rule.to(place) for name, rule in name_rules(rules).items()}
        chosen, configs = parse_baselines(baselines), find_suite(suite)

        def load(name: str) -> Dataset:
            return load_dataset(name, data_root, download=download)

        tasks = [make_task(config, load, place) for config in configs]
        settings = {"suite": suite, "rules": rules, "baselines": chosen}
        with err.status("evaluating") as status:
            results = run(
                tasks,
                named,
                chosen,
                steps=steps,
                runs=runs,
                seed=seed,
                out=out_dir,
                settings=settings,
                report=lambda task, optimizer: status.update(f"{task}: {optimizer}"),
            )
        if as_json:
            print_json([vars(result) for result in results])
            return
        names = list(dict.fromkeys(result.optimizer for result in results))
        table = Table(title=f"loss, mean of the last 10 of {steps} steps, ± std over {runs} runs")
        table.add_column("task")
        for name in names:
            table.add_column(name, justify="right")
        for task in dict.fromkeys(result.task for result in results):
            row = {result.optimizer: result for result in results if result.task == task}
            lowest = min(result.mean for result in row.values() if result.mean == result.mean)
            cells = []
            for name in names:
                result = row[name]
                text = f"{result.mean:.3f} ± {result.std:.3f}"
                text += f"\n(lr {result.lr:g})" if name.endswith("tuned") else ""
                cells.append(f"[bold]{text}[/bold]" if result.mean == lowest else text)
            table.add_row(task, *cells)
        out.print(table)
        err.print(f"results.json, results.csv and loss curves are in {out_dir}", markup=False, soft_wrap=True)
