"""Rules as other programs read them: TorchScript, torch.export and ONNX files, run from Python.

Every file holds the whole step as one function of flat tensors,

    (param (n,), grad (n,), loss (), *state) → (delta (n,), *next state),

with the state in the order of `step_names`, all of it zero at the start, and n free.
"""

import json
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2o_runtime.artifact import FORMAT, ArtifactError
from l2o_runtime.config import ConfigError, RuleConfig, build
from l2o_runtime.gram import State, StateSpec
from l2o_runtime.rule import Rule

METADATA_KEY = "l2o-rule.json"
SUFFIXES = {".pt": "TorchScript", ".pt2": "torch.export", ".onnx": "ONNX"}

Flat = Callable[[list[Tensor]], list[Tensor]]


@contextmanager
def torchscript() -> Iterator[None]:
    """Silence torch ≥ 2.15's notice that torch.jit is deprecated: we offer the format knowingly."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=FutureWarning)
        yield


def step_names(rule: "Rule | ExportedRule") -> tuple[list[str], list[str]]:
    """Names of the step's inputs and outputs, in order."""
    state = [f"coordinate.{k}" for k in rule.coordinate_spec] + [f"context.{k}" for k in rule.context_spec]
    return ["param", "grad", "loss", *state], ["delta", *(f"next.{name}" for name in state)]


class FlatStep(nn.Module):
    """A rule's step as a function of flat tensors: what is exported."""

    def __init__(self, rule: Rule):
        super().__init__()
        self.rule = rule
        self.coordinates = list(rule.coordinate_spec)
        self.optimization = list(rule.context_spec)

    def forward(self, param: Tensor, grad: Tensor, loss: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Advance by one step; arguments and results as in the module's docstring."""
        split = len(self.coordinates)
        coordinates = dict(zip(self.coordinates, state[:split], strict=True))
        optimization = dict(zip(self.optimization, state[split:], strict=True))
        delta, coordinates, optimization = self.rule(param, grad, loss, coordinates, optimization)
        new = [coordinates[k] for k in self.coordinates] + [optimization[k] for k in self.optimization]
        return delta, *new


class ExportedRule:
    """A rule read from an exported file; called like `Rule.forward`, for coordinates (n,) without a batch.

    Attributes:
        path: the file.
        config: the rule's configuration.
        coordinate_spec, context_spec: its states.
    """

    def __init__(self, path: Path, metadata: str, run: Flat):
        self.path = path
        self.config = _parse_config(metadata)
        with torch.device("meta"):
            rule = Rule(self.config)
        self.coordinate_spec: StateSpec = rule.coordinate_spec
        self.context_spec: StateSpec = rule.context_spec
        self._run = run

    def __call__(
        self, param: Tensor, grad: Tensor, loss: Tensor, coordinates: State, optimization: State
    ) -> tuple[Tensor, State, State]:
        """One step on the CPU, where exported files run: Δ (n,) and both new states."""
        state = [coordinates[k] for k in self.coordinate_spec] + [optimization[k] for k in self.context_spec]
        with torch.autocast("cpu", enabled=False):
            delta, *new = self._run([tensor.cpu() for tensor in (param, grad, loss, *state)])
        split = len(self.coordinate_spec)
        return (
            delta,
            dict(zip(self.coordinate_spec, new[:split], strict=True)),
            dict(zip(self.context_spec, new[split:], strict=True)),
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
    if not path.is_file():
        raise ArtifactError(f"no rule at {path}: the file does not exist")
    readers = {".pt": _read_torchscript, ".pt2": _read_torch_export, ".onnx": _read_onnx}
    return ExportedRule(path, *readers[path.suffix](path))


def _parse_config(metadata: str) -> RuleConfig:
    try:
        content = json.loads(metadata)
        if content["format"] != FORMAT:
            raise ArtifactError(f"format {content['format']}, this version reads {FORMAT}: upgrade l2o-runtime")
        return build(RuleConfig, content["config"])
    except ArtifactError:
        raise
    except (ConfigError, ValueError, KeyError, TypeError):
        raise ArtifactError("the file does not carry a rule's configuration: was it written by `l2o export`?") from None


def _read_torchscript(path: Path) -> tuple[str, Flat]:
    extra = {METADATA_KEY: ""}
    try:
        with torchscript():
            module = torch.jit.load(path, map_location="cpu", _extra_files=extra)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise ArtifactError(f"{path}: not a TorchScript file, or damaged ({_first_line(error)})") from None

    def run(inputs: list[Tensor]) -> list[Tensor]:
        return list(module(*inputs))

    return _text(extra[METADATA_KEY]), run


def _read_torch_export(path: Path) -> tuple[str, Flat]:
    extra = {METADATA_KEY: ""}
    # torch.export.load logs a traceback of its own for a file that is no archive at all.
    if not zipfile.is_zipfile(path):
        raise ArtifactError(f"{path}: not a torch.export file, or damaged (it is no zip archive)")
    try:
        module = torch.export.load(path, extra_files=extra).module()
    except Exception as error:
        raise ArtifactError(f"{path}: not a torch.export file, or damaged ({_first_line(error)})") from None

    def run(inputs: list[Tensor]) -> list[Tensor]:
        return list(module(*inputs))

    return _text(extra[METADATA_KEY]), run


def _read_onnx(path: Path) -> tuple[str, Flat]:
    try:
        import onnxruntime
    except ImportError:
        raise ArtifactError(f"{path}: ONNX rules need onnxruntime: pip install 'l2o-runtime[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own, without a common base
        raise ArtifactError(f"{path}: not an ONNX file, or damaged ({_first_line(error)})") from None
    names = [value.name for value in session.get_inputs()]

    def run(inputs: list[Tensor]) -> list[Tensor]:
        arrays = [tensor.contiguous().numpy() for tensor in inputs]
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.from_numpy(array) for array in outputs]

    return session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, ""), run


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
