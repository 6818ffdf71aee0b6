"""What is left out of an ONNX graph without changing a number: one pass after the other, each tested by itself.

The exporter writes a constant, a cast and a reshape for many an operation. All of these passes keep every operation on
numbers as it is: nothing is fused, reordered or approximated, for the exporter's own rewriting takes ε for zero
(docs/decisions/0009-the-onnx-exporter-s-optimizer-is-off.md).
"""

from collections.abc import Callable
from typing import Any

LARGEST_CONSTANT = 1024
"""Elements of a result that may become a constant: indices and shapes do, anything larger would only take room."""

Pass = Callable[[Any], None]
"""Changes an `onnx_ir.Model` in place."""


def fold(model: Any) -> None:
    """Compute what depends on constants alone: shapes, indices, casts of numbers."""
    from onnxscript.optimizer import fold_constants

    fold_constants(model, onnx_shape_inference=False, output_size_limit=LARGEST_CONSTANT)


def bypass(model: Any) -> None:
    """Leave out operations that give what they get."""
    from onnx_ir.passes.common import IdentityEliminationPass

    IdentityEliminationPass()(model)


def share(model: Any) -> None:
    """Compute equal expressions once, and keep equal constants once."""
    from onnx_ir.passes import common

    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)


def prune(model: Any) -> None:
    """Leave out what nobody asks for."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)


PASSES: dict[str, Pass] = {"fold": fold, "bypass": bypass, "share": share, "prune": prune}
"""In the order in which they run."""


def shorten(graph: Any) -> None:
    """Drop what no runtime needs of an `onnx.GraphProto`: names of nodes, long names of values, shapes, which runtimes
    infer, and notes on where nodes come from, stack traces with paths of this machine.
    """
    kept = {value.name for value in (*graph.input, *graph.output)} | {""}
    names: dict[str, str] = {name: name for name in kept}
    _rename(graph, lambda name: names.setdefault(name, f"v{len(names)}"))


def _rename(graph: Any, short: Callable[[str], str]) -> None:
    graph.ClearField("value_info")
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
    for item in (*graph.input, *graph.output, *graph.initializer):
        item.name = short(item.name)
    for node in graph.node:
        node.ClearField("name")
        node.ClearField("doc_string")
        node.input[:] = map(short, node.input)
        node.output[:] = map(short, node.output)
        for attribute in node.attribute:
            if attribute.HasField("g"):  # the body of a loop, whose names are its own, or of the graph around it
                _rename(attribute.g, short)
