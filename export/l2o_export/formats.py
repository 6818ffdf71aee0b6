"""Write a rule, or a solver, as TorchScript, torch.export or ONNX: one function of tensors."""

import copy
import io
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from l2o_export.graph import PASSES, shorten
from l2o_runtime.config import to_dict
from l2o_runtime.contexts import DMD
from l2o_runtime.files.archive import METADATA_KEY, seal
from l2o_runtime.files.artifact import FORMAT, save_rule
from l2o_runtime.files.atomic import atomic_write
from l2o_runtime.files.exported import FlatStep, no_guards, step_names, torchscript
from l2o_runtime.learned import Learned
from l2o_runtime.rules import DirectionalRule, Rule
from l2o_runtime.state import zeros

ONNX_VERSIONS: dict[str, Any] = {"ir_version": 8, "opset": 18, "oldest_onnxruntime": "1.15"}
"""Of ONNX files: operators, of the standard domain only, the first file format that has them, and the oldest runtime
that was tried, which runs them."""


class ExportError(RuntimeError):
    """A rule cannot be written in a format, or what was written does not do what the rule does."""


def example_inputs(rule: Rule, coordinates: int = 11) -> tuple[Tensor, ...]:
    """Inputs of the flat step at the first step of an optimization."""
    param, grad = torch.linspace(-1, 1, coordinates), torch.linspace(0.5, -0.5, coordinates)
    state = [*zeros(rule.spec.coordinate, (coordinates,)).values(), *zeros(rule.spec.model, ()).values()]
    if not rule.per_tensor:
        return param, grad, torch.tensor(1.0), *state
    layout = rule.layout([torch.Size([coordinates - 8]), torch.Size([2, 2]), torch.Size([2, 2])])
    return param, grad, torch.tensor(1.0), *layout.given.values(), *state, *zeros(rule.spec.tensor, (3,)).values()


def signature(rule: Rule) -> str:
    """What a program without this package has to know to take a rule's steps, in words; see docs/artifact.md.

    >>> from l2o_runtime import load_rule
    >>> signature(load_rule("directional")).split("; ")[:5]
    ['l2o-rule/2', 'needs_loss 0', 'scheduled 1', 'decay_unit 0.005', 'rows 16']
    """
    config, (coordinate, tensor, model) = rule.config, rule.spec
    grid = rule.layout([torch.Size([2])]).grid
    facts = [FORMAT, f"needs_loss {config.needs_loss:d}", f"scheduled {config.scheduled:d}"]
    facts += [f"decay_unit {config.decay_unit}", f"rows {0 if grid is None else grid.shape[1]}"]
    facts += [f"layout {key}" for key in rule.layout_keys]
    states = [
        ([*lead, *shape], dtype)
        for lead, spec in ((["n"], coordinate), ([], model), (["tensors"], tensor))
        for shape, dtype in spec.values()
    ]
    names = step_names(rule)[0][3 + len(rule.layout_keys) :]
    facts += [
        " ".join(["state", name, str(dtype)[6:], *map(str, shape)])
        for name, (shape, dtype) in zip(names, states, strict=True)
    ]
    return "; ".join(facts)


def metadata(learned: Learned, provenance: dict[str, Any], names: tuple[list[str], list[str]]) -> str:
    """What every exported file says about itself: format, configuration, provenance, its tensors."""
    inputs, outputs = names
    content = {
        "format": FORMAT,
        "config": to_dict(learned.config),
        "provenance": provenance,
        "inputs": inputs,
        "outputs": outputs,
    }
    if isinstance(learned, Rule):
        content["signature"] = signature(learned)
    return json.dumps(content, sort_keys=True)


class Graph(ABC):
    """What is written, a rule or a solver: one function of tensors. What formats share is made once.

    Attributes:
        learned: not to be changed while it is written.
        provenance: where it comes from.
    """

    def __init__(self, learned: Learned, provenance: dict[str, Any]):
        self.learned, self.provenance = learned, provenance

    @property
    @abstractmethod
    def function(self) -> nn.Module:
        """The function, of positional tensors."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[Tensor, ...]:
        """Examples of what it takes."""

    @property
    @abstractmethod
    def shapes(self) -> tuple[Any, ...]:
        """Which of their sizes are free."""

    @property
    @abstractmethod
    def names(self) -> tuple[list[str], list[str]]:
        """Of inputs and outputs, in order."""

    @cached_property
    def metadata(self) -> str:
        """What every exported file says about itself."""
        return metadata(self.learned, self.provenance, self.names)

    @cached_property
    def program(self) -> ExportedProgram:
        """The function, traced by torch.export: takes longer than all else."""
        with torch.no_grad():
            return torch.export.export(self.function, self.inputs, dynamic_shapes=self.shapes)

    @property
    def elementary(self) -> "Graph":
        """The same of elementary operations only, which ONNX has; itself where there are no others."""
        return self


class Source(Graph):
    """The whole step of a rule, n left free."""

    def __init__(self, rule: Rule, provenance: dict[str, Any]):
        super().__init__(rule, provenance)
        self.rule = rule

    @property
    def function(self) -> nn.Module:
        """The step."""
        return FlatStep(self.rule)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """At the first step of an optimization."""
        return example_inputs(self.rule)

    @property
    def shapes(self) -> tuple[Any, ...]:
        """n, and numbers of tensors and matrices."""
        return _dynamic_shapes(self.rule)

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """Those of the step."""
        return step_names(self.rule)

    @cached_property
    def elementary(self) -> Graph:
        """With eigenvalues from the elementary solver."""
        rule = copy.deepcopy(self.rule)
        if isinstance(rule, DirectionalRule):
            rule.elementary = True
        elif isinstance(rule.context, DMD):
            rule.context.elementary = True
        else:
            return self
        return Source(rule, self.provenance)


def to_safetensors(source: Graph, path: Path) -> None:
    """The rule's own file."""
    save_rule(path, source.learned, source.provenance)


