"""l2o: meta-train, export and evaluate learned optimizers."""

from typing import Annotated

import typer

import l2o_runtime
from l2o_cli import bench, evaluate, export, inspect, lists, reproduce, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # "rich" takes [default: 300] for markup, and keeps the breaks of docstrings
    help="Meta-train a learned optimizer, export it, and compare it with Adam.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"l2o {l2o_runtime.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Meta-train a learned optimizer, export it, and compare it with Adam."""


app.command("train")(train.train)
app.command("export")(export.export)
app.command("eval")(evaluate.evaluate)
app.command("reproduce")(reproduce.reproduce)
app.command("bench")(bench.bench)
app.command("inspect")(inspect.inspect)
app.command("presets")(lists.presets)
app.command("rules")(lists.rules)
app.command("suites")(lists.suites)
