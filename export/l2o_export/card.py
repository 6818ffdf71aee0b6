"""The model card that goes with exported files."""

import math
import textwrap
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from l2o_runtime.config import to_dict
from l2o_runtime.files.artifact import BUNDLED
from l2o_runtime.files.exported import step_names
from l2o_runtime.rules import Rule
from l2o_runtime.rules.directional import DirectionalRule
from l2o_runtime.rules.geometry import PLACES
from l2o_runtime.rules.steering import correction

WIDTH = 80
"""Columns of a card."""

LOOP = """\
import numpy as np
import onnxruntime
x = np.random.default_rng(0).normal(size=(64, 5)).astype("f4")  # least squares
sizes = {{"n": 5, "tensors": 1{sizes}}}
types = {{"tensor(float)": "f4", "tensor(double)": "f8", "tensor(int64)": "i8"}}
session, fed = onnxruntime.InferenceSession("rule.onnx"), {{}}
for i in session.get_inputs():
    fed[i.name] = np.zeros([sizes.get(d, d) for d in i.shape], types[i.type])
{layout}for step in range(100):
    error = x @ (fed["param"] - np.arange(5, dtype="f4"))
    fed["loss"], fed["grad"] = np.array(np.mean(error**2)), x.T @ error / 32
    delta, *state = session.run(None, fed)
    fed["param"] += {factor}delta
    fed |= zip(list(fed)[{first}:], state, strict=True)
    print(step, fed["loss"])"""
"""A whole training loop for the card; a test runs it."""

LOOP_LAYOUT = 'fed["layout.shapes"][:] = 1, 5  # one tensor, a vector of 5\n'

LOOP_SIZES = ', "matrices": 2, "rows": {rows}, "columns": 2'
LOOP_GRID = 'fed["layout.shapes"][:], fed["layout.grid"][:], fed["param"][:] = (1, 5), -1, 3\n'
"""Of a rule that looks at matrices: there is none; its steps are in proportion to parameters, which are not zero."""


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
        bounds.append(f"shorter in networks of more than {limits.known_parameters:,} parameters")
    if config.scheduled:
        bounds.append(f"{config.output_scale:g} · lr beside the parameters, times a schedule")
        bounds.append("they fade where a gradient is gone")
        bounds += _by_place(rule)
    elif config.noise_floor is None:
        bounds.append("they go on where a gradient is gone, or is mere rounding")
    else:
        bounds.append("they fade where a gradient is gone, and are Adam's where it is mere rounding")
    return "; ".join(bounds)


def _by_place(rule: Rule) -> list[str]:
    """How many times longer its numbers for places make steps, beside what its network says of a tensor on its own."""
    if not (isinstance(rule, DirectionalRule) and rule.places is not None):
        return []
    with torch.no_grad():
        common = rule.head.bias[0]  # what the network says whatever it sees; near the bounds places add less
        times = (correction(common + rule.places, rule.config) - correction(common, rule.config)).exp().tolist()
    return ["by place × " + ", ".join(f"{value:.2g} {place}" for value, place in zip(times, PLACES, strict=True))]


def describe_licence(path: Path, provenance: dict[str, Any]) -> str | None:
    """The licence of a rule's weights, as far as it is known: bundled rules are under that of this package.

    >>> from l2o_runtime.files.artifact import find_rule
    >>> describe_licence(find_rule("default"), {})
    'MIT'
    """
    if path.parent == BUNDLED:
        return "MIT"
    stated = provenance.get("license")
    return stated if isinstance(stated, str) and stated else None


def state_bytes(rule: Rule) -> int:
    """Bytes of state per coordinate, without the count of steps, of which the optimizer keeps one per tensor."""
    specs = (spec for key, spec in rule.spec.coordinate.items() if key != "step")
    return sum(dtype.itemsize * math.prod(shape) for shape, dtype in specs)


def describe_state(rule: Rule) -> str:
    """One phrase on what an optimizer keeps."""
    more = ", 4 more where nothing says how long the run is" * rule.config.scheduled
    return f"{state_bytes(rule)} bytes per parameter{more}"


def describe_tasks(provenance: dict[str, Any]) -> str:
    """One phrase on what a rule was meta-trained on, as far as its provenance says.

    >>> describe_tasks({"untrained": True})
    'none: not meta-trained'
    >>> describe_tasks({"config": {"tasks": [{"kind": "mlp", "data": "mnist"}] * 2 + [{"kind": "quadratic"}]}})
    '3 (2 mlp on mnist, 1 quadratic)'
    """
    if provenance.get("untrained"):
        return "none: not meta-trained"
    config = provenance.get("config")
    tasks = config.get("tasks") if isinstance(config, dict) else None
    if not isinstance(tasks, list | tuple) or not tasks:
        return "not known"
    plain = [task if isinstance(task, dict) else {} for task in tasks]
    kinds = Counter(f"{task.get('kind', 'other')}{' on ' * ('data' in task)}{task.get('data', '')}" for task in plain)
    return f"{len(tasks)} ({', '.join(f'{count} {kind}' for kind, count in kinds.most_common())})"


