"""l2o: meta-train, export and evaluate learned optimizers."""

import re
from collections.abc import Callable
from inspect import cleandoc
from typing import Annotated

import typer

import l2o_runtime
from l2o_cli import bench, evaluate, export, inspect, lists, reproduce, share, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: boxes take twice the lines, and no help should be longer than a screen
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


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.train,
    "export": export.export,
    "eval": evaluate.evaluate,
    "reproduce": reproduce.reproduce,
    "bench": bench.bench,
    "inspect": inspect.inspect,
    "push": share.push,
    "pull": share.pull,
    "presets": lists.presets,
    "rules": lists.rules,
    "suites": lists.suites,
}
for name, command in COMMANDS.items():
    # The terminal breaks lines where it ends, not where the source does; a short help is not cut off.
    text = re.sub(r"(?<=\S)\n(?=\S)", " ", cleandoc(command.__doc__ or ""))
    app.command(name, help=text, short_help=text.partition("\n")[0])(command)
