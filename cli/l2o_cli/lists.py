"""l2o presets, l2o rules, l2o suites."""

from rich.table import Table

from l2o_cli.console import Json, err, friendly_errors, out, print_json

PURPOSES = {
    "directional": "To train with: runs of any length, told total_steps; hand-made so far; 12 bytes per parameter.",
    "scale": "The default of before: a few hundred steps, without a schedule; 12 bytes per parameter.",
    "mnist": "Small MNIST networks, up to 1,000 steps: two tiers, as scale; the best on the paper's Table 1.",
    "moments": "Small MNIST networks, up to 1,000 steps: an LSTM for every parameter; slower, 180 bytes per parameter.",
    "normalized-dmd": "Small MNIST networks, up to 200 steps: an LSTM with bounded steps that sees DMD.",
    "l2o": "Reproduction only: the paper's LSTM without context, 100 steps of one small network.",
    "l2o-dmd": "Reproduction only: the paper's LSTM that sees DMD eigenvalues.",
    "l2o-kae": "Reproduction only: the paper's LSTM that sees a Koopman autoencoder's latent state.",
}
"""What each bundled rule is for, what most people need first."""

GROUPS = {
    "To begin": ("demo", "specialise"),
    "For rules to train with": ("directional", "mnist", "scale", "scale-2", "moments", "normalized-dmd"),
    "Reproductions of papers": ("mnist-l2o", "mnist-dmd", "mnist-kae", "cifar-dmd", "rnnprop", "quadratics"),
    "Solvers for sparse recovery": (
        *("alista", "lista-cpss", "lista-cp", "lamp", "glista", "lista", "lfista"),
        *("alista-lasso", "lista-lasso"),
    ),
}
"""The presets in the order that they are listed in."""


def _show(rows: dict[str, str], as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    table = Table(show_header=False, box=None)
    for name, text in rows.items():
        table.add_row(name, text)
    out.print(table)


def presets(as_json: Json = False) -> None:
    """List the presets of `l2o train`: what each is for, and how many minutes it takes."""
    with friendly_errors():
        from l2o_training.config import load_preset

        groups = {title: {name: load_preset(name) for name in names} for title, names in GROUPS.items()}
        found = {name: config for group in groups.values() for name, config in group.items()}
        if as_json:
            print_json({name: {"description": c.description, "minutes": c.minutes} for name, c in found.items()})
            return
        for title, group in groups.items():
            table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
            table.add_column(min_width=max(map(len, found)), no_wrap=True)
            table.add_column(justify="right", min_width=len("999 min"), no_wrap=True)
            for name, config in group.items():
                table.add_row(f" {name}", f"{config.minutes} min", config.description)
            out.print(table)
        err.print("minutes: about, on one or two cores of a shared CPU; --data-root has the data sets", soft_wrap=True)


def rules(as_json: Json = False) -> None:
    """List the rules that ship with the package."""
    with friendly_errors():
        from l2o_runtime.files.artifact import ALIASES, bundled_rules

        aliases = {alias: f"another name of {name}" for alias, name in ALIASES.items()}
        _show(aliases | {name: PURPOSES[name] for name in sorted(bundled_rules(), key=list(PURPOSES).index)}, as_json)
        if not as_json:
            err.print("l2o inspect NAME has the architecture, docs/reproduction/bundled.md the figures")


def suites(as_json: Json = False) -> None:
    """List the suites of `l2o eval`."""
    with friendly_errors():
        from l2o_training.compare.suites import SUITES

        _show({name: suite.description for name, suite in SUITES.items()}, as_json)
