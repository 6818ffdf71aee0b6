"""The model card that goes with exported files."""

import json
import math
from typing import Any

from l2o_runtime.config import to_dict
from l2o_runtime.exported import step_names
from l2o_runtime.rule import Rule
from l2o_runtime.scale import UNITS

LAYOUT = (
    "layout.owner is the number of the tensor, int64 of shape (n,), that each coordinate belongs to; layout.shapes",
    "holds the number of dimensions and of coordinates of every tensor, float32 of shape (S, 2).",
)


def describe_context(rule: Rule) -> str:
    """One phrase on what a rule sees besides its gradient."""
    options = to_dict(rule.config.context)
    kind = options.pop("kind")
    text = ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)
    return f"{kind} ({text})" if text else kind


def describe_network(rule: Rule) -> str:
    """One phrase on the networks of a rule."""
    config = rule.config
    size = f"{config.layers} × {config.hidden}"
    if config.cell == "scale":
        return f"an LSTM of {size} units per tensor that steers a network of {UNITS} units per coordinate"
    return f"a coordinatewise LSTM of {size} units"


def describe_steps(rule: Rule) -> str:
    """One phrase on what bounds the steps of a rule."""
    config, bounds = rule.config, []
    if config.output == "tanh":
        bounds.append(f"at most {config.output_scale:g} · lr")
    if config.growth is not None:
        bounds.append(f"at most {config.growth:g} times as long as the ones before")
    if config.known_parameters is not None:
        bounds.append(f"shorter, and slower to fade, in networks of more than {config.known_parameters:,} parameters")
    return "; ".join(bounds) or "without bounds"


def state_bytes(rule: Rule) -> int:
    """Bytes of state per coordinate, without the count of steps, of which the optimizer keeps one per tensor."""
    specs = (spec for key, spec in rule.coordinate_spec.items() if key != "step")
    return sum(dtype.itemsize * math.prod(shape) for shape, dtype in specs)


def model_card(rule: Rule, manifest: dict[str, Any]) -> str:
    """Markdown: what the rule is, how it was made, how to call each file, how well they agree."""
    config, provenance = rule.config, manifest["provenance"]
    inputs, outputs = step_names(rule)
    tensors = [(("n", *shape), dtype) for shape, dtype in rule.coordinate_spec.values()]
    tensors += rule.context_spec.values()
    tensors += [(("S", *shape), dtype) for shape, dtype in rule.tensor_spec.values()]
    rows = [
        f"| `{name}` | {entry['format']} | {entry['bytes']} | {_parity(entry)} |"
        for name, entry in manifest["files"].items()
    ]
    first = len(inputs) - len(tensors)
    states = [
        f"| `{name}` | ({', '.join(map(str, shape))}) | {str(dtype).removeprefix('torch.')} |"
        for name, (shape, dtype) in zip(inputs[first:], tensors, strict=True)
    ]
    return "\n".join(
        [
            "# Learned optimizer",
            "",
            f"The rule is {describe_network(rule)}, over `{config.features}` features,",
            f"with context {describe_context(rule)}. {sum(p.numel() for p in rule.parameters())} weights,",
            f"{state_bytes(rule)} bytes of state per coordinate, meta-trained for {config.horizon} steps.",
            f"Its steps: {describe_steps(rule)}.",
            "It needs the loss at every step." if config.needs_loss else "It works with and without the loss.",
            "",
            "## Files",
            "",
            f"Parity: relative distance of the parameters from eager after {manifest['steps']} steps.",
            "",
            "| file | format | bytes | parity |",
            "|---|---|---|---|",
            *rows,
            "",
            "## The step",
            "",
            f"`({', '.join(inputs[:first])}, *state) → ({outputs[0]}, *next state)`; param and grad are float32 of",
            "shape (n,), loss is a float32 scalar (0 where it is not known), every state starts at zero, and",
            "the caller adds `lr · delta` to the parameters.",
            *LAYOUT * bool(rule.tensor_spec),
            "The state, in order:",
            "",
            "| name | shape | dtype |",
            "|---|---|---|",
            *states,
            "",
            "## Provenance",
            "",
            "```json",
            json.dumps(provenance, indent=2, sort_keys=True),
            "```",
            "",
        ]
    )


def _parity(entry: dict[str, Any]) -> str:
    return "reference" if entry["parity"] is None else f"{entry['parity']:.1e}"
