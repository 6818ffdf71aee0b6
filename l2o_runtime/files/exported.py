"""Rules as other programs read them: TorchScript, torch.export and ONNX files, run from Python.

Every file holds the whole step as one function of flat tensors,

    (param (n,), grad (n,), loss (), *state) → (delta (n,), *next state),

with the state in the order of `step_names`, all of it zero at the start, and n free. A rule with a network per tensor
takes its `Layout` between loss and state, (n,), (S, 2) and where it looks at whole matrices (M, R, C), and has states
with S in front.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2o_runtime.files.archive import (
    METADATA_KEY,
    check_metadata,
    check_seal,
    read_archive,
    safe_program,
    safe_torchscript,
    write_archive,
)
from l2o_runtime.files.artifact import SUFFIXES, ArtifactError, find_rule, read_limited
from l2o_runtime.files.protobuf import reads_elsewhere
from l2o_runtime.files.untrusted import printable
from l2o_runtime.layout import Layout
from l2o_runtime.rules import Rule, RuleConfig, Spec, make_rule
from l2o_runtime.state import State

MAX_REASON = 4000
"""Characters of a reader's message: onnxruntime's says what is wrong at its end, behind hundreds of them."""

Flat = Callable[[list[Tensor]], list[Tensor]]


@contextmanager
def torchscript() -> Iterator[None]:
    """Silence torch ≥ 2.15's notice that torch.jit is deprecated: we offer the format knowingly."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=FutureWarning)
        yield


@contextmanager
def no_guards() -> Iterator[None]:
    """Let torch 2.9 make modules of programs without checks of their inputs, which fail where inputs are *args."""
    program, made = torch.export.ExportedProgram, torch.export.ExportedProgram.module
    if torch.__version__.startswith("2.9."):
        program.module = partialmethod(made, check_guards=False)  # type: ignore[assignment]
    try:
        yield
    finally:
        program.module = made  # type: ignore[method-assign]


def step_names(rule: "Rule | ExportedRule") -> tuple[list[str], list[str]]:
    """Names of the step's inputs and outputs, in order."""
    coordinate, tensor, model = rule.spec
    state = [f"coordinate.{k}" for k in coordinate] + [f"context.{k}" for k in model]
    state += [f"tensor.{k.removeprefix('tensor_')}" for k in tensor]
    layout = [f"layout.{key}" for key in rule.layout_keys]
    return ["param", "grad", "loss", *layout, *state], ["delta", *(f"next.{name}" for name in state)]