def model_card(rule: Rule, manifest: dict[str, Any]) -> str:
    """Markdown, one screen: what the rule is for, how well each file agrees with it, how to call it."""
    config, provenance = rule.config, manifest["provenance"]
    context = "" if config.context.kind == "none" else f", context {describe_context(rule)}"
    trained = describe_tasks(provenance)
    length = f"For up to {config.horizon:,} steps on tasks as in its meta-training ({trained}); beyond, it extrapolates"
    if config.scheduled:
        length = f"For runs of any length. Tasks of meta-training: {trained}"
    about = (
        f"{length}. Kind `{config.kind}`: {config.network}{context}; "
        f"{sum(p.numel() for p in rule.parameters()):,} weights, {state_bytes(rule)} bytes of state per parameter. "
        f"Steps: {describe_steps(rule)}. Full provenance: `manifest.json`."
    )
    title = f"# Learned optimizer `{manifest['rule']}`, licence: {manifest['license'] or 'not stated'}"
    text = [title, fill(about), "", *_files(manifest), "", *_step(rule)]
    if any(entry["format"] == "onnx" for entry in manifest["files"].values()):
        sizes, layout = "", LOOP_LAYOUT * rule.per_tensor
        if "grid" in rule.layout_keys:
            rows = rule.layout([torch.Size([5])]).given["grid"].shape[1]
            sizes, layout = LOOP_SIZES.format(rows=rows), LOOP_GRID
        factor = "(1 - step / 100) * " * config.scheduled  # the schedule
        loop = LOOP.format(first=3 + len(rule.layout_keys), sizes=sizes, layout=layout, factor=factor)
        text += ["", "```python", loop, "```"]
    return "\n".join(text) + "\n"


def fill(text: str) -> str:
    """Text in lines of a card's width."""
    indent = "  " * text.startswith("- ")
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _files(manifest: dict[str, Any]) -> list[str]:
    """The files, what of them was verified, and what there is to know of their formats."""
    allowed = max((entry["parity"]["allowed"] for entry in manifest["files"].values()), default=0.0)
    lines = [
        f"Relative errors against eager, {manifest['steps']} steps: *step*, from equal states, ≤ "
        f"{manifest['step_tolerance']:.0e}; *free*, at the end, ≤ {allowed:.1e} (eager's own, a last bit "
        f"changed: {manifest['eager_distance']:.1e})."
    ]
    for name, entry in manifest["files"].items():
        parity, note = entry["parity"], ""
        if entry["format"] == "onnx":
            note = f"; IR {entry['ir_version']}, opset {entry['opset']}, onnxruntime ≥ {entry['oldest_onnxruntime']}"
        if entry["format"] == "torchscript":
            note = "; `_` for `.` in names"
        lines.append(f"- `{name}`: step {parity['step_error']:.1e}, free {parity['distance']:.1e}{note}")
    lines += [f"- **{name} was not written**: {reason}." for name, reason in manifest["failed"].items()]
    return list(map(fill, lines))


def _step(rule: Rule) -> list[str]:
    """How to call a file, with a line for every group of the state."""
    inputs, _ = step_names(rule)
    spec, first = rule.spec, 3 + len(rule.layout_keys)
    tensors = [("n", *shape, dtype) for shape, dtype in spec.coordinate.values()]
    tensors += [(*shape, dtype) for shape, dtype in spec.model.values()]
    tensors += [("S", *shape, dtype) for shape, dtype in spec.tensor.values()]
    layout = "; owner: each coordinate's tensor; shapes: (dimensions, size) of each" * rule.per_tensor
    layout += "; grid: where matrices have their coordinates, or −1" * ("grid" in rule.layout_keys)
    loss = "is needed" if rule.config.needs_loss else "may be 0"
    size = "lr · schedule · delta" if rule.config.scheduled else "lr · delta"
    text = (
        f"`({', '.join(inputs[:first])}, *state) → (delta, *state)`; add {size} to param (n,); loss {loss}{layout}"
        ". State, zero at first, float32 if not said:"
    )
    lines = [text]
    pairs = [(*name.split("."), tensor) for name, tensor in zip(inputs[first:], tensors, strict=True)]
    for group, members in groupby(pairs, key=lambda pair: pair[0]):
        parts = []
        for tensor, same in groupby(members, key=lambda pair: pair[2]):
            *shape, dtype = tensor
            said = f" {str(dtype)[6:]}" * (dtype != torch.float32)
            parts.append(f"{', '.join(f'{name}' for _, name, _ in same)} ({', '.join(map(str, shape))}){said}")
        lines.append(f"- `{group}.`: {'; '.join(parts)}")
    return list(map(fill, lines))
