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


def upgraded(config: Any) -> Any:
    """A rule's configuration of the first format, which has no `kind`, as of today; any other stays as it is.

    Raises:
        ConfigError: the first format did not have it either, or it has bounded growth.

    >>> upgraded({"cell": "scale", "features": "moments", "output": "adam", "layers": 1, "known_parameters": 7})
    {'kind': 'tiered', 'limits': {'known_parameters': 7}, 'output_scale': 0.1}
    """
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
