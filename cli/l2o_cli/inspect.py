"""l2o inspect."""

import json
from typing import Annotated

import typer
from rich.table import Table

from l2o_cli.console import Json, friendly_errors, out, print_json


def inspect(
    rule: Annotated[str, typer.Argument(help="A .safetensors rule, or a bundled name (see `l2o rules`).")],
    provenance: Annotated[bool, typer.Option("--provenance", help="Print all of its provenance as well.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a rule or a learned solver is: architecture, sizes, horizon, what it was meta-trained on."""
    with friendly_errors():
        from safetensors import safe_open

        from l2o_export.card import (
            describe_context,
            describe_licence,
            describe_state,
            describe_steps,
            describe_tasks,
            state_bytes,
        )
        from l2o_runtime.config import to_dict
        from l2o_runtime.files.artifact import find_rule, read_learned
        from l2o_runtime.rules import Rule

        path = find_rule(rule)
        loaded, origin = read_learned(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        config = loaded.config
        facts = {
            "file": str(path),
            "format": metadata["format"],
            "bytes": path.stat().st_size,
            "weights": sum(p.numel() for p in loaded.parameters()),
            "license": describe_licence(path, origin),
            "config": to_dict(config),
            "provenance": origin,
        }
        if isinstance(loaded, Rule):
            facts["state_bytes_per_parameter"] = state_bytes(loaded)
        if as_json:
            print_json(facts)
            return
        table = Table(show_header=False, box=None)
        for key in ("file", "format", "bytes", "weights"):
            table.add_row(key, f"{facts[key]:,}" if isinstance(facts[key], int) else str(facts[key]))
        table.add_row("network", f"{config.kind}: {config.network}")
        if isinstance(loaded, Rule):
            table.add_row("context", describe_context(loaded))
            table.add_row("state", describe_state(loaded))
            table.add_row("steps", describe_steps(loaded))
            table.add_row("loss", "needed at every step" if loaded.config.needs_loss else "optional")
        table.add_row("horizon", f"{config.horizon} steps")
        table.add_row("tasks", describe_tasks(origin))
        table.add_row("licence", f"{facts['license'] or 'not stated'}, of the weights")
        for key in ("validation", "git"):
            if key in origin:
                table.add_row(key, str(origin[key]))
        out.print(table)
        if provenance:
            out.print("provenance", json.dumps(origin, indent=2, sort_keys=True), soft_wrap=True)
        else:
            out.print("all of its provenance: --provenance, or --json")
