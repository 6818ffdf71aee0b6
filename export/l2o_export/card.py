"""The model card that goes with exported files."""

import math
import textwrap
from collections import Counter
from itertools import groupby
from typing import Any

from l2o_runtime.config import to_dict
from l2o_runtime.files.exported import step_names
from l2o_runtime.rules import Rule

LAYOUT = (
    "layout.owner is the number of the tensor, int64 (n,), that each coordinate belongs to; layout.shapes "
    "holds the number of dimensions and of coordinates of every tensor, float32 (S, 2). "
)

LOOP = """\
import numpy as np
import onnxruntime

x = np.random.default_rng(0).normal(size=(64, 5)).astype("f4")  # least squares with five unknowns
theta, y = np.zeros(5, "f4"), x @ np.arange(5, dtype="f4")
session = onnxruntime.InferenceSession("rule.onnx")
types, sizes = {{"tensor(float)": "f4", "tensor(double)": "f8", "tensor(int64)": "i8"}}, {{"n": 5, "tensors": 1}}
{layout}
inputs = session.get_inputs()[{first}:]
state = {{i.name: np.zeros([sizes.get(d, d) for d in i.shape], types[i.type]) for i in inputs}}
for step in range(100):
    error = x @ theta - y
    loss, grad = np.array(np.mean(error**2), "f4"), 2 * x.T @ error / len(x)
    delta, *new = session.run(None, {{"param": theta, "grad": grad, "loss": loss, **fixed, **state}})
    theta, state = theta + delta, dict(zip(state, new, strict=True))
    print(step, loss)"""
"""A whole training loop for the card; a test runs it."""

LOOP_LAYOUT = (
    'fixed = {"layout.owner": np.zeros(5, "i8"), "layout.shapes": np.array([[1, 5]], "f4")}  # one vector of 5'
)


def describe_context(rule: Rule) -> str:
    """One phrase on what a rule sees besides its gradient."""
    options = to_dict(rule.config.context)
    kind = options.pop("kind")
    text = ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)
    return f"{kind} ({text})" if text else kind


def describe_steps(rule: Rule) -> str:
    """One phrase on what bounds the steps of a rule, and where they end."""
    config, bounds = rule.config, []
    limits = getattr(config, "limits", None)
    if config.bounded:
        bounds.append(f"at most {config.output_scale:g} · lr")
    if limits is not None:
        bounds.append(f"shorter, and slower to fade, in networks of more than {limits.known_parameters:,} parameters")
    if config.noise_floor is None:
        bounds.append("they go on where a gradient is gone, and where it is nothing but rounding")
    else:
        bounds.append("they fade where a gradient is gone, and are Adam's where it is nothing but rounding")
    return "; ".join(bounds)


def state_bytes(rule: Rule) -> int:
    """Bytes of state per coordinate, without the count of steps, of which the optimizer keeps one per tensor."""
    specs = (spec for key, spec in rule.spec.coordinate.items() if key != "step")
    return sum(dtype.itemsize * math.prod(shape) for shape, dtype in specs)


def describe_tasks(provenance: dict[str, Any]) -> str:
    """One phrase on what a rule was meta-trained on, as far as its provenance says.

    >>> describe_tasks({"config": {"tasks": [{"kind": "mlp", "data": "mnist"}] * 2 + [{"kind": "quadratic"}]}})
    '3 (2 mlp on mnist, 1 quadratic)'
    """
    config = provenance.get("config")
    tasks = config.get("tasks") if isinstance(config, dict) else None
    if not isinstance(tasks, list | tuple) or not tasks:
        return "not known"
    plain = [task if isinstance(task, dict) else {} for task in tasks]
    kinds = Counter(f"{task.get('kind', 'other')}{' on ' * ('data' in task)}{task.get('data', '')}" for task in plain)
    return f"{len(tasks)} ({', '.join(f'{count} {kind}' for kind, count in kinds.most_common())})"


