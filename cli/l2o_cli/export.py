"""l2o export."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from l2o_cli.console import Json, err, friendly_errors, out, print_json


def export(
    rule: Annotated[str, typer.Argument(help="A .safetensors rule, or a bundled name (see `l2o rules`).")],
    to: Annotated[str, typer.Option("--to", help="Formats: safetensors, torchscript, pt2, onnx, or all.")] = "all",
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Folder for the files.")] = Path("runs/export"),
    as_json: Json = False,
) -> None:
    """Write a rule, its context computation included, or a learned solver, for places without this package or Python.

    Every file is verified against eager, over 200 steps of an optimization: step by step from equal states, and left to
    itself. One that fails is not written, and the exit code is 1; the others are. Beside the files lie manifest.json
    (hashes, versions, parity) and README.md, the model card.

    Example: l2o export runs/demo/rule.safetensors --to torchscript,pt2,onnx --out runs/demo/export
    """
    with friendly_errors():
        from l2o_export.export import export_rule, parse_formats
        from l2o_runtime.files.artifact import find_rule

        formats, path = parse_formats(to), find_rule(rule)
        with err.status("exporting and verifying"):
            manifest = export_rule(path, formats, out_dir)
    if as_json:
        print_json(manifest)
    elif manifest["files"]:
        table = Table("file", "bytes", "step error", "free distance (allowed)")
        for name, entry in manifest["files"].items():
            parity = entry["parity"]
            distances = f"{parity['distance']:.1e} ({parity['allowed']:.1e})"
            table.add_row(name, f"{entry['bytes']:,}", f"{parity['step_error']:.1e}", distances)
        out.print(table)
        out.print(f"in {out_dir}, with manifest.json and README.md", soft_wrap=True)
    for name, reason in manifest["failed"].items():
        err.print(f"error: {name} was not written: {reason}", soft_wrap=True, style="red")
    if manifest["failed"]:
        raise typer.Exit(1)
