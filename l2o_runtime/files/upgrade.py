"""Configurations of rules as the first format had them: one table, whose keys ruled each other out."""

from collections.abc import Mapping
from typing import Any

from l2o_runtime.config import ConfigError, require

KINDS = {
    ("lstm", "log_sign"): "lstm",
    ("lstm", "normalized"): "normalized",
    ("lstm", "moments"): "moments",
    ("scale", "moments"): "tiered",
}
"""Cell and features of the first format → kind."""

GROWTH = "growth: rules whose steps may only grow so fast were an experiment, and are no longer run; use l2o 0.1"

NOW = {
    "cell": 'kind = "tiered" for the cell "scale", and one of the other kinds for "lstm"',
    "features": 'kind, such as "moments"; features "log_sign" are of kind "lstm"',
    "known_parameters": "limits.known_parameters, with kind tiered",
    "output": 'kind = "moments" or "tiered", whose steps are a change of Adam\'s',
    "growth": "nothing, leave it out: such rules were an experiment, and are no longer run",
}
"""Keys of the first format → how today's says it."""

STILL = {"output": ["adam"], "cell": ["lstm", "scale"]}
"""Keys that there still are → values of the first format, which no kind has today."""


def upgraded(config: Any) -> Any:
    """A rule's configuration of the first format, which has no `kind`, as of today; any other stays as it is.

    Raises:
        ConfigError: the first format did not have it either, or it has bounded growth, or both formats are mixed.

    >>> upgraded({"cell": "scale", "features": "moments", "output": "adam", "layers": 1, "known_parameters": 7})
    {'kind': 'tiered', 'limits': {'known_parameters': 7}, 'output_scale': 0.1}
    """
    if isinstance(config, Mapping) and "kind" in config:
        _refuse_old_keys(config)
    if not isinstance(config, Mapping) or "kind" in config:
        return config
    old = dict(config)
    cell, features = (str(old.pop(key, default)) for key, default in (("cell", "lstm"), ("features", "log_sign")))
    if (cell, features) not in KINDS:
        known = "; ".join(f"{cell} over {features}" for cell, features in KINDS)
        raise ConfigError(f"cell: no rule is {cell} over {features}; there are {known}")
    kind = KINDS[cell, features]
    require(old.pop("growth", None) is None, GROWTH)
    new = {"kind": kind} | old
    known = new.pop("known_parameters", None)
    require(known is None or kind == "tiered", f"known_parameters: goes with cell 'scale', got {known}")
    if known is not None:
        new["limits"] = {"known_parameters": known}
    if kind in ("moments", "tiered"):
        output = new.pop("output", "linear")
        require(output == "adam", f"output: 'adam' goes with features 'moments', got {output!r}")
        new.setdefault("output_scale", 0.1)  # which was everybody's default
    if kind == "tiered":
        layers = new.pop("layers", 2)
        require(layers == 1, f"layers: 1 goes with cell 'scale', got {layers}")
    if "context" in new:
        new["context"] = _upgraded_context(new["context"])
    return new


def _upgraded_context(context: Any) -> Any:
    """A context of the first format, which could have a `scope`."""
    if not isinstance(context, Mapping) or "scope" not in context:
        return context
    scope = context["scope"]
    require(scope in ("model", "tensor"), f"context.scope: {scope!r} is not one of model, tensor")
    rest = {key: value for key, value in context.items() if key != "scope"}
    return rest | {"kind": "tensor_dmd"} if scope == "tensor" else rest


def _refuse_old_keys(config: Mapping[str, Any]) -> None:
    """Answer a key of the first format beside a `kind` with today's spelling."""
    for key, now in NOW.items():
        old = config.get(key) in STILL[key] if key in STILL else key in config
        require(not old, f"{key}: {config.get(key)!r:.80} is how the first format of rules said it; now: {now}")
    context = config.get("context")
    scope = context.get("scope") if isinstance(context, Mapping) else None
    now = 'context.kind = "tensor_dmd" for a DMD per tensor, and no scope else'
    require(scope is None, f"context.scope: {scope!r:.80} is how the first format of rules said it; now: {now}")
