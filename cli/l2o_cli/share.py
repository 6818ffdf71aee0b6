"""l2o push, l2o pull."""

from pathlib import Path
from typing import Annotated

import typer

from l2o_cli.console import Json, err, friendly_errors, out, print_json


def push(
    rule: Annotated[str, typer.Argument(help="A .safetensors rule, or a bundled name (see `l2o rules`).")],
    repository: Annotated[str, typer.Argument(help="owner/name on the hub; it is made if there is none.")],
    licence: Annotated[
        str | None,
        typer.Option(
            "--license", help="Of the weights, such as mit or cc-by-4.0.", show_default="a bundled rule's own"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put a rule on the Hugging Face Hub, with a card, and print the name by which others use it.

    Example: l2o push runs/demo/rule.safetensors you/demo-rule --license mit
    """
    with friendly_errors():
        from l2o_export.publish import push_rule
        from l2o_runtime.files.artifact import find_rule

        with err.status("sending"):
            name = push_rule(find_rule(rule), repository, licence)
    if as_json:
        print_json({"rule": name})
    else:
        out.print(name, soft_wrap=True)


def pull(
    name: Annotated[
        str, typer.Argument(help="owner/name@revision on the hub; a revision is a commit's 40 hex digits.")
    ],
    path: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("rule.safetensors"),
    as_json: Json = False,
) -> None:
    """Get a rule from the Hugging Face Hub, checked against the digest in its card.

    Example: l2o pull you/demo-rule@0123456789abcdef0123456789abcdef01234567 --out rule.safetensors
    """
    with friendly_errors():
        from l2o_runtime.files.artifact import read_limited
        from l2o_runtime.files.atomic import atomic_write
        from l2o_runtime.files.hub import fetch

        with err.status("asking"):
            content = read_limited(fetch(name))
        with atomic_write(path) as file:
            file.write(content)
    if as_json:
        print_json({"rule": name, "file": str(path), "bytes": len(content)})
    else:
        out.print(f"{path}: {len(content):,} bytes", soft_wrap=True)