def to_torchscript(source: Graph, path: Path) -> None:
    """A traced TorchScript module; `torch::jit::load` reads it in C++."""
    buffer = io.BytesIO()
    with torchscript(), warnings.catch_warnings(), torch.no_grad():
        # The number of feature columns is a Python number, rightly constant in the trace.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        module = torch.jit.trace(source.function, source.inputs, check_trace=False)  # type: ignore[no-untyped-call]
        for value, name in zip(list(module.graph.inputs())[1:], source.names[0], strict=True):
            value.setDebugName(identifier(name))
        torch.jit.save(module, buffer, _extra_files={METADATA_KEY: source.metadata})  # type: ignore[no-untyped-call]
    _write(path, buffer)


def to_torch_export(source: Graph, path: Path) -> None:
    """An ExportedProgram (`.pt2`), TorchScript's successor; AOTInductor compiles it for C++."""
    buffer = io.BytesIO()
    torch.export.save(source.program, buffer, extra_files={METADATA_KEY: source.metadata})
    _write(path, buffer)


def to_onnx(source: Graph, path: Path) -> None:
    """An ONNX model of standard operators only; DMD's eigenvalues come from the elementary solver.

    Raises:
        ExportError: onnx is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (the exporter imports it only when it runs)
    except ImportError:
        raise ExportError("export to ONNX needs onnx and onnxscript: pip install onnx onnxscript") from None
    inputs, outputs = source.names
    with torch.no_grad(), warnings.catch_warnings(), no_guards():
        # The exporter's own dependencies warn about each other; nothing in it is ours to change.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            source.elementary.program,
            dynamo=True,
            opset_version=ONNX_VERSIONS["opset"],
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=source.shapes,  # for the names of sizes
            # The exporter's optimizer takes + 1e-8 for + 0 and drops it: 0/0 wherever a gradient is zero.
            optimize=False,
            verbose=False,
        )
    assert program is not None
    for change in PASSES.values():
        change(program.model)
    model = program.model_proto
    model.ir_version = ONNX_VERSIONS["ir_version"]
    shorten(model.graph)
    onnx.helper.set_model_props(model, {METADATA_KEY: source.metadata})
    onnx.checker.check_model(model, full_check=True)
    foreign = {node.domain for node in model.graph.node} - {""}
    if foreign or model.functions:
        raise ExportError(f"the ONNX model uses operators outside the standard domain: {sorted(foreign)}")
    _write(path, io.BytesIO(model.SerializeToString(deterministic=True)))


WRITERS: dict[str, tuple[str, Callable[[Graph, Path], None]]] = {
    "safetensors": (".safetensors", to_safetensors),
    "torchscript": (".pt", to_torchscript),
    "pt2": (".pt2", to_torch_export),
    "onnx": (".onnx", to_onnx),
}
"""Format → suffix and writer."""


def identifier(name: str) -> str:
    """A tensor's name as TorchScript has it, which allows no dots.

    >>> identifier("coordinate.m10")
    'coordinate_m10'
    """
    return name.replace(".", "_")


def _dynamic_shapes(rule: Rule) -> tuple[Any, ...]:
    """n is free in every coordinate tensor; everything else is fixed by the configuration."""
    n, tensors = {0: Dim("n", min=2)}, {0: Dim("tensors", min=1)}
    fewest = rule.config.rank if isinstance(rule, DirectionalRule) else 2
    matrices = {0: Dim("matrices", min=2), 1: Dim("rows", min=max(fewest, 2)), 2: Dim("columns", min=2)}
    free = {"owner": n, "shapes": tensors, "grid": matrices}
    layout = tuple(free[key] for key in rule.layout_keys)
    state = [*(n for _ in rule.spec.coordinate), *({} for _ in rule.spec.model), *(tensors for _ in rule.spec.tensor)]
    # FlatStep.forward takes the state as *args, which torch.export sees as one tuple.
    return n, n, {}, (*layout, *state)


def _write(path: Path, buffer: io.BytesIO) -> None:
    with atomic_write(path) as file:
        file.write(seal(buffer.getvalue(), path.suffix))
