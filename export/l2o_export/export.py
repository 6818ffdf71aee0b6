"""Export a rule or a solver: write the formats, verify each against eager, and say so in a manifest and a card."""

import hashlib
import json
import logging
import platform
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

from l2o_export.card import describe_licence, model_card
from l2o_export.formats import ONNX_VERSIONS, WRITERS, ExportError, Graph, Source
from l2o_export.solvers import SolverGraph, SolverReference, read_solver, solver_card, verify_solver
from l2o_export.verify import Parity, Reference, make_reference, verify
from l2o_runtime.config import nearest, require
from l2o_runtime.files.artifact import load_rule, read_learned
from l2o_runtime.files.atomic import atomic_write
from l2o_runtime.files.exported import load_exported
from l2o_runtime.files.untrusted import printable
from l2o_runtime.learned import Learned
from l2o_runtime.rules import Rule
from l2o_runtime.solvers import UnrolledSolver

AnyReference: TypeAlias = Reference | SolverReference


def parse_formats(text: str) -> list[str]:
    """Format names from "torchscript,onnx"; "all" is all of them.

    Raises:
        ConfigError: an unknown format.
    """
    names = list(WRITERS) if text == "all" else [part.strip() for part in text.split(",") if part.strip()]
    require(bool(names), f"no export format given: known: {', '.join(WRITERS)}")
    for name in names:
        require(name in WRITERS, f"unknown export format {name!r}: {nearest(name, list(WRITERS))}")
    return names


def export_rule(rule_path: Path, formats: Iterable[str], out: Path) -> dict[str, Any]:
    """Write a rule, or a solver, in several formats, each verified against eager; a failure takes none with it.

    Args:
        rule_path: a `.safetensors` file.
        formats: keys of `WRITERS`.
        out: folder; made if needed.

    Returns:
        The manifest, which is also written as `manifest.json` beside `README.md`, the model card. Its `failed` has the
        formats that could not be written, or do not do what the rule does, and why. Nothing is written if all failed.

    Raises:
        ExportError: the rule itself diverges on the network that files are verified with.
    """
    learned, provenance = read_learned(rule_path)
    source, reference = _prepared(learned, provenance)
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {}
    contents: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory(dir=out, prefix=".export.") as folder:
        paths = {name: Path(folder) / f"rule{WRITERS[name][0]}" for name in formats}
        failed, parities = _verified(source, paths, reference)
        for name, parity in parities.items():
            path = paths[name]
            contents[path.name] = path.read_bytes()
            files[path.name] = {
                "format": name,
                "bytes": len(contents[path.name]),
                "sha256": hashlib.sha256(contents[path.name]).hexdigest(),
                "parity": parity._asdict(),
            } | (ONNX_VERSIONS if name == "onnx" else {})
    manifest = {
        "rule": rule_path.name,
        "license": describe_licence(rule_path, source.provenance),
        "steps": reference.steps,
        "step_tolerance": reference.tolerance,
        "eager_distance": reference.own,
        "provenance": source.provenance,
        "versions": _versions(),
        "files": files,
        "failed": failed,
    }
    if files:
        contents["manifest.json"] = json.dumps(manifest, indent=2, sort_keys=True).encode()
        contents["README.md"] = _card(learned, manifest).encode()
    for file_name, content in contents.items():
        with atomic_write(out / file_name) as file:
            file.write(content)
    return manifest


def _prepared(learned: Learned, provenance: dict[str, Any]) -> tuple[Graph, AnyReference]:
    """What is written, and what files are held against."""
    if isinstance(learned, Rule):
        return Source(learned, provenance), make_reference(learned)
    if isinstance(learned, UnrolledSolver):
        return SolverGraph(learned, provenance), SolverReference(learned)
    raise ExportError(f"solvers of kind {learned.config.kind} are not exported; unrolled ones are")


def _card(learned: Learned, manifest: dict[str, Any]) -> str:
    if isinstance(learned, UnrolledSolver):
        return solver_card(learned, manifest)
    assert isinstance(learned, Rule)
    return model_card(learned, manifest)


def _verified(
    source: Graph, paths: dict[str, Path], reference: AnyReference
) -> tuple[dict[str, str], dict[str, Parity]]:
    """Write formats to paths and hold them against eager: why some fail, how the others compare."""
    failed: dict[str, str] = {}
    written: dict[str, Any] = {}
    parities: dict[str, Parity] = {}
    for name, path in paths.items():
        try:
            written[name] = _write(source, name, path)
        except ExportError as error:
            failed[name] = str(error)
    check = verify_solver if isinstance(reference, SolverReference) else verify
    for name, found in check(reference, written).items():  # type: ignore[arg-type]
        if isinstance(found, ExportError):
            failed[name] = str(found)
        elif found.complaint:
            failed[name] = found.complaint
        else:
            parities[name] = found
    return failed, parities


def _write(source: Graph, name: str, path: Path) -> Any:
    """Write one format and read it back.

    Raises:
        ExportError: one or the other cannot be done.
    """
    try:
        with _quiet():
            WRITERS[name][1](source, path)
        if isinstance(source, SolverGraph):
            return read_solver(path)
        return load_rule(path) if name == "safetensors" else load_exported(path)
    except (ExportError, OSError):
        raise
    except Exception as error:  # the exporters of torch and onnx raise classes of many kinds, without a common base
        raise ExportError(f"could not be written ({type(error).__name__}: {printable(error)})") from error


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("l2o-runtime", "torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters log notices of their own internals; what matters is measured afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
