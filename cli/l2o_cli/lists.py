"""l2o presets, l2o rules, l2o suites."""

from rich.table import Table

from l2o_cli.console import Json, friendly_errors, out, print_json


def _show(rows: dict[str, str], as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    table = Table(show_header=False, box=None)
    for name, text in rows.items():
        table.add_row(name, text)
    out.print(table)


def presets(as_json: Json = False) -> None:
    """List the presets of `l2o train`."""
    with friendly_errors():
        from l2o_training.config import load_preset, preset_names

        _show({name: load_preset(name).description for name in preset_names()}, as_json)


def rules(as_json: Json = False) -> None:
    """List the rules that ship with the package."""
    with friendly_errors():
        from l2o_export.card import describe_context, describe_network
        from l2o_runtime.artifact import ALIASES, bundled_rules, load_rule

        loaded = {name: load_rule(name) for name in bundled_rules()}
        rows = {alias: f"another name of {name}" for alias, name in ALIASES.items()} | {
            name: f"{describe_network(rule)}, {rule.config.features} features, context {describe_context(rule)}"
            for name, rule in loaded.items()
        }
        _show(rows, as_json)


def suites(as_json: Json = False) -> None:
    """List the suites of `l2o eval`."""
    with friendly_errors():
        from l2o_training.evaluation.suites import DESCRIPTIONS

        _show(DESCRIPTIONS, as_json)
