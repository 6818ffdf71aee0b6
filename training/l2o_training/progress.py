"""The bar of a meta-training, in terminals and notebooks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from l2o_training.meta.epoch import Epoch


@contextmanager
def training_bar(
    epochs: int, begun: int = 0, *, console: Console | None = None, shown: bool = True
) -> Iterator[Callable[[Epoch], None]]:
    """Show how a run goes on; gives what is to be called after every epoch.

    Args:
        epochs: of the run.
        begun: that are done.
        console: where to; standard error if left out.
        shown: whether at all.
    """
    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(bar_width=10),
        TextColumn("{task.description}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console or Console(stderr=True), disable=not shown) as bar:
        job, latest = bar.add_task("", total=epochs, completed=begun), [""]

        def report(epoch: Epoch) -> None:
            if epoch.validation is not None:
                latest[0] = "" if epoch.speedup is None else f", {epoch.speedup:.2g} x fewer steps than Adam"
            text = f"best {epoch.best:.4g}" + (latest[0] or f", {epoch.steps / epoch.seconds:.0f} inner steps/s")
            text += f", {epoch.dropped} updates dropped: not finite" if epoch.dropped else ""
            bar.update(job, completed=epoch.epoch, description=text)

        yield report