def model_card(rule: Rule, manifest: dict[str, Any]) -> str:
    """Markdown: what the rule is, how well each file agrees with it, how to call it."""
    config, provenance = rule.config, manifest["provenance"]
    validation = provenance.get("validation")
    score = f"; validation loss {validation:.3g}" if isinstance(validation, float) else ""
    about = [
        "A small network in place of Adam's formula, meta-trained and frozen: from gradients and its state to steps.",
        f"- It is of kind `{config.kind}`, {config.network}, with context {describe_context(rule)}; "
        f"{sum(p.numel() for p in rule.parameters()):,} weights, {state_bytes(rule)} bytes of state per parameter.",
        "- It needs the loss at every step." if config.needs_loss else "- It works with and without the loss.",
        f"- Meta-trained for runs of up to {config.horizon:,} steps; it extrapolates in longer ones.",
        f"- Its steps: {describe_steps(rule)}.",
        f"- Tasks of its meta-training: {describe_tasks(provenance)}{score}. `l2o eval` compares it with Adam.",
        "- `manifest.json` has all of its provenance, hashes and versions.",
    ]
    text = [
        f"# Learned optimizer `{manifest['rule']}`",
        "",
        *map(_fill, about),
        "",
        "## Files",
        "",
        *_files(manifest),
        "",
        "## The step",
        "",
    ]
    return "\n".join(text + _step(rule, any(entry["format"] == "onnx" for entry in manifest["files"].values()))) + "\n"


def _fill(text: str) -> str:
    indent = "  " * text.startswith("- ")
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _files(manifest: dict[str, Any]) -> list[str]:
    """The files, what of them was verified, and what there is to know of their formats."""
    lines = ["| file | format | bytes | step | free | allowed |", "|---|---|---|---|---|---|"]
    notes = [
        f"Each was held against eager, which trained a small network for {manifest['steps']} steps. *Step*: from equal "
        "states, the largest error of Δ or of a state in one step, relative to its size (at most "
        f"{manifest['step_tolerance']:.0e}). *Free*: left to itself, the relative distance of its parameters from "
        "eager's at the end. Eager's own, of a copy whose first parameters differ in the last bit, is "
        f"{manifest['eager_distance']:.1e}."
    ]
    for name, entry in manifest["files"].items():
        parity = entry["parity"]
        numbers = f"{parity['step_error']:.1e} | {parity['distance']:.1e} | {parity['allowed']:.1e}"
        lines.append(f"| `{name}` | {entry['format']} | {entry['bytes']:,} | {numbers} |")
        if entry["format"] == "onnx":
            versions = f"IR {entry['ir_version']}, opset {entry['opset']}, standard operators only"
            notes.append(
                f"- `{name}`: {versions}; onnxruntime {entry['oldest_onnxruntime']}, the oldest tried, runs it."
            )
        if entry["format"] == "torchscript":
            notes.append(f"- `{name}`: its arguments are named as below, with `_` for `.`; it returns a tuple.")
    notes += [f"- **{name} was not written**: {reason}." for name, reason in manifest["failed"].items()]
    return [*lines, "", *map(_fill, notes)]


def _step(rule: Rule, onnx: bool) -> list[str]:
    """How to call a file, with a table of the state, and a loop if there is an ONNX file."""
    inputs, outputs = step_names(rule)
    tensors = [(("n", *shape), dtype) for shape, dtype in rule.spec.coordinate.values()]
    tensors += rule.spec.model.values()
    tensors += [(("S", *shape), dtype) for shape, dtype in rule.spec.tensor.values()]
    first = len(inputs) - len(tensors)
    text = (
        f"`({', '.join(inputs[:first])}, *state) → ({outputs[0]}, *next state)`. param and grad are float32 (n,), all "
        "tensors one after the other; loss is float32 (), a 0-d array, and 0 where it is not known; the caller adds "
        f"`lr · delta` to the parameters. {LAYOUT * rule.per_tensor}The state is zero at the start; in order:"
    )
    lines = [_fill(text), "", "| name | shape | dtype |", "|---|---|---|"]
    for (shape, dtype), members in groupby(zip(inputs[first:], tensors, strict=True), key=lambda pair: pair[1]):
        names = ", ".join(f"`{name}`" for name, _ in members)
        lines.append(f"| {names} | ({', '.join(map(str, shape))}{',' * (len(shape) == 1)}) | {str(dtype)[6:]} |")
    layout = LOOP_LAYOUT if rule.per_tensor else "fixed = {}"
    loop = ["", "```python", LOOP.format(first=first, layout=layout), "```"]
    return lines + loop * onnx
