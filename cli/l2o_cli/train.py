"""l2o train."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from l2o_cli.console import Threads, err, friendly_errors, out, set_threads
from l2o_cli.keys import show_keys

if TYPE_CHECKING:
    from l2o_runtime.solvers.base import SolverConfig
    from l2o_training.meta.trainer import Trainer
    from l2o_training.ranks.group import Ranks


DOWNLOAD_TIMEOUT = 3600.0
"""Seconds that ranks wait for the one that fetches data."""


def train(
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            "-p",
            help="A preset (see `l2o presets`) or a .toml file.",
            show_default="--task: specialise",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="PLACE",
            help="A task of your own, file.py:function or module:function; may be repeated. The file is run.",
        ),
    ] = None,
    start: Annotated[str, typer.Option(help="Begin with this rule: a bundled name or a file.")] = "",
    steps: Annotated[int | None, typer.Option(min=1, help="Length of the runs that the rule is for.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Fit the training to this time; with --resume, go on for so long.")
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run.", show_default="runs/PRESET")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a key, such as epochs=50 or rule.context.rank=4."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything; same seed, same machine, same rule.")] = None,
    data_root: Annotated[Path, typer.Option(help="Folder with the data sets.")] = Path("data"),
    download: Annotated[bool, typer.Option("--download", help="Let torchvision fetch missing data.")] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the folder's last checkpoint.")] = False,
    threads: Threads = 0,
    nproc: Annotated[
        int, typer.Option(min=1, help="Ranks on this machine; they share the lanes. torchrun starts them elsewhere.")
    ] = 1,
    max_restarts: Annotated[int, typer.Option(min=0, help="With --nproc: restarts after a rank died.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that ranks wait for one that hangs.")] = 300,
    keys: Annotated[
        bool, typer.Option("--keys", callback=show_keys, is_eager=True, help="List all keys, types, defaults; exit.")
    ] = False,
) -> None:
    """Meta-train a rule from unrolled optimizations.

    The folder gets config.json, checkpoints, metrics.jsonl, TensorBoard events, rule.safetensors (the best on
    fresh instances) and learning-curve.png. Started by torchrun, or with --nproc, several ranks train together.

    Example: l2o train --preset demo --out runs/demo --set epochs=20

    Example: l2o train --task my_tasks.py:make --steps 1000 --minutes 15 --out runs/mine
    """
    with friendly_errors():
        from l2o_runtime.config import require
        from l2o_training.ranks.launch import launch
        from l2o_training.ranks.rendezvous import join, launched
        from l2o_training.specialising import PRESET, settings

        require(bool(preset or tasks), "give --preset (see `l2o presets`), or --task with a task of your own")
        chosen = preset or PRESET
        changes = [*settings(tasks or (), start, steps), *(overrides or [])]
        changes += [f"seed={seed}"] if seed is not None else []
        folder = out_dir or Path("runs") / Path(chosen).stem
        require(nproc > 1 or max_restarts == 0, "--max-restarts: only with --nproc 2 or more")
        if nproc > 1 and not launched():
            launch(["-m", "l2o_cli", *sys.argv[1:]], nproc, max_restarts)
            return
        try:
            with join(timeout) as ranks:
                _train(ranks, chosen, changes, folder, data_root, download, device, resume, threads, minutes)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(str(error) or "interrupted before training: nothing was changed") from None


def _train(
    ranks: "Ranks",
    preset: str,
    changes: list[str],
    folder: Path,
    data_root: Path,
    download: bool,
    device: str,
    resume: bool,
    threads: int,
    minutes: float | None,
) -> None:
    """Train as one of several ranks, or alone."""
    import torch

    from l2o_runtime.rules import RuleConfig
    from l2o_training.config import load_preset, pick_device
    from l2o_training.meta.folder import kept
    from l2o_training.meta.provenance import comparable, versions
    from l2o_training.meta.trainer import Trainer
    from l2o_training.progress import training_bar
    from l2o_training.ranks.group import START_TIMEOUT
    from l2o_training.specialising import prepare, verdict
    from l2o_training.tasks.data import Datasets
    from l2o_training.tasks.places import TaskError

    set_threads(threads or (1 if ranks.size > 1 else 0))
    place = ranks.place(ranks.agree(lambda: pick_device(device), START_TIMEOUT))
    config = ranks.agree(lambda: load_preset(preset, changes), START_TIMEOUT)
    ranks.require_same(
        {"config": comparable(config), "versions": versions(), "--resume": resume, "--device": place.split(":")[0]}
    )
    ranks.require_shared(folder)
    ranks.connect(torch.device(place))
    config, over = ranks.agree(
        lambda: prepare(
            config,
            folder,
            minutes=minutes,
            resume=resume,
            device=place,
            load=Datasets(data_root, download=download),
            ranks=ranks,
            say=(lambda line: err.print(line, soft_wrap=True)) if ranks.main else None,
        ),
        None if minutes is None else max(DOWNLOAD_TIMEOUT, 60 * minutes),
    )

    def build(fetch: bool = False) -> Trainer:
        return Trainer(
            config,
            folder,
            data_root=data_root,
            download=fetch,
            device=place,
            resume=resume,
            ranks=ranks,
            restarted=ranks.restarted,
        )

    if download and ranks.size > 1:  # one rank of a machine fetches what the others then read
        ranks.agree(lambda: build(fetch=True) if os.environ.get("LOCAL_RANK", "0") == "0" else None, DOWNLOAD_TIMEOUT)
    trainer = ranks.agree(lambda: build(fetch=download and ranks.size == 1))
    ranks.require_same({"checkpoint": trainer.epoch if trainer.restored else None})
    what = f"context {config.rule.context.kind}" if isinstance(config.rule, RuleConfig) else config.rule.network
    count = f" with {ranks.size} ranks" if ranks.size > 1 else ""
    if ranks.main:
        again = f", continuing after epoch {trainer.epoch}" if trainer.restored else ""
        text = f"meta-training {preset} ({what}) on {place}{count} into {folder}{again}"
        err.print(text, soft_wrap=True)
    with training_bar(config.epochs, trainer.epoch, console=err, shown=ranks.main) as report:
        try:
            path = trainer.run(report, over)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(kept(folder, trainer.epoch)) from None
        except TaskError as error:
            raise TaskError(f"{error}; {kept(folder, trainer.epoch)}", error.trace) from None
    said = verdict(trainer)  # on all ranks, which share the work
    if ranks.main:
        _conclude(trainer, path, said)


def _conclude(trainer: "Trainer", path: Path, said: list[str]) -> None:
    """Say how good the rule is, and what can be done with it."""
    from l2o_runtime.rules import RuleConfig
    from l2o_training.meta.validation import RATES
    from l2o_training.tasks import PythonConfig

    config = trainer.config
    out.print(str(path), soft_wrap=True)
    for line in said:
        out.print(line, soft_wrap=True)
    if trainer.best_epoch == 0:
        text = "warning: no validation was better than that before the first update, whose rule was kept"
        if trainer.epoch == 0:
            text = "warning: the time was over before the first update: go on with --resume"
        err.print(text, soft_wrap=True)
    if not isinstance(config.rule, RuleConfig):
        for step in _uses(config.rule, path):
            err.print(f"next: {step}", soft_wrap=True)
        return
    name = shlex.quote(str(path))
    mean, rates = "geometric mean" if config.objective == "log_loss" else "mean", ", ".join(map(str, RATES))
    over = "tasks" if config.end_counts else "tasks and steps"
    err.print(f"{mean} over {over}; Adam on the same instances, at the best rate of {rates}", soft_wrap=True)
    places = [task.make for task in config.tasks if isinstance(task, PythonConfig)]
    own = "".join(f" --task {shlex.quote(place)}" for place in places) + f" --steps {config.horizon}" * bool(places)
    told = f", total_steps={config.horizon}" if config.rule.scheduled else ""
    for step in (
        f"l2o eval {name}{' default' if own else ''}{own}",
        f"l2o export {name}",
        f"LearnedOptimizer(model.parameters(), rule={str(path)!r}{told})",
    ):
        err.print(f"next: {step}", soft_wrap=True)


def _uses(solver: "SolverConfig", path: Path) -> list[str]:
    """What can be done with a solver that is no rule."""
    from l2o_runtime.solvers import UnrolledConfig
    from l2o_runtime.solvers.twin import TwinConfig

    name = shlex.quote(str(path))
    if isinstance(solver, UnrolledConfig):
        use = f"x = l2o_runtime.LearnedSolver({str(path)!r})(b)"
        return [f"l2o eval {name} --suite sparse-recovery", f"l2o export {name}", use]
    if isinstance(solver, TwinConfig):
        return [f"l2o inspect {name}", f"LearnedMinimax(min_params, max_params, rule={str(path)!r})"]
    return [f"l2o inspect {name}"]
