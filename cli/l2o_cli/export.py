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
    """Write a rule, its context computation included, for places without this package or without Python.

    Every file is verified on a 200-step optimization against eager; nothing is written unless all agree. Beside
    the files lie manifest.json (hashes, versions, parity) and README.md, the model card.

    Example: l2o export runs/demo/rule.safetensors --to torchscript,pt2,onnx --out runs/demo/export
    """
    with friendly_errors():
        from l2o_export.export import export_rule, parse_formats
        from l2o_runtime.artifact import find_rule

        formats, path = parse_formats(to), find_rule(rule)
        with err.status("exporting and verifying"):
            manifest = export_rule(path, formats, out_dir)
        if as_json:
            print_json(manifest)
            return
        table = Table("file", "format", "bytes", f"parity at step {manifest['steps']}")
        for name, entry in manifest["files"].items():
            parity = "reference" if entry["parity"] is None else f"{entry['parity']:.1e}"
            table.add_row(str(out_dir / name), entry["format"], f"{entry['bytes']:,}", parity)
        out.print(table)
