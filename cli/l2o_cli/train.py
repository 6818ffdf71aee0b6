"""l2o train."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from l2o_cli.console import Threads, err, friendly_errors, out, set_threads


def train(
    preset: Annotated[str, typer.Option("--preset", "-p", help="A preset (see `l2o presets`) or a .toml file.")],
    out_dir: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run. [default: runs/PRESET]")
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
) -> None:
    """Meta-train a rule: truncated back-propagation through unrolled optimizations.

    The folder gets config.json, checkpoint.pt, metrics.jsonl, TensorBoard events, rule.safetensors (the best on
    fresh instances) and learning-curve.png.

    Example: l2o train --preset demo --out runs/demo --set epochs=20
    """
    with friendly_errors():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from l2o_training.config import load_preset
        from l2o_training.trainer import Progress as Epoch
        from l2o_training.trainer import Trainer, pick_device

        set_threads(threads)
        changes = [*(overrides or []), *([f"seed={seed}"] if seed is not None else [])]
        config = load_preset(preset, changes)
        folder = out_dir or Path("runs") / Path(preset).stem
        place = pick_device(device)
        trainer = Trainer(config, folder, data_root=data_root, download=download, device=place, resume=resume)
        kind = config.rule.context.kind
        err.print(f"meta-training {preset} (context {kind}) on {place} into {folder}", markup=False, soft_wrap=True)
        columns = (
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=err) as bar:
            started = trainer.epoch
            job = bar.add_task("", total=config.epochs, completed=started)

            def report(epoch: Epoch) -> None:
                rate = epoch.steps / epoch.seconds
                text = f"meta-loss {epoch.meta_loss:.4f}  best {epoch.best:.4f}  {rate:.0f} inner steps/s"
                bar.update(job, completed=epoch.epoch, description=text)

            path = trainer.run(report)
        out.print(f"{path}  validation loss {trainer.best:.4f}", markup=False, soft_wrap=True)