class FlatStep(nn.Module):
    """A rule's step as a function of flat tensors: what is exported."""

    def __init__(self, rule: Rule):
        super().__init__()
        self.rule = rule
        coordinate, tensor, model = rule.spec
        self.coordinates, self.optimization = list(coordinate), [*model, *tensor]

    def forward(self, param: Tensor, grad: Tensor, loss: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Advance by one step; arguments and results as in the module's docstring."""
        given = len(self.rule.layout_keys)
        layout, state = Layout(*state[:given]) if given else None, state[given:]
        split = len(self.coordinates)
        coordinates = dict(zip(self.coordinates, state[:split], strict=True))
        optimization = dict(zip(self.optimization, state[split:], strict=True))
        delta, coordinates, optimization = self.rule(param, grad, loss, coordinates, optimization, layout)
        new = [coordinates[k] for k in self.coordinates] + [optimization[k] for k in self.optimization]
        return delta, *new


class ExportedRule:
    """A rule read from an exported file; called like `Rule.forward`, for coordinates (n,) without a batch.

    Attributes:
        path: the file.
        config: the rule's configuration.
        spec: its states.
        per_tensor, layout, layout_keys: as a `Rule` has them.
    """

    def __init__(self, path: Path, config: RuleConfig, run: Flat):
        self.path = path
        self.config = config
        with torch.device("meta"):
            rule = make_rule(self.config)
        self.spec: Spec = rule.spec
        self.per_tensor, self.layout, self.layout_keys = rule.per_tensor, rule.layout, rule.layout_keys
        self._run = run

    def __call__(
        self,
        param: Tensor,
        grad: Tensor,
        loss: Tensor,
        coordinates: State,
        optimization: State,
        layout: Layout | None = None,
    ) -> tuple[Tensor, State, State]:
        """One step on the CPU, where exported files run: Δ (n,) and both new states."""
        coordinate, tensor, model = self.spec
        whole = [*model, *tensor]
        state = [coordinates[k] for k in coordinate] + [optimization[k] for k in whole]
        given = [] if layout is None else layout.given.values()
        with torch.autocast("cpu", enabled=False):
            delta, *new = self._run([tensor.cpu() for tensor in (param, grad, loss, *given, *state)])
        split = len(coordinate)
        return (
            delta,
            dict(zip(coordinate, new[:split], strict=True)),
            dict(zip(whole, new[split:], strict=True)),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Sessions cannot be copied; a copy reads the file again."""
        return load_exported, (self.path,)


def load_exported(path: str | Path) -> ExportedRule:
    """Read a `.pt`, `.pt2` or `.onnx` file that `l2o export` wrote.

    Raises:
        ArtifactError: missing, damaged, not one of ours, or onnxruntime is not installed.
    """
    path = Path(path).absolute()
    if path.suffix not in SUFFIXES:
        raise ArtifactError(f"{path}: unknown kind of rule; expected .safetensors, {', '.join(SUFFIXES)}")
    find_rule(path)
    readers = {".pt": _read_torchscript, ".pt2": _read_torch_export, ".onnx": _read_onnx}
    try:
        content = read_limited(path)
        check_seal(content)
        return ExportedRule(path, *readers[path.suffix](content))
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None
    except Exception as error:  # torch and onnxruntime raise classes of many kinds, without a common base
        # The file is intact, since its digest fits: the reader does not know such files, or someone made it up.
        reader = "onnxruntime" if path.suffix == ".onnx" else "torch"
        advice = f"{reader} {sys.modules[reader].__version__} does not read it; try another, or export the rule again"
        raise ArtifactError(f"{path}: {advice}. Its reason: {printable(error, MAX_REASON)}") from None


def _read_torchscript(content: bytes) -> tuple[RuleConfig, Flat]:
    metadata, members = read_archive(content, ".pt")
    config = check_metadata(metadata)
    archive = write_archive(safe_torchscript(members))
    with torchscript():
        module = torch.jit.load(archive, map_location="cpu")  # type: ignore[no-untyped-call]
    return config, lambda inputs: list(module(*inputs))


def _read_torch_export(content: bytes) -> tuple[RuleConfig, Flat]:
    metadata, members = read_archive(content, ".pt2")
    config = check_metadata(metadata)
    archive = write_archive(safe_program(members, config))
    logger = logging.getLogger("torch.export")
    disabled, logger.disabled = logger.disabled, True  # it logs a traceback of its own, and then raises
    try:
        with no_guards():
            module = torch.export.load(archive).module()
    finally:
        logger.disabled = disabled
    return config, lambda inputs: list(module(*inputs))


def _read_onnx(content: bytes) -> tuple[RuleConfig, Flat]:
    try:
        import onnxruntime
    except ImportError:
        raise ArtifactError("ONNX rules need onnxruntime: pip install onnxruntime") from None
    if reads_elsewhere(content):
        raise ArtifactError("it takes numbers from other files (external data), which no rule needs")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Without fallback: onnxruntime would print about a file that it cannot read, and read it again.
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    names = [value.name for value in session.get_inputs()]

    def run(inputs: list[Tensor]) -> list[Tensor]:
        arrays = [tensor.contiguous().numpy() for tensor in inputs]
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.from_numpy(array) for array in outputs]

    return check_metadata(session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "")), run
