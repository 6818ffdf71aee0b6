"""Export of unrolled solvers: one function b → x, the batch left free, held against eager."""

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from l2o_export.card import describe_tasks, fill
from l2o_export.formats import ExportError, Graph
from l2o_export.verify import Parity
from l2o_runtime.files.archive import check_seal
from l2o_runtime.files.artifact import read_learned
from l2o_runtime.files.exported import no_guards, torchscript
from l2o_runtime.files.untrusted import printable
from l2o_runtime.solvers import UnrolledSolver

TOLERANCE = 1e-4
"""Of x, relative, over a batch: layers amplify rounding, and an entry at a threshold may fall on its other side."""

BATCHES = (1, 3, 64)
"""Sizes that files are tried with."""

Solve = Callable[[Tensor], Tensor]

CALL = """\
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession("rule.onnx")
b = np.zeros((8, {rows}), "f4")
(x,) = session.run(None, {{"b": b}})  # (8, {columns})"""


class SolverGraph(Graph):
    """All layers of a solver."""

    learned: UnrolledSolver

    @property
    def function(self) -> nn.Module:
        """b (batch, m) → x (batch, n)."""
        return self.learned

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Three measurements."""
        return (measurements(self.learned, 3),)

    @property
    def shapes(self) -> tuple[Any, ...]:
        """The batch is free."""
        return ({0: Dim("batch", min=1, max=2**20)}, None)[:1]

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """b and x."""
        return ["b"], ["x"]


def measurements(solver: UnrolledSolver, count: int) -> Tensor:
    """b = A x (count, m) for x with a tenth of its entries from N(0, 1)."""
    rng = torch.Generator().manual_seed(count)
    shape = (count, solver.config.columns)
    x = (torch.rand(shape, generator=rng) < 0.1) * torch.randn(shape, generator=rng)
    return x @ solver.matrix.T


def read_solver(path: Path) -> Solve:
    """A file that was just written, as a function; nobody else's, for nothing but its digest is checked.

    Raises:
        ExportError: onnxruntime is not installed.
    """
    if path.suffix == ".safetensors":
        found, _ = read_learned(path)
        return found
    content = path.read_bytes()
    check_seal(content)
    if path.suffix == ".onnx":
        return _read_onnx(content)
    if path.suffix == ".pt":
        with torchscript():
            module: Solve = torch.jit.load(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]
        return module
    with no_guards():
        return torch.export.load(io.BytesIO(content)).module()


def _read_onnx(content: bytes) -> Solve:
    try:
        import onnxruntime
    except ImportError:
        raise ExportError("verifying ONNX needs onnxruntime: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda b: torch.from_numpy(session.run(None, {"b": b.contiguous().numpy()})[0])


class SolverReference:
    """What files of a solver are held against: eager, on measurements of several batch sizes.

    Attributes:
        steps: its layers.
        tolerance: what x may be off, relative.
        own: how far eager is from itself, for measurements changed in the last bit.
    """

    def __init__(self, solver: UnrolledSolver):
        self.solver, self.steps, self.tolerance = solver, solver.config.layers, TOLERANCE
        b = measurements(solver, BATCHES[-1])
        with torch.no_grad():
            self.own = distance(solver(b), solver(torch.nextafter(b, torch.tensor(math.inf))))
        if not math.isfinite(self.own):
            raise ExportError("the solver itself gives numbers that are not finite")


def distance(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖ours‖, ∞ where it is no number, or shapes differ."""
    if ours.shape != theirs.shape:
        return math.inf
    found = float((ours - theirs).norm() / ours.norm().clamp_min(1e-30))
    return found if math.isfinite(found) else math.inf


@torch.no_grad()
def verify_solver(reference: SolverReference, files: Mapping[str, Solve]) -> dict[str, Parity | ExportError]:
    """Hold files, read back, against eager."""
    found: dict[str, Parity | ExportError] = {}
    for name, solve in files.items():
        try:
            errors = []
            for count in BATCHES:
                b = measurements(reference.solver, count)
                errors.append((distance(reference.solver(b), solve(b)), f"x of a batch of {count}"))
            worst, where = max(errors)
        except Exception as error:  # programs of torch and onnxruntime raise classes of many kinds
            found[name] = ExportError(f"could not be run ({type(error).__name__}: {printable(error)})")
            continue
        allowed = max(TOLERANCE, 10 * reference.own)
        if worst > allowed:
            text = f"it differs from eager in {where}, by {worst:.1e} (relative; at most {allowed:.1e} is allowed)"
            found[name] = ExportError(text)
        else:
            found[name] = Parity(0.0, where, worst, allowed)
    return found


def solver_card(solver: UnrolledSolver, manifest: dict[str, Any]) -> str:
    """Markdown, one screen: what the solver is for, how well each file agrees with it, how to call it."""
    config = solver.config
    about = (
        f"Sparse x (n,) from b = A x + noise (m,), for one A: {config.network}. "
        f"Meta-trained on {describe_tasks(manifest['provenance'])}; "
        f"{sum(p.numel() for p in solver.parameters()):,} weights. Full provenance: `manifest.json`."
    )
    errors = (
        f"`b` (batch, {config.rows}) → `x` (batch, {config.columns}), float32, any batch. Relative errors against "
        f"eager, over batches of {', '.join(map(str, BATCHES))}:"
    )
    lines = [f"# Learned solver `{manifest['rule']}`", fill(about), "", fill(errors)]
    lines += [f"- `{name}`: {entry['parity']['distance']:.1e}" for name, entry in manifest["files"].items()]
    lines += [fill(f"- **{name} was not written**: {reason}.") for name, reason in manifest["failed"].items()]
    if any(entry["format"] == "onnx" for entry in manifest["files"].values()):
        lines += ["", "```python", CALL.format(rows=config.rows, columns=config.columns), "```"]
    return "\n".join(lines) + "\n"
